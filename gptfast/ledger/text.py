"""The ledger as lines for a terminal, as a picture, and against another ledger."""

from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from gptfast import hardware
from gptfast.errors import UserError
from gptfast.ledger.book import Ledger, Row, checks, unnamed_kernels, waterfall
from gptfast.ledger.kinds import COMMUNICATION
from gptfast.memory import GIB
from gptfast.model import flops_per_token

# Rows below this share of the step are one line a group in the table, and changes below it none;
# the JSON has all.
_SHOWN_SHARE = 0.0005
# What a step's speed depends on besides its work.
_SHOWN_SETTINGS = (
    "kernels",
    "attention",
    "compile",
    "reshard_after_forward",
    "deterministic",
    "data",
)
_COLUMNS = (
    f"{'ms':>9}{'share':>8}{'beside':>9}{'work':>14}{'rate':>13}{'of ceiling':>11}{'floor':>9}"
    f"{'points':>8}"
)
# The least width of what stands before the columns: no label is cut, so that no two look the same.
_LABEL = 46
_COMPARED_LABEL = 60


def table(ledger: Ledger) -> list[str]:
    """Header, a line a row in groups, the sum, and what remains to be explained."""
    lines: list[tuple[str, Row]] = []
    for group, members in groupby(ledger.rows, key=lambda row: row.group):
        rows = list(members)
        lines.append((group, _summed(group, rows)))
        shown = [row for row in rows if row.ms + row.hidden_ms >= _SHOWN_SHARE * ledger.step_ms]
        lines += [(f"  {row.name}", row) for row in shown]
        small = [row for row in rows if row not in shown]
        if small and shown and sum(row.ms for row in small) > 0:
            lines.append((f"  {len(small)} smaller", _summed(group, small)))
    lines.append(("step", _summed("", list(ledger.rows))))
    width = max(_LABEL, *(len(label) + 1 for label, _ in lines))
    told = [f"{label:<{width}}{_columns(ledger, row)}".rstrip() for label, row in lines]
    return [*header(ledger), "", f"{'':<{width}}{_COLUMNS}", *told, "", *footer(ledger)]


def _summed(group: str, rows: list[Row]) -> Row:
    return Row(
        group=group,
        name=group,
        ms=sum(row.ms for row in rows),
        hidden_ms=sum(row.hidden_ms for row in rows),
        floor_ms=sum(row.floor_ms for row in rows),
    )


def _columns(ledger: Ledger, row: Row) -> str:
    work = rate = share = ""
    busy_s = (row.ms + row.hidden_ms) / 1e3
    if row.flops and busy_s:
        work, rate = _unit(row.flops, "FLOP"), _unit(row.flops / busy_s, "FLOP/s")
        if ledger.ceilings:
            share = f"{row.flops / busy_s / ledger.ceilings.product:.1%}"
    elif row.bytes and busy_s:
        work, rate = _unit(row.bytes, "B"), _unit(row.bytes / busy_s, "B/s")
        if ledger.ceilings and row.group != COMMUNICATION:
            share = f"{row.bytes / busy_s / ledger.ceilings.copy:.1%}"
    points = ledger.points(row)
    beside = f"{row.hidden_ms:.2f}" if row.hidden_ms >= 0.005 else ""
    floor = f"{row.floor_ms:.2f}" if ledger.ceilings else ""
    return (
        f"{row.ms:>9.2f}{row.ms / ledger.step_ms:>8.1%}{beside:>9}{work:>14}"
        f"{rate:>13}{share:>11}{floor:>9}"
        f"{'' if points is None or not ledger.ceilings else format(points, '.2f'):>8}"
    )


