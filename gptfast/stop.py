"""What asks a run to stop: SIGTERM, Ctrl-C, a terminal that is closed."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Signals closer to each other than this are one request.
_SAME_SIGNAL_SECONDS = 3.0


class StopRequest:
    """made: whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.made = False
        self._made_at = -math.inf
        self._terminals: list[int] = []

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """In the body SIGTERM, SIGINT and SIGHUP make the request; another, later, raises
        KeyboardInterrupt. A SIGHUP that is ignored, as nohup has it, stays ignored."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        # Of one that has gone it cannot be told any more.
        self._terminals = [file for file in (1, 2) if os.isatty(file)]
        previous = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            self._leave_terminals()
        at = time.monotonic()
        # Ctrl-C comes twice under torchrun: from the terminal, and from torchrun itself.
        if at - self._made_at > _SAME_SIGNAL_SECONDS and self.made:
            raise KeyboardInterrupt(f"second signal {number}: stopping at once, without saving")
        self.made, self._made_at = True, at

    def _leave_terminals(self) -> None:
        """Nobody reads there any more, and the next line would be an error before all is saved."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for file in self._terminals:
            os.dup2(nowhere, file)
        os.close(nowhere)
