"""A profiled stretch of steps as device events, each with the operators that launched it.

Source is PyTorch's exported Chrome trace (Kineto): `kernel`, `gpu_memcpy` and `gpu_memset` events
carry the correlation number of the host call that launched them; that call lies, on its thread,
within the operators (`cpu_op`, with shapes) and scopes (`user_annotation`) that it belongs to.
Where nothing ran on a GPU, the operators themselves are the events: each for the time that none
within it runs.

Times are microseconds on the trace's clock, on which host and GPU agree.
"""

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from gptfast.errors import UserError

# Scope of one step on the host; the number follows.
STEP = "gptfast::step"
# Scope that says of itself that it is the optimizer's, wherever it runs.
OPTIMIZER_SCOPE = "gptfast::optimizer"

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_HOST = ("cpu_op", "user_annotation")
_BACKWARD_SCOPE = "autograd::engine::evaluate_function"
# Operators that compute; the profiler records nodes of the autograd graph as operators too.
_OPERATORS = ("aten::", "gptfast::", "c10d::", "fsdp::", "mkldnn::", "cpp_fused", "graph_")
_CPU = -1


@dataclass(frozen=True)
class Op:
    """One call of an operator, or a scope; `number` tells calls of the same name apart."""

    number: int
    name: str
    dims: tuple = ()
    """Shapes of tensor arguments, as the profiler gives them; () for the others."""
    strides: tuple = ()
    types: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    """Arguments that are no tensors, as text; "" for tensors."""


@dataclass(frozen=True)
class Event:
    """What occupied a stream from start to end."""

    name: str
    start: float
    end: float
    stream: int
    phase: str = FORWARD
    launched: float | None = None
    """When the host began the call that launched it."""
    ops: tuple[Op, ...] = ()
    """Operators and scopes around that call, the innermost first."""
    collective: str = ""
    """Name of the collective, for what communicates; moved_bytes: what each process sends."""
    moved_bytes: float = 0.0

    def within(self, *prefixes: str) -> Op | None:
        """The innermost operator or scope whose name begins so."""
        return next((op for op in self.ops if op.name.startswith(prefixes)), None)


class Stretch(NamedTuple):
    """Whole steps, end to end: from the end of all work of the step before to the end of the last
    step's. events lie at least partly within."""

    events: list[Event]
    start: float
    end: float
    steps: int
    on_gpu: bool


def load_trace(path: Path) -> dict:
    """The JSON of a Chrome trace, `.gz` or not. UserError if it is none, or cut off."""
    try:
        raw = path.read_bytes()
        trace = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        if isinstance(trace["traceEvents"], list):
            return trace
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, EOFError, zlib.error):
        pass
    raise UserError(f"{path} is no Chrome trace of PyTorch's profiler, or it is cut off")


def stretch(trace: dict) -> Stretch:
    """The measured steps of a trace.

    The first step of several is left out: when the profiler starts, the GPU is empty, and the host
    has no lead over it as it has in a run. UserError if the trace holds no step.
    """
    complete = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["tid"]) for e in complete if _is_step(e))
    if not spans:
        raise UserError(f"the trace holds no step: no scope is named {STEP!r}")
    scopes = _Scopes(complete)
    device = [e for e in complete if e.get("cat") in _DEVICE]
    events = list(_device_events(device, complete, scopes) if device else scopes.as_events())
    events = _with_phases(events, spans, scopes)
    boundaries = _boundaries(events, spans) if device else [end for _, end, _ in spans]
    if len(spans) > 1:
        start, steps = boundaries[0], len(spans) - 1
    else:
        launched_within = [e.start for e in events if _launched(e) >= spans[0][0]]
        start, steps = min(launched_within, default=spans[0][0]) if device else spans[0][0], 1
    end = boundaries[-1]
    inside = [e for e in events if e.end > start and e.start < end]
    inside.sort(key=lambda e: (e.start, e.end))
    return Stretch(inside, start, end, steps, bool(device))


def _is_step(event: dict) -> bool:
    return event.get("cat") == "user_annotation" and event["name"].startswith(STEP)


def _launched(event: Event) -> float:
    return event.start if event.launched is None else event.launched


def _boundaries(events: list[Event], spans: list[tuple]) -> list[float]:
    """For each step when the last of what the host launched until its end was done."""
    ends, latest, queue = [], 0.0, sorted(events, key=_launched)
    done = 0
    for _, host_end, _ in spans:
        while done < len(queue) and _launched(queue[done]) <= host_end:
            latest = max(latest, queue[done].end)
            done += 1
        ends.append(latest)
    return ends


