"""CORE's prompts are the protocol's, and its scores those of a naive evaluation."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfast.errors import UserError
from gptfast.evaluate.core import evaluate_core
from gptfast.evaluate.core_bundle import Bundle, Example, Task, load_bundle
from gptfast.evaluate.core_prompts import Prompter, draw_shots, select_examples
from gptfast.evaluate.core_results import judge
from gptfast.evaluate.core_scoring import Scorer
from gptfast.evaluate.outcomes import CORRECT, MARGIN
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer
from kernels.launch import INTERPRETED
from tests.core_cases import (
    BEGINS,
    TASKS,
    VOCAB,
    assert_same,
    make_model,
    make_tokenizer,
    naive_task,
    write_bundle,
)

REAL_BUNDLE = Path(__file__).parent.parent.parent / "shared" / "data" / "eval_bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return load_bundle(write_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_of_the_three_kinds_are_the_protocols():
    def task(kind: str, *examples: Example) -> Task:
        return Task("copa", kind, 1, "\nAnswer: ", 0.5, examples, "")

    class Letters:
        """A tokenizer is not needed to write prompts."""

    choice = task(
        "multiple_choice",
        Example((("Sky?", "blue"), ("Sky?", "red")), 0),
        Example((("Sun?", "cold"), ("Sun?", "hot")), 1),
    )
    # Random(1337) leaves two examples in this order; each is the other's only possible shot.
    prompter = Prompter(choice, Letters(), context=99)
    first = [e.options[0][0] for e in prompter.examples].index("Sky?")
    assert prompter.prompts(first) == [
        "Sun?\nAnswer: hot\n\nSky?\nAnswer: blue",
        "Sun?\nAnswer: hot\n\nSky?\nAnswer: red",
    ]
    schema = task(
        "schema",
        Example((("Ann, as Ann", "won."), ("Ann, as Bo", "won.")), 1),
        Example((("It, as it", "fell."), ("It, as he", "fell.")), 0),
    )
    prompter = Prompter(schema, Letters(), context=99)
    first = [e.options[0][1] for e in prompter.examples].index("won.")
    assert prompter.prompts(first) == [
        "It, as it\nAnswer: fell.\n\nAnn, as Ann\nAnswer: won.",
        "It, as it\nAnswer: fell.\n\nAnn, as Bo\nAnswer: won.",
    ]
    language = task("language_modeling", Example((("1 + 1 =", "2"),)), Example((("2 + 2 =", "4"),)))
    prompter = Prompter(language, Letters(), context=99)
    first = [e.options[0][1] for e in prompter.examples].index("2")
    assert prompter.prompts(first) == [
        "2 + 2 =\nAnswer: 4\n\n1 + 1 =\nAnswer:",
        "2 + 2 =\nAnswer: 4\n\n1 + 1 =\nAnswer: 2",
    ]


def test_examples_and_shots_are_those_that_the_seeds_draw():
    examples = tuple(Example((("q", str(i)),)) for i in range(40))
    task = Task("squad", "language_modeling", 10, " ", 0.0, examples, "")
    order = list(range(40))
    random.Random(1337).shuffle(order)
    assert [int(e.options[0][1]) for e in select_examples(task, 15)] == order[:15]
    for count, index in ((15, 0), (15, 7), (15, 14), (40, 39), (500, 123)):
        others = [i for i in range(count) if i != index]
        assert draw_shots(index, count, 10) == random.Random(1234 + index).sample(others, 10)


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_every_example_is_scored_as_by_the_naive_evaluation(model, tokenizer, bundle, batch_tokens):
    scorer = Scorer(model, batch_tokens=batch_tokens)
    result = evaluate_core(scorer, tokenizer, bundle)
    assert [task.label for task in result.tasks] == list(TASKS)
    for task in result.tasks:
        expected = naive_task(model, tokenizer, TASKS[task.label])
        assert_same(task.outcomes, expected)
        assert task.accuracy == expected[:, 0].mean()
        assert task.cropped == 0


def test_one_at_a_time_gives_the_same_and_computes_three_times_as_much(model, tokenizer, bundle):
    letters = [{**row, "choices": list("ABCD")} for row in TASKS["arc_easy"][3]]
    examples = tuple(
        Example(tuple((row["query"], c) for c in row["choices"]), row["gold"]) for row in letters
    )
    bundle = Bundle((replace(bundle.tasks[0], examples=examples), *bundle.tasks[1:]), ())
    packed, alone = Scorer(model), Scorer(model, one_at_a_time=True)
    one, other = (evaluate_core(scorer, tokenizer, bundle) for scorer in (packed, alone))
    for a, b in zip(one.tasks, other.tasks):
        assert_same(a.outcomes, b.outcomes[:, [CORRECT, MARGIN]])
    # Of four one-letter choices, the shots and the question are computed once, the letters never.
    scorers = Scorer(model), Scorer(model, one_at_a_time=True)
    items = Prompter(bundle.tasks[0], tokenizer, context=640).items(range(14))
    for scorer in scorers:
        scorer.scores(items, "multiple_choice")
    assert scorers[1].tokens == sum(len(ids) - 1 for item in items for ids in item.sequences)
    assert scorers[0].tokens < 0.35 * scorers[1].tokens


def test_equal_options_tie_and_an_option_without_tokens_of_its_own_is_not_chosen(
    model, tokenizer, bundle
):
    prompter = Prompter(bundle.tasks[0], tokenizer, context=640)
    items = {i.index: i for i in prompter.items(range(14))}
    texts = {i: [a for _, a in prompter.examples[i].options] for i in items}
    same = next(i for i in items if texts[i][:2] == ["the same"] * 2)
    begins = next(i for i in items if texts[i] == BEGINS)
    scores = Scorer(model).scores([items[same], items[begins]], "multiple_choice")
    assert scores[0][0] == scores[0][1]
    assert scores[1][1] == np.inf
    assert np.isfinite(scores[1][[0, 2, 3]]).all()
    assert judge(np.array([2.0, 1.0, 1.0]), 1, "multiple_choice") == (True, 0.0)
    assert judge(np.array([2.0, 1.0, 1.0]), 2, "multiple_choice") == (False, 0.0)
    assert judge(np.array([2.0, 1.0, 1.5]), 1, "schema") == (True, 0.5)
    assert judge(np.array([2.0, np.inf]), 1, "multiple_choice") == (False, -np.inf)
    assert judge(np.array([0.25]), 0, "language_modeling") == (True, 0.25)
    assert judge(np.array([0.0]), 0, "language_modeling") == (False, 0.0)


def test_greedy_decoding_says_what_counts_as_exact_match(model, tokenizer):
    """A model's own continuation, 8 tokens that decode and encode to themselves, is correct."""
    ids = tokenizer.encode("the river", prepend=tokenizer.bos_id)
    item = Prompter(
        Task("squad", "language_modeling", 0, " ", 0.0, (Example((("q", "a"),)),), ""),
        tokenizer,
        context=640,
    ).items([0])[0]
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    said = replace(item, sequences=[np.array(ids, dtype=np.int32)], starts=[len(ids) - 8])
    wrong = [*ids[:-1], (ids[-1] + 1) % VOCAB]
    missed = replace(said, sequences=[np.array(wrong, dtype=np.int32)])
    right, less = (
        scores[0] for scores in Scorer(model).scores([said, missed], "language_modeling")
    )
    assert right > 0 > less


