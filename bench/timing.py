"""How long does a call take on the GPU: L2-cold, under load, beside its rivals, the host left out?

A sample is one stretch between two CUDA events: a call on each of several sets of buffers, so that
none finds its own data in L2. What has to happen before a call, such as the forward pass of a
backward pass, is queued ahead of the stretch.

The host stays ahead of the GPU: if the first event has not passed when the last launch is queued,
the GPU cannot have waited for the host in between. Otherwise the sample is taken again, with a
spinning kernel in front of it that is twice as long as the one before. (A call that waits for the
GPU itself never gets there: it is timed as it is, and marked.)

Products run into the card's power limit: rested, an H200 multiplies 10 to 20 % faster than it keeps
up. So before each sample the same call goes on for LOAD_MS, as it does in training and in
triton.testing.do_bench; without that, a call was timed at whatever clock the rival before it had
left. The clock of the multiprocessors is read right behind every stretch.

Every contender gives one sample a round, in an order drawn anew, so that heat is the same for all
and none has always the same one before it. Reported are the median and the 20th and 80th percentile
of the rounds.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.testing

# How long products are repeated before each sample, as triton.testing.do_bench does for a median.
LOAD_MS = 100.0

# Clock cycles of a spinning kernel: half a millisecond at 2 GHz at first, 32 ms at the most.
HEAD_START = 1_000_000
LONGEST_HEAD_START = 64 * HEAD_START
# Of the one that reads the clock: long beside an event, short beside what changes clocks.
CLOCK_CYCLES = 1_000_000

# Exponentials, reciprocals and their like, a clock and multiprocessor, of compute capability 8.0,
# 9.0 and 10.0 (CUDA C++ Programming Guide, throughput of native arithmetic instructions).
SPECIAL_FUNCTIONS_PER_CLOCK = 16


class Stages(NamedTuple):
    """A call in two parts: `run` is timed, on what `prepare` made of one set of buffers."""

    prepare: Callable[[Any], Any]
    run: Callable[[Any], Any]


class Stretch(NamedTuple):
    ms: float  # a call
    ahead: bool  # whether all was queued before the GPU began
    ghz: float  # clock of the multiprocessors right behind it


@dataclass(frozen=True)
class Samples:
    ms: tuple[float, ...]

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.ms, q))


@dataclass(frozen=True)
class Cost:
    """What one call has to do at the least."""

    bytes: float = 0.0  # of device memory, read + written
    flops: float = 0.0  # of bf16 products
    special_functions: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.special_functions + other.special_functions,
        )


@dataclass(frozen=True)
class Ceilings:
    """What a GPU was measured to do in this session, a second."""

    copy: float  # bytes read + written by a device-to-device copy
    product: float  # FLOPs of a bf16 product
    special_functions: float

    def __str__(self) -> str:
        return (
            f"copy {self.copy / 1e12:.2f} TB/s (read + written), bf16 product "
            f"{self.product / 1e12:.0f} TFLOP/s, {self.special_functions / 1e12:.2f}e12 special "
            "functions/s"
        )

    def seconds(self, cost: Cost) -> float:
        """The roofline: the slowest of the three, as they can run side by side."""
        return max(
            cost.bytes / self.copy,
            cost.flops / self.product,
            cost.special_functions / self.special_functions,
        )


def buffer_sets(bytes_a_call: float, l2_bytes: int) -> int:
    """How many sets of buffers to take in turn.

    As many as move 32 times the L2, so that a stretch is long beside an event, and at least two;
    but one where a single call moves 64 times the L2: it evicts everything by itself.
    """
    if bytes_a_call >= 64 * l2_bytes:
        return 1
    return max(2, -(-32 * l2_bytes // int(bytes_a_call)))


class Gpu:
    """The current CUDA GPU and its clock; what else is here knows no GPU."""

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        self.properties = torch.cuda.get_device_properties("cuda")
        self.start, self.stop, self.clocked = (
            torch.cuda.Event(enable_timing=True) for _ in range(3)
        )

    @property
    def l2_bytes(self) -> int:
        return self.properties.L2_cache_size

    def stretch(
        self, stages: Stages, sets: Sequence[Any], *, load: int = 0, head_start: int = 0
    ) -> Stretch:
        """One call on each set, timed, behind `load` calls that are not and `head_start` cycles."""
        for turn in range(load):
            stages.run(stages.prepare(sets[turn % len(sets)]))
        states = [stages.prepare(buffers) for buffers in sets]
        if head_start:
            torch.cuda._sleep(head_start)
        self.start.record()
        # Results live to the end, so that no call writes where the one before it wrote.
        results = [stages.run(state) for state in states]
        self.stop.record()
        ahead = not self.start.query()
        torch.cuda._sleep(CLOCK_CYCLES)
        self.clocked.record()
        self.clocked.synchronize()
        del results
        ghz = CLOCK_CYCLES / self.stop.elapsed_time(self.clocked) / 1e6
        return Stretch(self.start.elapsed_time(self.stop) / len(sets), ahead, ghz)

    def peak_bytes(self, stages: Stages, buffers: Any) -> int:
        """The most that one call, with what is prepared for it, adds to what is allocated."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = stages.run(stages.prepare(buffers))
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def do_bench(self, call: Callable[[], Any], ms: float) -> tuple[float, float]:
        """(median ms by Triton's own method, GHz right behind): one call at a time between its own
        two events, each on the same buffers again, after a write over the L2."""
        median: Any = triton.testing.do_bench(
            call, warmup=LOAD_MS, rep=max(LOAD_MS, 10 * ms), return_mode="median"
        )
        return median, self.stretch(Stages(as_it_is, as_it_is), [None]).ghz

    def ceilings(self, load_ms: float = LOAD_MS, seconds: float = 3.0) -> Ceilings:
        """Copy, product and SM clock, the card hot: copies and products take turns."""
        pairs = [torch.randn(2, 2**28, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        n = 8192
        matrices = [torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

        copy = Contender(self, Stages(as_it_is, lambda pair: pair[0].copy_(pair[1])), pairs)
        product = Contender(
            self, Stages(as_it_is, lambda pair: pair[0] @ pair[1]), matrices, load_ms
        )
        samples = interleave({"copy": copy.sample, "product": product.sample}, seconds=seconds)
        # Special functions draw less power than products do: the clock of a card that hardly works.
        spin = Contender(self, Stages(as_it_is, torch.cuda._sleep), [20 * CLOCK_CYCLES])
        interleave({"spin": spin.sample}, seconds=0.0)
        clock = float(np.median(spin.ghz)) * 1e9
        multiprocessors = self.properties.multi_processor_count
        return Ceilings(
            copy=2 * pairs[0][0].nbytes / (samples["copy"].quantile(0.5) / 1e3),
            product=2 * n**3 / (samples["product"].quantile(0.5) / 1e3),
            special_functions=SPECIAL_FUNCTIONS_PER_CLOCK * multiprocessors * clock,
        )

    def release(self) -> None:
        torch.cuda.empty_cache()


def as_it_is(buffers: Any) -> Any:
    return buffers


def gpu_here() -> Gpu | None:
    return Gpu() if torch.cuda.is_available() else None


class Contender:
    """One provider's call; each `sample()` is the time of one stretch, in ms a call.

    The first sample comes without load: it tells how many calls make load_ms.
    """

    def __init__(self, gpu: Gpu, stages: Stages, sets: Sequence[Any], load_ms: float = 0.0):
        self.gpu = gpu
        self.stages = stages
        self.sets = sets
        self.load_ms = load_ms
        self.load = 0
        self.head_start = 0
        # No head start is long enough: the call itself waits.
        self.waits_for_gpu = False
        self.ghz: list[float] = []

    def sample(self) -> float:
        stretch = self._stretch()
        while not (stretch.ahead or self.waits_for_gpu):
            self.head_start = max(HEAD_START, 2 * self.head_start)
            if self.head_start > LONGEST_HEAD_START:
                self.head_start, self.waits_for_gpu = 0, True
            stretch = self._stretch()
        if self.load_ms and not self.load:
            # The load is a head start too, and one in which the card does not rest.
            self.load, self.head_start = math.ceil(self.load_ms / stretch.ms), 0
        self.ghz.append(stretch.ghz)
        return stretch.ms

    def _stretch(self) -> Stretch:
        return self.gpu.stretch(self.stages, self.sets, load=self.load, head_start=self.head_start)


def interleave(
    contenders: Mapping[str, Callable[[], float]],
    *,
    seconds: float,
    least: int = 10,
    most: int = 40,
    warm_up: int = 3,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Samples]:
    """Samples of each: `least` to `most` rounds, as many as `seconds` allow, after `warm_up`."""
    names, order = list(contenders), random.Random(0)
    ms: dict[str, list[float]] = {name: [] for name in names}
    begin = clock()
    for turn in range(warm_up + most):
        done = turn - warm_up
        if done == 0:
            begin = clock()
        if done >= least and clock() - begin >= seconds:
            break
        for name in order.sample(names, len(names)):
            value = contenders[name]()
            if done >= 0:
                ms[name].append(value)
    return {name: Samples(tuple(values)) for name, values in ms.items()}
