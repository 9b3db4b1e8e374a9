"""The ledger of a step: rows that add up to it, and what they cost."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from gptfast import hardware
from gptfast.ledger.costs import Ceilings, floor_ms, known_costs
from gptfast.ledger.job import Job
from gptfast.ledger.kinds import (
    ATTENTION,
    COMMUNICATION,
    ELSE,
    GAPS,
    GROUPS,
    OPTIMIZER_GROUP,
    PRODUCTS,
    SHARDING,
    Kind,
    is_communication,
    kind,
)
from gptfast.ledger.trace import Event, Stretch

HOST_LATE = "host late: nothing launched"
WAITING = "launched, but waiting: latency, dependencies"
BETWEEN_OPERATORS = "Python between operators"
# Kernels of a row that the JSON names, the longest first.
_KERNELS_KEPT = 6


@dataclass(frozen=True)
class Row:
    """One line; all figures are of one step on one GPU."""

    group: str
    name: str
    ms: float
    """Of the step's own time: rows add up to it. What ran beside something else is hidden_ms."""
    hidden_ms: float = 0.0
    calls: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    floor_ms: float = 0.0
    kernels: tuple[tuple[str, float, float], ...] = ()
    """(name, ms, calls) of the longest."""


@dataclass(frozen=True)
class Ledger:
    job: Job
    device: str
    """The GPU's name, or "cpu"."""
    rows: tuple[Row, ...]
    step_ms: float
    """Of the profiled steps."""
    steps: int
    unprofiled_step_ms: float | None = None
    """Median of the steps before the profile, without its overhead."""
    ceilings: Ceilings | None = None
    settings: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    parts: dict = field(default_factory=dict)
    """Further figures of the same session: forward + backward alone, sharding's cost, memory."""

    @property
    def tokens(self) -> float:
        """Of one step on one GPU, those that count."""
        return self.job.counted_tokens

    @property
    def best_step_ms(self) -> float:
        """The step's time as training sees it: without the profiler where that was measured."""
        return self.unprofiled_step_ms or self.step_ms

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.best_step_ms * 1e3

    def flops_per_second(self, *, causal: bool = False) -> float:
        job = self.job
        return self.tokens_per_second * (job.counted_flops - causal * job.attention_flops / 2)

    @property
    def own_peak(self) -> float | None:
        peak = hardware.peak(self.device)
        return peak.bf16_flops if peak else None

    def mfu(self) -> float | None:
        """Of this GPU's own dense bf16 peak; None where that is not known."""
        return hardware.mfu(self.flops_per_second(), self.own_peak) if self.own_peak else None

    def profiled_mfu(self) -> float | None:
        """The same of the profiled steps, which the rows are of."""
        mfu = self.mfu()
        return mfu * self.best_step_ms / self.step_ms if mfu else None

    def points(self, row: Row) -> float | None:
        """MFU points that the step would gain if this row ran at its floor."""
        mfu, excess = self.profiled_mfu(), row.ms - row.floor_ms
        if mfu is None or excess >= self.step_ms:
            return None
        return 100 * mfu * excess / (self.step_ms - excess)

    def total(self, *groups: str) -> float:
        """ms of all rows of these groups."""
        return sum(row.ms for row in self.rows if row.group in groups)


class _Sums(NamedTuple):
    exposed: dict[int, float]
    host_late: float
    waiting: float


def build(stretch: Stretch, job: Job, device: str, ceilings: Ceilings | None, **more) -> Ledger:
    """Rows of a stretch of steps, averaged over them. more: further fields of Ledger."""
    events = stretch.events
    sums = _partition(stretch)
    members: dict[tuple[str, str], list[tuple[int, Event, Kind]]] = defaultdict(list)
    for i, event in enumerate(events):
        found = kind(event, job)
        members[found.group, found.name].append((i, event, found))
    us = 1e3 * stretch.steps
    rows = []
    for (group, name), found in members.items():
        ms = sum(sums.exposed[i] for i, _, _ in found) / us
        busy = sum(_inside(event, stretch) for _, event, _ in found) / us
        calls = {k.call: k for _, _, k in found if k.call is not None}
        flops = sum(k.flops for k in calls.values()) / stretch.steps
        moved = sum(k.bytes for k in calls.values()) / stretch.steps
        flops, moved = known_costs(group, name, job) or (flops, moved)
        rows.append(
            Row(
                group=group,
                name=name,
                ms=ms,
                hidden_ms=max(0.0, busy - ms),
                calls=len(found) / stretch.steps,
                flops=flops,
                bytes=moved,
                floor_ms=floor_ms(group, flops, moved, ceilings, ms),
                kernels=_longest(((e.name, _inside(e, stretch)) for _, e, _ in found), us),
            )
        )
    late, waiting = (HOST_LATE, WAITING) if stretch.on_gpu else (BETWEEN_OPERATORS, WAITING)
    rows.append(Row(GAPS, late, sums.host_late / us))
    rows.append(Row(GAPS, waiting, sums.waiting / us))
    rows.sort(key=lambda row: (GROUPS.index(row.group), -row.ms))
    step_ms = (stretch.end - stretch.start) / us
    return Ledger(job, device, tuple(rows), step_ms, stretch.steps, ceilings=ceilings, **more)


