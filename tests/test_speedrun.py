"""A speedrun: what it skips, and how it goes on after anything, on quick steps that stand in for
the real ones."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError

from gptfast import parallel
from gptfast.errors import UserError
from gptfast.speedrun import (
    Followers,
    Plan,
    StepFailedError,
    StoppedError,
    attempt,
    follow,
    run_plan,
)
from gptfast.speedrun.plan import Step
from gptfast.speedrun.settings import NodeSettings
from gptfast.speedrun.state import DONE, INTERRUPTED, RUNNING, STOPPED, State

ROOT = Path(__file__).parent.parent

# What a step does in these tests. A stage takes ten moments, leaves a checkpoint at each, saves and
# ends when asked to, and goes on at its last checkpoint; told to fail, it does so in the middle, or
# at once.
QUICK_STEP = """
import json, pathlib, signal, sys, time
kind, out, *flags = sys.argv[1:]
out = pathlib.Path(out)
out.mkdir(parents=True, exist_ok=True)
print("running", kind, *flags, flush=True)
if kind != "stage":
    (out / kind).write_text("{}")
    sys.exit(0)
if "--at-once" in flags:
    (out / "metrics.jsonl").touch()
    sys.exit("error: not enough memory")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
done = [int(p.name[5:]) for p in out.glob("checkpoints/step_*")]
if bool(done) != ("--resume" in flags):
    sys.exit("error: resumed what was not begun, or began what was there")
for step in range(max(done, default=0), 10):
    time.sleep(0.05)
    folder = out / "checkpoints" / f"step_{step + 1:06d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    print("step", step + 1, flush=True)
    if asked or ("--fail" in flags and step == 4):
        break
if "--fail" in flags:
    sys.exit("error: no such text" if "--clear" in flags else 7)
stopped = step < 9
(out / "summary.json").write_text(json.dumps({"stopped": stopped}))
"""


class Silent:
    """A console that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shown: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def status(self, line: str) -> None:
        self.shown.append(line)


def quick_plan(out: Path, **flags: list[str]) -> Plan:
    """tokenizer -> base -> loss, base -> mid -> report, with further flags by step."""

    def step(name: str, kind: str, folder: Path, **more) -> Step:
        arguments = (kind, str(folder), *flags.get(name, []))
        outputs = more.pop("outputs", ((folder, kind),))
        return Step(name, "train/none.py", arguments, outputs, **more)

    def stage(name: str, source: str) -> Step:
        folder = out / f"{name}-d2"
        outputs = ((folder, "summary.json"),)
        more = {"outputs": outputs, "after": (source,), "owns": folder, "resumable": True}
        return step(name, "stage", folder, **more)

    evaluation = out / "base-d2" / "evaluation" / "step_000010"
    steps = (
        step("tokenizer", "report.json", out / "tok", owns=out / "tok", distributed=False),
        stage("base", "tokenizer"),
        step("loss", "loss.json", evaluation, after=("base",)),
        stage("mid", "base"),
        step("report", "report.html", out / "report", distributed=False, always=True),
    )
    folders = {"tokenizer": out / "tok", "base": out / "base-d2", "mid": out / "mid-d2"}
    return Plan(
        steps, (("core", "nobody asked"),), out / "speedrun-d2", 2, 1, on_gpu=False, folders=folders
    )


def command_in(folder: Path):
    script = folder / "quick_step.py"
    script.write_text(QUICK_STEP)

    def command(step: Step, extra: list[str]) -> list[str]:
        return [sys.executable, "-I", "-S", str(script), *step.arguments, *extra]

    return command


def run(plan: Plan, folder: Path) -> list[str]:
    """Runs it; what it said."""
    console = Silent()
    run_plan(plan, command_in(folder), console, machine={"device": "cpu"}, again="AGAIN")
    return console.lines


def records(plan: Plan) -> dict[str, dict]:
    return json.loads((plan.folder / "speedrun.json").read_text())["steps"]


def done_in(lines: list[str]) -> list[str]:
    return [line.split()[2] for line in lines if " done in " in line]


def test_every_step_runs_once_and_nothing_twice(tmp_path):
    plan = quick_plan(tmp_path)
    assert done_in(run(plan, tmp_path)) == ["tokenizer", "base", "loss", "mid", "report"]
    assert all(record["state"] == DONE for record in records(plan).values())
    log = (plan.folder / "logs" / "02-base.log").read_text().splitlines()
    assert log[0] == "running stage"
    assert log[-1] == "step 10"
    before = records(plan)
    # The report is made anew each time; it costs nothing.
    lines = run(plan, tmp_path)
    assert done_in(lines) == ["report"]
    assert sum("unchanged" in line for line in lines) == 4
    after = records(plan)
    assert all(after[name] == before[name] for name in before if name != "report")
    head = json.loads((plan.folder / "speedrun.json").read_text())
    assert head["machine"] == {"device": "cpu"}
    assert head["folders"]["base"] == "../base-d2"
    assert head["left_out"] == {"core": "nobody asked"}


