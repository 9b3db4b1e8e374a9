"""Tasks: what is asked, what counts as right, and in which order the questions come."""

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptfast.engine.calculator import calculate
from gptfast.errors import UserError
from gptfast.tasks import (
    ARC,
    CHAT_TASKS,
    GSM8K,
    MMLU,
    Conversations,
    HumanEval,
    Task,
    TaskMixture,
    TaskSequence,
    chat_task,
    fetch,
    render_mc,
)
from gptfast.tasks.common import hub_shuffle
from gptfast.tasks.gsm8k import answer_parts, stated_result
from gptfast.tasks.humaneval import code_of, leading_imports, program
from tests.fake_hub import QUICK, Hub, fake_hub

CHAT_EVAL = Path(__file__).parents[2] / "shared/data/chat_eval"
CHAT_TRAIN = CHAT_EVAL.with_name("chat_train")
needs_chat_eval = pytest.mark.skipif(not CHAT_EVAL.is_dir(), reason=f"no {CHAT_EVAL}")


class Numbers(Task):
    """Conversations that are their own index."""

    def __init__(self, size: int, first: int = 0) -> None:
        super().__init__(size)
        self.first = first
        self.made: list[int] = []

    def conversation(self, index: int) -> dict:
        self.made.append(index)
        return {"messages": self.first + index}


def numbers(task: Task) -> list[int]:
    return [conversation["messages"] for conversation in task]


def write_split(folder: Path, split: str, rows: list[dict], parts: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        table = pa.Table.from_pylist(rows[part::parts])
        pq.write_table(table, folder / f"{split}-{part:05d}-of-{parts:05d}.parquet")


def test_slices_are_lazy_views():
    task = Numbers(100)
    part = task[10:50:3][1:5]
    assert isinstance(part, Task)
    assert task.made == []
    assert len(part) == 4
    assert part[0] == {"messages": 13}
    assert task.made == [13]
    assert numbers(part) == [13, 16, 19, 22]
    assert (part[-1], task[-1]) == ({"messages": 22}, {"messages": 99})
    assert len(task[:1000]) == 100
    assert numbers(task[50:50]) == []
    with pytest.raises(IndexError):
        part[4]
    # The task itself is what it was.
    assert len(task) == 100


def test_sequence_is_in_order():
    sequence = TaskSequence(
        [Numbers(2), Numbers(0), Numbers(3, first=10)[1:], Numbers(1, first=20)]
    )
    assert numbers(sequence) == [0, 1, 11, 12, 20]
    assert numbers(sequence[1:4]) == [1, 11, 12]
    assert numbers(TaskSequence([])) == []


def test_mixture_is_the_references_shuffle_of_all_pairs():
    tasks = [Numbers(30), Numbers(20, first=100), Numbers(20, first=100)]
    pairs = [(which, index) for which, size in enumerate((30, 20, 20)) for index in range(size)]
    random.Random(42).shuffle(pairs)
    expected = [tasks[which][index]["messages"] for which, index in pairs]
    mixture = TaskMixture(tasks)
    assert numbers(mixture) == expected
    assert numbers(TaskMixture(tasks)) == expected
    assert numbers(mixture[5:9]) == expected[5:9]
    # A task that is given twice comes twice as often.
    assert sum(number >= 100 for number in expected) == 40


def test_order_of_hub_datasets():
    """What datasets 5.2 makes of shuffle(seed=42)."""
    assert hub_shuffle(5).tolist() == [4, 2, 3, 1, 0]
    assert hub_shuffle(1319)[:6].tolist() == [30, 754, 429, 1010, 1284, 953]
    assert hub_shuffle(14042)[:6].tolist() == [1469, 122, 5555, 7550, 10165, 13363]


def test_render_mc():
    assert render_mc("Why?", ["A", "B"], ["so", "not so"]) == (
        "Multiple Choice question: Why?\n"
        "- so=A\n"
        "- not so=B\n"
        "\n"
        "Respond only with the letter of the correct answer."
    )
    with pytest.raises(ValueError, match="zip"):
        render_mc("Why?", ["A", "B"], ["so"])


def test_arc(tmp_path):
    choices = {"text": ["red", "blue", "green"], "label": ["1", "2", "3"]}
    row = {"id": "x", "question": "Sky?", "choices": choices, "answerKey": "2"}
    write_split(tmp_path / "ARC-Easy", "test", [row])
    task = ARC(tmp_path, subset="ARC-Easy", split="test")
    assert (task.eval_type, task.baseline, len(task)) == ("categorical", 0.25, 1)
    question = task[0]
    assert question["messages"] == [
        {"role": "user", "content": render_mc("Sky?", ["1", "2", "3"], choices["text"])},
        {"role": "assistant", "content": "2"},
    ]
    assert question["letters"] == ["1", "2", "3"]
    assert task.evaluate_many([question, question], ["2", "3"]) == [True, False]
    with pytest.raises(ValueError, match="'A' is none of the letters"):
        task.evaluate(question, "A")


def test_mmlu_and_its_nested_training_questions(tmp_path):
    row = {"question": "1+1?", "subject": "maths", "choices": list("1234"), "answer": 1}
    write_split(tmp_path / "all", "test", [row])
    write_split(tmp_path / "auxiliary_train", "train", [{"train": row}] * 3, parts=2)
    test = MMLU(tmp_path, subset="all", split="test")
    train = MMLU(tmp_path, subset="auxiliary_train", split="train")
    assert (len(test), len(train)) == (1, 3)
    assert test[0] == train[2]
    assert test[0]["messages"][1] == {"role": "assistant", "content": "B"}
    assert (test[0]["letters"], test[0]["subject"]) == (list("ABCD"), "maths")
    assert test.evaluate(test[0], "B")


def test_gsm8k_answers_come_in_parts():
    answer = "It is 12/60 = $<<12/60=0.2>>0.2.\nSo <<0.2*50=10>><<1>>10.\n#### 10"
    assert answer_parts(answer) == [
        {"type": "text", "text": "It is 12/60 = $"},
        {"type": "python", "text": "12/60"},
        {"type": "python_output", "text": "0.2"},
        {"type": "text", "text": "0.2.\nSo "},
        {"type": "python", "text": "0.2*50"},
        {"type": "python_output", "text": "10"},
        {"type": "python", "text": "1"},
        {"type": "python_output", "text": ""},
        {"type": "text", "text": "10.\n#### 10"},
    ]


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("#### 10", "10"),
        ("so\n#### -1,234.50 dollars", "-1234.50"),
        ("#### 1 #### 2", "1"),
        ("####10", None),
        ("#### $10", None),
        ("the answer is 10", None),
        ("", None),
    ],
)
def test_gsm8k_result(answer, result):
    assert stated_result(answer) == result


