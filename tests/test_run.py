"""Which run is meant by a folder or a stage's name, who may write there, how it goes on."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gptfast import parallel
from gptfast.errors import UserError
from gptfast.plan import Summary
from gptfast.run import (
    exit_code,
    find_run,
    open_run_folder,
    prepare_to_write,
    resume_command,
    write_json,
    write_start,
)


def make_run(folder: Path, *steps: int, written: float = 0.0) -> Path:
    for step in steps:
        manifest = folder / "checkpoints" / f"step_{step:06d}" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
        os.utime(manifest, (written, written))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("")
    return folder


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def alive(folder: Path):
    """Another process holds the folder until the body has ended, and is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-IS", "-c", HOLD, str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def open_folder(out: Path | None, *, resume: bool = False) -> tuple[Path, list[str]]:
    """The folder of a run named base-d4, and what was said."""
    said: list[str] = []
    with parallel.start(cpu=True) as world:
        settings = {"depth": 4, "resume": resume}
        folder = open_run_folder(out, "base-d4", settings, world, resume=resume, say=said.append)
    return folder, said


def test_runs_that_are_started_together_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, third = (Path("runs") / f"base-d4{end}" for end in ("", "-2", "-3"))
    with alive(first):
        assert open_folder(None) == (second, [])
        make_run(second)
        assert open_folder(None) == (third, [])
        assert not (first / "settings.json").exists()
        # The newest run goes on, although the first, begun before it, holds nothing yet.
        assert open_folder(None, resume=True) == (second, [])
    # Killed: the lock went with its process.
    assert open_folder(None) == (first, [])


def test_a_run_that_is_alive_is_left_alone(tmp_path):
    with alive(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(UserError, match=r"a run is alive in .*run: wait for its end, or"):
                open_folder(tmp_path / "run", resume=resume)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    assert open_folder(tmp_path / "run", resume=True) == (tmp_path / "run", [])


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    folder, said = open_folder(tmp_path / "run")
    assert folder == tmp_path / "run"
    assert len(said) == 1
    assert f"{folder} cannot be locked (No locks available): see to it that no other" in said[0]


def test_what_a_resumed_run_tells_of_its_start(tmp_path):
    folder, _ = open_folder(tmp_path)
    environment = json.loads((folder / "environment.json").read_text())
    first = {**environment, "started": "2026-11-01 10:00:00", "processes": 8}
    (folder / "environment.json").write_text(json.dumps(first))
    # Opened to be resumed, the run may yet be refused: nothing is written.
    open_folder(tmp_path, resume=True)
    assert json.loads((folder / "environment.json").read_text()) == first
    assert json.loads((folder / "settings.json").read_text())["resume"] is False
    with parallel.start(cpu=True) as world:
        write_start(folder, {"depth": 4, "resume": True}, world, resume=True)
    now = json.loads((folder / "environment.json").read_text())
    assert (now["started"], now["processes"]) == ("2026-11-01 10:00:00", 1)
    assert json.loads((folder / "settings.json").read_text())["resume"] is True


def test_a_folder_is_itself(tmp_path, monkeypatch):
    run = make_run(tmp_path / "somewhere" / "mine", 10)
    assert find_run(run) == run
    assert find_run(str(run)) == run
    # A folder of a checkpoint alone will do, and a folder comes before a stage.
    (tmp_path / "base" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_run("base") == Path("base")


def test_a_stage_is_its_deepest_then_newest_run(tmp_path):
    make_run(tmp_path / "sft-d4", 5, written=900)
    make_run(tmp_path / "sft-d20", 700, written=300)
    make_run(tmp_path / "sft-d20-2", 100, 200, written=500)
    make_run(tmp_path / "sft-d20-3", 900, written=400)
    make_run(tmp_path / "base-d26", 5)
    # Deeper, but there is nothing to load yet; and names that are not a run's.
    make_run(tmp_path / "sft-d32")
    make_run(tmp_path / "sft-d40-old", 5)
    assert find_run("sft", tmp_path) == tmp_path / "sft-d20-2"
    assert find_run(Path("base"), tmp_path) == tmp_path / "base-d26"


def test_what_is_not_there_is_told_with_what_is(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"checkpoint: {tmp_path / 'runs'} has no runs")):
        find_run("mid", tmp_path / "runs")
    make_run(tmp_path / "mid-d20")
    make_run(tmp_path / "base-d20", 5)
    with pytest.raises(
        UserError, match=r"no run of the stage mid with a checkpoint: .* has base-d20, mid-d20"
    ):
        find_run("mid", tmp_path)
    with pytest.raises(
        UserError, match=r"smt is no run's folder; give one, or a stage \(base, mid, sft, rl\): "
    ):
        find_run("smt", tmp_path)


@pytest.mark.parametrize(
    ("torchrun", "start"),
    [
        ({}, "python"),
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}, "torchrun --nproc_per_node=8"),
        (
            {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"},
            "torchrun --nnodes=2 --node_rank=0 --master_addr=node0 --master_port=29511 "
            "--nproc_per_node=8",
        ),
    ],
    ids=["one process", "one node", "two nodes"],
)
def test_the_command_that_continues_starts_as_many_processes_on_as_many_nodes(
    monkeypatch, torchrun, start
):
    # torchrun tells these of one node too, where they say nothing that is worth repeating.
    address = {"GROUP_RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29511"}
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**address, **torchrun}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train/base.py", "--depth", "4"])
    command = resume_command(Path("my runs/d4"))
    assert command == f"{start} train/base.py --depth 4 --out 'my runs/d4' --resume"


def test_a_file_is_known_to_be_writable_before_there_is_anything_to_write(tmp_path):
    new, old = tmp_path / "made" / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    for path in (new, old):
        prepare_to_write(path)
    assert new.parent.is_dir()
    assert not new.exists()
    assert old.read_text() == "kept"
    for path, why in ((old / "under.json", "Not a directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"--out {path} cannot be written: {why}"):
            prepare_to_write(path)


def test_what_is_no_number_is_null_in_a_runs_files(tmp_path):
    summary = Summary(step=3, loss=float("nan"), evaluations=[{"step": 0, "val_bpb": float("inf")}])
    write_json(tmp_path / "summary.json", {**asdict(summary), "folder": tmp_path})
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["step"], found["loss"], found["folder"]) == (3, None, str(tmp_path))
    assert found["evaluations"] == [{"step": 0, "val_bpb": None}]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_memory_that_runs_out_is_one_line(capsys):
    def recipe() -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
            "79.10 GiB of which 1.20 GiB is free. Of the allocated memory 70 GiB is allocated by"
        )

    assert exit_code(recipe) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert line.endswith("is free. Smaller batches take less: --help names their flags")