def _unit(value: float, unit: str) -> str:
    """Three digits and a prefix: 3.44 TFLOP, 692 TFLOP/s."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def header(ledger: Ledger) -> list[str]:
    """What was measured, how fast it is, and against which denominators."""
    job, config = ledger.job, ledger.job.config
    known = _settings(ledger)
    settings = ", ".join(f"{name} {known[name]}" for name in _SHOWN_SETTINGS if name in known)
    lines = [
        f"{ledger.device} x {job.processes}: {config.n_layer} layers of {config.n_embd}, "
        f"vocabulary {config.vocab_size:,}, {job.batch} x {config.sequence_len} tokens a GPU, "
        f"{job.accumulation} pass(es) a step{_counted(ledger)}"
        + (f"; {settings}" if settings else ""),
        f"step {ledger.best_step_ms:.2f} ms, {ledger.tokens_per_second:,.0f} tokens/s a GPU, "
        f"{_unit(ledger.flops_per_second(), 'FLOP/s')} a GPU by the report's formula "
        f"({_unit(ledger.flops_per_second(causal=True), 'FLOP/s')} counting causal attention only)",
    ]
    peak = ledger.own_peak
    if peak is None:
        lines.append(f"MFU: not shown, the dense bf16 peak of {ledger.device} is not known")
    else:
        full, causal = ledger.flops_per_second(), ledger.flops_per_second(causal=True)
        lines.append(
            f"MFU {100 * hardware.mfu(full, hardware.REPORT_PEAK_FLOPS):.2f} % of the report's 989 "
            f"TFLOP/s; {100 * hardware.mfu(full, peak):.2f} % of this GPU's {peak / 1e12:g} "
            f"({100 * hardware.mfu(causal, peak):.2f} % causal-aware)"
        )
    if ledger.ceilings:
        lines.append(f"measured ceilings: {ledger.ceilings}")
    return lines


def _counted(ledger: Ledger) -> str:
    """How many of a step's tokens count, unless all do."""
    job = ledger.job
    everything = (job.tokens * job.accumulation, flops_per_token(job.config))
    if (ledger.tokens, job.counted_flops) == everything:
        return ""
    return (
        f", of which {ledger.tokens:,.0f} tokens count, the mean of the run, "
        f"at {job.counted_flops:,} FLOPs"
    )


def footer(ledger: Ledger) -> list[str]:
    """How far the rows explain the step, and what has no name."""
    found = checks(ledger)
    unprofiled = ""
    if ledger.unprofiled_step_ms:
        unprofiled = (
            f"; without the profiler a step takes {ledger.unprofiled_step_ms:.2f} ms "
            f"({found['profiler_overhead']:+.1%} with it)"
        )
    lines = [
        f"rows add up to {ledger.step_ms * (1 - found['rows_missing']):.2f} of the "
        f"{ledger.step_ms:.2f} ms of a profiled step (mean of {ledger.steps}){unprofiled}",
        f"everything else: {found['everything_else']:.1%} of the step",
        "columns: beside = ran at the same time as rows above it, not part of the step's ms; floor "
        "= the work at the measured ceilings; points = MFU points that the step would gain if the "
        "row ran at its floor",
    ]
    unnamed = unnamed_kernels(ledger)
    if unnamed:
        lines.append("kernels above 0.5 ms that no rule knows:")
        lines += [f"  {ms:8.3f} ms  {name}" for name, ms in unnamed]
    parts = ledger.parts
    for name, value in parts.items():
        if name.endswith("_bytes"):
            lines.append(f"{_words(name.removesuffix('_bytes'))}: {value / GIB:.1f} GiB")
        elif isinstance(value, int | float):
            lines.append(f"{_words(name)}: {value:.4g}")
    return lines


def _words(name: str) -> str:
    return name.replace("_", " ")