def test_gsm8k_scores(tmp_path):
    write_split(
        tmp_path / "main", "test", [{"question": "How much?", "answer": "<<9=9>>#### 1,000"}]
    )
    task = GSM8K(tmp_path, split="test")
    assert (task.eval_type, task.baseline) == ("generative", 0.0)
    question = task[0]
    assert question["messages"][0] == {"role": "user", "content": "How much?"}
    for answer, right in (("x #### 1000", True), ("#### 1000.0", False), ("1000", False)):
        assert task.evaluate(question, answer) is right
        assert task.reward(question, answer) == float(right)


PROMPT = "# sums\nfrom typing import List\n\nimport math\ndef add(a, b):\n    import os\n"
PROBLEM = {
    "task_id": "x",
    "prompt": PROMPT,
    "canonical_solution": "    return a + b\n",
    "test": "def check(f):\n    assert f(1, 2) == 3 and List and math\n",
    "entry_point": "add",
}


def test_humaneval_program():
    assert leading_imports(PROMPT) == "from typing import List\nimport math"
    assert code_of("See:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1"
    assert code_of("```\nx = 1\n```") == "x = 1"
    assert code_of("  x = 1\n") == "x = 1"
    conversation = {"messages": [{"content": PROMPT}], "test": "TEST", "entry_point": "add"}
    assert program(conversation, "CODE") == (
        "from typing import List\nimport math\n\nCODE\n\nTEST\ncheck(add)"
    )


def test_humaneval_scores(tmp_path):
    write_split(tmp_path, "test", [PROBLEM])
    task = HumanEval(tmp_path)
    problem = task[0]
    assert task.eval_type == "generative"
    assert problem["messages"] == [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": PROMPT + "\n    return a + b\n"},
    ]
    answers = {
        problem["messages"][1]["content"]: True,
        "def add(a, b): return a + b": True,
        "Of course!\n```python\ndef add(a, b):\n    return b + a\n```\nHope it helps": True,
        "def add(a, b): return a - b": False,
        "def add(a, b): exit(0)": False,
        "Of course!": False,
        "": False,
    }
    assert task.evaluate_many([problem] * len(answers), list(answers)) == list(answers.values())
    assert task.evaluate(problem, "def add(a, b): return a + b")


def test_unknown_names():
    with pytest.raises(UserError, match="no chat task 'ARC'; there are ARC-Easy, "):
        chat_task("ARC", data=None, cache=Path())
    with pytest.raises(UserError, match="no task 'squad' to fetch; there are arc, "):
        fetch("squad", Path())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub(tmp_path, monkeypatch) as hub:
        yield hub


def test_fetch_lays_files_out_and_asks_once(hub, tmp_path):
    names = [f"main/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    hub.files = {name: name.encode() for name in names}
    folder = fetch("gsm8k", tmp_path)
    assert {request.repo for request in hub.requests} == {"openai/gsm8k"}
    assert sorted(hub.asked("GET")) == sorted(names)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {*names, *(f"{name}.json" for name in names)}
    assert all((folder / name).read_bytes() == hub.files[name] for name in names)
    hub.requests.clear()
    assert fetch("gsm8k", tmp_path) == folder
    assert hub.requests == []


def test_fetch_keeps_nothing_that_is_damaged(hub, tmp_path):
    name = "test-00000-of-00001.parquet"
    there = f"openai_humaneval/{name}"
    hub.files[there] = b"PAR1 some rows PAR1"
    hub.faults[there, "GET"] = ["corrupt"] * 2
    with pytest.raises(UserError, match=rf"{there} of openai/openai_humaneval .*in 2 tries"):
        fetch("humaneval", tmp_path, policy=QUICK)
    assert [path for path in (tmp_path / "tasks").rglob("*") if path.is_file()] == []
    # The one subset of HumanEval is not a folder.
    assert (fetch("humaneval", tmp_path) / name).read_bytes() == hub.files[there]


@needs_chat_eval
@pytest.mark.parametrize(
    ("name", "size"),
    [("ARC-Easy", 2376), ("ARC-Challenge", 1172), ("MMLU", 14042), ("GSM8K", 1319)],
)
def test_right_answers_of_the_real_tasks_are_right(name, size, tmp_path):
    task = chat_task(name, data=CHAT_EVAL, cache=tmp_path)
    assert len(task) == size
    assert set(CHAT_TASKS) == {"ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval"}
    for question in task[:: size // 200]:
        right = question["messages"][-1]["content"]
        answer = right if isinstance(right, str) else "".join(part["text"] for part in right)
        assert task.evaluate(question, answer)
        if task.eval_type == "categorical":
            wrong = [letter for letter in question["letters"] if letter != right]
            assert not any(task.evaluate(question, letter) for letter in wrong)


@needs_chat_eval
def test_first_questions_of_the_real_tasks(tmp_path):
    """Rows hub_shuffle(n)[0] of the files: the ones that the reference asks first."""
    table = pq.read_table(CHAT_EVAL / "gsm8k/main/test-00000-of-00001.parquet")
    task = chat_task("GSM8K", data=CHAT_EVAL, cache=tmp_path)
    assert task[0]["messages"][0]["content"] == table["question"][30].as_py()
    table = pq.read_table(CHAT_EVAL / "mmlu/all/test-00000-of-00001.parquet")
    task = chat_task("MMLU", data=CHAT_EVAL, cache=tmp_path)
    assert task[1]["subject"] == table["subject"][122].as_py()


@needs_chat_eval
def test_calculator_agrees_with_the_parts_of_gsm8k(tmp_path):
    task = chat_task("GSM8K", data=CHAT_EVAL, cache=tmp_path)
    parts = [part for question in task[:200] for part in question["messages"][1]["content"]]
    calls = [(a["text"], b["text"]) for a, b in pairwise(parts) if a["type"] == "python"]
    assert len(calls) > 500
    for expression, result in calls:
        assert float(calculate(expression)) == pytest.approx(float(result), abs=0.011)


@needs_chat_eval
def test_canonical_solutions_of_humaneval_pass(tmp_path):
    task = chat_task("HumanEval", data=CHAT_EVAL, cache=tmp_path)
    problems = list(task)
    assert len(problems) == 164
    solutions = [problem["messages"][1]["content"] for problem in problems]
    assert all(task.evaluate_many(problems, solutions))
    # The prompt alone is a function that gives None.
    prompts = [problem["messages"][0]["content"] for problem in problems[:20]]
    assert not any(task.evaluate_many(problems[:20], prompts))


@pytest.mark.skipif(not CHAT_TRAIN.is_dir(), reason=f"no {CHAT_TRAIN}")
def test_real_conversations():
    files = sorted(CHAT_TRAIN.glob("*_train.parquet"))
    task = Conversations(files, shuffle=True)
    assert len(task) == 14_365 + 2_794 + 6_136
    assert [message["role"] for message in task[-1]["messages"]] == ["user", "assistant"]
    assert np.array_equal(np.sort(hub_shuffle(len(task))), np.arange(len(task)))
