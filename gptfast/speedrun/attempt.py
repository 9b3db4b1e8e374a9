"""One process of a step: started, watched, stopped; and the lock that it holds while it lives.

A speedrun may die at any moment. Its process is then told by the kernel (it saves and ends) and
holds the lock until it has; the next speedrun waits for that before it looks at anything.
"""

import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gptfast.errors import UserError
from gptfast.machine import ROOT
from gptfast.nvml import EnergyMeter
from gptfast.parallel import SHUTDOWN_VARIABLE

_LOOK_SECONDS = 0.1
# Of a log, from its end: enough for the error that ended it.
_TAIL_BYTES = 64 * 1024
# What torchrun, from torch 2.12 on, gives its processes to save and end; d32's checkpoint, 16 GB,
# takes as long at 100 MB/s.
_SHUTDOWN_SECONDS = 180
# Longer than that.
_LOCK_SECONDS = _SHUTDOWN_SECONDS + 30.0
_PR_SET_PDEATHSIG = 1


@contextmanager
def locked(folder: Path, status: Callable[[str], None]) -> Iterator[int]:
    """Hold the folder's lock; gives its file descriptor, which processes inherit to hold it, too.

    UserError if something else still holds it after three minutes and a half.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began > _LOCK_SECONDS:
                    raise UserError(
                        f"another speedrun is at work in {folder}: wait for it, or name another "
                        "--out"
                    ) from None
            status("waiting for a step of an earlier speedrun to end")
            time.sleep(_LOOK_SECONDS)
        yield file.fileno()


class Attempt:
    """A running process whose output goes to the end of a log.

    gpus: how many of the node's it uses, the first ones. stopped: whether it was asked to end.
    """

    def __init__(self, command: Sequence[str], log: Path, lock: int, *, gpus: int) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.stopped = log, False
        self._meter, self._began = EnergyMeter(range(gpus)), time.monotonic()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {
            SHUTDOWN_VARIABLE: str(_SHUTDOWN_SECONDS),
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
        }
        if not gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with log.open("ab") as file:
            self._start = file.tell()
            # In a session of its own: Ctrl-C reaches it once, from us, and not from the terminal.
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def wait(self, look: Callable[[], None]) -> int:
        """Its exit code once it has ended; `look` is called a few times a second until then.

        SIGINT and SIGTERM are handed on to it as a SIGTERM: it saves and ends.
        """
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._process.poll() is None:
                look()
                time.sleep(_LOOK_SECONDS)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._process.returncode

    def _stop(self, *_: object) -> None:
        self.stopped = True
        self._process.terminate()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def joules(self) -> float | None:
        """What its GPUs took since its start; None where they do not count."""
        return self._meter.joules()

    def output(self) -> list[str]:
        """The last lines that it wrote; of a progress bar, as it stands."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._start, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
        return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _end_with_parent() -> None:
    """Linux sends this process SIGTERM when the one that started it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
