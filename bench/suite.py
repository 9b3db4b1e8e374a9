"""Checks and measures, a case and a direction at a time, all its providers together."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from bench.case import BOTH, Buffers, Case, Size, again_and_again, stages
from bench.check import Check
from bench.providers import EAGER, OURS
from bench.report import Row
from bench.timing import (
    LOAD_MS,
    Ceilings,
    Contender,
    Cost,
    Gpu,
    Samples,
    Stages,
    as_it_is,
    buffer_sets,
    interleave,
)

# How long the rounds of a group go on; ten are taken even if they last longer.
SECONDS = 1.0
# How long ours and a floor take turns, with nobody else: behind a rival that hardly multiplies a
# call finds a card that has rested longer than 100 ms of load make up for.
FLOOR_SECONDS = 6.0
# Ours is timed with triton.testing.do_bench too, where a call takes at least this long: below, its
# pair of events and the start and end of a single kernel are percents of what they enclose. Both
# passes have autograd between them, half a millisecond of the host, which do_bench, a call at
# a time, does not hide (0.32 ms of kernels were 0.56 there).
LONG_MS, LONG_BOTH_MS = 0.3, 2.0


class Result(NamedTuple):
    """One provider's row; without samples the row's note, and maybe a failure, says why."""

    row: Row
    samples: Samples | None = None
    failure: Exception | None = None


class Suite:
    """Keeps every result. Without a GPU it can only check, ours and eager.

    load_ms: how long products go on before each sample; do_bench: whether that method is asked too.
    """

    def __init__(self, gpu: Gpu | None, load_ms: float = LOAD_MS, do_bench: bool = True) -> None:
        self.gpu = gpu
        self.load_ms = load_ms
        self.do_bench = do_bench
        self.ceilings: Ceilings | None = None
        self._groups: dict[tuple[str, str, str], dict[str, Result]] = {}
        self._checked: tuple[tuple[str, str], Check] | None = None

    @property
    def rows(self) -> list[Row]:
        return [result.row for group in self._groups.values() for result in group.values()]

    def check(self, case: Case, size: Size) -> Check:
        """Once a case; only the last is kept, as compiled calls may hold memory."""
        key = (case.name, size.name)
        if self._checked is None or self._checked[0] != key:
            self._checked = None
            gc.collect()
            names = (OURS, EAGER) if self.gpu is None else case.providers
            self._checked = key, Check(case, names)
            self._release()
        return self._checked[1]

    def group(self, case: Case, size: Size, direction: str) -> dict[str, Result]:
        """Of all providers, measured when the first of them is asked for."""
        key = (case.name, size.name, direction)
        return self.once(key, lambda: self._measure(case, size, direction))

    def once(
        self, key: tuple[str, str, str], measure: Callable[[], dict[str, Result]]
    ) -> dict[str, Result]:
        """The results of a group, case, size and direction; `measure` is called the first time."""
        if key not in self._groups:
            if self.ceilings is None and self.gpu is not None:
                self.ceilings = self.gpu.ceilings(self.load_ms)
                self._release()
            self._groups[key] = measure()
            gc.collect()
            self._release()
        return self._groups[key]

    def instruments(self) -> tuple[Gpu, Ceilings]:
        """The GPU and what it was measured to do: known whenever `once` calls its `measure`."""
        assert self.gpu is not None, "measuring needs a GPU"
        assert self.ceilings is not None, "ceilings are measured first"
        return self.gpu, self.ceilings

    def _release(self) -> None:
        if self.gpu is not None:
            self.gpu.release()

    def _measure(self, case: Case, size: Size, direction: str) -> dict[str, Result]:
        gpu, ceilings = self.instruments()
        check, cost = self.check(case, size), case.cost[direction]
        count = buffer_sets(cost.bytes, gpu.l2_bytes)
        sets = [Buffers.of(case, check.calls[OURS]) for _ in range(count)]
        # What moves memory stays below the card's power limit, and needs no load.
        load_ms = self.load_ms if cost.flops else 0.0
        contenders: dict[str, Contender] = {}
        peaks: dict[str, int] = {}

        def enter(name: str, call: Any) -> None:
            # The first stretch allocates: who does not fit is out before the rounds begin.
            clobbers = name in case.clobbering
            timed, over = stages(call, direction, clobbers), sets
            if name in case.floors:
                # Prepared once: what a floor is made of may let a card rest between its calls (the
                # cross-entropy's products were 1.2 % faster so).
                timed, over = Stages(as_it_is, timed.run), [timed.prepare(each) for each in sets]
            contender = Contender(gpu, timed, over, load_ms)
            contender.sample()
            peak = gpu.peak_bytes(timed, over[0])
            # The arguments count too; those of who clobbers were copied, and are in already.
            peaks[name] = peak if clobbers else peak + sets[0].bytes
            contenders[name] = contender

        for name, call in {**check.calls, **case.floors}.items():
            check.attempt(name, enter, name, call)
            self._release()

        def in_turns(names: Iterable[str], seconds: float) -> dict[str, Samples]:
            return interleave(
                {name: contenders[name].sample for name in names},
                seconds=seconds,
                warm_up=1 if load_ms else 3,
            )

        samples = in_turns([name for name in contenders if name in case.providers], SECONDS)
        ours_beside: dict[str, float] = {}
        for name in case.floors:
            if name in contenders:
                duel = in_turns((OURS, name), FLOOR_SECONDS)
                samples[name], ours_beside[name] = duel[name], duel[OURS].quantile(0.5)

        results = {}
        for name in (*case.providers, *case.floors):
            row = Row(case.name, size.name, direction, name)
            if name not in samples:
                row = replace(row, note=check.notes[name])
                results[name] = Result(row, failure=check.failures.get(name))
                continue
            row = replace(
                row,
                **speed(samples[name], cost, ceilings),
                sm_ghz=median(contenders[name].ghz),
                peak_gib=peaks[name] / 2**30,
                error_ratio=check.ratio(name),
                errors=check.errors.get(name, {}),
                ours_ms=ours_beside.get(name),
                note="waits for the GPU" if contenders[name].waits_for_gpu else "",
            )
            if name == OURS:
                row = self._cross_checked(row, check.calls[OURS], sets[0])
            results[name] = Result(row, samples[name])
        return results

    def _cross_checked(self, row: Row, call: Any, buffers: Buffers) -> Row:
        """With do_bench's median, if that is asked for, the call long and to be had by itself."""
        long = LONG_BOTH_MS if row.direction == BOTH else LONG_MS
        if not self.do_bench or row.ms is None or row.ms < long:
            return row
        run = again_and_again(call, row.direction, buffers)
        if run is None:
            return row
        ms, ghz = self.instruments()[0].do_bench(run, row.ms)
        return replace(row, do_bench_ms=ms, do_bench_ghz=ghz)


def speed(samples: Samples, cost: Cost, ceilings: Ceilings) -> dict[str, Any]:
    """The figures of a row that follow from its times; the rate is in FLOPs where there are any."""
    ms = samples.quantile(0.5)
    return {
        "ms": ms,
        "p20": samples.quantile(0.2),
        "p80": samples.quantile(0.8),
        "gb_per_s": None if cost.flops else cost.bytes / ms / 1e6,
        "tflop_per_s": cost.flops / ms / 1e9 if cost.flops else None,
        "of_ceiling": ceilings.seconds(cost) * 1e3 / ms,
    }
