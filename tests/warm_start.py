"""Programs started as users start them, but for the seconds that importing PyTorch takes: each is
forked from a process that has done so, and runs its file or module as Python would.

That process is this file, run as a program. It has one thread, and neither a GPU nor the
interpreter of Triton's kernels.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
# What the programs import, together with what they import late.
_IMPORTED = (
    *("train.base", "train.mid", "train.sft", "train.rl", "train.evaluate", "train.report"),
    *("torch._dynamo", "matplotlib.figure"),
)


class Started:
    """A process, much like subprocess.Popen's; what it says goes to files, which `said` reads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pid = int(self._wait_for("pid", seconds=120))

    @property
    def returncode(self) -> int | None:
        """Its exit code, or -n if signal n killed it; None while it runs."""
        told = self._folder / "exit"
        return int(told.read_text()) if told.exists() else None

    def wait(self, timeout: float) -> int:
        return int(self._wait_for("exit", seconds=timeout))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def said(self) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, so far."""
        return (self._folder / "out").read_text(), (self._folder / "err").read_text()

    def _wait_for(self, name: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while not (self._folder / name).exists():
            assert time.monotonic() < deadline, self._folder
            time.sleep(0.01)
        return (self._folder / name).read_text()


def start(
    folder: Path,
    *arguments: object,
    variables: Mapping[str, object] | None = None,
    working_folder: Path | None = None,
) -> Started:
    """`python *arguments`: a file of this repository and its flags, or -m, a module and its flags.

    folder: is made, for what is told of the process. variables: of its environment, beside those of
    a user's shell.
    """
    folder.mkdir(parents=True)
    further = {name: str(value) for name, value in (variables or {}).items()}
    job = {
        "folder": str(folder.absolute()),
        "arguments": list(map(str, arguments)),
        "working_folder": str(working_folder or Path.cwd()),
        "environment": _users_environment() | further,
    }
    server = _server()
    assert server.poll() is None
    assert server.stdin is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return Started(folder)


def start_ranks(folder: Path, count: int, *arguments: object) -> list[Started]:
    """As many processes as torchrun would start on one node, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(
            folder / f"rank{rank}",
            *arguments,
            variables=world | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in range(count)
    ]


def _users_environment() -> dict[str, str]:
    ours = ("PYTEST_", "TRITON_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # One thread, whatever a program asks for: several would wait for each other longer than they
    # compute.
    return kept | {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "PYTHONPATH": str(ROOT)}


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, text=True, env=_users_environment()
    )

    def end() -> None:
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return server


def _serve() -> None:
    for module in _IMPORTED:
        import_module(module)
    # Collecting garbage would write to, and so copy, what the programs share.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        if os.fork() == 0:
            _run_and_tell(**json.loads(line))


def _run_and_tell(
    folder: str, arguments: list[str], working_folder: str, environment: dict[str, str]
) -> NoReturn:
    told = Path(folder)
    program = os.fork()
    if program == 0:
        os.chdir(working_folder)
        os.environ.clear()
        os.environ.update(environment)
        for stream, path in enumerate((os.devnull, told / "out", told / "err")):
            file = os.open(path, os.O_RDWR | os.O_CREAT)
            os.dup2(file, stream)
            os.close(file)
        paths = environment["PYTHONPATH"].split(os.pathsep)
        sys.path[:0] = [path for path in paths if path not in sys.path]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(ROOT / arguments[0]), *arguments[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    _write_whole(told / "pid", program)
    _, status = os.waitpid(program, 0)
    _write_whole(told / "exit", os.waitstatus_to_exitcode(status))
    os._exit(0)


def _write_whole(path: Path, number: int) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(str(number))
    beside.replace(path)


if __name__ == "__main__":
    _serve()
