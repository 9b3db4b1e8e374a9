"""Running programs that a model wrote, without trusting them. Linux only.

Each program gets a fresh interpreter (`python -I`) with nothing of our environment and no stdin,
in a session of its own, with limits on time, memory, files, processes and output. It succeeds if
it reaches its end: its process then says so with a token drawn for this run. Leaving early, by
`sys.exit(0)`, by `os._exit(0)` or by a crash, is a failure. When it ends, or its time does,
all that it started ends with it, lingering threads and processes included.

How it is shut in depends on what the system allows, which `isolation()` finds out once:

"namespaces": the program has a network of its own, which leads nowhere; it sees no processes but
    its own; of the file system it sees the interpreter and the system's libraries, read-only,
    and a small empty /tmp, its working folder, which is gone afterwards. It has no capabilities,
    and where we are root it is a user that owns nothing. Needs user namespaces, which most
    systems give to everybody and most containers to nobody.
"filter": the kernel refuses it whatever would need those. It can make threads, but no process,
    socket or signal, and it can open no file for writing, not even /dev/null. But it can read
    the files that we can read, and the environment and memory of the same user's processes.

This is a boundary against what models write by mistake or to be rewarded for: it does no harm to
the run, to files or to other processes, and it talks to nobody. It is none against a program
that attacks the kernel or learns from timing; and a program that searches the interpreter it
shares with its judge for the token can fake success.
"""

import functools
import logging
import marshal
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from gptfast.errors import UserError
from gptfast.sandbox.filter import filter_for

Isolation = Literal["namespaces", "filter"]

_CHILD = Path(__file__).with_name("child.py")
# How long the child's start may take, on a machine with much else to do, before it is given up.
_START_SECONDS = 60.0
_MOST_WORKERS = 16
# Folder space, in largest files.
_FILES_IN_FOLDER = 4
# Loads from the standard library what the child has not loaded before it shut itself in.
_TRIAL = "import decimal, fractions, json, random, typing"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SandboxResult:
    """What became of a program.

    Attributes:
        success: it reached its end within all limits.
        stdout, stderr: what it wrote; bytes that are not UTF-8 become U+FFFD.
        error: None if it succeeded, otherwise what failed, such as "AssertionError: 2 != 3".
        timed_out: it ran until its time was up.
        memory_exceeded: it ended with a MemoryError.
    """

    success: bool
    stdout: str
    stderr: str
    error: str | None
    timed_out: bool
    memory_exceeded: bool


def run_program(
    source: str,
    *,
    timeout: float = 5.0,
    memory_bytes: int = 256 << 20,
    file_bytes: int = 4 << 20,
    processes: int = 8,
    open_files: int = 64,
) -> SandboxResult:
    """Run Python source in the sandbox. Safe to call in several threads.

    `__name__` is "program", so that `if __name__ == "__main__":` is not entered.

    Args:
        timeout: seconds from the program's start.
        memory_bytes: address space of each of its processes, the interpreter's own (some 30 MB)
            included. The reference has the same limit.
        file_bytes: size of each file that it writes, stdout and stderr among them. Beyond it
            writing fails. All files together can have four times as much.
        processes: processes and threads at a time, itself included. With "filter", it has one
            process, and threads as far as memory reaches.
        open_files: at a time, of each process.

    Raises:
        UserError: if this system has neither form of isolation.
        RuntimeError: if the sandbox, not the program, fails.
    """
    orders = {
        "source": source,
        "timeout": timeout,
        "memory_bytes": memory_bytes,
        "file_bytes": file_bytes,
        "processes": processes,
        "open_files": open_files,
    }
    return _run(orders, isolation())


def run_many(
    sources: Sequence[str], *, workers: int | None = None, **limits: Any
) -> list[SandboxResult]:
    """`run_program` for each source, with its limits; results in order.

    Args:
        workers: programs at a time. If None, one a CPU of this process, but at most 16: other
            ranks on this machine have programs to run, too.
    """
    # Once, before several threads could find it out at the same time.
    isolation()
    count = workers or min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(partial(run_program, **limits), sources))


