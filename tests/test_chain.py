"""The whole chain as users start it, on CPU: base, mid, sft, rl, each from the run before, each
killed once and resumed."""

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from gptfast.checkpoint.files import list_steps, read_manifest, step_folder
from tests.tuning_cases import plain_newton_schulz, rows
from tests.warm_start import start

__all__ = ["plain_newton_schulz"]

# Stage -> its flags; what a stage needs beyond them comes from the run before.
STAGES = {
    "base": [
        *("--depth=2", "--sequence-len=64", "--vocab-size=300", "--tokenizer-chars=60000"),
        *("--device-batch-size=2", "--total-batch-size=128", "--num-iterations=20"),
        "--eval-tokens=1000",
    ],
    "mid": ["--train", "embedded[:40]", "--val", "embedded[:20]", "--eval-tokens=1000"],
    "sft": [
        *("--train", "embedded[:60]", "--val", "embedded[:20]", "--eval-tokens=1000"),
        *("--target-examples-per-step=3", "--init-lr-frac=0.3"),
        *("--accuracy-problems=4", "--accuracy-every=0"),
    ],
    "rl": [
        *("--source=sft", "--task=toy", "--num-iterations=20", "--examples-per-step=2"),
        *("--num-samples=2", "--normalise-together=2", "--device-batch-size=4"),
        *("--max-new-tokens=3", "--eval-examples=2", "--eval-samples=1"),
    ],
}
EVERY = ["--eval-every=0", "--save-every=4"]


def killed_after_a_checkpoint(stage: str, flags: list[str], folder: Path) -> None:
    """Start a stage as users do; kill -9 as soon as there is something to go on from."""
    run = start(folder / "started" / stage, f"train/{stage}.py", *flags)
    deadline = time.monotonic() + 100
    while not list_steps(folder / "runs" / f"{stage}-d2" / "checkpoints"):
        assert run.returncode is None, run.said()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.kill()
    assert run.wait(30) == -signal.SIGKILL


@pytest.mark.usefixtures("plain_newton_schulz")
def test_from_text_to_rewards_each_stage_killed_and_resumed(tmp_path, monkeypatch, capsys):
    # Sources are found in runs/ by the names of their stages.
    monkeypatch.chdir(tmp_path)
    # One thread: several would wait for each other longer than they compute.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    before = None
    for stage in STAGES:
        run = tmp_path / "runs" / f"{stage}-d2"
        flags = ["--device=cpu", *STAGES[stage], *EVERY, f"--cache={tmp_path / 'cache'}"]
        killed_after_a_checkpoint(stage, flags, tmp_path)
        # Resumed in this process, which has imported everything already.
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *flags, "--resume"])
        import_module(f"train.{stage}").main()
        out = capsys.readouterr().out
        assert "resumed after step" in out

        steps = rows(run, "step")
        summary = json.loads((run / "summary.json").read_text())
        assert [row["step"] for row in steps] == list(range(summary["step"]))
        assert summary["step"] >= 15
        newest = step_folder(run / "checkpoints", list_steps(run / "checkpoints")[-1])
        meta = read_manifest(newest)["meta"]
        assert (meta["stage"], meta["step"]) == (stage, summary["step"])
        if before is not None:
            assert meta["tokenizer"] == before["tokenizer"]
            assert meta["model_config"] == before["model_config"]
        before = meta
    for stage in ("base", "mid", "sft"):
        losses = [row["loss"] for row in rows(tmp_path / "runs" / f"{stage}-d2", "step")]
        assert losses[-1] < losses[0]
