"""The main job as users start it, on CPU: torchrun, the preset, kill, resume, bad input."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from gptfast.run import exit_code
from tests.warm_start import start_ranks
from train import base

ROOT = Path(__file__).parent.parent
# Small enough that starting Python is most of the time.
TINY = [
    *("--depth=2", "--sequence-len=32", "--vocab-size=300", "--tokenizer-chars=100000"),
    *("--num-iterations=12", "--eval-every=4", "--eval-tokens=8192", "--save-every=4"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and tokenizer, made once for all runs of this file."""
    return tmp_path_factory.mktemp("cache")


def start(
    *flags: str, processes: int = 1, launcher: Sequence[str] | None = None
) -> subprocess.Popen:
    if launcher is None and processes > 1:
        launcher = ["--standalone", f"--nproc_per_node={processes}"]
    torchrun = ["-m", "torch.distributed.run", *launcher] if launcher else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / "train" / "base.py"), "--device=cpu", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def train(*flags: str, processes: int = 1) -> str:
    """What it said on stdout."""
    run = start(*flags, processes=processes)
    out, err = run.communicate(timeout=280)
    assert run.returncode == 0, f"exit code {run.returncode}\n{out}\n{err}"
    return out


def rows(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def figures(run: Path) -> list[tuple]:
    """What must be the same bit for bit in a resumed run."""
    losses = [(r["step"], r["loss"], r["grad_norm"]) for r in rows(run, "step")]
    return losses + [(r["step"], r["val_bpb"]) for r in rows(run, "eval")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run of two processes; what it said lies in it."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    flags = (*TINY, f"--cache={cache}", f"--out={run}", "--log-to", "tensorboard")
    out = train(*flags, processes=2)
    (run / "said.txt").write_text(out)
    return run


def test_a_run_ends_with_everything_it_promises(uninterrupted):
    run = uninterrupted
    assert "no GPU" in (run / "said.txt").read_text()
    steps, evaluations = rows(run, "step"), rows(run, "eval")
    assert [row["step"] for row in steps] == list(range(12))
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert [row["step"] for row in evaluations] == [0, 4, 8, 12]
    assert evaluations[-1]["val_bpb"] < 0.95 * evaluations[0]["val_bpb"]
    assert len(rows(run, "sample")[-1]["samples"]) == 7
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 12
    assert summary["skipped_steps"] == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000008", "step_000012"]
    assert list((run / "tensorboard").iterdir())


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, cache, uninterrupted):
    run = tmp_path / "run"
    flags = ("--device=cpu", *TINY, f"--cache={cache}", f"--out={run}")
    killed = start_ranks(tmp_path / "killed", 2, "train/base.py", *flags)
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "step_000004").exists():
        assert all(rank.returncode is None for rank in killed), [rank.said() for rank in killed]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for rank in killed:
        rank.kill()
    assert [rank.wait(60) for rank in killed] == [-signal.SIGKILL] * 2
    assert len(rows(run, "step")) < 12

    resumed = start_ranks(tmp_path / "resumed", 2, "train/base.py", *flags, "--resume")
    assert [rank.wait(200) for rank in resumed] == [0, 0], [rank.said() for rank in resumed]
    assert "resumed after step" in resumed[0].said()[0]
    assert figures(run) == figures(uninterrupted)


@pytest.mark.slow
def test_resumes_on_another_world_size(tmp_path, cache, uninterrupted):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = uninterrupted / "checkpoints" / "step_000008"
    (run / "checkpoints" / "step_000008").symlink_to(checkpoint)
    flags = (*TINY, f"--cache={cache}", f"--out={run}", "--resume")
    out = train(*flags, "--device-batch-size=8", "--total-batch-size=1024")
    assert "checkpoint of 2 processes on 1" in out
    assert [row["step"] for row in rows(run, "step")] == [8, 9, 10, 11]
    # The same weights at step 8 on the same text, packed into other rows.
    ours, theirs = (
        {row["step"]: row["val_bpb"] for row in rows(folder, "eval")}
        for folder in (run, uninterrupted)
    )
    assert ours[8] == pytest.approx(theirs[8], rel=2e-3)


@pytest.mark.slow
def test_two_nodes_train_as_one(tmp_path, cache, uninterrupted):
    """Two torchrun agents stand for two nodes: parameters are replicated, not sharded, between
    them, and the same text in the same order gives the same losses up to rounding."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    agents = [
        start(
            *(*TINY, f"--cache={cache}", f"--out={run}"),
            launcher=["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", *address],
        )
        for rank in range(2)
    ]
    for agent in agents:
        out, err = agent.communicate(timeout=280)
        assert agent.returncode == 0, f"{out}\n{err}"
    assert json.loads((run / "environment.json").read_text())["nodes"] == 2
    ours, theirs = rows(run, "step"), rows(uninterrupted, "step")
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=2e-3)


# The loop's own part is tested in one process with mid-training and SFT (tests/tuning_cases.py).
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_asked_to_stop_it_saves_at_the_next_step_and_exits_0(tmp_path, cache, processes):
    run = tmp_path / "run"
    flags = [f for f in TINY if "iterations" not in f] + ["--num-iterations=100000"]
    flags += [f"--cache={cache}", f"--out={run}", "--eval-every=0", "--save-every=0"]
    running = start(*flags, processes=processes)
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(rows(run, "step")) < 3:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if processes == 1:
        running.send_signal(signal.SIGTERM)
    else:
        # Ctrl-C: the terminal signals every process, and torchrun then its workers once more.
        for pid in (running.pid, *children(running.pid)):
            os.kill(pid, signal.SIGINT)
    out, err = running.communicate(timeout=90)
    assert running.returncode == 0 or processes > 1, err
    assert "--resume" in out, err
    done = len(rows(run, "step"))
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{done:06d}"]


def children(pid: int) -> list[int]:
    """Processes whose parent is pid."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def test_of_several_processes_one_tells_the_mistake(tmp_path, cache):
    flags = ("--device=cpu", *TINY, f"--cache={cache}", f"--out={tmp_path / 'run'}", "--depth=11")
    ranks = start_ranks(tmp_path / "ranks", 2, "train/base.py", *flags)
    assert [rank.wait(100) for rank in ranks] == [2, 2]
    told = [line for rank in ranks for line in rank.said()[1].splitlines()]
    assert sum(line.startswith("error: ") for line in told) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--depth=11"], "depths that work are 10 and 12"),
        (["--total-batch-size=1000"], "the nearest that work: 768 or 1024"),
        (["--data=/nowhere/at/all"], "/nowhere/at/all"),
        (["--device-batch-size=0"], "device_batch_size must be at least 1, got 0"),
        (["--num-iterations=0"], "gives 0 steps"),
        (["--resume"], "no complete checkpoint"),
        (["--attention=flash4"], "flash4"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, cache, flags, words, monkeypatch, capsys):
    flags = [*TINY, "--device=cpu", f"--cache={cache}", f"--out={tmp_path / 'run'}", *flags]
    monkeypatch.setattr(sys, "argv", ["base.py", *flags])
    assert exit_code(base.main) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert words in errors[0]