def draw(ledger: Ledger, path: Path) -> bool:
    """The waterfall as a PNG, from the GPU's peak to what was achieved. False, and no file, where
    the peak is not known."""
    stages = waterfall(ledger)
    if not stages or ledger.own_peak is None:
        return False
    # Imported here: the first import builds a font cache. No pyplot: it would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = ["peak", *(name for name, _ in stages[1:]), "achieved"]
    (_, before), last = stages[0], stages[-1][1]
    axes.bar(0, before, color="C0")
    axes.text(0, before + 1, f"{before:.0f} %", ha="center", fontsize=9)
    for x, (_, after) in enumerate(stages[1:], 1):
        axes.bar(x, before - after, bottom=after, color="C3" if after < before else "C2")
        axes.text(
            x,
            max(before, after) + 1,
            f"{after - before:+.1f}".replace("-", "−"),
            ha="center",
            fontsize=9,
        )
        axes.plot([x - 0.4, x + 1.4], [after, after], color="gray", linewidth=0.6)
        before = after
    axes.bar(len(stages), last, color="C0")
    axes.text(len(stages), last + 1, f"{last:.1f} %", ha="center", fontsize=9)
    axes.set_xticks(range(len(labels)), labels, fontsize=9)
    axes.set(ylabel=f"MFU, % of {ledger.own_peak / 1e12:g} TFLOP/s", ylim=(0, 112))
    job = ledger.job
    axes.set_title(
        f"{ledger.device} x {job.processes}, {job.config.n_layer} layers, "
        f"{job.batch} x {job.config.sequence_len} tokens a GPU: {ledger.step_ms:.1f} ms a step",
        fontsize=10,
    )
    figure.savefig(path, dpi=130, format="png")
    return True


def compare(before: Ledger, after: Ledger, max_loss: float) -> tuple[list[str], bool]:
    """Lines that say which rows a change of the step's time comes from, and whether the step got
    slower by more than max_loss of itself. UserError, saying why, for two ledgers that cannot be
    compared: of different GPUs or of steps that do different work."""
    reasons = []
    if before.device != after.device:
        reasons.append(f"measured on {before.device} and on {after.device}")
    for name, one in _flat(before).items():
        other = _flat(after)[name]
        if one != other:
            reasons.append(f"{name} is {one} and {other}")
    if (before.unprofiled_step_ms is None) != (after.unprofiled_step_ms is None):
        reasons.append("only one of them knows the step's time without the profiler")
    if reasons:
        raise UserError(f"these ledgers cannot be compared: {'; '.join(reasons)}")

    then, now = _settings(before), _settings(after)
    lines = [
        f"{name}: {then.get(name)} before, {now.get(name)} now"
        for name in _SHOWN_SETTINGS
        if then.get(name) != now.get(name)
    ]
    a, b = before.best_step_ms, after.best_step_ms
    lost = b / a - 1
    old, new = (
        {(row.group, row.name): row.ms for row in ledger.rows} for ledger in (before, after)
    )
    changes = {key: new.get(key, 0.0) - old.get(key, 0.0) for key in {**old, **new}}
    # MFU is work by time: a row's part in the change of 1 / time is linear in its milliseconds.
    mfu = before.profiled_mfu()
    per_ms = -100 * mfu / after.step_ms if mfu else 0.0
    compared = [
        (": ".join(key), old.get(key, 0.0), new.get(key, 0.0))
        for key, change in sorted(changes.items(), key=lambda item: -abs(item[1]))
        if abs(change) >= _SHOWN_SHARE * before.step_ms
    ]
    compared.append(("profiled step", before.step_ms, after.step_ms))
    width = max(_COMPARED_LABEL, *(len(label) + 1 for label, _, _ in compared))
    head = f"{'':<{width}}{'before':>9}{'now':>9}{'change':>9}"
    lines.append(head + f"{'points':>8}" * bool(mfu))
    for label, then_ms, now_ms in compared:
        change = now_ms - then_ms
        points = f"{per_ms * change:>+8.2f}" if mfu else ""
        lines.append(f"{label:<{width}}{then_ms:>9.2f}{now_ms:>9.2f}{change:>+9.2f}{points}")
    verdict = "slower" if lost > 0 else "faster"
    lines.append(
        f"step {a:.2f} -> {b:.2f} ms: {abs(lost):.1%} {verdict}; {max_loss:.1%} slower is allowed"
    )
    return lines, lost > max_loss


def _settings(ledger: Ledger) -> dict:
    """A run's settings by name, those of all its parts together."""
    flat = {}
    for name, value in ledger.settings.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _flat(ledger: Ledger) -> dict:
    """What must be equal for two steps to be the same work."""
    job = ledger.job._asdict()
    # None where they are what follows from the rest.
    job["tokens_per_step"] = round(ledger.tokens * ledger.job.processes)
    job["flops_per_token"] = ledger.job.counted_flops
    return {**asdict(job.pop("config")), **job}
