"""What a session of `pytest bench/` hands over: table, JSON for keeping, chart, comparison."""

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.providers import COMPILE, DISTRIBUTIONS, OURS, RIVALS, installed

VERSIONED = ("torch", "triton", *DISTRIBUTIONS.values(), "nvidia-cutlass-dsl", "pytest-benchmark")
COLUMNS = (
    f"{'provider':<12}{'ms':>10}{'p20':>10}{'p80':>10}{'rate':>14}{'of ceiling':>12}"
    f"{'SM GHz':>8}{'peak GiB':>10}{'error ratio':>13}{'by ours':>9}"
)


@dataclass(frozen=True)
class Row:
    """One provider's pass of one operator at one size; without `ms` a note says why."""

    case: str
    size: str
    direction: str
    provider: str
    ms: float | None = None
    """The median; p20 and p80 are percentiles."""
    p20: float | None = None
    p80: float | None = None
    gb_per_s: float | None = None
    """The least bytes that the operator has to move, by the time it took."""
    tflop_per_s: float | None = None
    """The same for its products; then gb_per_s is None."""
    of_ceiling: float | None = None
    """The least time at the ceilings that this session measured, by the time it took."""
    peak_gib: float | None = None
    error_ratio: float | None = None
    """The worst output's or gradient's error against fp32, by that of PyTorch's bf16."""
    errors: Mapping[str, float] = field(default_factory=dict)
    sm_ghz: float | None = None
    """Clock of the multiprocessors right behind the calls, the median."""
    do_bench_ms: float | None = None
    """The median by triton.testing.do_bench; do_bench_ghz is the clock right behind that."""
    do_bench_ghz: float | None = None
    ours_ms: float | None = None
    """Of a floor, which is not measured beside the rivals: ours, in turns with it."""
    note: str = ""

    @property
    def group(self) -> tuple[str, str, str]:
        return self.case, self.size, self.direction


def timed(rows: Iterable[Row], case: str, size: str, direction: str) -> dict[str, Row]:
    """Provider -> row, of those that were timed in one group."""
    group = (case, size, direction)
    return {row.provider: row for row in rows if row.group == group and row.ms is not None}


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of text: each group's name, and below it a line a provider."""
    lines = []
    for group, members in groupby(rows, key=lambda row: row.group):
        members = list(members)
        ours = next((row.ms for row in members if row.provider == OURS), None)
        lines += ["", f"{' '.join(group)}", COLUMNS]
        lines += [_line(row, row.ours_ms or ours) for row in members]
    return lines


def _line(row: Row, ours: float | None) -> str:
    if row.ms is None:
        return f"{row.provider:<12}  {row.note}"
    in_tflops = row.gb_per_s is None
    rate = f"{row.tflop_per_s:.0f} TFLOP/s" if in_tflops else f"{row.gb_per_s:.0f} GB/s"
    ratio = "" if row.error_ratio is None else f"{row.error_ratio:.2f}"
    by_ours = "" if ours is None else f"{row.ms / ours:.2f}"
    note = f"  {row.note}" if row.note else ""
    return (
        f"{row.provider:<12}{row.ms:>10.4f}{row.p20:>10.4f}{row.p80:>10.4f}{rate:>14}"
        f"{row.of_ceiling:>12.1%}{row.sm_ghz:>8.2f}{row.peak_gib:>10.2f}{ratio:>13}{by_ours:>9}"
        f"{note}"
    )


def agreement(rows: Iterable[Row]) -> list[str]:
    """Lines: ours beside triton.testing.do_bench, and what of their difference is the clock's."""
    lines = [
        "Ours beside triton.testing.do_bench, and the SM clock right behind each. A product's time "
        "goes with the clock:",
        "the last column takes that out. What stays is do_bench's way: one call at a time, its "
        "start and end alone",
        "between two events, on the same buffers, behind a write over the L2.",
        f"{'':<48}{'ours ms':>10}{'GHz':>6}{'do_bench ms':>13}{'GHz':>6}{'difference':>12}"
        f"{'at one clock':>14}",
    ]
    header = len(lines)
    for row in rows:
        if row.do_bench_ms is None:
            continue
        apart = row.ms / row.do_bench_ms - 1
        at_one_clock = (row.ms * row.sm_ghz) / (row.do_bench_ms * row.do_bench_ghz) - 1
        clocked = f"{at_one_clock:+.1%}" if row.gb_per_s is None else "-"
        lines.append(
            f"{' '.join(row.group):<48}{row.ms:>10.4f}{row.sm_ghz:>6.2f}{row.do_bench_ms:>13.4f}"
            f"{row.do_bench_ghz:>6.2f}{apart:>+12.1%}{clocked:>14}"
        )
    return lines if len(lines) > header else []


