"""Programs of train/ started as users start them, but for the seconds that importing PyTorch takes:
each is forked from a process that has done so, and runs its file as Python would.

That process is this file, run as a program. It has one thread, and neither a GPU nor the
interpreter of Triton's kernels.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
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


def start(folder: Path, program: str, *flags: object, **environment: object) -> Started:
    """train/{program}.py. folder: is made, for what this process says of itself.

    environment: variables that differ from this process's.
    """
    folder.mkdir(parents=True)
    variables = _outside_of_tests() | {name: str(value) for name, value in environment.items()}
    job = {
        "folder": str(folder.absolute()),
        "arguments": [str(ROOT / "train" / f"{program}.py"), *map(str, flags)],
        "working_folder": str(Path.cwd()),
        "environment": variables,
    }
    server = _server()
    assert server.poll() is None
    assert server.stdin is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return Started(folder)


def start_ranks(folder: Path, count: int, program: str, *flags: object) -> list[Started]:
    """As many processes as torchrun would start on one node, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(folder / f"rank{rank}", program, *flags, RANK=rank, LOCAL_RANK=rank, **world)
        for rank in range(count)
    ]


def _outside_of_tests() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, text=True, env=_outside_of_tests()
    )

    def end() -> None:
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return server


def _serve() -> None:
    for module in _IMPORTED:
        import_module(module)
    # Nobody waits for the processes that tell of the programs.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            _run_and_tell(**json.loads(line))


def _run_and_tell(
    folder: str, arguments: list[str], working_folder: str, environment: dict[str, str]
) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
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
