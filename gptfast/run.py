"""A run's folder, its environment, and how a recipe starts and ends."""

import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch

from gptfast.checkpoint.files import MANIFEST, list_steps, step_folder
from gptfast.errors import UserError
from gptfast.lock import lock_folder
from gptfast.loop import TrainingDivergedError
from gptfast.machine import describe_machine
from gptfast.metrics import plain
from gptfast.parallel import World, launcher
from gptfast.plan import Summary
from gptfast.plots import plot_run

STAGES = ("base", "mid", "sft", "rl")
# A run's folder by default: base-d20, base-d20-2.
_DEFAULT_NAME = re.compile(rf"({'|'.join(STAGES)})-d(\d+)(-\d+)?")


def exit_code(recipe: Callable[[], None]) -> int:
    """Run a recipe: 0 when it ends, 2 with one line on stderr when the user can mend the
    cause, 1 with one line when training diverged."""
    try:
        recipe()
    except UserError as error:
        if not error.told_elsewhere:
            sys.stderr.write(f"error: {error}\n")
        return 2
    except torch.OutOfMemoryError as error:
        # Of training MemoryNeed tells more.
        told = str(error).partition(" Of the allocated")[0]
        sys.stderr.write(f"error: {told} Smaller batches take less: --help names their flags\n")
        return 2
    except TrainingDivergedError as error:
        sys.stderr.write(f"stopped: {error}\n")
        return 1
    return 0


def open_run_folder(
    out: Path | None,
    name: str,
    settings: object,
    world: World,
    *,
    resume: bool,
    say: Callable[[str], None],
) -> Path:
    """The folder of this run, made, and locked until this process ends; settings.json and
    environment.json are in it, unless it is to be resumed: see `write_start`.

    out: what the user asked for. If nothing: runs/`name`, or the first of runs/`name`-2, -3, ...
    that holds no run yet and where none is alive; to resume, the last that holds one. UserError if
    the folder asked for holds another run already, if one is alive there, or if it cannot be
    written.
    """
    # One process looks and makes, so that all agree.
    found: Path | str | None = None
    if world.is_main:
        first = Path("runs") / name
        try:
            found = _take_folder(out, first, resume=resume, say=say)
            if not resume:
                write_start(found, settings, world, resume=False)
        except UserError as error:
            found = str(error)
        except OSError as error:
            found = f"cannot write to {out or first}: {error.strerror}"
    folder = world.gather(found)[0]
    if isinstance(folder, str):
        raise UserError(folder)
    return folder


def _take_folder(
    out: Path | None, first: Path, *, resume: bool, say: Callable[[str], None]
) -> Path:
    if out is None and not resume:
        return next(f for f in _numbered(first) if not _holds_a_run(f) and lock_folder(f, say))
    folder = out or _last_run(first)
    if not resume and _holds_a_run(folder):
        raise UserError(f"{folder} holds a run already: --resume continues it, --out names another")
    if not lock_folder(folder, say):
        raise UserError(f"a run is alive in {folder}: wait for its end, or name another --out")
    return folder


def write_start(folder: Path, settings: object, world: World, *, resume: bool) -> None:
    """settings.json and environment.json (rank 0), whole at any moment; of a resumed run they tell
    of its last session, but when the first one started."""
    if not world.is_main:
        return
    here, path = environment(world), folder / "environment.json"
    if resume and path.is_file():
        here["started"] = json.loads(path.read_text(encoding="utf-8"))["started"]
    write_json(folder / "settings.json", settings)
    write_json(path, here)


def _holds_a_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists()


def _numbered(first: Path) -> Iterator[Path]:
    """runs/base-d20, runs/base-d20-2, -3, ..."""
    yield first
    for number in itertools.count(2):
        yield first.with_name(f"{first.name}-{number}")


def _last_run(first: Path) -> Path:
    """The last of the numbered folders that holds a run, the first if none does."""
    there = itertools.takewhile(Path.exists, _numbered(first))
    return [first, *filter(_holds_a_run, there)][-1]