def environment(gpu: str) -> dict[str, Any]:
    """Where and of what a session was: GPU, commit, time, versions."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        commit = described.stdout.strip() or None
    except FileNotFoundError:
        commit = None
    return {
        "gpu": gpu,
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: installed(name) for name in VERSIONED},
    }


def write_json(path: Path, rows: Iterable[Row], **more: Any) -> None:
    """Everything of a session, for `--compare` and for keeping."""
    path.write_text(json.dumps({**more, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def read_json(path: Path) -> tuple[str, list[Row]]:
    """(GPU, rows) of a kept session; ValueError for a file that is none."""
    try:
        kept = json.loads(path.read_text())
        return kept["gpu"], [Row(**row) for row in kept["rows"]]
    except (json.JSONDecodeError, KeyError, TypeError) as problem:
        raise ValueError(f"{path} is no JSON of `pytest bench/ --json`: {problem!r}") from problem


def against_compile(rows: Iterable[Row]) -> dict[tuple[str, str, str], float]:
    """Group -> how many times faster than torch.compile ours is."""
    ms = {(row.group, row.provider): row.ms for row in rows if row.ms is not None}
    return {
        group: ms[group, COMPILE] / ours
        for (group, provider), ours in ms.items()
        if provider == OURS and (group, COMPILE) in ms
    }


def compare(rows: Iterable[Row], kept: Iterable[Row], max_loss: float) -> tuple[list[str], bool]:
    """Lines, and whether any ratio to torch.compile fell by more than `max_loss` of itself.

    Milliseconds are not compared: they differ from card to card, ratios hold. Groups that only one
    of the two sessions has do not count; nothing to compare is a failure.
    """
    now, then = against_compile(rows), against_compile(kept)
    losses = {group: 1 - now[group] / then[group] for group in now if group in then}
    if not losses:
        return ["nothing to compare: no pass that both sessions timed beside torch.compile"], True
    lines = [
        f"{' '.join(group)}: {then[group]:.3f} x torch.compile before, {now[group]:.3f} x now: "
        f"{loss:.1%} lost, {max_loss:.0%} allowed"
        for group, loss in losses.items()
        if loss > max_loss
    ]
    failed = bool(lines)
    worst = max(losses.values())
    lines.append(
        f"{len(losses)} passes compared by their ratio to torch.compile; worst: {-worst:+.1%}"
    )
    return lines, failed


def chart(rows: Sequence[Row], path: Path, title: str) -> None:
    """A PNG: for each group, the time of every rival by ours, from 1 to where it is."""
    ours = {row.group: row.ms for row in rows if row.provider == OURS and row.ms is not None}
    figure = Figure(figsize=(8, 1.5 + 0.6 * len(ours)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    drawn = {}
    for y, (group, ms) in enumerate(ours.items()):
        members = timed(rows, *group)
        present = [name for name in RIVALS if name in members]
        for i, name in enumerate(present):
            ratio, height = members[name].ms / ms, 0.8 / len(present)
            place, color = y - 0.4 + (i + 0.5) * height, f"C{RIVALS.index(name)}"
            drawn[name] = axes.barh(place, ratio - 1, height, left=1, color=color)
            axes.text(max(ratio, 1), place, f" {ratio:.2f}", va="center", fontsize=6)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(ours)), [" ".join(group) for group in ours], fontsize=8)
    axes.invert_yaxis()
    ticks = (0.5, 1, 2, 5, 10)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("time by ours: right of 1, ours is faster")
    axes.set_title(title, fontsize=10)
    if drawn:
        axes.legend(drawn.values(), drawn, fontsize=8)
    figure.savefig(path, dpi=150, format="png")
