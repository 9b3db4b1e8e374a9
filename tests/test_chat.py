"""The chat tasks: scores are a naive evaluation's, however the work is batched and shared."""

import json
import multiprocessing
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gptfast.conversation import render_for_completion
from gptfast.errors import UserError
from gptfast.evaluate.categorical import _behind_prompts
from gptfast.evaluate.chat import deal, evaluate_categorical, evaluate_chat
from gptfast.evaluate.chat_results import ChatResult
from gptfast.evaluate.generative import Answering
from gptfast.evaluate.loading import Placement, random_model
from gptfast.evaluate.outcomes import CORRECT, CROPPED, MARGIN, ResultStore, TaskResult
from gptfast.model import GPT
from gptfast.tasks import CHAT_TASKS, Task, chat_task
from gptfast.tokenizer import Tokenizer
from tests.chat_cases import Letters, Words, make_tokenizer, naive_letters, naive_words
from tests.core_cases import make_model
from tests.operators import host_never_waits

CHAT_EVAL = Path(__file__).parents[2] / "shared/data/chat_eval"
VOCAB = 300
SHORT = Answering(max_new_tokens=8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model(VOCAB)


def outcomes(result: ChatResult) -> list[np.ndarray]:
    return [task.outcomes for task in result.tasks]


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_letters_are_those_of_the_naive_evaluation(model, tokenizer, batch_size):
    task = Letters(40)
    result = evaluate_chat(model, tokenizer, {"x": task}, batch_size=batch_size)
    expected = naive_letters(model, tokenizer, task)
    (found,) = outcomes(result)
    assert found[:, CORRECT].tolist() == expected[:, 0].tolist()
    np.testing.assert_allclose(found[:, MARGIN], expected[:, 1], atol=2e-5, rtol=0)
    assert result.tasks[0].accuracy == expected[:, 0].mean()
    assert evaluate_categorical(model, tokenizer, task) == expected[:, 0].mean()
    first = evaluate_categorical(model, tokenizer, task, max_problems=15)
    assert first == expected[:15, 0].mean()
    for most, limit in ((15, 15), (40, None)):
        assert evaluate_chat(model, tokenizer, {"x": task}, max_problems=most).first == limit


def test_letters_in_several_chunks(model, tokenizer, monkeypatch):
    task = Letters(40)
    whole = evaluate_chat(model, tokenizer, {"x": task})
    monkeypatch.setattr("gptfast.evaluate.categorical._CHUNK", 6)
    parts = evaluate_chat(model, tokenizer, {"x": task})
    assert outcomes(parts)[0][:, CORRECT].tolist() == outcomes(whole)[0][:, CORRECT].tolist()


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_words_are_those_of_the_naive_evaluation(model, tokenizer, batch_size):
    task = Words(12)
    result = evaluate_chat(model, tokenizer, {"x": task}, answering=SHORT, batch_size=batch_size)
    expected = naive_words(model, tokenizer, task, SHORT.max_new_tokens)
    assert 0 < sum(expected) < 12
    assert outcomes(result)[0][:, CORRECT].tolist() == expected


def test_a_problem_is_solved_by_any_of_its_samples(model, tokenizer):
    task = Words(10)

    def solved(**options) -> np.ndarray:
        answering = Answering(max_new_tokens=6, temperature=1.0, **options)
        return outcomes(evaluate_chat(model, tokenizer, {"x": task}, answering=answering))[0]

    one, five = solved(num_samples=1), solved(num_samples=5)
    # The first sample is the same one, so that more samples solve no less.
    assert (five[:, CORRECT] >= one[:, CORRECT]).all()
    assert five[:, CORRECT].sum() > one[:, CORRECT].sum()
    assert ((five[:, MARGIN] * 5) % 1 == 0).all()
    assert ((five[:, MARGIN] > 0) == five[:, CORRECT]).all()
    # A problem's samples are its own, in whatever company they are drawn.
    assert (solved(num_samples=5) == five).all()
    some = evaluate_chat(
        model,
        tokenizer,
        {"x": task[:4]},
        answering=Answering(max_new_tokens=6, temperature=1.0, num_samples=5),
    )
    assert (outcomes(some)[0] == five[:4]).all()
    assert (solved(num_samples=5, seed=1)[:, MARGIN] != five[:, MARGIN]).any()


def test_long_prompts_lose_their_beginning_and_are_counted(tokenizer):
    short = make_model(VOCAB, sequence_len=16)
    letters, words = Letters(20), Words(20)
    result = evaluate_chat(
        short, tokenizer, {"a": letters, "b": words}, answering=Answering(max_new_tokens=150)
    )
    expected = naive_letters(short, tokenizer, letters)
    assert outcomes(result)[0][:, CORRECT].tolist() == expected[:, 0].tolist()
    for task, found, room in (
        (letters, outcomes(result)[0], 160),
        (words, outcomes(result)[1], 10),
    ):
        long = [len(render_for_completion(tokenizer, each)) > room for each in task]
        assert 0 < sum(long) < 20
        assert found[:, CROPPED].tolist() == long
    section = result.section({"source": "sft"})
    assert f"Prompts cropped to the context: a {result.tasks[0].cropped}, b " in section
    with pytest.raises(UserError, match=r"answers of 160 tokens leave no room .* context of 160"):
        evaluate_chat(short, tokenizer, {"b": words}, answering=Answering(max_new_tokens=160))


def test_a_letter_that_is_several_tokens_is_named(model, tokenizer):
    class Names(Letters):
        def conversation(self, index: int) -> dict:
            return {**super().conversation(index), "letters": ["A", "(b)"]}

    with pytest.raises(UserError, match=r"the letter '\(b\)' is 3 tokens of this tokenizer"):
        evaluate_chat(model, tokenizer, {"x": Names(3)})


@pytest.mark.gpu
def test_a_gpu_gives_the_same_and_the_host_never_waits(model, tokenizer):
    placement = Placement(torch.device("cuda"), dtype="float32", kernels="triton")
    on_gpu = random_model(model.config, placement)
    on_gpu.load_state_dict(model.state_dict())
    tasks = {"a": Letters(40), "b": Words(12)}
    here, there = (
        outcomes(evaluate_chat(each, tokenizer, tasks, answering=SHORT)) for each in (model, on_gpu)
    )
    for one, other in zip(here, there):
        assert (one[:, CORRECT] == other[:, CORRECT]).all()
        np.testing.assert_allclose(one[:, MARGIN], other[:, MARGIN], atol=1e-3, rtol=0)
    prompts, head = [[1, 2, 3], [4] * 50], on_gpu.lm_head.weight[:5]
    with host_never_waits():
        behind = _behind_prompts(on_gpu, prompts, head)
    assert behind.shape == (2, 5)


# --- sharing and resuming -------------------------------------------------------------------------


def test_problems_are_dealt_out_evenly():
    known = [np.zeros((count, 4)) for count in (7, 0, 10, 3)]
    known[2][::2, 0] = 1
    for size in (1, 2, 3, 8):
        shares = [deal(known, rank, size) for rank in range(size)]
        for number, table in enumerate(known):
            everything = sorted(i for share in shares for i in share[number])
            assert everything == np.flatnonzero(table[:, 0] == 0).tolist()
        loads = [sum(map(len, share)) for share in shares]
        assert max(loads) - min(loads) <= 1


def tasks() -> dict[str, Task]:
    return {"a": Letters(25), "b": Words(9), "c": Letters(3)}


def evaluate_on_rank(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    result = evaluate_chat(
        make_model(VOCAB),
        make_tokenizer(),
        tasks(),
        answering=SHORT,
        group=dist.group.WORLD,
        store=ResultStore(folder / "results", {"model": 1}),
    )
    np.save(folder / f"{rank}.npy", np.concatenate(outcomes(result)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path, model, tokenizer):
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=evaluate_on_rank, args=(r, 2, tmp_path)) for r in range(2)]
    for process in ranks:
        process.start()
    alone = np.concatenate(outcomes(evaluate_chat(model, tokenizer, tasks(), answering=SHORT)))
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npy")
        assert (found[:, CORRECT] == alone[:, CORRECT]).all()
        np.testing.assert_allclose(found[:, MARGIN], alone[:, MARGIN], atol=2e-5, rtol=0)
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["a-25.json", "b-9.json", "c-3.json"]


def test_what_is_known_is_not_asked_again(tmp_path, model, tokenizer, monkeypatch):
    def evaluate(answering: Answering = SHORT, **options) -> np.ndarray:
        store = ResultStore(tmp_path, {"model": "m"})
        result = evaluate_chat(
            model, tokenizer, tasks(), answering=answering, store=store, **options
        )
        return np.concatenate(outcomes(result))

    first = evaluate()
    # What two ranks leave if they are stopped: b by halves, c not at all.
    content = json.loads((tmp_path / "b-9.json").read_text())
    part = {**content, "outcomes": content["outcomes"][:5]}
    (tmp_path / "b-9.rank1.json").write_text(json.dumps(part))
    (tmp_path / "b-9.json").unlink()
    (tmp_path / "c-3.json").unlink()
    asked = []

    def ask(task: Task, indices: list[int]) -> np.ndarray:
        asked.append((type(task).__name__, indices))
        return np.ones((len(indices), 4))

    where = "gptfast.evaluate.chat"
    monkeypatch.setattr(f"{where}.answer_with_letters", lambda m, t, task, i, **o: ask(task, i))
    monkeypatch.setattr(f"{where}.answer_in_words", lambda e, task, i, a, **o: ask(task, i))
    second = evaluate()
    assert asked == [("Words", [5, 6, 7, 8]), ("Letters", [0, 1, 2])]
    assert (second[:30] == first[:30]).all()
    asked.clear()
    evaluate()
    assert asked == []
    # Other answers are other results, letters the same; fewer problems are another question.
    evaluate(Answering(max_new_tokens=9))
    assert [kind for kind, _ in asked] == ["Words"]
    evaluate(max_problems=2)
    assert [len(indices) for _, indices in asked[1:]] == [2, 2, 2]
    asked.clear()
    evaluate(Answering(max_new_tokens=9))
    evaluate(max_problems=2)
    assert asked == []


# --- ChatCORE and the real tasks ------------------------------------------------------------------


def result_of(first: int | None = None, **correct: int) -> ChatResult:
    tasks = []
    for name, count in correct.items():
        table = np.zeros((8, 4))
        table[:, 0] = 1
        table[:count, CORRECT] = 1
        name = name.replace("_", "-")
        baseline = 0.25 if name in ("ARC-Easy", "ARC-Challenge", "MMLU") else 0.0
        tasks.append(TaskResult(name, baseline, table))
    return ChatResult(tuple(tasks), first)


def test_chatcore_by_hand_and_only_of_all_five():
    result = result_of(ARC_Easy=5, ARC_Challenge=2, MMLU=4, GSM8K=1, HumanEval=3)
    expected = (0.375 / 0.75 + 0.0 + 0.25 / 0.75 + 0.125 + 0.375) / 5
    assert result.metric == pytest.approx(expected)
    assert result.missing == ()
    assert result.section({"source": "sft", "top_k": 50}).splitlines() == [
        "- source: sft",
        "- top_k: 50",
        "- ARC-Easy: 0.6250",
        "- ARC-Challenge: 0.2500",
        "- MMLU: 0.5000",
        "- GSM8K: 0.1250",
        "- HumanEval: 0.3750",
        f"- ChatCORE metric: {expected:.4f}",
    ]
    some = result_of(GSM8K=1, MMLU=4)
    assert some.metric is None
    missing = ["ARC-Easy", "ARC-Challenge", "HumanEval"]
    assert some.as_dict()["missing"] == missing
    assert some.as_dict()["chatcore_metric"] is None
    assert some.as_dict()["tasks"]["GSM8K"]["accuracy"] == 0.125
    summary = f"ChatCORE metric: none, partial without {', '.join(missing)}"
    assert some.section({}).splitlines()[-1] == f"- {summary}"
    assert some.table().splitlines()[-1] == summary


def test_chatcore_of_the_first_problems_says_so():
    result = result_of(8, ARC_Easy=5, ARC_Challenge=2, MMLU=4, GSM8K=1, HumanEval=3)
    summary = f"ChatCORE metric (first 8 of each task): {result.metric:.4f}"
    assert result.section({}).splitlines()[-1] == f"- {summary}"
    assert result.table().splitlines()[-1] == summary
    saved = result.as_dict()
    assert (saved["chatcore_metric_partial"], saved["first_of_each_task"]) == (result.metric, 8)
    assert "chatcore_metric" not in saved


def test_chatcore_with_tasks_of_an_earlier_result(tmp_path):
    whole = result_of(ARC_Easy=5, ARC_Challenge=2, MMLU=4, GSM8K=1, HumanEval=3)
    saved = {**whole.as_dict(), "circumstances": "as now"}
    (tmp_path / "chat.json").write_text(json.dumps(saved))
    better = result_of(GSM8K=8)
    joined = better.with_earlier(tmp_path / "chat.json", "as now")
    assert list(joined.figures) == list(CHAT_TASKS)
    assert joined.figures["GSM8K"]["accuracy"] == 1.0
    assert joined.metric == pytest.approx(whole.metric + 0.875 / 5)
    lines = joined.table().splitlines()
    assert [line.split()[0] for line in lines] == ["task", "GSM8K", "ChatCORE"]
    assert lines[-1].endswith("(with ARC-Easy, ARC-Challenge, MMLU, HumanEval of before)")
    # The limit may have left out problems of the earlier tasks alone.
    (tmp_path / "cut.json").write_text(json.dumps({**saved, "first_of_each_task": 8}))
    assert better.with_earlier(tmp_path / "cut.json", "as now").first == 8
    assert better.with_earlier(tmp_path / "chat.json", "otherwise") == better
    assert better.with_earlier(tmp_path / "none.json", "as now") == better


@pytest.mark.skipif(not CHAT_EVAL.is_dir(), reason=f"no {CHAT_EVAL}")
def test_the_five_real_tasks(tmp_path):
    names = tuple(CHAT_TASKS)
    tasks = {name: chat_task(name, data=CHAT_EVAL, cache=tmp_path) for name in names}
    tokenizer = Tokenizer.train(
        [each["messages"][0]["content"] for each in tasks["MMLU"][:99]], 999
    )
    model = make_model(999, sequence_len=512)
    result = evaluate_chat(model, tokenizer, tasks, answering=SHORT, max_problems=12)
    assert [task.label for task in result.tasks] == list(names)
    assert result.metric is not None
    # What random weights say is no solution.
    assert [task.accuracy for task in result.tasks[3:]] == [0.0, 0.0]
    letters = {name: tasks[name][:12] for name in names[:3]}
    for task in result.tasks[:3]:
        expected = naive_letters(model, tokenizer, letters[task.label])
        assert task.outcomes[:, CORRECT].tolist() == expected[:, 0].tolist()