def test_prompts_longer_than_the_context_lose_their_beginning_and_are_counted(tokenizer, bundle):
    short = make_model(sequence_len=5)
    result = evaluate_core(Scorer(short), tokenizer, bundle)
    for task in result.tasks:
        assert_same(task.outcomes, naive_task(short, tokenizer, TASKS[task.label]))
    cropped = {task.label: task.cropped for task in result.tasks}
    assert cropped["arc_easy"] == 14
    assert cropped["coqa"] == 7
    assert cropped["winograd"] == 0
    assert "arc_easy 14" in result.section("m")
    with pytest.raises(UserError, match=r"example \d+ of arc_easy .* context of 4 tokens"):
        Prompter(bundle.tasks[0], tokenizer, context=4).items(range(14))


def test_bf16_scores_are_near_those_of_fp32_and_kernels_give_the_same(tokenizer, bundle):
    # Short, as kernels are slow in Triton's interpreter.
    items = Prompter(bundle.tasks[2], tokenizer, context=640).items([0])
    # On a CPU there are none but interpreted.
    theirs = {"kernels": "triton"} if INTERPRETED else {}
    exact, bf16, kernels = (
        np.concatenate(Scorer(make_model(**choice)).scores(items, "schema"))
        for choice in ({}, {"dtype": "bfloat16"}, theirs)
    )
    np.testing.assert_allclose(bf16, exact, atol=0.05)
    np.testing.assert_allclose(kernels, exact, atol=2e-5)