def find_run(source: str | Path, runs: Path = Path("runs")) -> Path:
    """The run that is meant: its folder, or of a stage (base, mid, sft, rl) the best one in `runs`.

    That is the one of the largest depth that has a checkpoint; of several, the one whose newest
    checkpoint is newest. UserError, with what is there, if there is none.
    """
    folder = Path(source)
    if _holds_a_run(folder) or (folder / "checkpoints").is_dir():
        return folder
    names = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
    found = [match for name in names if (match := _DEFAULT_NAME.fullmatch(name))]
    there = f"{runs} has {', '.join(match[0] for match in found) or 'no runs'}"
    stage = str(source)
    if stage not in STAGES:
        raise UserError(
            f"{folder} is no run's folder; give one, or a stage ({', '.join(STAGES)}): {there}"
        )
    ages = {
        runs / match[0]: (int(match[2]), written)
        for match in found
        if match[1] == stage and (written := _newest_checkpoint(runs / match[0])) is not None
    }
    if not ages:
        raise UserError(f"no run of the stage {stage} with a checkpoint: {there}")
    return max(ages, key=ages.__getitem__)


def stage_of(run: Path) -> str:
    """The stage that a run's folder is named after, otherwise its name."""
    name = run.resolve().name
    match = _DEFAULT_NAME.fullmatch(name)
    return match[1] if match else name


def _newest_checkpoint(run: Path) -> float | None:
    """When it was complete, in seconds; None if there is none."""
    root = run / "checkpoints"
    written = [step_folder(root, step) / MANIFEST for step in list_steps(root)]
    return max((path.stat().st_mtime for path in written if path.is_file()), default=None)


def end_run(
    folder: Path, summary: Summary, world: World, *, title: str, say: Callable[[str], None]
) -> None:
    """Write summary.json and curves.png (rank 0), and say how it went and where everything lies."""
    if not world.is_main:
        return
    write_json(folder / "summary.json", {**asdict(summary), "ended": timestamp()})
    if summary.stopped:
        where = ", on each node with its own --node_rank" if world.nodes > 1 else ""
        command = resume_command(folder)
        say(f"stopped after step {summary.step}; continue with{where}:\n  {command}")
    else:
        before, after = summary.evaluations[0], summary.evaluations[-1]
        names = [n for n in after if n in before and n not in ("step", "tokens")]
        # Of a resumed run, what was no number is None.
        pairs = [(n, before[n], after[n]) for n in names if None not in (before[n], after[n])]
        figures = ", ".join(f"{name} {first:.4f} -> {last:.4f}" for name, first, last in pairs)
        speed = summary.tokens_per_second
        speed = "" if speed is None else f", {speed:,.0f} tokens/s"
        say(
            f"done: {summary.step} steps in {summary.training_seconds:.1f} s{speed}; {figures}; "
            f"{summary.skipped_steps} step(s) skipped"
        )
    lies = {
        "checkpoints": folder / "checkpoints",
        "metrics": folder / "metrics.jsonl",
        "summary": folder / "summary.json",
        "curves": plot_run(folder, title),
    }
    say("\n".join(f"  {name}: {path}" for name, path in lies.items()))


def resume_command(folder: Path) -> str:
    """The command that continues this run, as the user would type it (on the first of several
    nodes, if this is called there)."""
    arguments = [a for a in sys.argv if a != "--resume"]
    if not any(a.startswith("--out") for a in arguments):
        arguments += ["--out", str(folder)]
    return shlex.join([*launcher(), *arguments, "--resume"])


def prepare_to_write(path: Path) -> None:
    """Make the folder of a file that is written at the end. UserError if it could not be, now."""
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        with path.open("a"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from error


def write_json(path: Path, value: object) -> None:
    """Readable JSON: see `plain`; paths as strings. What was there is replaced whole."""
    text = json.dumps(plain(value), indent=2, default=str, allow_nan=False)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def write_section(folder: Path, title: str, body: str) -> None:
    """One section of the training report: base-model-loss.md for "Base model loss"."""
    path = folder / f"{title.lower().replace(' ', '-')}.md"
    path.write_text(f"## {title}\n\ntimestamp: {timestamp()}\n\n{body}", encoding="utf-8")


def environment(world: World) -> dict:
    """What a figure of this run depends on besides its settings."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": timestamp(),
        "processes": world.size,
        "nodes": world.nodes,
        **describe_machine(),
        "device": "cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device),
    }


def timestamp() -> str:
    """Now, as runs record it."""
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")
