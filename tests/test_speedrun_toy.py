"""The real thing at its smallest: from an empty folder to a report, killed twice on the way."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Small enough that starting Python is most of the time.
FLAGS = {
    "tokenizer": "--max-chars 200000",
    "base": "--sequence-len 64 --num-iterations 12 --device-batch-size 4 --total-batch-size 256 "
    "--save-every 3 --eval-every 0 --eval-tokens 2048",
    "evaluate": "--split-tokens 2048",
    "mid": "--num-iterations 8 --save-every 2 --eval-every 0 --eval-tokens 1024 "
    "--train embedded[:60]",
    "sft": "--num-iterations 1 --eval-every 0 --eval-tokens 1024 --train embedded[:20] "
    "--accuracy-problems 4",
}


def start(folder: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train" / "speedrun.py"), f"--out={folder}"]
    command += ["--vocab-size=300", f"--cache={cache}", "--device=cpu"]
    command += [f"--{name}-flags={flags}" for name, flags in FLAGS.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def kill_at(checkpoint: str, run: Path, *arguments: Path) -> None:
    """SIGKILL, once a run has written a checkpoint."""
    process = start(*arguments)
    deadline = time.monotonic() + 280
    while not (run / "checkpoints" / checkpoint / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_toy_speedrun_killed_twice_ends_in_a_complete_report(tmp_path):
    out = tmp_path / "runs"
    arguments = (out, tmp_path / "cache")
    kill_at("step_000003", out / "base-d2", *arguments)
    assert not (out / "mid-d2").exists()
    kill_at("step_000002", out / "mid-d2", *arguments)
    last = start(*arguments)
    said, _ = last.communicate(timeout=280)
    assert last.returncode == 0, said

    folder = out / "speedrun-d2"
    steps = json.loads((folder / "speedrun.json").read_text())["steps"]
    assert list(steps) == ["tokenizer", "base", "loss", "mid", "sft", "report"]
    assert {step["state"] for step in steps.values()} == {"done"}
    assert [steps[name]["attempts"] for name in ("tokenizer", "base", "loss", "mid", "sft")] == [
        1, 2, 1, 2, 1,
    ]  # fmt: skip
    assert said.count("unchanged; it took") == 3
    for stage, count in (("base", 12), ("mid", 8), ("sft", 1)):
        rows = map(json.loads, (out / f"{stage}-d2" / "metrics.jsonl").read_text().splitlines())
        assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(count))
    text = (folder / "report" / "report.md").read_text()
    # What would have to be fetched, and what was not asked for; nothing else.
    missing = re.findall(r"^## (.*)\n\n\*\*missing\*\*", text, re.MULTILINE)
    # The tokenizer is compared where its rivals can be had.
    assert missing[-5:] == [
        "Base model evaluation", "Chat evaluation mid", "Chat evaluation sft", "Chat RL",
        "Chat evaluation rl",
    ]  # fmt: skip
    assert "| Number of iterations | 8 | 765 |" in text
    assert "Total wall clock time: " in text
    assert (folder / "report" / "report.html").read_text().count("<svg") >= 8
