"""What the chat tasks came to: ChatCORE, and the report's section."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gptfast.errors import UserError
from gptfast.evaluate.outcomes import TaskResult, of_the_first, result_table
from gptfast.tasks import CHAT_TASKS

_NAME = "ChatCORE metric"


@dataclass(frozen=True)
class ChatResult:
    """first: how many problems of each task were asked at most; None: all. earlier: of tasks that
    were evaluated before these, name -> figures, as TaskResult.as_dict gives them."""

    tasks: tuple[TaskResult, ...]
    first: int | None = None
    earlier: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def with_earlier(self, path: Path, circumstances: str) -> "ChatResult":
        """With the tasks of the result in this file, if there is one under the same circumstances.
        UserError if it cannot be read."""
        if not path.is_file():
            return self
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved.get("circumstances") != circumstances:
                return self
            first = self.first or saved["first_of_each_task"]
            return replace(self, first=first, earlier=saved["tasks"])
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): remove it") from error

    @property
    def figures(self) -> dict[str, Mapping[str, float]]:
        """Of every task, in ChatCORE's order."""
        found = {**self.earlier, **{task.label: task.as_dict() for task in self.tasks}}
        return {name: found[name] for name in dict.fromkeys([*CHAT_TASKS, *found]) if name in found}

    @property
    def missing(self) -> tuple[str, ...]:
        """Tasks of ChatCORE that were not evaluated."""
        return tuple(name for name in CHAT_TASKS if name not in self.figures)

    @property
    def metric(self) -> float | None:
        """ChatCORE: the mean of the five tasks' centred accuracies; None if one is missing."""
        if self.missing:
            return None
        return sum(self.figures[name]["centered"] for name in CHAT_TASKS) / len(CHAT_TASKS)

    @property
    def key(self) -> str:
        """The metric's name in files; another one if it is not comparable with ChatCORE."""
        return "chatcore_metric_partial" if self.first else "chatcore_metric"

    def section(self, arguments: Mapping[str, object]) -> str:
        """The report's "Chat evaluation", Markdown."""
        lines = [f"{name}: {value}" for name, value in arguments.items()]
        found = self.figures.items()
        lines += [f"{name}: {figures['accuracy']:.4f}" for name, figures in found]
        cropped = [f"{name} {figures['cropped']}" for name, figures in found if figures["cropped"]]
        if cropped:
            lines.append(f"Prompts cropped to the context: {', '.join(cropped)}")
        return "".join(f"- {line}\n" for line in [*lines, self._summary])

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {
            self.key: self.metric,
            "missing": list(self.missing),
            "first_of_each_task": self.first,
            "tasks": self.figures,
        }

    def table(self) -> str:
        """What a terminal shows: the tasks evaluated now, and what all come to."""
        now = [task.label for task in self.tasks]
        before = [name for name in self.figures if name not in now]
        note = f" (with {', '.join(before)} of before)" if before else ""
        return f"{result_table(self.tasks)}\n{self._summary}{note}"

    @property
    def _summary(self) -> str:
        name = f"{_NAME} ({of_the_first(self.first)})" if self.first else _NAME
        if self.metric is None:
            return f"{name}: none, partial without {', '.join(self.missing)}"
        return f"{name}: {self.metric:.4f}"
