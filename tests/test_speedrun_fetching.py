"""What a speedrun fetches first: what its steps would, and what is told where that fails."""

import sys
from pathlib import Path

import pytest

from gptfast.errors import UserError
from gptfast.speedrun import Plan, SpeedrunSettings, fetching, make_plan, with_fetching
from gptfast.speedrun.decide import is_whole
from gptfast.speedrun.estimate import estimate
from gptfast.speedrun.fetching import SIZES, fetch_all, missing_bytes
from gptfast.speedrun.settings import FlagSettings
from train import fetch as recipe
from train.speedrun import read_flags


def plan_of(cache: Path, *, gpus: int = 8, nodes: int = 1, **settings) -> Plan:
    asked = SpeedrunSettings(cache=cache, **settings)
    plan = make_plan(asked, gpus=gpus)
    return with_fetching(plan, read_flags(plan, nodes=nodes), cache, nodes=nodes)


def test_everything_but_the_text_is_fetched_first(tmp_path):
    step = plan_of(tmp_path, rl=True).steps[0]
    assert step.name == "fetch"
    assert step.arguments == (f"--cache={tmp_path}", "--what", *SIZES)
    assert not step.distributed
    # Another node may have another cache.
    assert plan_of(tmp_path, nodes=2).steps[0].distributed


@pytest.mark.parametrize(
    ("given", "fetched"),
    [
        (("chat_data",), ["core"]),
        (("core_bundle",), ["smoltalk", "mmlu", "gsm8k", "arc", "humaneval"]),
        (("chat_data", "core_bundle"), None),
    ],
)
def test_what_is_given_is_not_fetched(given, fetched, tmp_path):
    for name in ("smoltalk", "mmlu", "gsm8k", "arc"):
        (tmp_path / name).mkdir()
    plan = plan_of(tmp_path, **dict.fromkeys(given, tmp_path))
    step = plan.step("fetch")
    assert (step and list(step.arguments[2:])) == fetched


def test_flags_of_a_step_decide_what_is_fetched(tmp_path):
    own = tmp_path / "own.jsonl"
    own.touch()
    flags = FlagSettings(
        evaluate_flags="--only bpb",
        mid_flags=f"--train {own}",
        sft_flags=f"--train {own} gsm8k --accuracy-of ARC-Easy",
        chat_flags="--task HumanEval",
    )
    step = plan_of(tmp_path, flags=flags).steps[0]
    assert step.arguments[2:] == ("gsm8k", "arc", "humaneval")
    # Offline, and the toy, which is: nothing is.
    for more in ({"gpus": 0}, {"gpus": 1, "offline": True, "data": str(own)}):
        assert plan_of(tmp_path, **more).step("fetch") is None


def test_what_is_there_is_not_counted(tmp_path):
    step = plan_of(tmp_path).steps[0]
    assert missing_bytes(step) == sum(SIZES.values())
    (tmp_path / "eval_bundle").mkdir()
    (tmp_path / "eval_bundle" / "core.yaml").touch()
    (tmp_path / "tasks" / "gsm8k" / "main").mkdir(parents=True)
    (tmp_path / "tasks" / "gsm8k" / "main" / "train-00000-of-00001.parquet").touch()
    assert missing_bytes(step) == sum(SIZES.values()) - SIZES["core"] - SIZES["gsm8k"]
    assert not is_whole(step)
    found = estimate(step, {}, None)
    assert (found.seconds, found.ground) == (missing_bytes(step) / 20e6, "20 MB/s, supposed")


def test_without_a_network_it_says_what_is_missing_and_what_to_give(tmp_path, monkeypatch):
    def fetch(name: str, cache: Path, *, progress: bool) -> None:
        if name != "gsm8k":
            raise UserError(f"{name} could not be fetched in 5 tries: no route to host")
        folder = cache / "tasks" / name
        folder.mkdir(parents=True)
        (folder / "a.parquet").touch()

    monkeypatch.setattr(fetching, "fetch", fetch)
    with pytest.raises(UserError) as failure:
        fetch_all(["gsm8k", "arc", "core", "smoltalk"], tmp_path)
    assert str(failure.value) == (
        "not there: arc, core, smoltalk. arc could not be fetched in 5 tries: no route to host. "
        "Local copies do as well: --chat-data FOLDER (with arc, smoltalk as on the Hub) and "
        "--core-bundle FOLDER (what eval_bundle.zip unpacks to) of train/speedrun.py"
    )


def test_the_recipe_fetches_what_the_step_says(tmp_path, monkeypatch):
    fetched = []
    for name in ("fetch", "fetch_bundle"):
        note = lambda *what, progress, name=name: fetched.append((name, *what))  # noqa: E731
        monkeypatch.setattr(fetching, name, note)
    step = plan_of(tmp_path).steps[0]
    monkeypatch.setattr(sys, "argv", [step.script, *step.arguments])
    recipe.main()
    tasks = [("fetch", name, tmp_path) for name in SIZES if name != "core"]
    assert fetched == [("fetch_bundle", tmp_path), *tasks]
