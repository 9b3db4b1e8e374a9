"""Runs the steps of a plan that are not done yet, one after the other."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gptfast.report.spelling import duration
from gptfast.speedrun.attempt import Attempt, locked
from gptfast.speedrun.decide import ANEW, CONTINUE, SKIP, check_folders, decide, lacking
from gptfast.speedrun.plan import Plan, Step
from gptfast.speedrun.state import DONE, FAILED, STOPPED, Record, State, now

# How often the time of a running step is written down, should all die.
_SAVE_SECONDS = 5.0


class StepFailedError(RuntimeError):
    """A step ended with an error. code: 2 if the user can mend it, else 1."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StoppedError(Exception):
    """A signal asked to stop, and the step has ended; the message says how to go on."""


class Console(Protocol):
    """Where progress goes: lines that stay, and one that changes."""

    def say(self, line: str) -> None: ...

    def status(self, line: str) -> None: ...


class Others(Protocol):
    """The speedruns on the other nodes, as the first one sees them."""

    def start(self, step: Step, extra: Sequence[str]) -> None: ...

    def results(self) -> list[tuple[int, float | None]]:
        """(exit code, joules) of the step on each of them, once it has ended there."""


def run_plan(
    plan: Plan,
    command: Callable[[Step, Sequence[str]], list[str]],
    console: Console,
    *,
    machine: Mapping[str, object],
    again: str,
    others: Others | None = None,
) -> None:
    """Run what is not done; what is unfinished goes on where it stopped.

    Args:
        command: the command line of a step with further arguments.
        machine: what the report tells of where this ran.
        again: the command that goes on, for messages.
        others: other nodes, which run every distributed step with us.

    Raises:
        UserError: a folder holds what this speedrun did not make, or made from something else.
        StepFailedError: a step failed; the message names it, its log and how to go on.
        StoppedError: SIGINT or SIGTERM came, and the step has ended.
    """
    with locked(plan.folder, console.status) as lock:
        state = State(plan, machine)
        state.note_interrupted()
        for number, step in enumerate(plan.steps, 1):
            # At first of all; later again, because the user's files may have changed meanwhile.
            check_folders(plan.steps[number - 1 :], state)
            place = f"[{number:>2}/{len(plan.steps)}] {step.name:<9}"
            log = plan.folder / "logs" / f"{number:02d}-{step.name}.log"
            todo = decide(step, state)
            if todo == SKIP:
                console.say(f"{place} unchanged; it took {_took(state.records[step.name])}")
                continue
            if todo == ANEW and step.owns:
                shutil.rmtree(step.owns, ignore_errors=True)
            extra = ["--resume"] if todo == CONTINUE else []
            record = state.begin(step, log, anew=todo == ANEW)
            if others and step.distributed:
                others.start(step, extra)
            attempt = Attempt(command(step, extra), log, lock, gpus=plan.gpus)
            watch = _Watch(attempt, record, state, console, place)
            codes = [attempt.wait(watch.look)]
            watch.account()
            if others and step.distributed:
                codes += _gather(record, others)
            _settle(step, record, state, attempt, codes, again)
            console.say(f"{place} done in {_took(record)}")


class _Watch:
    """Shows the last line of a running process, and keeps its record's time."""

    def __init__(
        self, attempt: Attempt, record: Record, state: State, console: Console, place: str
    ) -> None:
        self.attempt, self.record, self.state = attempt, record, state
        self.console, self.place = console, place
        self._before = record.seconds, record.energy_joules
        self._saved = 0.0

    def look(self) -> None:
        self.console.status(f"{self.place} {(self.attempt.output() or ['starting'])[-1]}")
        if self.attempt.seconds - self._saved > _SAVE_SECONDS:
            self._saved = self.attempt.seconds
            self.account()
            self.state.save()

    def account(self) -> None:
        seconds, joules = self._before
        self.record.seconds = seconds + self.attempt.seconds
        self.record.energy_joules = _sum(joules, self.attempt.joules)


def _gather(record: Record, others: Others) -> list[int]:
    """Exit codes of the other nodes; their energy is added to the record's."""
    results = others.results()
    for _, joules in results:
        record.energy_joules = _sum(record.energy_joules, joules)
    return [code for code, _ in results]


def _settle(
    step: Step, record: Record, state: State, attempt: Attempt, codes: list[int], again: str
) -> None:
    """Write down how an attempt ended, and raise unless the next step may begin."""
    lacks = lacking(step)
    done = lacks is None and not any(codes)
    record.state = DONE if done else STOPPED if attempt.stopped else FAILED
    record.ended = now()
    state.save()
    if attempt.stopped:
        raise StoppedError(f"stopped in step {step.name}; go on with:\n  {again}")
    if done:
        return
    lines = attempt.output()
    told = [line for line in lines if line.startswith("error: ")]
    code = next((c for c in codes if c), 0)
    reason = told[0] if told else f"exit code {code}" if code else f"it ended without {lacks}"
    last = f"  last line: {lines[-1]}\n" if lines and not told else ""
    raise StepFailedError(
        f"step {step.name} failed: {reason}\n{last}  log: {attempt.log}\n  go on with: {again}",
        2 if told or code == 2 else 1,
    )


def _took(record: Record) -> str:
    attempts = f", {record.attempts} attempts" if record.attempts > 1 else ""
    return f"{duration(record.seconds)}{attempts}"


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b
