"""A run's folder, its environment, and how a recipe starts and ends."""

import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path

import torch

from gptfast.errors import UserError
from gptfast.loop import Summary, TrainingDivergedError
from gptfast.parallel import World
from gptfast.plots import plot_run


def exit_code(recipe: Callable[[], None]) -> int:
    """Run a recipe: 0 when it ends, 2 with one line on stderr when the user can mend the
    cause, 1 with one line when training diverged."""
    try:
        recipe()
    except UserError as error:
        if not error.told_elsewhere:
            sys.stderr.write(f"error: {error}\n")
        return 2
    except TrainingDivergedError as error:
        sys.stderr.write(f"stopped: {error}\n")
        return 1
    return 0


def open_run_folder(
    out: Path | None, name: str, settings: object, world: World, *, resume: bool
) -> Path:
    """The folder of this run, made, with settings.json and environment.json in it.

    out: what the user asked for. If nothing: runs/`name`, or the first of runs/`name`-2, -3, ...
    that holds no run yet; to resume, the last that does. UserError if the folder asked for holds
    another run already, or cannot be written.
    """
    # One process looks and makes, so that all agree.
    found: Path | str | None = None
    if world.is_main:
        try:
            found = out or _default_folder(Path("runs") / name, resume=resume)
            if not resume and _holds_a_run(found):
                found = f"{found} holds a run already: --resume continues it, --out names another"
            else:
                found.mkdir(parents=True, exist_ok=True)
                write_json(found / "settings.json", settings)
                write_json(found / "environment.json", environment(world))
        except OSError as error:
            found = f"cannot write to {found}: {error.strerror}"
    folder = world.gather(found)[0]
    if isinstance(folder, str):
        raise UserError(folder)
    return folder


def _holds_a_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists()


def _default_folder(first: Path, *, resume: bool) -> Path:
    folder, last = first, first
    for number in itertools.count(2):
        if not _holds_a_run(folder):
            return last if resume else folder
        folder, last = first.with_name(f"{first.name}-{number}"), folder
    raise AssertionError("unreachable")


def end_run(
    folder: Path, summary: Summary, world: World, *, title: str, say: Callable[[str], None]
) -> None:
    """Write summary.json and curves.png (rank 0), and say how it went and where everything lies."""
    if not world.is_main:
        return
    write_json(folder / "summary.json", summary)
    if summary.stopped:
        command = resume_command(folder)
        say(f"stopped after step {summary.step}; continue with:\n  {command}")
    else:
        before, after = summary.evaluations[0], summary.evaluations[-1]
        say(
            f"done: {summary.step} steps in {summary.training_seconds:.1f} s, "
            f"{summary.tokens_per_second:,.0f} tokens/s; validation "
            f"{before['val_bpb']:.4f} -> {after['val_bpb']:.4f} bits per byte; "
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
    """The command that continues this run, as the user would type it."""
    arguments = [a for a in sys.argv if a != "--resume"]
    if not any(a.startswith("--out") for a in arguments):
        arguments += ["--out", str(folder)]
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    start = f"torchrun --nproc_per_node={processes}" if processes else "python"
    return f"{start} {shlex.join(arguments)} --resume"


def write_json(path: Path, value: object) -> None:
    """Readable JSON; dataclasses as objects, paths as strings."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    path.write_text(json.dumps(plain, indent=2, default=str) + "\n", encoding="utf-8")


def write_section(folder: Path, title: str, body: str) -> None:
    """One section of the training report: base-model-loss.md for "Base model loss"."""
    path = folder / f"{title.lower().replace(' ', '-')}.md"
    time = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    path.write_text(f"## {title}\n\ntimestamp: {time}\n\n{body}", encoding="utf-8")


def environment(world: World) -> dict:
    """What a figure of this run depends on besides its settings."""
    on_gpu = world.device.type == "cuda"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "processes": world.size,
        "nodes": world.nodes,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else "cpu",
        "cpu_count": os.cpu_count(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        # No git, or no checkout: the commit is unknown.
        return None
    return done.stdout.strip()


def _version(module: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None
