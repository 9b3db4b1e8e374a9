"""What CORE's tasks came to: figures, files to resume from, the CSV and the report's section.

Outcomes of a task are a float64 table with a row for each example and the columns below; rows of
examples that were not scored are zero, so that tables of several ranks add up.
"""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptfast.errors import UserError
from gptfast.evaluate.core_bundle import CORE_TASKS, LANGUAGE_MODELING, Task

DONE, CORRECT, MARGIN, CROPPED = range(4)
COLUMNS = 4
# Part of every key: raise it when the same scores would no longer mean the same.
_PROTOCOL = 1


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
class TaskResult:
    """One task. outcomes: (examples, 4), examples in the protocol's shuffled order."""

    label: str
    baseline: float
    outcomes: np.ndarray

    @property
    def examples(self) -> int:
        return len(self.outcomes)

    @property
    def accuracy(self) -> float:
        return float(self.outcomes[:, CORRECT].mean())

    @property
    def centered(self) -> float:
        """0 for guessing, 1 for all correct."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    @property
    def standard_error(self) -> float:
        """Of the centred accuracy."""
        variance = self.accuracy * (1 - self.accuracy) / self.examples
        return math.sqrt(variance) / (1 - self.baseline)

    @property
    def cropped(self) -> int:
        """Examples whose prompt was longer than the context."""
        return int(self.outcomes[:, CROPPED].sum())


@dataclass(frozen=True)
class CoreResult:
    """All tasks. missing: tasks of CORE that the bundle does not have."""

    tasks: tuple[TaskResult, ...]
    missing: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Mean of the centred accuracies: the CORE metric if no task is missing."""
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def key(self) -> str:
        """The metric's name in logs; another one if it is not comparable with CORE."""
        return "core_metric_partial" if self.missing else "core_metric"

    @property
    def name(self) -> str:
        if not self.missing:
            return "CORE metric"
        count = f"{len(self.tasks)} of {len(CORE_TASKS)} tasks"
        return f"CORE metric, partial ({count}, without {', '.join(self.missing)})"

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
        figures = ("accuracy", "centered", "standard_error", "examples", "cropped")
        tasks = {task.label: {name: getattr(task, name) for name in figures} for task in self.tasks}
        return {self.key: self.mean, "missing": list(self.missing), "tasks": tasks}

    def table(self) -> str:
        """What a terminal shows."""
        lines = [f"{'task':34}  accuracy  centred    +-  examples"]
        for task in self.tasks:
            figures = (
                f"{task.accuracy:8.4f}  {task.centered:7.4f}  {task.standard_error:.4f}"
                f"  {task.examples:6}"
            )
            note = f"  {task.cropped} cropped to the context" if task.cropped else ""
            lines.append(f"{task.label:34}  {figures}{note}")
        return "\n".join([*lines, f"{self.name}: {self.mean:.4f}"])

    def write_csv(self, path: Path) -> None:
        """Task, Accuracy, Centered; then the metric in the last row."""
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("Task", "Accuracy", "Centered", "Examples", "Standard error"))
            for task in self.tasks:
                figures = (f"{x:.6f}" for x in (task.accuracy, task.centered))
                rows.writerow((task.label, *figures, task.examples, f"{task.standard_error:.6f}"))
            rows.writerow((self.name, "", f"{self.mean:.6f}", "", ""))


class ResultStore:
    """Outcomes in a folder, so that an evaluation that was stopped goes on where it was.

    `<task>.json` holds what was known when the last evaluation began or ended,
    `<task>.rankN.json` what rank N has added since. Files of another model, bundle or protocol
    are not read; they are replaced when the task is done.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        """identity: JSON values that tell models, tokenizers and precisions apart."""
        self.folder = folder
        # As it will be read back, so that tuples equal lists.
        self.identity = json.loads(json.dumps(dict(identity)))
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, task: Task, examples: int) -> np.ndarray:
        """Table of the outcomes known, in the one file that is left afterwards. One process."""
        table = np.zeros((examples, COLUMNS))
        parts = sorted(self.folder.glob(f"{task.label}.rank*.json"))
        for path in (self.folder / f"{task.label}.json", *parts):
            for index, *outcome in self._read(path, self._key(task, examples)):
                table[index] = (1, *outcome)
        if parts:
            self._finish(task, table, parts)
        return table

    def save_part(self, task: Task, table: np.ndarray, rank: int) -> None:
        """What a rank has found for a task until now."""
        self._write(self.folder / f"{task.label}.rank{rank}.json", task, table)

    def save(self, task: Task, table: np.ndarray) -> None:
        """What all ranks have found. One process."""
        self._finish(task, table, sorted(self.folder.glob(f"{task.label}.rank*.json")))

    def _finish(self, task: Task, table: np.ndarray, parts: list[Path]) -> None:
        self._write(self.folder / f"{task.label}.json", task, table)
        for part in parts:
            part.unlink(missing_ok=True)

    def _key(self, task: Task, examples: int) -> dict[str, object]:
        parts = ("label", "kind", "shots", "delimiter", "sha256")
        return {
            "protocol": _PROTOCOL,
            "identity": self.identity,
            "task": {name: getattr(task, name) for name in parts},
            "examples": examples,
        }

    def _read(self, path: Path, key: Mapping[str, object]) -> list[list[float]]:
        if not path.is_file():
            return []
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content["outcomes"] if content["key"] == key else []
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): remove it") from error

    def _write(self, path: Path, task: Task, table: np.ndarray) -> None:
        done = np.flatnonzero(table[:, DONE])
        content = {
            "key": self._key(task, len(table)),
            "done": len(done),
            "accuracy": float(table[done, CORRECT].mean()) if len(done) else None,
            "columns": ["example", "correct", "margin", "cropped"],
            "outcomes": [[int(i), *table[i, CORRECT:].tolist()] for i in done],
        }
        scratch = path.with_suffix(".partial")
        scratch.write_text(json.dumps(content), encoding="utf-8")
        scratch.replace(path)
