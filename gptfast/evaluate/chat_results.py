"""What the chat tasks came to: ChatCORE, and the report's section."""

from collections.abc import Mapping
from dataclasses import dataclass

from gptfast.evaluate.outcomes import TaskResult, result_table
from gptfast.tasks import CHAT_TASKS

_NAME = "ChatCORE metric"


@dataclass(frozen=True)
class ChatResult:
    tasks: tuple[TaskResult, ...]

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
            "chatcore_metric": self.metric,
            "missing": list(self.missing),
            "tasks": {task.label: task.as_dict() for task in self.tasks},
        }

    def table(self) -> str:
        """What a terminal shows."""
        return f"{result_table(self.tasks)}\n{self._summary}"

    @property
    def _summary(self) -> str:
        if self.metric is None:
            return f"{_NAME}: none, partial without {', '.join(self.missing)}"
        return f"{_NAME}: {self.metric:.4f}"
