"""Moments on a device's own clock, read later, so that the host never waits while it measures."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

# A CUDA event that was recorded, or seconds of the host's clock.
Moment = torch.cuda.Event | float


def now(device: torch.device) -> Moment:
    """When the device has done all that was launched so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def timed(device: torch.device, into: list[tuple[Moment, Moment]]) -> Iterator[None]:
    """Append the moments before and after the body."""
    before = now(device)
    yield
    into.append((before, now(device)))


def median_ms(pairs: Sequence[tuple[Moment, Moment]]) -> float:
    """Of the times between; waits for the last."""
    return statistics.median(elapsed_ms(a, b) for a, b in pairs)


def elapsed_ms(start: Moment, end: Moment) -> float:
    """From start to end; waits until both have passed."""
    if isinstance(start, float):
        assert isinstance(end, float), "moments of two devices"
        return 1e3 * (end - start)
    assert not isinstance(end, float), "moments of two devices"
    end.synchronize()
    return start.elapsed_time(end)
