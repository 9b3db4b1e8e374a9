"""Mid-training, in this process: what a run leaves, what it learns, exact resume."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gptfast.checkpoint.files import read_manifest
from gptfast.config import RunSettings
from gptfast.config_chat import CPU_SYSTEM, MidSettings, MixtureSettings, SourceSettings
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.stage import Stage
from tests.tuning_cases import (
    figures,
    leave_out_newton_schulz_kernel,
    plain_newton_schulz,
    rows,
    run_stage,
    stop_at,
    write_conversations,
    write_source,
)
from train import mid

pytestmark = pytest.mark.usefixtures("plain_newton_schulz")
__all__ = ["plain_newton_schulz"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> MidSettings:
    folder = tmp_path_factory.mktemp("mid")
    return MidSettings(
        start=SourceSettings(str(write_source(folder / "base-d2"))),
        mixture=MixtureSettings(
            train=(f"{write_conversations(folder / 'own.jsonl')}:0.6",), cache=folder
        ),
        system=CPU_SYSTEM,
        run=RunSettings(out=folder / "whole", eval_every=3, eval_tokens=400, save_every=2),
    )


def summary_of(run: Path) -> dict:
    """Read as strictly as JSON is defined: Python alone knows NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads((run / "summary.json").read_text(), parse_constant=refuse)


def to_folder(settings: MidSettings, out: Path, **run: object) -> MidSettings:
    return replace(settings, run=replace(settings.run, out=out, **run))


@pytest.fixture(scope="module")
def whole(settings: MidSettings) -> Path:
    """A run from beginning to end."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_newton_schulz_kernel(patch)
        run_stage(mid.train, settings)
    return settings.run.out


def test_all_of_the_mixture_once_and_it_is_learned(whole):
    steps, evaluations = rows(whole, "step"), rows(whole, "eval")
    # 53 conversations of 20 tokens or so, 96 tokens a step, all of them learned.
    supervised = [row["supervised_tokens"] for row in steps]
    assert set(supervised[:-1]) == {96}
    assert 0 < supervised[-1] <= 96
    assert len(steps) == evaluations[-1]["step"] > 8
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert evaluations[-1]["val_bpb"] < 0.8 * evaluations[0]["val_bpb"]
    assert rows(whole, "sample")[-1]["samples"][0].startswith("<|bos|><|user_start|>Hello!")


def test_the_learning_rate_is_flat_and_falls_at_the_end(whole):
    multipliers = [row["lr_multiplier"] for row in rows(whole, "step")]
    flat = round(0.8 * len(multipliers))
    assert multipliers[:flat] == [1.0] * flat
    assert multipliers[-1] < 1.0


def test_the_run_is_all_that_the_next_stage_needs(whole, settings):
    newest = max((whole / "checkpoints").iterdir())
    meta = read_manifest(newest)["meta"]
    assert meta["stage"] == "mid"
    assert Path(meta["tokenizer_folder"]) == (whole / "tokenizer").absolute()
    assert meta["source"] == settings.start.source
    saved = json.loads((whole / "settings.json").read_text())
    assert saved["start"]["source"] == settings.start.source
    assert (whole / "curves.png").stat().st_size > 1000
    assert json.loads((whole / "summary.json").read_text())["skipped_steps"] == 0


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    settings, whole, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    # A hundred joules a session, on a machine that counts none.
    monkeypatch.setattr(Stage, "_joules", lambda self, meter, before: before + 100.0)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        said = run_stage(mid.train, to_folder(settings, run))
    assert "--resume" in said[-2]
    assert len(rows(run, "step")) < len(rows(whole, "step"))
    run_stage(mid.train, to_folder(settings, run, resume=True))
    assert figures(run) == figures(whole)
    ours, theirs = summary_of(run), summary_of(whole)
    assert ours["training_seconds"] == pytest.approx(sum(r["seconds"] for r in rows(run, "step")))
    assert ours["energy_joules"] == 200.0
    assert ours["evaluations"] == theirs["evaluations"]
    assert ours["loss"] == theirs["loss"]


def test_a_finished_run_that_is_resumed_stays_what_it_was(settings, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    run_stage(mid.train, to_folder(settings, run, resume=True))
    assert {**summary_of(run), "ended": None} == {**summary_of(whole), "ended": None}
    assert summary_of(run)["training_seconds"] > 0
    assert figures(run) == figures(whole)


def test_skipped_steps_are_counted_over_sessions_and_nan_is_null(settings, tmp_path, monkeypatch):
    forward, calls = GPT.forward, itertools.count()

    def poisoned(self, ids, targets=None, reduction="sum", **options):
        loss = forward(self, ids, targets, reduction, **options)
        training = targets is not None and reduction == "sum"
        return loss * math.nan if training and next(calls) in (1, 4) else loss

    monkeypatch.setattr(GPT, "forward", poisoned)
    short = replace(settings, num_iterations=5)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        run_stage(mid.train, to_folder(short, tmp_path))
    run_stage(mid.train, to_folder(short, tmp_path, resume=True))
    assert [row["skipped_steps"] for row in rows(tmp_path, "step")] == [0, 1, 1, 1, 2]
    assert summary_of(tmp_path)["skipped_steps"] == 2
    assert summary_of(tmp_path)["loss"] is None


def test_another_mixture_does_not_go_on_with_the_run(settings, whole, tmp_path):
    other = replace(settings, mixture=replace(settings.mixture, train=("embedded[:30]",)))
    begun = [(whole / name).read_text() for name in ("settings.json", "environment.json")]
    with pytest.raises(UserError, match="belongs to other conversations"):
        run_stage(mid.train, to_folder(other, whole, resume=True))
    assert [(whole / n).read_text() for n in ("settings.json", "environment.json")] == begun


def test_a_run_that_would_end_before_its_checkpoint_does_not_go_on(settings, whole):
    done = len(rows(whole, "step"))
    shorter = replace(settings, num_iterations=3)
    told = f"{done} steps are done, but the run is to end after 3: give --num-iterations {done}"
    with pytest.raises(UserError, match=told):
        run_stage(mid.train, to_folder(shorter, whole, resume=True))


def test_a_batch_that_does_not_divide_is_told_before_step_0(settings, tmp_path):
    odd = replace(settings, optim=replace(settings.optim, total_batch_size=100))
    with pytest.raises(UserError, match="the nearest that work: 96 or 192"):
        run_stage(mid.train, to_folder(odd, tmp_path / "run"))
