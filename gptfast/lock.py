"""One living process a folder: a lock that goes with the process, however it ends.

A lock by fcntl's lockf belongs to a process: a fork does not inherit it, and the process itself may
take it again. Closing any file that was opened on the same path would give it up, so the one opened
here is never closed, and nobody else is to read it.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

_NAME = "lock"


def lock_folder(folder: Path, say: Callable[[str], None]) -> bool:
    """Hold the folder, made if missing, until this process ends; whether no other process holds
    it. Where the file system knows no locks that is told, and nobody is kept out."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        # Which of the two is left to the operating system.
        os.close(file)
        return False
    except OSError as error:
        os.close(file)
        say(
            f"{folder} cannot be locked ({error.strerror}): see to it that no other run is started "
            "with it while this one is alive"
        )
    return True