# --- the real bundle ------------------------------------------------------------------------------

real = pytest.mark.skipif(
    not REAL_BUNDLE.is_dir(), reason="needs the CORE bundle in ../shared/data/eval_bundle"
)


@pytest.fixture(scope="module")
def real_bundle() -> Bundle:
    return load_bundle(REAL_BUNDLE)


@pytest.fixture(scope="module")
def real_tokenizer(real_bundle) -> Tokenizer:
    squad = next(task for task in real_bundle.tasks if task.label == "squad")
    return Tokenizer.train([example.options[0][0] for example in squad.examples[:400]], 2048)


@pytest.fixture(scope="module")
def real_model() -> GPT:
    # With room for the longest prompts, uncropped.
    return make_model(2048, sequence_len=1024)


@real
def test_every_real_task_is_scored_as_by_the_naive_evaluation(
    real_model, real_tokenizer, real_bundle
):
    assert real_bundle.missing == ("coqa",)
    uris = {path.stem: path for path in REAL_BUNDLE.rglob("*.jsonl")}
    names = {"jeopardy": "jeopardy_all", "winograd": "winograd_wsc"}
    for task in real_bundle.tasks:
        name = names.get(task.label, task.label.removesuffix("_zeroshot"))
        rows = [json.loads(line) for line in uris[name].read_bytes().splitlines()]
        count = 1 if task.shots else 6
        naive = (task.kind, task.shots, task.delimiter, rows)
        expected = naive_task(real_model, real_tokenizer, naive, count)
        items = Prompter(task, real_tokenizer, context=10_240).items(range(count))
        assert not any(item.cropped for item in items)
        scores = Scorer(real_model).scores(items, task.kind)
        found = [judge(each, item.gold, task.kind) for item, each in zip(items, scores)]
        assert [correct for correct, _ in found] == expected[:, 0].tolist(), task.label
        margins = [margin for _, margin in found]
        np.testing.assert_allclose(margins, expected[:, 1], atol=2e-5, rtol=0, err_msg=task.label)


@real
def test_random_weights_score_like_guessing(real_model, real_tokenizer, real_bundle):
    # Short ones, so that there can be enough of them; their baselines are a guesser's accuracy.
    labels = {
        *("hellaswag_zeroshot", "copa", "openbook_qa", "lambada_openai"),
        *("winograd", "winogrande"),
    }
    tasks = tuple(task for task in real_bundle.tasks if task.label in labels)
    result = evaluate_core(
        Scorer(real_model), real_tokenizer, replace(real_bundle, tasks=tasks), max_per_task=100
    )
    errors = []
    for task in result.tasks:
        errors.append((task.baseline * (1 - task.baseline) / 100) ** 0.5 / (1 - task.baseline))
        assert abs(task.centered) <= 3.5 * errors[-1], task.label
    assert abs(result.mean) <= 3 * np.sqrt(np.square(errors).sum()) / len(errors)
