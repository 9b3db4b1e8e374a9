"""Pictures of a run, from its metrics file."""

from pathlib import Path

from gptfast.metrics import read_rows


def plot_run(folder: Path, title: str) -> Path:
    """Loss and bits per byte against tokens; writes and returns folder/curves.png."""
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
    millions = [row["tokens"] / 1e6 for row in steps]
    left.plot(millions, [row["loss"] for row in steps], linewidth=0.8)
    left.set(xlabel="million tokens", ylabel="training loss, nats a token")
    right.plot(
        [row["tokens"] / 1e6 for row in evaluations],
        [row["val_bpb"] for row in evaluations],
        marker=".",
    )
    right.set(xlabel="million tokens", ylabel="validation, bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    out = folder / "curves.png"
    figure.savefig(out, dpi=120)
    return out
