"""What CORE's scores come to: centred and partial means, files, resuming, sharing out."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from gptfast.errors import UserError
from gptfast.evaluate.core import evaluate_core, share_out
from gptfast.evaluate.core_bundle import CORE_TASKS, Bundle, load_bundle
from gptfast.evaluate.core_compare import comparison
from gptfast.evaluate.core_prompts import Prompter
from gptfast.evaluate.core_results import CoreResult
from gptfast.evaluate.core_scoring import Scorer
from gptfast.evaluate.outcomes import CORRECT, MARGIN, ResultStore, TaskResult
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer
from tests.core_cases import TASKS, make_model, make_tokenizer, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return load_bundle(write_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


def result_of(
    *accuracies: tuple[str, int, int, float],
    missing: tuple[str, ...] = (),
    first: int | None = None,
) -> CoreResult:
    tasks = []
    for label, correct, examples, baseline in accuracies:
        outcomes = np.zeros((examples, 4))
        outcomes[:, 0] = 1
        outcomes[:correct, CORRECT] = 1
        tasks.append(TaskResult(label, baseline, outcomes))
    return CoreResult(tuple(tasks), missing, first)


def test_centred_scores_and_their_mean_by_hand(tmp_path):
    result = result_of(("copa", 7, 10, 0.5), ("squad", 1, 4, 0.0), ("boolq", 5, 10, 0.62))
    centred = [0.2 / 0.5, 0.25, -0.12 / 0.38]
    assert [task.centered for task in result.tasks] == pytest.approx(centred)
    assert result.mean == pytest.approx(sum(centred) / 3)
    assert result.tasks[0].standard_error == pytest.approx((0.7 * 0.3 / 10) ** 0.5 / 0.5)
    assert (result.key, result.name) == ("core_metric", "CORE metric")
    result.write_csv(tmp_path / "core.csv")
    rows = list(csv.DictReader((tmp_path / "core.csv").read_text().splitlines()))
    assert [(row["Task"], row["Accuracy"]) for row in rows][:2] == [
        ("copa", "0.700000"),
        ("squad", "0.250000"),
    ]
    assert rows[-1]["Task"] == "CORE metric"
    assert float(rows[-1]["Centered"]) == pytest.approx(result.mean, abs=1e-6)
    assert result.section("d20").splitlines()[:3] == [
        "- Model: d20",
        f"- CORE metric: {result.mean:.4f}",
        "- copa: 0.4000",
    ]


def test_a_metric_without_all_tasks_is_named_partial(bundle):
    assert bundle.missing == tuple(label for label in CORE_TASKS if label not in TASKS)
    result = result_of(("copa", 7, 10, 0.5), missing=("coqa", "boolq"))
    assert result.key == "core_metric_partial"
    assert result.name == "CORE metric, partial (1 of 22 tasks, without coqa, boolq)"
    assert result.name in result.section("m")
    assert result.name in result.table()
    assert result.as_dict()["missing"] == ["coqa", "boolq"]


def test_a_metric_of_the_first_examples_says_so_everywhere(tmp_path):
    result = result_of(("copa", 7, 10, 0.5), first=1000)
    assert result.name == "CORE metric (first 1,000 of each task)"
    assert result.as_dict() == {
        "core_metric_partial": pytest.approx(0.4),
        "missing": [],
        "first_of_each_task": 1000,
        "tasks": {"copa": result.tasks[0].as_dict()},
    }
    assert f"- {result.name}: 0.4000\n" in result.section("m")
    assert result.table().endswith(f"\n{result.name}: 0.4000")
    result.write_csv(tmp_path / "core.csv")
    assert (tmp_path / "core.csv").read_text().splitlines()[-1].startswith(f'"{result.name}",')
    both = result_of(("copa", 7, 10, 0.5), missing=("coqa",), first=10)
    limits = "1 of 22 tasks, without coqa; first 10 of each task"
    assert both.name == f"CORE metric, partial ({limits})"


def test_ranks_share_all_examples_and_carry_nearly_the_same(tokenizer, bundle):
    prompters = [Prompter(task, tokenizer, context=640) for task in bundle.tasks]
    known = [np.zeros((len(prompter), 4)) for prompter in prompters]
    known[0][:5, 0] = 1
    for size in (1, 2, 3, 8):
        shares = share_out(prompters, known, size)
        loads = np.zeros(size)
        for number, (prompter, share) in enumerate(zip(prompters, shares)):
            everything = sorted(index for part in share for index in part)
            assert everything == list(range(5 if number == 0 else 0, len(prompter)))
            loads += [sum(map(prompter.cost, part)) for part in share]
        largest = max(prompter.cost(i) for prompter in prompters for i in range(len(prompter)))
        assert loads.max() - loads.min() <= largest


def test_one_long_example_is_shared_out_against_many_short_ones():
    class Costs:
        def cost(self, index: int) -> int:
            return 100 if index == 3 else 1

    (share,) = share_out([Costs()], [np.zeros((101, 4))], 2)
    assert share[0] == [3]
    assert len(share[1]) == 100


def test_resumes_by_task_and_only_for_the_same_model(tmp_path, model, tokenizer, bundle):
    def evaluate(identity: str, tasks: slice = slice(None), **options) -> tuple[int, CoreResult]:
        scorer = Scorer(model)
        some = replace(bundle, tasks=bundle.tasks[tasks])
        store = ResultStore(tmp_path, {"model": identity, "pair": (1, 2)})
        result = evaluate_core(scorer, tokenizer, some, store=store, **options)
        return scorer.tokens, result

    _, first = evaluate("a", slice(3))
    rest, whole = evaluate("a")
    everything, expected = evaluate("b")
    assert 0 < rest < everything
    for a, b, c in zip(whole.tasks, expected.tasks, first.tasks[:1] * 6):
        assert (a.outcomes == b.outcomes).all()
        assert c.label == "arc_easy"
    assert evaluate("b")[0] == 0
    # What a stopped evaluation of three ranks leaves; any number of ranks goes on from there.
    whole_file = tmp_path / "jeopardy-13.json"
    content = json.loads(whole_file.read_text())
    outcomes = content["outcomes"]
    for rank, part in ((0, outcomes[:4]), (2, outcomes[4:9])):
        path = tmp_path / f"jeopardy-13.rank{rank}.json"
        path.write_text(json.dumps({**content, "outcomes": part}))
    whole_file.unlink()
    again, resumed = evaluate("b")
    assert 0 < again < everything
    assert (resumed.tasks[4].outcomes == expected.tasks[4].outcomes).all()
    assert json.loads(whole_file.read_text()) == content
    assert not list(tmp_path.glob("*.rank*"))
    # Another number of examples has other shots, and costs nothing of what is known of all.
    cut, result = evaluate("b", max_per_task=7)
    assert cut > 0
    assert result.first == 7
    assert evaluate("b")[0] == evaluate("b", max_per_task=7)[0] == 0
    # Nothing is left out: arc_easy has the most examples, 14.
    assert evaluate("b", max_per_task=14)[1].first is None
    whole_file.write_text("{")
    with pytest.raises(UserError, match=r"jeopardy-13\.json is damaged"):
        evaluate("b")


def test_comparison_lists_every_example_that_differs():
    one, other = (
        result_of(("copa", 7, 10, 0.5), ("squad", 1, 4, 0.0), missing=("coqa",)) for _ in range(2)
    )
    assert comparison(one, other, names=("a", "b")).startswith("0 of 14 examples differ (0.00%).")
    for result, margins in ((one, [0.25, -0.5, -np.inf]), (other, [0.25, 0.125, -np.inf])):
        result.tasks[0].outcomes[:3, MARGIN] = margins
    other.tasks[0].outcomes[1, CORRECT] = 0
    text = comparison(one, other, names=("a", "b"))
    assert text.startswith("1 of 14 examples differ (7.14%).\n")
    assert "| copa | 10 | 0.7000 | 0.6000 | 1 | 6.2e-01 |\n" in text
    assert "| squad | 4 | 0.2500 | 0.2500 | 0 | 0.0e+00 |\n" in text
    assert f"| {one.name} | 14 | 0.3250 | 0.2250 | 1 | |\n" in text
    assert text.endswith("| copa | 1 | -0.500000 | +0.125000 |\n")
