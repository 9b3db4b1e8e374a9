"""Documents out of jsonl and txt files, plain or compressed with gzip or zstandard."""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from gptfast.errors import UserError

_COMPRESSIONS = (".gz", ".zst")
_DOCUMENT_CHARS = 8192


def kind_of(path: Path) -> str | None:
    """ "jsonl" or "txt" by the name, a suffix .gz or .zst apart; None for anything else."""
    stem = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    return stem.suffix[1:] if stem.suffix in (".jsonl", ".txt") else None


def read_text_file(path: Path) -> Iterator[str]:
    """The documents of one file: the field `text` of each line of jsonl, or pieces of a txt.

    An empty or null `text` comes out as an empty string.

    Raises:
        UserError: naming the file and the line that is not UTF-8, not JSON or has no `text`.
    """
    if kind_of(path) == "jsonl":
        return (_text_of(path, number, line) for number, line in _lines(path) if line.strip())
    return cut_into_documents(line for _, line in _lines(path))


def cut_into_documents(lines: Iterable[str], chars: int = _DOCUMENT_CHARS) -> Iterator[str]:
    """Lines joined into documents, nothing added or lost.

    A document ends at the first blank line after `chars` characters, or at the first line's end
    after twice as many.
    """
    document, size = [], 0
    for line in lines:
        document.append(line)
        size += len(line)
        if size >= 2 * chars or (size >= chars and line.isspace()):
            yield "".join(document)
            document, size = [], 0
    if document:
        yield "".join(document)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end). Cut as bytes, so that a bad one can be named."""
    number = 0
    try:
        # pyarrow tells the compression by the name, and that a stream ends too early.
        with pa.input_stream(str(path)) as stream:
            for number, line in enumerate(io.BufferedReader(stream), start=1):
                text = line.decode()
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number} is not UTF-8: byte 0x{error.object[error.start]:02x} "
            f"at column {error.start + 1}"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}") from error


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text", 0), str | None):
        raise UserError(f'{path}, line {number} is not an object like {{"text": "..."}}')
    text = record["text"] or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}, line {number} has half a surrogate pair in its text") from error
    return text
