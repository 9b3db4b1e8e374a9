"""What the chat tasks came to: ChatCORE, and the report's section."""

from collections.abc import Mapping
from dataclasses import dataclass

from gptfast.evaluate.outcomes import TaskResult, of_the_first, result_table
from gptfast.tasks import CHAT_TASKS

_NAME = "ChatCORE metric"


@dataclass(frozen=True)
class ChatResult:
    """first: how many problems of each task were asked at most; None: all."""

    tasks: tuple[TaskResult, ...]
    first: int | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """Tasks of ChatCORE that were not evaluated."""
        have = {task.label for task in self.tasks}
        return tuple(name for name in CHAT_TASKS if name not in have)

    @property
    def metric(self) -> float | None:
        """ChatCORE: the mean of the five tasks' centred accuracies; None if one is missing."""
        if self.missing:
            return None
        five = [task.centered for task in self.tasks if task.label in CHAT_TASKS]
        return sum(five) / len(five)

    @property
    def key(self) -> str:
        """The metric's name in files; another one if it is not comparable with ChatCORE."""
        return "chatcore_metric_partial" if self.first else "chatcore_metric"

    def section(self, arguments: Mapping[str, object]) -> str:
        """The report's "Chat evaluation", Markdown."""
        lines = [f"{name}: {value}" for name, value in arguments.items()]
        lines += [f"{task.label}: {task.accuracy:.4f}" for task in self.tasks]
        cropped = [f"{task.label} {task.cropped}" for task in self.tasks if task.cropped]
        if cropped:
            lines.append(f"Prompts cropped to the context: {', '.join(cropped)}")
        return "".join(f"- {line}\n" for line in [*lines, self._summary])

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {
            self.key: self.metric,
            "missing": list(self.missing),
            "first_of_each_task": self.first,
            "tasks": {task.label: task.as_dict() for task in self.tasks},
        }

    def table(self) -> str:
        """What a terminal shows."""
        return f"{result_table(self.tasks)}\n{self._summary}"

    @property
    def _summary(self) -> str:
        name = f"{_NAME} ({of_the_first(self.first)})" if self.first else _NAME
        if self.metric is None:
            return f"{name}: none, partial without {', '.join(self.missing)}"
        return f"{name}: {self.metric:.4f}"
