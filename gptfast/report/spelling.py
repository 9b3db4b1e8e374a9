"""How figures are spelled: as the reference report does, where it has them."""

from collections.abc import Mapping

# What stands for a figure that is not there.
MISSING = "–"
# What the reference report spells in its own way; {} is the figure.
_SPELLING = {
    "Number of FLOPs per token": "{:.6e}",
    "Total training flops": "{:.6e}",
    "MFU %": "{:.2f} %",
    "Total training time": "{:.2f} m",
    "Peak memory usage": "{:,.2f} MiB",
    "train_time": "{:.2f} s",
    "Lines": "{:,}",
    "MFU of this GPU's own peak %": "{:.2f} %",
    "Tokens a second and GPU": "{:,.0f}",
    "Tokens a second and process": "{:,.0f}",
    "First step, compilation included": "{:.1f} s",
    "Launch to step 1": "{:.1f} s",
}


def short_gpu(name: str) -> str:
    return name.removeprefix("NVIDIA ")


def spell(value: object, label: str = "") -> str:
    """As the reference report does: 4 decimals, thousands separated, the units of the label."""
    if value is None or value == "":
        return MISSING
    if label in _SPELLING and isinstance(value, int | float):
        return _SPELLING[label].format(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.6e}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or MISSING
    return str(value)


def spell_score(value: float | None, evaluation: Mapping) -> str | None:
    """ "0.2084", and "0.2084, first 20" if the evaluation is of the first 20 of each task; None if
    there is no score."""
    if value is None:
        return None
    first = evaluation.get("first_of_each_task")
    return f"{spell(value)}, first {first:,}" if first else spell(value)


def spell_scores(evaluation: Mapping, figure: str) -> dict[str, str | None]:
    """This figure of each of the evaluation's tasks, spelled as a score."""
    tasks = evaluation["tasks"].items()
    return {task: spell_score(figures[figure], evaluation) for task, figures in tasks}


def duration(seconds: float | None) -> str:
    """1 m 05 s, 6 h 34 m."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def count(value: float) -> str:
    """With the unit that leaves three figures: 11.2 B, 61.4 K."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def times(ours: float | None, theirs: float | None) -> str:
    """ "2.60 ×", and "" where either is missing."""
    return f"{ours / theirs:.2f} ×" if ours and theirs else ""
