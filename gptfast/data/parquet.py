"""Every corpus is parquet with one string column `text`: one reader, one check, one writer."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gptfast.errors import UserError

COLUMN = "text"
# Documents a row group that we write, as in the reference's shards: the unit that ranks share.
DOCUMENTS_PER_GROUP = 1024
# Documents that are in memory, and are tokenised, at a time: other people's row groups can hold
# millions.
_CHUNK = 1024


class RowGroup(NamedTuple):
    """Rows [start, stop) of row group `index` of a parquet file; nearly always all of its rows."""

    path: Path
    index: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def row_groups(path: Path) -> list[RowGroup]:
    """The row groups of one file, in order. UserError if it is no parquet with a string `text`."""
    with _open(path) as file:
        metadata = file.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return [RowGroup(path, index, 0, rows) for index, rows in enumerate(counts) if rows]


def count_documents(path: Path) -> tuple[int, int]:
    """Read the whole file: (documents with text, documents without: null or empty).

    Raises:
        UserError: naming the file, and the row group that cannot be read or is not UTF-8.
    """
    filled = rows = 0
    for group in row_groups(path):
        for _, column in _chunks(group):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                raise _unreadable(group, error) from error
            filled += pc.sum(pc.greater(pc.binary_length(column), 0)).as_py() or 0
            rows += len(column)
    return filled, rows - filled


def read_documents(group: RowGroup, begin: int = 0) -> Iterator[tuple[int, list[str]]]:
    """(row, texts) for each 1,024 rows or fewer of the group, from row `begin` on.

    row: where in the parquet's row group the chunk begins, which is a valid `begin`.
    texts: the chunk's documents, without null and empty ones.
    """
    for row, column in _chunks(group._replace(start=max(begin, group.start))):
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError as error:
            raise _unreadable(group, error) from error
        yield row, [text for text in texts if text]


def iter_texts(
    groups: Iterable[RowGroup | Path], *, doc_cap: int | None = None, max_chars: int | None = None
) -> Iterator[str]:
    """The documents of row groups or whole files, in order.

    Args:
        doc_cap: characters of a document that are kept.
        max_chars: characters after which the iteration ends, with the document that reaches them.
    """
    chars = 0
    for item in groups:
        for group in row_groups(item) if isinstance(item, Path) else [item]:
            for _, texts in read_documents(group):
                for text in texts:
                    yield text[:doc_cap]
                    chars += min(len(text), doc_cap or len(text))
                    if max_chars is not None and chars >= max_chars:
                        return


def write_documents(
    path: Path, documents: Iterable[str], rows_per_group: int = DOCUMENTS_PER_GROUP
) -> tuple[int, int]:
    """Write the documents that have text; (written, without text)."""
    schema = pa.schema([(COLUMN, pa.string())])
    empty = 0

    def filled() -> Iterator[str]:
        nonlocal empty
        for document in documents:
            if document:
                yield document
            else:
                empty += 1

    written, rest = 0, filled()
    # Nearly every text differs from all others: a dictionary and statistics would only cost.
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(path, schema, **options) as writer:
        while group := list(islice(rest, rows_per_group)):
            writer.write_table(pa.table([group], schema=schema), row_group_size=rows_per_group)
            written += len(group)
    return written, empty


def hold_out(groups: Sequence[RowGroup], rows: int) -> tuple[list[RowGroup], list[RowGroup]]:
    """(all but the last `rows` rows, the last `rows` rows) of the groups."""
    head, tail = list(groups), []
    while rows:
        last = head.pop()
        cut = max(last.start, last.stop - rows)
        tail.insert(0, last._replace(start=cut))
        if cut > last.start:
            head.append(last._replace(stop=cut))
        rows -= last.stop - cut
    return head, tail


def _chunks(group: RowGroup) -> Iterator[tuple[int, pa.Array]]:
    """(first row, column) for each chunk of the group's rows."""
    row = 0
    with _open(group.path) as file:
        batches = file.iter_batches(
            _CHUNK, row_groups=[group.index], columns=[COLUMN], use_threads=False
        )
        while row < group.stop:
            try:
                column = next(batches).column(0)
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(group, error) from error
            first, last = max(group.start - row, 0), min(group.stop - row, len(column))
            if first < last:
                yield row + first, column[first:last]
            row += len(column)


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no readable parquet file: {_first_line(error)}") from error
    schema = file.schema_arrow
    kind = schema.field(COLUMN).type if COLUMN in schema.names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        file.close()
        raise UserError(f"{path} needs a column `{COLUMN}` of strings; its columns: {columns}")
    return file


def _unreadable(group: RowGroup, error: Exception) -> UserError:
    return UserError(
        f"{group.path}, row group {group.index} cannot be read: {_first_line(error)}; "
        "fetch or write this file again, or take it out of the dataset"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
