"""CORE scored twice, such as batched and one sequence at a time: every example that differs."""

import numpy as np

from gptfast.evaluate.core_results import CoreResult
from gptfast.evaluate.outcomes import CORRECT, MARGIN, TaskResult


def comparison(one: CoreResult, other: CoreResult, *, names: tuple[str, str]) -> str:
    """Markdown: a table of the tasks' accuracies, and each example judged differently with its two
    margins. The results are of the same bundle and examples."""
    differing = [_differing(a, b) for a, b in zip(one.tasks, other.tasks, strict=True)]
    examples = sum(task.examples for task in one.tasks)
    count = sum(map(len, differing))
    lines = [
        f"{count} of {examples:,} examples differ ({count / examples:.2%}).",
        "",
        f"| task | examples | {names[0]} | {names[1]} | differing | margins differ by at most |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {a.label} | {a.examples} | {a.accuracy:.4f} | {b.accuracy:.4f} | {len(indices)} "
        f"| {_largest_change(a, b):.1e} |"
        for a, b, indices in zip(one.tasks, other.tasks, differing)
    ]
    figures = f"{one.mean:.4f} | {other.mean:.4f} | {count}"
    lines.append(f"| {one.name} | {examples} | {figures} | |")
    if count:
        lines += [
            "",
            "A margin is positive where the answer is right: in logits (language modelling), "
            "otherwise in nats a token.",
            "",
            f"| task | example | margin {names[0]} | margin {names[1]} |",
            "| --- | --: | --: | --: |",
        ]
    for a, b, indices in zip(one.tasks, other.tasks, differing):
        margins = a.outcomes[:, MARGIN], b.outcomes[:, MARGIN]
        lines += [
            f"| {a.label} | {i} | {margins[0][i]:+.6f} | {margins[1][i]:+.6f} |" for i in indices
        ]
    return "\n".join(lines) + "\n"


def _differing(a: TaskResult, b: TaskResult) -> list[int]:
    return np.flatnonzero(a.outcomes[:, CORRECT] != b.outcomes[:, CORRECT]).tolist()


def _largest_change(a: TaskResult, b: TaskResult) -> float:
    # Equal infinite margins do not differ.
    margins = a.outcomes[:, MARGIN], b.outcomes[:, MARGIN]
    return max((abs(x - y) for x, y in zip(*margins) if x != y), default=0.0)
