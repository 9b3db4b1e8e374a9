"""Signals that ask a run to stop: which are heeded, and what a terminal takes with it."""

import os
import pty
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gptfast.stop import StopRequest

pytestmark = pytest.mark.usefixtures("not_under_nohup")


@contextmanager
def terminal() -> Iterator[int]:
    """stdout and stderr are a terminal; gives its other end."""
    kept = [os.dup(file) for file in (1, 2)]
    master, slave = pty.openpty()
    try:
        for file in (1, 2):
            os.dup2(slave, file)
        os.close(slave)
        yield master
    finally:
        for file, copy in zip((1, 2), kept):
            os.dup2(copy, file)
            os.close(copy)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_a_request_and_a_later_one_an_end(monkeypatch, number):
    handler, clock = signal.getsignal(number), [0.0]
    monkeypatch.setattr("gptfast.stop.time.monotonic", lambda: clock[0])
    request = StopRequest()
    with request.heeded():
        assert not request.made
        for clock[0] in (1.0, 3.0):
            os.kill(os.getpid(), number)
            assert request.made
        clock[0] = 6.1
        with pytest.raises(KeyboardInterrupt, match="without saving"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is handler


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest()
        with request.heeded():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.made
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_what_is_said_after_a_terminal_has_gone_is_no_error():
    request = StopRequest()
    with terminal() as other_end, request.heeded():
        os.close(other_end)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(1, b"nobody reads this\n")
        os.kill(os.getpid(), signal.SIGHUP)
        for file in (1, 2):
            assert os.write(file, b"saved\n") == 6


def test_a_file_takes_what_is_said_after_a_hang_up(capfd):
    request = StopRequest()
    with request.heeded():
        os.kill(os.getpid(), signal.SIGHUP)
        os.write(1, b"saved\n")
    assert capfd.readouterr().out == "saved\n"
