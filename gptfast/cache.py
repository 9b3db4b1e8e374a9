"""What is made in a folder that several commands share: by one of them, whole or not at all.

The lock is flock's: commands of one machine wait for each other, those of several where the shared
file system carries locks from one to the other. Where it does not (NFS mounted with nolock), each
machine works in a scratch folder of its own, and what is ready first stays.
"""

import fcntl
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gptfast.errors import UserError


@contextmanager
def sole_maker(target: Path) -> Iterator[Path]:
    """Wait until nobody else makes `target`; gives an empty scratch folder beside it.

    The body looks first whether `target` has been made meanwhile, and makes it with a rename. A
    killed one's scratch folder is removed by the next on the same machine.

    Raises:
        UserError: where the file system knows no locks.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{platform.node()}")
    with _locked(target.with_name(f".{target.name}.lock")):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """The folder; if it does not exist yet, `build` fills a scratch folder that becomes it."""
    if not folder.exists():
        with sole_maker(folder) as scratch:
            if not folder.exists():
                build(scratch)
                place(scratch, folder)
    return folder


def place(made: Path, folder: Path) -> None:
    """Give a new folder its name, unless another machine was faster: its folder is as good."""
    try:
        made.replace(folder)
    except OSError:
        if not folder.exists():
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file, which exists only while somebody holds it or waits."""
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be locked: {error.strerror}; name a --cache on a file system "
                    "with locks, such as a local disk"
                ) from error
            # Whoever held it may have removed it meanwhile; then another one may hold a new one.
            if not _is_at(file, path):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
