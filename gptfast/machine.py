"""What a figure depends on besides its settings: code, hardware, software."""

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from gptfast.nvml import gpu_names

ROOT = Path(__file__).parent.parent
# What somebody reads: counted as the size of the code.
_TEXT = {".py", ".md", ".toml", ".html", ".css", ".js", ".sh", ".yaml"}
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")


def describe_machine() -> dict[str, object]:
    """JSON values; None for what cannot be told here. Takes no memory of a GPU."""
    on_gpu = torch.cuda.is_available()
    name, memory = (gpu_names() or [(None, None)])[0] if on_gpu else ("cpu", None)
    return {
        "git_branch": git("rev-parse", "--abbrev-ref", "HEAD"),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain")),
        "git_message": git("log", "-1", "--format=%s"),
        "platform": platform.system(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_cores": physical_cores(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "device": name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_bytes": memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
    }


@cache
def code_size(root: Path = ROOT) -> dict[str, int]:
    """Characters, lines and files of what is in the repository; of the folder without git."""
    listed = git("ls-files", "-z", root=root)
    names: Iterable[Path]
    if listed is None:
        names = (p for p in root.rglob("*") if not any(x.startswith(".") for x in p.parts))
    else:
        names = (root / name for name in listed.split("\0") if name)
    texts = [p.read_text("utf-8") for p in names if p.suffix in _TEXT and p.is_file()]
    return {
        "characters": sum(map(len, texts)),
        "lines": sum(text.count("\n") for text in texts),
        "files": len(texts),
    }


@cache
def dependencies(root: Path = ROOT) -> tuple[int, int]:
    """(what pyproject.toml asks for, those and everything they bring), extras left out; the
    second counts what is installed here."""
    text = (root / "pyproject.toml").read_text("utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    direct = re.findall(r'^\s*"([A-Za-z0-9._-]+)', block[1] if block else "", re.MULTILINE)
    found: set[str] = set()
    waiting = list(direct)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            # Not on this machine (what brings it needs it on others), so it brings nothing here.
            continue
        found.add(name)
        waiting += [_REQUIREMENT.findall(r)[0] for r in required if "extra ==" not in r]
    return len(direct), len(found)


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """What git says; None without git, or without a checkout."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version(distribution: str) -> str | None:
    """Of an installed distribution; None if it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str | None:
    """As it calls itself (Linux); None elsewhere."""
    named = re.search(r"^model name\s*: (.+)", _cpu_info(), re.MULTILINE)
    return named[1] if named else None


def physical_cores() -> int | None:
    """Cores without their hyper-threads (Linux); None elsewhere."""
    text = _cpu_info()
    places = zip(
        re.findall(r"^physical id\s*: (\d+)", text, re.MULTILINE),
        re.findall(r"^core id\s*: (\d+)", text, re.MULTILINE),
    )
    return len(set(places)) or None


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return ""