def test_an_evaluation_with_other_flags_is_made_again_alone(tmp_path):
    run(quick_plan(tmp_path), tmp_path)
    lines = run(quick_plan(tmp_path, loss=["--more"]), tmp_path)
    assert done_in(lines) == ["loss", "report"]


def test_a_result_that_was_removed_is_made_again(tmp_path):
    plan = quick_plan(tmp_path)
    run(plan, tmp_path)
    next(tmp_path.glob("base-d2/evaluation/*/loss.json")).unlink()
    assert done_in(run(plan, tmp_path)) == ["loss", "report"]


def test_changed_files_of_the_users_change_what_is_made_from_them(tmp_path):
    text = tmp_path / "texts" / "a.txt"
    text.parent.mkdir()
    text.write_text("one")
    plan = quick_plan(tmp_path)
    steps = tuple(
        Step(**{**vars(step), "inputs": (text.parent,)}) if step.name == "loss" else step
        for step in plan.steps
    )
    plan = Plan(**{**vars(plan), "steps": steps})
    run(plan, tmp_path)
    assert done_in(run(plan, tmp_path)) == ["report"]
    text.write_text("two words")
    assert done_in(run(plan, tmp_path)) == ["loss", "report"]


def test_what_was_trained_is_never_overwritten(tmp_path):
    run(quick_plan(tmp_path), tmp_path)
    # Other settings, told as they differ.
    with pytest.raises(UserError, match=r"base-d2 was made without --longer 3, now it is with it"):
        run(quick_plan(tmp_path, base=["--longer", "3"]), tmp_path)
    # A model made from one that is gone: said before the other is trained anew.
    shutil.rmtree(tmp_path / "base-d2")
    with pytest.raises(UserError, match="mid-d2 was made from the base that was there before"):
        run(quick_plan(tmp_path), tmp_path)
    assert not (tmp_path / "base-d2").exists()
    shutil.rmtree(tmp_path / "mid-d2")
    assert done_in(run(quick_plan(tmp_path), tmp_path)) == ["base", "loss", "mid", "report"]
    # Half of a finished run is gone: for the user to decide.
    (tmp_path / "mid-d2" / "summary.json").unlink()
    (tmp_path / "mid-d2" / "metrics.jsonl").touch()
    shutil.rmtree(tmp_path / "mid-d2" / "checkpoints")
    with pytest.raises(UserError, match=r"mid-d2 was finished, but lacks .*summary.json"):
        run(quick_plan(tmp_path), tmp_path)


def test_a_folder_of_somebody_elses_is_refused(tmp_path):
    (tmp_path / "base-d2").mkdir()
    (tmp_path / "base-d2" / "precious").write_text("")
    with pytest.raises(UserError, match="base-d2 holds something that this speedrun did not make"):
        run(quick_plan(tmp_path), tmp_path)
    assert (tmp_path / "base-d2" / "precious").exists()
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize(("clear", "code"), [(["--clear"], 2), ([], 1)])
def test_a_failure_names_step_log_and_command_and_is_continued(tmp_path, clear, code):
    plan = quick_plan(tmp_path, base=["--fail", *clear])
    with pytest.raises(StepFailedError) as failure:
        run(plan, tmp_path)
    assert failure.value.code == code
    reason, *_, log, again = str(failure.value).splitlines()
    expected = "error: no such text" if clear else "exit code 7"
    assert reason == f"step base failed: {expected}"
    assert log == f"  log: {plan.folder / 'logs' / '02-base.log'}"
    assert again == "  go on with: AGAIN"
    assert records(plan)["base"]["state"] == "failed"
    assert not (tmp_path / "mid-d2").exists()
    # The same again: it goes on at its checkpoint.
    with pytest.raises(StepFailedError):
        run(plan, tmp_path)
    assert "--resume" in (plan.folder / "logs" / "02-base.log").read_text()


def test_after_a_failure_without_a_checkpoint_other_flags_may_be_given(tmp_path):
    """Of a first step that memory does not hold, say."""
    with pytest.raises(StepFailedError):
        run(quick_plan(tmp_path, base=["--batch", "64", "--at-once"]), tmp_path)
    assert list((tmp_path / "base-d2").iterdir()) == [tmp_path / "base-d2" / "metrics.jsonl"]
    lines = run(quick_plan(tmp_path, base=["--batch", "16"]), tmp_path)
    assert done_in(lines) == ["base", "loss", "mid", "report"]
    with pytest.raises(UserError, match="was made with --batch 16, now it is --batch 32: name"):
        run(quick_plan(tmp_path, base=["--batch", "32"]), tmp_path)


def test_a_step_that_is_left_out_after_it_was_killed_is_not_running(tmp_path):
    plan = quick_plan(tmp_path)
    plan.folder.mkdir()
    State(plan, {}).begin(plan.steps[3], Path("log"), anew=True)
    fewer = tuple(step for step in plan.steps if step.name not in ("base", "loss", "mid"))
    run(replace(plan, steps=fewer), tmp_path)
    assert records(plan)["mid"]["state"] == INTERRUPTED