@functools.cache
def isolation() -> Isolation:
    """The stronger kind of isolation that works here; logs a warning if it is only "filter".

    Raises:
        UserError: if none works.
    """
    cause = _failure("namespaces")
    if cause is None:
        return "namespaces"
    filter_cause = _failure("filter")
    if filter_cause is not None:
        raise UserError(
            f"programs cannot be sandboxed here: with namespaces {cause!r}, with a filter of "
            f"system calls {filter_cause!r}"
        )
    _log.warning(
        "no namespaces for sandboxed programs (%s): they have no network, processes or signals "
        "and write no files, but they can read what this user can read",
        cause,
    )
    return "filter"


def _failure(kind: Isolation) -> str | None:
    """Why a program cannot run in this kind of isolation; None if it can."""
    orders = {"source": _TRIAL, "timeout": 30.0, "memory_bytes": 256 << 20, "file_bytes": 4096}
    try:
        return _run(orders | {"processes": 1, "open_files": 64}, kind).error
    except RuntimeError as error:
        return str(error)


def _run(orders: dict[str, Any], kind: Isolation) -> SandboxResult:
    machine = os.uname().machine
    try:
        code = filter_for(machine, namespaces=kind == "namespaces")
    except KeyError as error:
        raise UserError(
            f"programs are sandboxed on x86_64 and aarch64, not on {machine}"
        ) from error
    with (
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        tempfile.TemporaryFile() as answer,
    ):
        orders = orders | {
            "namespaces": kind == "namespaces",
            "filter": code,
            "folder_bytes": _FILES_IN_FOLDER * orders["file_bytes"],
            "interpreter": _interpreter_folders(),
            "answer": answer.fileno(),
            "parent": os.getpid(),
        }
        exit_code = _run_child(orders, stdout, stderr)
        if exit_code != 0:
            cause = _text(stderr).strip().split("\n")[-1] or f"exit code {exit_code}"
            raise RuntimeError(f"the sandbox could not run a program: {cause}")
        return _result(_text(answer), orders["timeout"], _text(stdout), _text(stderr))


def _run_child(orders: dict[str, Any], stdout: IO[bytes], stderr: IO[bytes]) -> int:
    """Exit code of the child, which has ended in any case."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", "-X", "utf8", str(_CHILD)],
        stdin=subprocess.PIPE,
        # Files, whose size is limited, rather than pipes, which somebody would have to empty.
        stdout=stdout,
        stderr=stderr,
        pass_fds=[orders["answer"]],
        cwd="/",
        env=_environment(),
        start_new_session=True,
    )
    try:
        process.communicate(marshal.dumps(orders), orders["timeout"] + _START_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the sandbox did not end in {error.timeout:g} s") from error
    finally:
        # With it ends all that it has started.
        process.kill()
        process.wait()
    return process.returncode


def _result(answer: str, timeout: float, stdout: str, stderr: str) -> SandboxResult:
    timed_out, exit_code, how, message = answer.split(" ", 3)
    if timed_out == "1":
        message = f"still running after {timeout:g} s"
    elif not how:
        message = f"left before its end, with exit code {exit_code}"
    return SandboxResult(
        success=how == "finished",
        stdout=stdout,
        stderr=stderr,
        error=None if how == "finished" else message,
        timed_out=timed_out == "1",
        memory_exceeded=how == "memory",
    )


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _interpreter_folders() -> list[str]:
    """Where this interpreter and its packages are, by every name that leads there."""
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    return sorted((prefixes | {str(Path(prefix).resolve()) for prefix in prefixes}) - {"/"})


def _environment() -> dict[str, str]:
    # Threads of numeric libraries would take memory and processes for nothing.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    home = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}
    # Without it some interpreters do not start.
    libraries = "LD_LIBRARY_PATH"
    return home | threads | ({libraries: os.environ[libraries]} if libraries in os.environ else {})
