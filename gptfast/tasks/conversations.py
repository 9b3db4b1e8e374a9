"""Conversations out of any JSONL or parquet files with `messages`, checked when they are read."""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gptfast.conversation import Conversation, problem_with, problem_with_roles
from gptfast.errors import UserError
from gptfast.tasks.common import Task, hub_shuffle, locate, read_parquet, split_files


class Conversations(Task):
    """The rows `{"messages": [...]}` of some files, as gptfast.conversation describes them.

    A content is text; the assistant's can be a list of parts where it comes from JSONL.

    Args:
        files: .jsonl or .parquet, in order.
        shuffle: as the reference shuffles datasets of the Hub.

    Raises:
        UserError: naming the file and the line or row that is wrong.
    """

    def __init__(self, files: Sequence[Path], *, shuffle: bool = False) -> None:
        self._files = [_read(file) for file in files]
        self._ends = list(accumulate(map(len, self._files)))
        size = self._ends[-1] if files else 0
        self._order = hub_shuffle(size) if shuffle else np.arange(size)
        super().__init__(size)

    def conversation(self, index: int) -> Conversation:
        which, within = locate(self._ends, int(self._order[index]))
        messages = self._files[which][within]
        return {"messages": messages.as_py() if isinstance(messages, pa.Scalar) else messages}


def smoltalk(folder: Path, *, split: str) -> Conversations:
    """SmolTalk for small models; HuggingFaceTB/smol-smoltalk: train (460,341), test (24,229)."""
    return Conversations(split_files(folder, split), shuffle=True)


def _read(file: Path) -> list[list[dict[str, Any]]] | pa.ChunkedArray:
    if file.suffix == ".jsonl":
        return _read_jsonl(file)
    if file.suffix == ".parquet":
        return _read_parquet(file)
    raise UserError(f"{file} is neither .jsonl nor .parquet")


def _read_jsonl(file: Path) -> list[list[dict[str, Any]]]:
    conversations = []
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number} is not JSON: {error}") from error
        messages: Any = record.get("messages") if isinstance(record, dict) else None
        if problem := problem_with(messages):
            raise UserError(f"{file}, line {number}: {problem}")
        conversations.append(messages)
    return conversations


def _read_parquet(file: Path) -> pa.ChunkedArray:
    column = read_parquet(file, ["messages"])["messages"]
    if pa.types.is_large_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    _check_type(file, column.type)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} is damaged: {error}") from error
    row = 0
    for chunk in column.chunks:
        if not _is_plainly_right(chunk):
            for number, messages in enumerate(chunk, start=row):
                if problem := problem_with(messages.as_py()):
                    raise UserError(f"{file}, row {number} (from 0): {problem}")
        row += len(chunk)
    return column


def _check_type(file: Path, kind: pa.DataType) -> None:
    item = kind.value_type if pa.types.is_list(kind) else kind
    fields = {field.name: field.type for field in item} if pa.types.is_struct(item) else {}
    for name in ("role", "content"):
        found = fields.get(name)
        if found not in (pa.string(), pa.large_string()) or item is kind:
            raise UserError(f"{file}: messages is {kind}; a list of role and content is needed")


def _is_plainly_right(chunk: pa.ListArray) -> bool:
    """Whether every row is right, told by columns: rows have few different sequences of roles."""
    messages = chunk.flatten()
    roles, contents = messages.field("role"), messages.field("content")
    if any(part.null_count for part in (chunk, messages, roles, contents)):
        return False
    begins = pc.subtract(chunk.offsets, chunk.offsets[0])
    turns = pa.ListArray.from_arrays(begins, roles.cast(pa.string()))
    sequences = pc.unique(pc.binary_join(turns, "\n")).to_pylist()
    return not any(problem_with_roles(sequence.split("\n")) for sequence in sequences)
