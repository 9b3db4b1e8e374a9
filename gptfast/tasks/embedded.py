"""Conversations that need nothing: made from what every Python carries, the same at every call.

What a function of the standard library does, by its docstring; sums, with the calculator; and sums
with four answers to choose from. Small models learn them in minutes, so that every stage can be
tried where nothing can be fetched.
"""

import ast
import hashlib
import importlib.util
import platform
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import pyarrow as pa

from gptfast.conversation import PYTHON, PYTHON_OUTPUT, TEXT, Conversation
from gptfast.errors import UserError
from gptfast.tasks.common import MultipleChoice, Task, TaskMixture, render_mc

Split = Literal["train", "val"]

# Docstrings differ between Python versions: figures are comparable within one version only.
NAME = f"embedded-python-{platform.python_version()}"
# Modules whose docstrings begin with a sentence that says what a thing does.
_MODULES = (
    *("argparse", "base64", "bisect", "calendar", "collections", "configparser", "copy", "csv"),
    *("datetime", "difflib", "fractions", "functools", "glob", "gzip", "heapq", "inspect"),
    *("ipaddress", "logging", "mailbox", "pathlib", "random", "shutil", "socket"),
    *("statistics", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "zipfile"),
)
_QUESTIONS = ("What does {} do?", "Explain {} in a sentence.", "What is {} for?")
_LONGEST_ANSWER = 160
_VALIDATION_SHARE = 10
_SUMS = {"train": 600, "val": 60}
_OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
_LETTERS = ["A", "B", "C", "D"]


def embedded(*, split: Split) -> Task:
    """All three, mixed."""
    return TaskMixture([Docstrings(split=split), Sums(split=split), ChosenSums(split=split)])


class Docstrings(Task):
    """Questions for the first sentence of docstrings."""

    def __init__(self, *, split: Split) -> None:
        wanted = split == "val"
        self._rows = [
            (question, answer)
            for question, answer in _questions()
            if (_digest(question) % _VALIDATION_SHARE == 0) == wanted
        ]
        super().__init__(len(self._rows))

    def conversation(self, index: int) -> Conversation:
        question, answer = self._rows[index]
        return _conversation(question, answer)


class Sums(Task):
    """Two numbers to add, subtract or multiply; the answer asks the calculator."""

    eval_type = "generative"

    def __init__(self, *, split: Split) -> None:
        self._split = split
        super().__init__(_SUMS[split])

    def conversation(self, index: int) -> Conversation:
        draw = random.Random(f"sums {self._split} {index}")
        a, b, sign = draw.randint(0, 99), draw.randint(0, 99), draw.choice(list(_OPERATORS))
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        parts = [
            {"type": TEXT, "text": f"{a} {_OPERATORS[sign]} {b} is "},
            {"type": PYTHON, "text": f"{a}{sign}{b}"},
            {"type": PYTHON_OUTPUT, "text": str(result)},
            {"type": TEXT, "text": f"{result}."},
        ]
        return _conversation(f"What is {a} {_OPERATORS[sign]} {b}?", parts)

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """Whether the answer ends with the right result."""
        return answer.endswith(conversation["messages"][-1]["content"][-1]["text"])


class ChosenSums(MultipleChoice):
    """Two digits to add, and four sums to choose from."""

    def __init__(self, *, split: Split) -> None:
        rows = []
        for index in range(_SUMS[split]):
            draw = random.Random(f"chosen sums {split} {index}")
            a, b = draw.randint(0, 9), draw.randint(0, 9)
            wrong = draw.sample([n for n in range(19) if n != a + b], 3)
            choices = draw.sample([a + b, *wrong], 4)
            rows.append({"a": a, "b": b, "choices": choices, "answer": choices.index(a + b)})
        super().__init__(pa.Table.from_pylist(rows))

    def conversation(self, index: int) -> Conversation:
        row = self.row(index)
        choices = [str(choice) for choice in row["choices"]]
        prompt = render_mc(f"{row['a']} plus {row['b']}?", _LETTERS, choices)
        return {**_conversation(prompt, _LETTERS[row["answer"]]), "letters": _LETTERS}


def _conversation(question: str, answer: str | list[dict[str, str]]) -> Conversation:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@cache
def _questions() -> list[tuple[str, str]]:
    """(question, answer) for everything public in the modules that says in a sentence what it is
    for. UserError if this Python carries no sources."""
    found = []
    for module in _MODULES:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for name, docstring in _documented(tree, module):
            answer = _first_sentence(docstring)
            if answer and len(answer) <= _LONGEST_ANSWER:
                question = _QUESTIONS[_digest(name) % len(_QUESTIONS)].format(f"`{name}`")
                found.append((question, answer))
    if not found:
        raise UserError(
            "this Python carries no sources of its standard library to make conversations of: "
            "name a file of conversations instead of `embedded`"
        )
    return found


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of the public functions and classes in a module or class."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        if docstring := ast.get_docstring(child):
            yield name, docstring
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, name)


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    head, stop, _ = paragraph.partition(". ")
    return (head + stop).strip()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
