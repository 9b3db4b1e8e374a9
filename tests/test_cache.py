"""What several commands make at once is made by one of them, and a killed one's rest goes."""

import errno
import fcntl
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from gptfast.cache import build_once, place, sole_maker
from gptfast.errors import UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_builds_and_the_others_find_it(tmp_path):
    folder, built = tmp_path / "cache" / "made", []

    def build(scratch: Path) -> None:
        time.sleep(0.02)
        (scratch / "content").write_text("whole")
        built.append(scratch)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(partial(build_once, build=build), [folder] * 8)) == [folder] * 8
    assert len(built) == 1
    assert names(folder.parent) == {"made"}
    assert (folder / "content").read_text() == "whole"


def test_nobody_else_is_inside_and_the_lock_goes_with_the_last(tmp_path):
    inside, most = [], []

    def work(number: int) -> None:
        with sole_maker(tmp_path / "target") as scratch:
            inside.append(number)
            assert not list(scratch.iterdir())
            (scratch / "half").write_text("half")
            time.sleep(0.001)
            most.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert most == [1] * 40
    assert names(tmp_path) == set()


def test_what_a_killed_one_left_is_removed(tmp_path):
    left = tmp_path / f".made.{platform.node()}"
    left.mkdir()
    (left / "half").write_text("half")
    (tmp_path / ".made.lock").write_text("")
    build_once(tmp_path / "made", lambda scratch: (scratch / "whole").touch())
    assert names(tmp_path) == {"made"}
    assert names(tmp_path / "made") == {"whole"}


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        build_once(tmp_path / "made", lambda scratch: 1 / 0)
    assert names(tmp_path) == set()


def test_a_folder_that_another_machine_has_placed_stays(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "made"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "whose").write_text(folder.name)
    place(ours, theirs)
    assert (theirs / "whose").read_text() == "made"
    with pytest.raises(FileNotFoundError):
        place(tmp_path / "missing", tmp_path / "new")


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"made\.lock cannot be locked: Function not.*--cache"):
        build_once(tmp_path / "made", lambda scratch: None)
