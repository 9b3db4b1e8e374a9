"""Time, energy and money, ours and the reference's on equal terms: an hour of one GPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from gptfast.report.document import Section, Table, Text, Tile
from gptfast.report.figures import achieved_flops, gpu_hours, training_flops
from gptfast.report.prices import Price
from gptfast.report.prices import price as list_price
from gptfast.report.reference import hardware_name, reference
from gptfast.report.runs import Folders, Run
from gptfast.report.spelling import MISSING, count, duration, short_gpu, times

_KWH = 3.6e6
# The reference's total leaves RL out, so ours does.
_NOT_COUNTED = ("rl", "chat-rl")


@dataclass(frozen=True)
class Cost:
    """price: what one GPU costs an hour, None if unknown or on CPU."""

    folders: Folders
    price: Price | None

    @classmethod
    def of(cls, folders: Folders, asked: float | None = None) -> "Cost":
        gpu = folders.first.gpu if folders.first else None
        return cls(folders, list_price(gpu, asked) if gpu else None)

    @property
    def base(self) -> Run | None:
        return self.folders.runs.get("base")

    @property
    def gpus(self) -> int | None:
        """None on CPU, and while nothing has run."""
        first = self.folders.first
        return first.processes if first and first.gpu else None

    @property
    def steps(self) -> dict[str, Mapping]:
        """The speedrun's steps that began; name -> its record."""
        steps = self.folders.speedrun.get("steps", {})
        return {name: step for name, step in steps.items() if step.get("seconds")}

    @property
    def started(self) -> str:
        first = self.folders.first
        told = self.folders.speedrun.get("started")
        return str(told or (first.started() if first else ""))

    @property
    def wall_seconds(self) -> float | None:
        """Of all steps but RL's; None if no speedrun recorded them and no run tells when it was."""
        return self._seconds(without=_NOT_COUNTED)

    @property
    def wall_seconds_with_rl(self) -> float | None:
        """As wall_seconds, of all steps; None also where there was no RL."""
        return self._seconds() if self.had_rl else None

    @property
    def had_rl(self) -> bool:
        return any(name in _NOT_COUNTED for name in self.steps or self.folders.runs)

    def _seconds(self, *, without: Sequence[str] = ()) -> float | None:
        if self.steps:
            return sum(s["seconds"] for n, s in self.steps.items() if n not in without)
        runs = [run for stage, run in self.folders.runs.items() if stage not in without]
        first = [run.environment.get("started") for run in runs]
        last = [run.summary.get("ended") for run in runs]
        if not runs or None in first or None in last:
            return None
        moments = [[datetime.fromisoformat(str(m)) for m in side] for side in (first, last)]
        return (max(moments[1]) - min(moments[0])).total_seconds()

    @property
    def all_gpu_hours(self) -> float | None:
        """Of all steps but RL's."""
        return self._hours(self.wall_seconds)

    def _hours(self, seconds: float | None) -> float | None:
        """GPU-hours of so many seconds."""
        return seconds * self.gpus / 3600 if seconds and self.gpus else None

    def _dollars(self, hours: float | None) -> float | None:
        return hours * self.price.dollars if hours and self.price else None

    @property
    def joules(self) -> float | None:
        """Of all GPUs, in all steps; None unless every step that ran was measured."""
        found = [step.get("energy_joules") for step in self.steps.values()]
        if found:
            return _total(found)
        return _total([run.summary.get("energy_joules") for run in self.folders.runs.values()])

    @property
    def hourly_rate(self) -> str:
        if not self.price or not self.gpus:
            return ""
        return f"${self.gpus * self.price.dollars:.2f}/hour"

    def tiles(self) -> tuple[Tile, ...]:
        """Base training's time; GPU-hours and dollars of all that the reference ran, too, and of
        RL, if there was any, in the note."""
        base_hours = gpu_hours(self.base) if self.base else None
        theirs = _reference_hours()
        their_base = reference()["sections"]["Base model training"]["Total training time"]
        seconds = self.base.training_seconds if self.base else None
        of_what = "without RL" if self.had_rl else "in all"
        hours, all_hours = self.all_gpu_hours, self._hours(self.wall_seconds_with_rl)
        with_rl = f"with RL {_number(all_hours)}; " if all_hours else ""
        money_with_rl = _ours(_money(self._dollars(all_hours)), " with RL")
        return (
            Tile(
                "Base training",
                duration(seconds),
                duration(60 * their_base),
                note=f"{_ours(_number(base_hours), ' GPU-hours')}reference: {theirs['base']:.1f} "
                "GPU-hours",
            ),
            Tile(
                f"GPU-hours {of_what}",
                _number(hours),
                f"{theirs['all']:.1f}",
                note=f"{with_rl}{duration(self.wall_seconds)} {of_what}; reference: "
                f"{duration(reference()['wall_clock_seconds'])} on {hardware_name()}",
            ),
            Tile(
                f"Money {of_what}",
                _money(self._dollars(hours)),
                _money(theirs["all"] * reference()["price_per_gpu_hour"]),
                note=f"{money_with_rl}{self._own_price()}reference: at "
                f"${reference()['price_per_gpu_hour']:.2f} a GPU-hour",
            ),
        )

    def section(self) -> Section:
        """Time, energy and money, row by row, then step by step."""
        rows = [*self._time_rows(), *self._rate_rows(), *self._money_rows(), *self._energy_rows()]
        columns = ("", "This run", f"Reference, {hardware_name()}")
        table = Table(columns, tuple((name, a, b) for name, a, b in rows))
        blocks = [table, *([self._steps_table()] if self.steps else []), Text(_HOW)]
        return Section("Time, energy, money", tuple(blocks))

    def wall_clock(self) -> Section:
        theirs = duration(reference()["wall_clock_seconds"])
        what = ""
        if self.wall_seconds:
            steps = "all steps but RL, pauses between them left out"
            what = f" ({steps if self.steps else 'from the first start to the last end'})"
        text = f"Total wall clock time: {duration(self.wall_seconds)}{what}; reference: {theirs}."
        return Section("Wall clock", (Text(text),))

    def _time_rows(self) -> list[tuple[str, str, str]]:
        theirs = _reference_hours()
        first = self.folders.first
        gpu = first.gpu if first else None
        where = (
            f"{self.gpus} × {short_gpu(gpu)}" if self.gpus and gpu else "CPU" if first else MISSING
        )
        seconds = self.base.training_seconds if self.base else None
        minutes = reference()["sections"]["Base model training"]["Total training time"]
        return [
            ("Hardware", where, hardware_name()),
            (
                "Everything but RL, wall clock",
                duration(self.wall_seconds),
                duration(reference()["wall_clock_seconds"]),
            ),
            ("Everything but RL, GPU-hours", _number(self.all_gpu_hours), f"{theirs['all']:.1f}"),
            *self._with_rl("wall clock", duration(self.wall_seconds_with_rl)),
            *self._with_rl("GPU-hours", _number(self._hours(self.wall_seconds_with_rl))),
            ("Base training, wall clock", duration(seconds), duration(60 * minutes)),
            (
                "Base training, GPU-hours",
                _number(gpu_hours(self.base) if self.base else None),
                f"{theirs['base']:.1f}",
            ),
        ]

    def _rate_rows(self) -> list[tuple[str, str, str]]:
        """The same work on both, so that size and length of the run do not matter."""
        section = reference()["sections"]["Base model training"]
        their_flops = section["Total training flops"]
        their_tokens = section["Number of training tokens"]
        theirs = _reference_hours()
        base, gpus = self.base, reference()["gpus"]
        flops = achieved_flops(base) if base else None
        hours = their_flops / flops / 3600 if flops else None
        mine = gpu_hours(base) if base else None
        per_hour = base.tokens / mine if base and base.tokens and mine else None
        done = training_flops(base) if base else None
        name = short_gpu(base.gpu) if base and base.gpu else "of these"
        return [
            (
                "Base training, tokens a GPU-hour",
                count(per_hour) if per_hour else MISSING,
                count(their_tokens / theirs["base"]),
            ),
            ("Base training, FLOPs", f"{done:.3e}" if done else MISSING, f"{their_flops:.3e}"),
            (
                f"GPU-hours for {their_flops:.2e} FLOPs at this rate (calculated)",
                _number(hours) + (f" ({times(theirs['base'], hours)} fewer)" if hours else ""),
                f"{theirs['base']:.1f}",
            ),
            (
                f"The same on {gpus} × {name} (prediction)",
                duration(3600 * hours / gpus if hours else None),
                duration(3600 * theirs["base"] / gpus),
            ),
        ]

    def _money_rows(self) -> list[tuple[str, str, str]]:
        theirs, their_price = _reference_hours(), reference()["price_per_gpu_hour"]
        hours = self.all_gpu_hours
        own = f"${self.price.dollars:.2f} ({self.price.source})" if self.price else MISSING
        return [
            ("Price of a GPU-hour", own, f"${their_price:.2f}"),
            (
                "Everything but RL, at that price",
                _money(self._dollars(hours)),
                _money(theirs["all"] * their_price),
            ),
            *self._with_rl(
                "at that price", _money(self._dollars(self._hours(self.wall_seconds_with_rl)))
            ),
            (
                f"The same at ${their_price:.2f} on both sides",
                _money(hours * their_price if hours else None),
                _money(theirs["all"] * their_price),
            ),
        ]

    def _with_rl(self, what: str, figure: str) -> list[tuple[str, str, str]]:
        """The row of everything, where it is more than everything but RL."""
        return [(f"Everything with RL, {what}", figure, "not told")] if self.had_rl else []

    def _energy_rows(self) -> list[tuple[str, str, str]]:
        joules, tokens = self.joules, self.base.tokens if self.base else None
        seconds = sum(step["seconds"] for step in self.steps.values())
        watts = joules / seconds / self.gpus if joules and seconds and self.gpus else None
        base = self.steps.get("base", {}).get("energy_joules")
        if base is None and self.base:
            base = self.base.summary.get("energy_joules")
        return [
            (
                "Energy of the GPUs, all steps",
                f"{joules / _KWH:.2f} kWh" if joules else MISSING,
                "not told",
            ),
            ("Mean power of a GPU", f"{watts:.0f} W" if watts else MISSING, "not told"),
            (
                "Base training, tokens a kWh",
                count(tokens / base * _KWH) if base and tokens else MISSING,
                "not told",
            ),
        ]

    def _steps_table(self) -> Table:
        rows = []
        for name, step in self.steps.items():
            hours = self._hours(step["seconds"])
            joules = step.get("energy_joules")
            rows.append(
                (
                    name,
                    step.get("ended") or step.get("state", ""),
                    duration(step["seconds"]),
                    str(step.get("attempts", 1)),
                    _number(hours),
                    f"{joules / _KWH:.3f}" if joules is not None else MISSING,
                    _money(self._dollars(hours)),
                )
            )
        columns = ("Step", "Ended", "Took", "Attempts", "GPU-hours", "kWh", "Money")
        return Table(columns, tuple(rows), title="Step by step")

    def _own_price(self) -> str:
        return f"at ${self.price.dollars:.2f} a GPU-hour; " if self.price else ""


_HOW = (
    "GPU-hours: wall clock times all GPUs, busy or not. Calculated and predicted rows take the "
    "measured FLOPs a second of one GPU as it is and suppose that it stays so. Energy is what NVML "
    "counts for the whole cards; the rest of the machine is not in it."
)


def _total(found: Sequence[float | None]) -> float | None:
    """None for nothing, or if one of them is not known."""
    known = [each for each in found if each is not None]
    return sum(known) if known and len(known) == len(found) else None


def _reference_hours() -> dict[str, float]:
    """GPU-hours of the reference: of base training's steps, and of everything."""
    gpus = reference()["gpus"]
    minutes = reference()["sections"]["Base model training"]["Total training time"]
    return {
        "base": gpus * minutes / 60,
        "all": gpus * reference()["wall_clock_seconds"] / 3600,
    }


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _ours(figure: str, unit: str) -> str:
    return "" if figure == MISSING else f"{figure}{unit}; "


def _money(dollars: float | None) -> str:
    return MISSING if dollars is None else f"${dollars:,.2f}"