def _inside(event: Event, stretch: Stretch) -> float:
    return min(event.end, stretch.end) - max(event.start, stretch.start)


def _longest(named: Iterable[tuple[str, float]], us: float) -> tuple:
    time: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    for name, duration in named:
        time[name] += duration / us
        calls[name] += 1e3 / us
    longest = sorted(time.items(), key=lambda item: -item[1])
    return tuple((name, ms, calls[name]) for name, ms in longest[:_KERNELS_KEPT])


def _partition(stretch: Stretch) -> _Sums:
    """Give every moment of the stretch to one event, or to a gap.

    Where several run at once the moment is the main stream's, then another computing stream's,
    then communication's; of equals, of the one that began first. What is left is nobody's: the
    host was late as long as it had not begun to launch what ends the gap.
    """
    events = stretch.events
    busy: dict[int, float] = defaultdict(float)
    for event in events:
        if not is_communication(event):
            busy[event.stream] += event.end - event.start
    main = max(busy, key=busy.__getitem__) if busy else None
    rank = [
        (2 if is_communication(event) else event.stream != main, event.start) for event in events
    ]
    ends = sorted(range(len(events)), key=lambda i: events[i].end)
    exposed = {i: 0.0 for i in range(len(events))}
    host_late = waiting = 0.0
    active: set[int] = set()
    moment, begun, ended = stretch.start, 0, 0
    while moment < stretch.end:
        while begun < len(events) and events[begun].start <= moment:
            active.add(begun)
            begun += 1
        while ended < len(ends) and events[ends[ended]].end <= moment:
            active.discard(ends[ended])
            ended += 1
        next_start = events[begun].start if begun < len(events) else stretch.end
        next_end = min((events[i].end for i in active), default=stretch.end)
        until = min(next_start, next_end, stretch.end)
        if active:
            exposed[min(active, key=rank.__getitem__)] += until - moment
        else:
            launched = events[begun].launched if begun < len(events) else None
            late = min(max((launched or moment) - moment, 0.0), until - moment)
            host_late += late
            waiting += until - moment - late
        moment = until
    return _Sums(exposed, host_late, waiting)


def checks(ledger: Ledger) -> dict[str, float]:
    """Shares of the step: what the rows' sum misses of the profiled step, what the profiled step
    differs from an unprofiled one, and what has no better name than everything else."""
    rows = sum(row.ms for row in ledger.rows)
    result = {
        "rows_missing": 1 - rows / ledger.step_ms,
        "everything_else": ledger.total(ELSE) / ledger.step_ms,
    }
    if ledger.unprofiled_step_ms:
        result["profiler_overhead"] = ledger.step_ms / ledger.unprofiled_step_ms - 1
    return result


def unnamed_kernels(ledger: Ledger, above_ms: float = 0.5) -> list[tuple[str, float]]:
    """(name, ms) of kernels that no rule knew, above so many ms a step."""
    rows = [
        row
        for row in ledger.rows
        if row.group == ELSE or "not known" in row.name or row.name.startswith("other")
    ]
    return [(name, ms) for row in rows for name, ms, _ in row.kernels if ms > above_ms]


def waterfall(ledger: Ledger) -> list[tuple[str, float]]:
    """(stage, MFU in percent of the GPU's own peak) from the peak down to what was achieved.

    Each stage takes the step to be what stands so far, and the FLOPs of what does not stand yet to
    run at the peak; so the last is the profiled step's own MFU. Empty where the peak is unknown.
    """
    peak = ledger.own_peak
    if peak is None:
        return []
    ideal = 1e3 * ledger.tokens * ledger.job.counted_flops / peak
    ideal_attention = 1e3 * ledger.tokens * ledger.job.attention_flops / peak
    named = (PRODUCTS, ATTENTION, OPTIMIZER_GROUP, COMMUNICATION, SHARDING, GAPS)
    rest = tuple(group for group in GROUPS if group not in named)
    stages, elapsed = [("peak", 100.0)], ledger.total(PRODUCTS)
    stages.append(("products", 100 * ideal / (elapsed + ideal_attention)))
    for name, groups in (
        ("attention", (ATTENTION,)),
        ("memory-bound", rest),
        ("optimizer", (OPTIMIZER_GROUP,)),
        ("communication", (COMMUNICATION, SHARDING)),
        ("gaps", (GAPS,)),
    ):
        elapsed += ledger.total(*groups)
        stages.append((name, 100 * ideal / elapsed))
    return stages
