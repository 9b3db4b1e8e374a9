"""The dataset that needs nothing: source and documentation of the Python that runs us.

A few megabytes of code, docstrings and the language reference, enough for a first run. It differs
between Python versions, so figures measured on it are comparable within one version only.
"""

import ast
import hashlib
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from gptfast.data.parquet import write_documents
from gptfast.data.text_files import cut_into_documents
from gptfast.errors import UserError

NAME = f"embedded-python-{platform.python_version()}"
# Tests repeat themselves, encodings are tables, the others are no longer in every Python.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3"}
_VALIDATION_SHARE = 20
# Small row groups, so that each of eight ranks begins near the start of one.
_ROWS = 64


def write_embedded(folder: Path) -> None:
    """Write train.parquet and val.parquet: the same on every machine with this Python.

    A module is in one of the two as a whole, decided by its name alone.
    """
    splits: dict[str, dict[bytes, str]] = {"train": {}, "val": {}}
    for name, text in _modules():
        split = "val" if _digest(name)[0] % _VALIDATION_SHARE == 0 else "train"
        for document in cut_into_documents(text.splitlines(keepends=True)):
            splits[split][_digest(document)] = document
    for split, documents in splits.items():
        # Sorted by digest: mixed, without repeats, and in an order that depends on nothing else.
        texts = [documents[digest] for digest in sorted(documents)]
        write_documents(folder / f"{split}.parquet", texts, rows_per_group=_ROWS)


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_files(root))
    if not paths:
        raise UserError(
            f"this Python carries no readable standard library in {root}: "
            "name a file or folder of text instead of `embedded`"
        )
    for path in paths:
        with tokenize.open(root / path) as file:
            text = file.read()
        if path.name == "topics.py":
            yield from _topics(text)
        else:
            yield path.as_posix(), text


def _files(root: Path) -> Iterator[Path]:
    """Relative to root. Folders that are left out are not looked into: some are very large."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        inside = Path(folder).relative_to(root)
        yield from (inside / name for name in names if name.endswith(".py"))


def _topics(source: str) -> Iterator[tuple[str, str]]:
    """pydoc_data/topics.py is one dict: topic -> chapter of the language reference."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for topic, text in ast.literal_eval(node.value).items():
                yield f"topics/{topic}", text


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
