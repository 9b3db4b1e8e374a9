"""The pictures of a run: loss, bits per byte, MFU and learning rate over tokens; the MFU
ledger."""

from collections.abc import Mapping

from gptfast import hardware
from gptfast.errors import UserError
from gptfast.ledger import LEDGER_FILE
from gptfast.ledger import read_json as read_ledger
from gptfast.ledger.book import waterfall
from gptfast.ledger.kinds import GROUPS
from gptfast.report.charts import Level, Line, bar_steps, line_chart, pairs
from gptfast.report.document import Block, Figure, Table, Text
from gptfast.report.reference import reference
from gptfast.report.runs import Run


def of_stage(run: Run) -> list[Block]:
    """Every picture that the run's metrics have figures for; none of a run that has not begun."""
    figures = [loss(run), validation(run), mfu(run), learning_rate(run), reward(run)]
    return [*(figure for figure in figures if figure), *ledger(run)]


def loss(run: Run) -> Figure | None:
    return _over_tokens(
        run, "loss", "Training loss", "nats a token", noisy=True, focus=True, digits=3
    )


def mfu(run: Run) -> Figure | None:
    theirs = reference()["sections"]["Base model training"]["MFU %"]
    denominator = f"{hardware.REPORT_PEAK_FLOPS / 1e12:.0f} TFLOP/s a GPU"
    return _over_tokens(
        run,
        "mfu_report",
        f"MFU, of {denominator}",
        f"% of {denominator}",
        scale=100,
        noisy=True,
        zero=True,
        levels=[Level(theirs, f"reference {theirs} %, on A100s")],
    )


def learning_rate(run: Run) -> Figure | None:
    return _over_tokens(
        run, "lr_multiplier", "Learning rate", "of each group's own rate", zero=True
    )


def reward(run: Run) -> Figure | None:
    return _over_tokens(run, "reward", "Reward", "mean of a step's samples", noisy=True, digits=3)


def validation(run: Run) -> Figure | None:
    """Bits per byte; the loss where that is what the reference tells of the stage."""
    keys = ("val_loss", "val_bpb") if run.stage == "sft" else ("val_bpb", "val_loss")
    key = next((k for k in keys if any(k in row for row in run.validations)), None)
    if key is None:
        return None
    section = {"base": "Base model training", "mid": "Midtraining", "sft": "Chat SFT"}
    field = "Minimum validation bpb" if key == "val_bpb" else "Validation loss"
    theirs = reference()["sections"].get(section.get(run.stage, ""), {}).get(field)
    rows = [row for row in run.validations if row.get(key) is not None]
    unit = "bits per byte" if key == "val_bpb" else "nats a supervised token"
    x, x_label = _horizontal(rows)
    svg = line_chart(
        [Line(x, [row[key] for row in rows], dots=True)],
        title=f"Validation, {unit}",
        x_label=x_label,
        y_label=unit,
        levels=[Level(theirs, f"reference {theirs}, at its end")] if theirs else [],
        focus=True,
        digits=4,
    )
    return Figure(f"{run.stage}-validation", f"Validation, {unit}", svg=svg)


def core(tasks: Mapping[str, Mapping]) -> Figure:
    """Every task's centred accuracy beside the reference's."""
    theirs = reference()["sections"]["Base model evaluation"]
    rows = [
        (name, tasks[name]["centered"] if name in tasks else None, value)
        for name, value in theirs.items()
        if isinstance(value, float) and name[0].islower()
    ]
    svg = pairs(rows, title="Centred accuracy of CORE's tasks")
    caption = "Centred accuracy: 0 for guessing, 1 for all correct"
    return Figure("base-core", caption, svg=svg, wide=True)


def ledger(run: Run) -> list[Block]:
    """The MFU waterfall and the time of each group of kernels, if steps of the run were profiled
    (--profile-steps)."""
    path = run.folder / LEDGER_FILE
    if not path.exists():
        return []
    try:
        found = read_ledger(path)
    except UserError as error:
        return [Text(str(error), warning=True)]
    blocks: list[Block] = []
    if (stages := waterfall(found)) and found.own_peak:
        peak = f"{found.own_peak / 1e12:g} TFLOP/s, {found.device}'s dense bf16 peak"
        svg = bar_steps([*stages, ("achieved", stages[-1][1])], title="MFU waterfall", unit="%")
        caption = f"Where every point of MFU went, of {peak}"
        blocks.append(Figure(f"{run.stage}-waterfall", caption, svg=svg, wide=True))
    rows = tuple(
        (group, f"{ms:.1f} ms", f"{100 * ms / found.step_ms:.1f} %")
        for group in GROUPS
        if (ms := found.total(group)) > 0
    )
    title = f"A step of {found.step_ms:.1f} ms, kernel by kernel"
    return [*blocks, Table(("Kernels", "Time", "Share"), rows, title=title)]


def _over_tokens(
    run: Run,
    key: str,
    title: str,
    unit: str,
    *,
    scale: float = 1.0,
    noisy: bool = False,
    zero: bool = False,
    focus: bool = False,
    digits: int = 2,
    levels: list[Level] | None = None,
) -> Figure | None:
    rows = [row for row in run.steps if row.get(key) is not None]
    if not rows:
        return None
    x, x_label = _horizontal(rows)
    svg = line_chart(
        [Line(x, [scale * row[key] for row in rows], noisy=noisy)],
        title=f"{title} over {x_label}",
        x_label=x_label,
        y_label=unit,
        levels=levels or (),
        zero=zero,
        focus=focus,
        digits=digits,
    )
    return Figure(f"{run.stage}-{key.replace('_', '-')}", title, svg=svg)


def _horizontal(rows: list[Mapping]) -> tuple[list[float], str]:
    """Tokens, or steps where a stage does not count them."""
    if all("tokens" in row for row in rows):
        return [row["tokens"] for row in rows], "tokens"
    return [row["step"] for row in rows], "steps"