class _Scopes:
    """Operators and scopes of the host, by thread; what lies around a moment."""

    def __init__(self, complete: list[dict]) -> None:
        self.by_thread: dict[Any, list[dict]] = defaultdict(list)
        self.by_external_id: dict[int, dict] = {}
        for event in complete:
            if event.get("cat") in _HOST and not _is_step(event):
                self.by_thread[event["tid"]].append(event)
                if event["cat"] == "cpu_op":
                    self.by_external_id[event.get("args", {}).get("External id")] = event
        for events in self.by_thread.values():
            events.sort(key=lambda e: (e["ts"], -e["dur"]))
        self._ops: dict[int, Op] = {}

    def op(self, event: dict) -> Op:
        """One Op for one event, however often it is asked for."""
        if id(event) not in self._ops:
            args = event.get("args", {})
            self._ops[id(event)] = Op(
                number=len(self._ops),
                name=event["name"],
                dims=_tuples(args.get("Input Dims", ())),
                strides=_tuples(args.get("Input Strides", ())),
                types=tuple(args.get("Input type", ())),
                scalars=tuple(args.get("Concrete Inputs", ())),
            )
        return self._ops[id(event)]

    def around(self, moments: Iterable[tuple[Any, float]]) -> dict[tuple[Any, float], tuple]:
        """(thread, moment) -> the operators around it, innermost first."""
        wanted: dict[Any, list[float]] = defaultdict(list)
        for thread, moment in moments:
            wanted[thread].append(moment)
        found = {}
        for thread, times in wanted.items():
            events, stack, at = self.by_thread.get(thread, []), [], 0
            for moment in sorted(set(times)):
                while at < len(events) and events[at]["ts"] <= moment:
                    stack = [e for e in stack if _end(e) > events[at]["ts"]]
                    stack.append(events[at])
                    at += 1
                stack = [e for e in stack if _end(e) > moment]
                found[thread, moment] = tuple(self.op(e) for e in reversed(stack))
        return found

    def as_events(self) -> Iterator[Event]:
        """Operators as events of a device: each where it is the innermost of its thread."""
        for events in self.by_thread.values():
            for begin, end, stack in _innermost(events):
                # What autograd's engine and its nodes do around operators is Python's time.
                if stack[-1]["name"].startswith(_OPERATORS):
                    ops = tuple(self.op(e) for e in reversed(stack))
                    yield Event(ops[0].name, begin, end, _CPU, launched=begin, ops=ops)


def _innermost(events: list[dict]) -> Iterator[tuple[float, float, list[dict]]]:
    """(begin, end, nested events) of every piece of a thread's time; events sorted by begin."""
    stack: list[dict] = []
    moment = 0.0
    for event in [*events, None]:
        upto = event["ts"] if event else float("inf")
        while stack and _end(stack[-1]) <= upto:
            if _end(stack[-1]) > moment:
                yield moment, _end(stack[-1]), list(stack)
                moment = _end(stack[-1])
            stack.pop()
        if event:
            if stack and upto > moment:
                yield moment, upto, list(stack)
            moment = upto
            stack.append(event)


def _end(event: dict) -> float:
    return event["ts"] + event["dur"]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _device_events(device: list[dict], complete: list[dict], scopes: _Scopes) -> Iterator[Event]:
    launches = {}
    for event in complete:
        if event.get("cat") in _LAUNCH:
            launches.setdefault(event.get("args", {}).get("correlation"), event)
    # Several GPUs are several traces; of one process's only its own device counts.
    own = min(e.get("args", {}).get("device", 0) for e in device)
    device = [e for e in device if e.get("args", {}).get("device", 0) == own]
    moments = {}
    for event in device:
        args = event.get("args", {})
        call = launches.get(args.get("correlation"))
        if call is None:
            # No host call in the trace: the operator of the same external id, if there is one.
            call = scopes.by_external_id.get(args.get("External id"))
        if call is not None:
            moments[id(event)] = (call["tid"], call["ts"])
    around = scopes.around(moments.values())
    for event in device:
        args, place = event.get("args", {}), moments.get(id(event))
        yield Event(
            name=event["name"],
            start=event["ts"],
            end=_end(event),
            stream=args.get("stream", 0),
            launched=place[1] if place else None,
            ops=around[place] if place else (),
            collective=args.get("Collective name", ""),
            moved_bytes=_moved_bytes(args),
        )


_ITEM_BYTES = {"BFloat16": 2, "Half": 2, "Float": 4, "Double": 8, "Long": 8, "Int": 4, "Byte": 1}


def _moved_bytes(args: dict) -> float:
    """What a process sends in a ring: the larger of input and output less its own part (twice for
    an all-reduce)."""
    size = args.get("Group size", 0)
    elements = max(args.get("In msg nelems", 0), args.get("Out msg nelems", 0))
    if not size or not elements:
        return 0.0
    rounds = 2 if "allreduce" in args.get("Collective name", "").lower().replace("_", "") else 1
    return rounds * elements * _ITEM_BYTES.get(args.get("dtype", ""), 1) * (size - 1) / size


def _with_phases(events: list[Event], spans: list[tuple], scopes: _Scopes) -> list[Event]:
    """Backward is what autograd's engine calls; the optimizer is what the host launches in a step
    after the last of it, or what names itself so."""
    backward_ends = []
    for begin, end, _ in spans:
        backward_ends.append(
            max(
                (
                    _end(e)
                    for thread in scopes.by_thread.values()
                    for e in thread
                    if e["name"].startswith(_BACKWARD_SCOPE) and begin <= e["ts"] < end
                ),
                default=float("inf"),
            )
        )

    def phase(event: Event) -> str:
        if event.within(OPTIMIZER_SCOPE):
            return OPTIMIZER
        if event.within(_BACKWARD_SCOPE):
            return BACKWARD
        moment = _launched(event)
        for (begin, end, _), backward_end in zip(spans, backward_ends):
            if begin <= moment < end:
                return OPTIMIZER if moment >= backward_end else FORWARD
        return FORWARD

    return [replace(event, phase=phase(event)) for event in events]
