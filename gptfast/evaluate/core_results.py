"""What CORE came to: how an example is judged, the metric, the CSV and the report's section."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptfast.evaluate.core_bundle import CORE_TASKS, LANGUAGE_MODELING
from gptfast.evaluate.outcomes import TaskResult, of_the_first, result_table


def judge(scores: np.ndarray, gold: int, kind: str) -> tuple[bool, float]:
    """(correct, margin) of one example from its sequences' scores (see Scorer.scores).

    The margin is positive where the answer is right and tells by how much: the lead in logits, or
    by how many nats the best wrong option's mean loss is above the right one's. Of equal losses
    the first option is taken.
    """
    if kind == LANGUAGE_MODELING:
        return bool(scores[0] > 0), float(scores[0])
    best_other = np.delete(scores, gold).min()
    if best_other == scores[gold]:
        return int(scores.argmin()) == gold, 0.0
    return bool(scores[gold] < best_other), float(best_other - scores[gold])


@dataclass(frozen=True)
class CoreResult:
    """All tasks. missing: tasks of CORE that the bundle does not have. first: how many examples of
    each task were scored at most; None: all."""

    tasks: tuple[TaskResult, ...]
    missing: tuple[str, ...]
    first: int | None = None

    @property
    def mean(self) -> float:
        """Mean of the centred accuracies: the CORE metric if nothing was left out."""
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def key(self) -> str:
        """The metric's name in logs; another one if it is not comparable with CORE."""
        return "core_metric_partial" if self.missing or self.first else "core_metric"

    @property
    def name(self) -> str:
        name, limits = "CORE metric", []
        if self.missing:
            name += ", partial"
            count = f"{len(self.tasks)} of {len(CORE_TASKS)} tasks"
            limits.append(f"{count}, without {', '.join(self.missing)}")
        if self.first:
            limits.append(of_the_first(self.first))
        return f"{name} ({'; '.join(limits)})" if limits else name

    def section(self, model: str) -> str:
        """The report's "Base model evaluation", Markdown."""
        lines = [f"- Model: {model}", f"- {self.name}: {self.mean:.4f}"]
        lines += [f"- {task.label}: {task.centered:.4f}" for task in self.tasks]
        cropped = [f"{task.label} {task.cropped}" for task in self.tasks if task.cropped]
        if cropped:
            lines.append(f"- Prompts cropped to the context: {', '.join(cropped)}")
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, object]:
        """JSON values: the metric under its key, and each task's figures."""
        tasks = {task.label: task.as_dict() for task in self.tasks}
        limits = {"missing": list(self.missing), "first_of_each_task": self.first}
        return {self.key: self.mean, **limits, "tasks": tasks}

    def table(self) -> str:
        """What a terminal shows."""
        return f"{result_table(self.tasks)}\n{self.name}: {self.mean:.4f}"

    def write_csv(self, path: Path) -> None:
        """Task, Accuracy, Centered; then the metric in the last row."""
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("Task", "Accuracy", "Centered", "Examples", "Standard error"))
            for task in self.tasks:
                figures = (f"{x:.6f}" for x in (task.accuracy, task.centered))
                rows.writerow((task.label, *figures, task.examples, f"{task.standard_error:.6f}"))
            rows.writerow((self.name, "", f"{self.mean:.6f}", "", ""))
