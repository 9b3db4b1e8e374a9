"""What became of each example of a task: a table that ranks fill together and a folder keeps.

Outcomes are a float64 table with a row for each example and the columns below; rows of examples
that were not scored are zero, so that tables of several ranks add up.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from gptfast.errors import UserError

DONE, CORRECT, MARGIN, CROPPED = range(4)
COLUMNS = 4


@dataclass(frozen=True)
class TaskResult:
    """One task. baseline: accuracy of guessing, 0 to 1. outcomes: (examples, 4)."""

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

    def as_dict(self) -> dict[str, float]:
        """JSON values."""
        figures = ("accuracy", "centered", "standard_error", "examples", "cropped")
        return {name: getattr(self, name) for name in figures}


def cut_to(limit: int | None, sizes: Iterable[int]) -> int | None:
    """How many examples of each task are scored; None if the limit leaves none out."""
    return limit if limit is not None and any(size > limit for size in sizes) else None


def of_the_first(limit: int) -> str:
    """How a score is marked that is of no more examples of each task."""
    return f"first {limit:,} of each task"


def result_table(tasks: Sequence[TaskResult]) -> str:
    """What a terminal shows, a line for each task."""
    lines = [f"{'task':34}  accuracy  centred    +-  examples"]
    for task in tasks:
        figures = (
            f"{task.accuracy:8.4f}  {task.centered:7.4f}  {task.standard_error:.4f}"
            f"  {task.examples:6}"
        )
        note = f"  {task.cropped} cropped to the context" if task.cropped else ""
        lines.append(f"{task.label:34}  {figures}{note}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Asked:
    """What is scored for a task. key: JSON values that tell its questions, and how they are asked,
    from all others."""

    label: str
    examples: int
    key: Mapping[str, object]


class ResultStore:
    """Outcomes in a folder, so that an evaluation that was stopped goes on where it was.

    `<task>-<examples>.json` holds what was known when the last evaluation began or ended,
    `<task>-<examples>.rankN.json` what rank N has added since. Files of another model, or of other
    questions, are not read; they are replaced when the task is done. The first few examples of a
    task have a file of their own, so that scoring those never costs what is known of all.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        """identity: JSON values that tell models, tokenizers and precisions apart."""
        self.folder, self.identity = folder, dict(identity)
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, asked: Asked) -> np.ndarray:
        """Table of the outcomes known, in the one file that is left afterwards. One process."""
        table = np.zeros((asked.examples, COLUMNS))
        parts = self._parts(asked)
        for path in (self._whole(asked), *parts):
            for index, *outcome in self._read(path, self._key(asked)):
                table[int(index)] = (1, *outcome)
        if parts:
            self.save(asked, table)
        return table

    def save_part(self, asked: Asked, table: np.ndarray, rank: int) -> None:
        """What a rank has found for a task until now."""
        self._write(self._whole(asked).with_suffix(f".rank{rank}.json"), asked, table)

    def save(self, asked: Asked, table: np.ndarray) -> None:
        """What all ranks have found. One process."""
        self._write(self._whole(asked), asked, table)
        for part in self._parts(asked):
            part.unlink(missing_ok=True)

    def _whole(self, asked: Asked) -> Path:
        return self.folder / f"{asked.label}-{asked.examples}.json"

    def _parts(self, asked: Asked) -> list[Path]:
        return sorted(self.folder.glob(f"{self._whole(asked).stem}.rank*.json"))

    def _key(self, asked: Asked) -> dict[str, object]:
        key = {"identity": self.identity, "asked": dict(asked.key), "examples": asked.examples}
        # As it will be read back, so that tuples equal lists.
        return json.loads(json.dumps(key))

    def _read(self, path: Path, key: Mapping[str, object]) -> list[list[float]]:
        if not path.is_file():
            return []
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content["outcomes"] if content["key"] == key else []
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): remove it") from error

    def _write(self, path: Path, asked: Asked, table: np.ndarray) -> None:
        done = np.flatnonzero(table[:, DONE])
        content = {
            "key": self._key(asked),
            "done": len(done),
            "accuracy": float(table[done, CORRECT].mean()) if len(done) else None,
            "columns": ["example", "correct", "margin", "cropped"],
            "outcomes": [[int(i), *table[i, CORRECT:].tolist()] for i in done],
        }
        scratch = path.with_suffix(".partial")
        scratch.write_text(json.dumps(content), encoding="utf-8")
        scratch.replace(path)


def place_of(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, size); without a group, one process alone."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def known_outcomes(
    asked: Sequence[Asked], store: ResultStore | None, group: dist.ProcessGroup | None
) -> list[np.ndarray]:
    """A table for each task, of what rank 0 finds in the store, on every rank."""
    tables = [np.zeros((task.examples, COLUMNS)) for task in asked]
    if store and place_of(group)[0] == 0:
        tables = [store.load(task) for task in asked]
    if group is None:
        return tables
    flat = torch.from_numpy(np.concatenate(tables))
    dist.broadcast(flat, group_src=0, group=group)
    return _split_like(flat.numpy(), tables)


def complete_outcomes(
    asked: Sequence[Asked],
    known: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    store: ResultStore | None,
    group: dist.ProcessGroup | None,
) -> list[np.ndarray]:
    """The same with what all ranks have found, kept in the store where that is anything."""
    flat = torch.from_numpy(np.concatenate(found))
    if group is not None:
        dist.all_reduce(flat, group=group)
    tables = _split_like(np.concatenate(known) + flat.numpy(), known)
    for task, table, had in zip(asked, tables, known):
        assert table[:, DONE].all(), f"{task.label}: examples were not scored"
        if store and place_of(group)[0] == 0 and not had[:, DONE].all():
            store.save(task, table)
    return tables


def _split_like(flat: np.ndarray, tables: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([len(table) for table in tables])[:-1])
