"""What a task is: numbered conversations and, where they are questions, how answers are scored."""

import copy
import hashlib
import json
import random
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gptfast.conversation import Conversation
from gptfast.errors import UserError

EvalType = Literal["categorical", "generative"]

_HUB_SHUFFLE_SEED = 42
_MIXTURE_SEED = 42


class Task(Sequence[Conversation]):
    """Conversations, made when they are asked for. A slice of a task is a task.

    If answers are scored, the last message of a conversation is a right one; a categorical
    question has its "letters", too.

    Attributes:
        eval_type: "categorical" if the answer is one of the conversation's letters, "generative"
            if it is any text, None if answers are not scored.
        baseline: share of right answers that guessing gives.
    """

    eval_type: ClassVar[EvalType | None] = None
    baseline: ClassVar[float] = 0.0

    def __init__(self, size: int) -> None:
        self._indices = range(size)

    @abstractmethod
    def conversation(self, index: int) -> Conversation:
        """The conversation of this index in the whole task, however it is sliced."""

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """Whether this text of the assistant's is a right answer."""
        raise NotImplementedError(f"the answers of {type(self).__name__} are not scored")

    def evaluate_many(
        self, conversations: Sequence[Conversation], answers: Sequence[str]
    ) -> list[bool]:
        """`evaluate` for each pair."""
        return [self.evaluate(*pair) for pair in zip(conversations, answers, strict=True)]

    def fingerprint(self) -> str:
        """sha256 of all conversations in order: what is asked, and what is right."""
        digest = hashlib.sha256()
        for conversation in self:
            digest.update(json.dumps(conversation, sort_keys=True).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> "Task": ...

    def __getitem__(self, index: int | slice) -> "Conversation | Task":
        if isinstance(index, slice):
            part = copy.copy(self)
            part._indices = self._indices[index]
            return part
        return self.conversation(self._indices[index])


class TaskSequence(Task):
    """Tasks one after the other, for a curriculum."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = list(tasks)
        self._ends = list(accumulate(map(len, tasks)))
        super().__init__(self._ends[-1] if tasks else 0)

    def conversation(self, index: int) -> Conversation:
        which, within = locate(self._ends, index)
        return self._tasks[which][within]


class TaskMixture(TaskSequence):
    """All conversations of the tasks, mixed; to weigh a task more, give it more than once.

    The order depends on nothing but the sizes of the tasks.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__(tasks)
        order = list(range(len(self)))
        random.Random(_MIXTURE_SEED).shuffle(order)
        self._order = np.array(order, dtype=np.int64)

    def conversation(self, index: int) -> Conversation:
        return super().conversation(int(self._order[index]))


class HubTask(Task):
    """The rows of one split of a dataset from the Hub, shuffled as the reference shuffles them."""

    def __init__(self, table: pa.Table) -> None:
        super().__init__(len(table))
        self._table = table
        self._order = hub_shuffle(len(table))

    def row(self, index: int) -> dict[str, Any]:
        return self._table.slice(int(self._order[index]), 1).to_pylist()[0]


class MultipleChoice(HubTask):
    """Questions that are answered with a letter."""

    eval_type = "categorical"
    baseline = 0.25

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        if answer not in conversation["letters"]:
            raise ValueError(f"{answer!r} is none of the letters {conversation['letters']}")
        return answer == conversation["messages"][-1]["content"]


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The prompt of a multiple-choice question.

    The letter comes after its choice, so that the model reads what it stands for first, and
    without a space before it, so that it is the same token as in the answer.
    """
    lines = [f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join(
        [
            f"Multiple Choice question: {question}",
            *lines,
            "",
            "Respond only with the letter of the correct answer.",
        ]
    )


def hub_shuffle(size: int) -> np.ndarray:
    """(size,) int64: the order that `datasets.Dataset.shuffle(seed=42)` gives `size` rows.

    The library (checked with 5.2) takes the permutation of NumPy's default generator.
    """
    return np.random.default_rng(_HUB_SHUFFLE_SEED).permutation(size)


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """(which part, index within it) of an index into parts that end at `ends`."""
    which = bisect_right(ends, index)
    return which, index - (ends[which - 1] if which else 0)


def split_names(split: str, count: int) -> list[str]:
    """How the Hub names the files of a split."""
    return [f"{split}-{i:05d}-of-{count:05d}.parquet" for i in range(count)]


def split_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split in order. UserError if there are none, or not all of them."""
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        found = ", ".join(sorted(p.name for p in folder.glob("*"))[:5]) or "nothing"
        raise UserError(f"{folder} has no {split}-*.parquet; it has {found}")
    names = [file.name for file in files]
    if names != split_names(split, len(names)):
        raise UserError(
            f"{folder} does not hold one whole {split} split: it has {', '.join(names)}"
        )
    return files


def read_split(folder: Path, split: str, columns: Sequence[str]) -> pa.Table:
    """These columns of all rows of a split. UserError names the file that does not have them."""
    return pa.concat_tables([read_parquet(file, columns) for file in split_files(folder, split)])


def read_parquet(file: Path, columns: Sequence[str]) -> pa.Table:
    try:
        found = pq.read_schema(file).names
        if missing := [column for column in columns if column not in found]:
            raise UserError(f"{file} lacks {', '.join(missing)}; its columns: {', '.join(found)}")
        return pq.read_table(file, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is no readable parquet file: {error}") from error
