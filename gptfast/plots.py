"""Pictures of a run, from its metrics file."""

import math
from pathlib import Path

from gptfast.metrics import read_rows

_LABELS = {"val_bpb": "bits per byte", "val_loss": "loss, nats a token"}


def plot_run(folder: Path, title: str) -> Path:
    """Loss or reward, and every figure of the evaluations, against tokens, or steps where their
    tokens are not known; writes and returns folder/curves.png."""
    # Imported here: the first import builds a font cache, which a run without pictures need not
    # wait for. No pyplot: it would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = folder / "metrics.jsonl"
    steps, evaluations = read_rows(path, "step"), read_rows(path, "eval")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    counted = any("tokens" in row for row in steps)

    def when(row: dict) -> float:
        return row["tokens"] / 1e6 if counted else row["step"]

    learned = "reward" if steps and "reward" in steps[0] else "loss"
    # What is no number leaves a gap.
    values = [math.nan if row[learned] is None else row[learned] for row in steps]
    left.plot([when(row) for row in steps], values, linewidth=0.8)
    left.set(ylabel="mean reward" if learned == "reward" else "training loss, nats a token")
    for name in dict.fromkeys(name for row in evaluations for name in row):
        if name in ("kind", "step", "tokens"):
            continue
        # Some figures are not made at every evaluation.
        found = [(when(row), row[name]) for row in evaluations if row.get(name) is not None]
        if not found:
            continue
        right.plot(*zip(*found, strict=True), marker=".", label=_LABELS.get(name, name))
    right.set(ylabel="validation")
    if right.lines:
        right.legend()
    for axes in (left, right):
        axes.set(xlabel="million tokens" if counted else "steps")
        axes.grid(alpha=0.3)
    out = folder / "curves.png"
    figure.savefig(out, dpi=120)
    return out
