"""Tasks: conversations to train on, questions to evaluate with."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from gptfast.errors import UserError
from gptfast.tasks.arc import ARC
from gptfast.tasks.common import Task, TaskMixture, TaskSequence, render_mc
from gptfast.tasks.conversations import Conversations, smoltalk
from gptfast.tasks.gsm8k import GSM8K
from gptfast.tasks.hub import fetch
from gptfast.tasks.humaneval import HumanEval
from gptfast.tasks.mmlu import MMLU

__all__ = [
    "ARC",
    "CHAT_TASKS",
    "GSM8K",
    "MMLU",
    "Conversations",
    "HumanEval",
    "Task",
    "TaskMixture",
    "TaskSequence",
    "chat_task",
    "fetch",
    "render_mc",
    "smoltalk",
]

# The tasks of the chat evaluation: name -> (folder, how the test split is made from it).
CHAT_TASKS: dict[str, tuple[str, Callable[[Path], Task]]] = {
    "ARC-Easy": ("arc", partial(ARC, subset="ARC-Easy", split="test")),
    "ARC-Challenge": ("arc", partial(ARC, subset="ARC-Challenge", split="test")),
    "MMLU": ("mmlu", partial(MMLU, subset="all", split="test")),
    "GSM8K": ("gsm8k", partial(GSM8K, split="test")),
    "HumanEval": ("humaneval", HumanEval),
}


def chat_task(name: str, *, data: Path | None, cache: Path, progress: bool = False) -> Task:
    """A task of the chat evaluation, from the folder `data`, or fetched if that is None.

    Args:
        data: holds the folders arc, mmlu, gsm8k and humaneval, laid out as on the Hub.
        progress: show a bar of fetched files on stderr.

    Raises:
        UserError: for an unknown name, or data that cannot be read or fetched.
    """
    if name not in CHAT_TASKS:
        raise UserError(f"no chat task {name!r}; there are {', '.join(CHAT_TASKS)}")
    folder, make = CHAT_TASKS[name]
    if data is None:
        return make(fetch(folder, cache, progress=progress))
    return make(data.expanduser() / folder)
