"""Checks and measures, a case and a direction at a time, all its providers together."""

import gc
from dataclasses import replace
from typing import Any, NamedTuple

from bench.case import BACKWARD, Buffers, Case, Size, stages
from bench.check import Check
from bench.providers import EAGER, OURS
from bench.report import Row
from bench.timing import Ceilings, Contender, Cost, Gpu, Samples, Stages, buffer_sets, interleave

# How long the rounds of a group go on; ten are taken even if they last longer.
SECONDS = 1.0
# Ours is timed with triton.testing.do_bench too, where a call takes at least this long.
LONG_MS = 1.0


class Result(NamedTuple):
    """One provider's row; without samples the row's note, and maybe a failure, says why."""

    row: Row
    samples: Samples | None = None
    failure: Exception | None = None


class Suite:
    """Keeps every result. Without a GPU it can only check, ours and eager."""

    def __init__(self, gpu: Gpu | None) -> None:
        self.gpu = gpu
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
        if key not in self._groups:
            if self.ceilings is None:
                self.ceilings = self.gpu.ceilings()
                self._release()
            self._groups[key] = self._measure(case, size, direction)
            self._release()
        return self._groups[key]

    def _release(self) -> None:
        if self.gpu is not None:
            self.gpu.release()

    def _measure(self, case: Case, size: Size, direction: str) -> dict[str, Result]:
        check, cost = self.check(case, size), case.cost[direction]
        count = buffer_sets(cost.bytes, self.gpu.l2_bytes)
        sets = [Buffers.of(case, check.calls[OURS]) for _ in range(count)]
        contenders: dict[str, Contender] = {}
        peaks: dict[str, int] = {}

        def enter(name: str, call: Any) -> None:
            # The first stretch allocates: who does not fit is out before the rounds begin.
            clobbers = name in case.clobbering
            contender = Contender(self.gpu, stages(call, direction, clobbers), sets)
            contender.sample()
            peak = self.gpu.peak_bytes(contender.stages, sets[0])
            # The arguments count too; those of who clobbers were copied, and are in already.
            peaks[name] = peak if clobbers else peak + sets[0].bytes
            contenders[name] = contender

        for name, call in {**check.calls, **case.floors}.items():
            check.attempt(name, enter, name, call)
            self._release()
        samples = interleave({n: c.sample for n, c in contenders.items()}, seconds=SECONDS)

        results = {}
        for name in (*case.providers, *case.floors):
            row = Row(case.name, size.name, direction, name)
            if name not in samples:
                row = replace(row, note=check.notes[name])
                results[name] = Result(row, failure=check.failures.get(name))
                continue
            row = replace(
                row,
                **speed(samples[name], cost, self.ceilings),
                peak_gib=peaks[name] / 2**30,
                error_ratio=check.ratio(name),
                errors=check.errors.get(name, {}),
                note="waits for the GPU" if contenders[name].waits_for_gpu else "",
            )
            if name == OURS:
                row = self._cross_checked(row, check.calls[OURS], sets[0])
            results[name] = Result(row, samples[name])
        return results

    def _cross_checked(self, row: Row, call: Any, buffers: Buffers) -> Row:
        """With do_bench's median, if the call is long and nothing has to come before it."""
        if row.ms < LONG_MS or row.direction == BACKWARD or isinstance(call, Stages):
            return row
        run = stages(call, row.direction).run
        return replace(row, do_bench_ms=self.gpu.do_bench(lambda: run(buffers), row.ms))


def speed(samples: Samples, cost: Cost, ceilings: Ceilings) -> dict[str, float | None]:
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