def test_a_damaged_state_is_told(tmp_path):
    plan = quick_plan(tmp_path)
    plan.folder.mkdir()
    (plan.folder / "speedrun.json").write_text('{"steps": {"base": {"sta')
    with pytest.raises(UserError, match=r"speedrun.json is no speedrun's state, or it is damaged"):
        run(plan, tmp_path)


# A speedrun in a process of its own, to be killed.
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.test_speedrun import Silent, quick_plan, command_in
from gptfast.speedrun import run_plan
out = Path(sys.argv[2])
run_plan(quick_plan(out), command_in(out), Silent(), machine={}, again="AGAIN")
"""


def start_driver(out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(ROOT), str(out)])


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_it_goes_on_where_it_stopped(tmp_path):
    plan = quick_plan(tmp_path)
    killed = start_driver(tmp_path)
    wait_for(tmp_path / "base-d2" / "checkpoints" / "step_000003", killed)
    killed.kill()
    killed.wait()
    assert records(plan)["base"]["state"] == RUNNING
    # The step was told by the kernel: it saves and ends by itself, which is waited for.
    assert done_in(run(plan, tmp_path)) == ["base", "loss", "mid", "report"]
    found = records(plan)
    assert [found[name]["attempts"] for name in ("tokenizer", "base", "mid")] == [1, 2, 1]
    assert [r["state"] for r in found.values()] == [DONE] * 5
    assert len(list(tmp_path.glob("base-d2/checkpoints/*"))) == 10
    log = (plan.folder / "logs" / "02-base.log").read_text()
    # No moment was lost, none lived twice.
    assert [line for line in log.splitlines() if line.startswith("step")] == [
        f"step {i}" for i in range(1, 11)
    ]


def test_asked_to_stop_it_lets_the_step_save(tmp_path):
    plan, console = quick_plan(tmp_path), Silent()

    def stop(line: str) -> None:
        console.shown.append(line)
        if "base" in line and " step " in line and len(console.shown) < 1000:
            console.shown += [""] * 1000
            os.kill(os.getpid(), signal.SIGTERM)

    console.status = stop
    with pytest.raises(StoppedError, match=r"stopped in step base; go on with:\n  AGAIN"):
        run_plan(plan, command_in(tmp_path), console, machine={}, again="AGAIN")
    assert records(plan)["base"]["state"] == STOPPED
    assert json.loads((tmp_path / "base-d2" / "summary.json").read_text()) == {"stopped": True}
    assert done_in(run(plan, tmp_path)) == ["base", "loss", "mid", "report"]


@pytest.mark.parametrize("users", [None, "600"])
def test_torchrun_waits_longer_than_30_seconds_for_a_save(tmp_path, monkeypatch, users):
    monkeypatch.delenv(parallel.SHUTDOWN_VARIABLE, raising=False)
    if users:
        monkeypatch.setenv(parallel.SHUTDOWN_VARIABLE, users)
    command = ["printenv", parallel.SHUTDOWN_VARIABLE]
    with attempt.locked(tmp_path, print) as lock:
        process = attempt.Attempt(command, tmp_path / "log", lock, gpus=0)
        assert process.wait(lambda: None) == 0
    assert process.output() == [users or "180"]
    # A speedrun that is started meanwhile waits for it.
    assert attempt._LOCK_SECONDS > 180


# The second node; the first one is the test itself.
FOLLOWER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.test_speedrun import quick_plan, command_in
from gptfast.speedrun import follow
from gptfast.speedrun.settings import NodeSettings
out = Path(sys.argv[2])
node = NodeSettings(nodes=2, node_rank=1, master_port=int(sys.argv[3]))
follow(quick_plan(out), node, command_in(out), print)
"""


def test_two_nodes_run_what_the_first_decides(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "second").mkdir()
    command = [sys.executable, "-c", FOLLOWER, str(ROOT), str(tmp_path / "second"), str(port)]
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    others = Followers(NodeSettings(nodes=2, master_port=port))
    plan = quick_plan(tmp_path)
    try:
        run_plan(plan, command_in(tmp_path), Silent(), machine={}, again="AGAIN", others=others)
    finally:
        others.end()
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    # Those that run alone, tokenizer and report, ran on the first alone.
    assert [line.split(":")[0] for line in out.splitlines()] == ["base", "loss", "mid"]
    assert (tmp_path / "second" / "mid-d2" / "summary.json").exists()
    assert not (tmp_path / "second" / "tok").exists()


def test_a_node_that_has_gone_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("gptfast.speedrun.nodes._SILENCE", timedelta(seconds=0.05))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = Followers(NodeSettings(nodes=2, master_port=port))
    others.start(quick_plan(tmp_path).steps[1], [])
    with pytest.raises(UserError, match="node 1 has gone"):
        others.results()


def test_another_node_notices_that_the_first_has_gone(tmp_path, monkeypatch):
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise DistNetworkError("Failed to recv, got 0 bytes")

    monkeypatch.setattr("gptfast.speedrun.nodes._store", lambda node: Gone())
    node = NodeSettings(nodes=2, node_rank=1)
    with pytest.raises(UserError, match="first node's speedrun has ended; start it again on all"):
        follow(quick_plan(tmp_path), node, command_in(tmp_path), print)
