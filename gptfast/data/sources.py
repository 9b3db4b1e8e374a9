"""Where text comes from: one function makes any dataset into lists of parquet row groups."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from gptfast.cache import build_once
from gptfast.data import embedded, fineweb
from gptfast.data.parquet import (
    RowGroup,
    count_documents,
    hold_out,
    iter_texts,
    row_groups,
    write_documents,
)
from gptfast.data.text_files import kind_of, read_text_file
from gptfast.errors import UserError

# Part of the name of every folder made here: raise it when what is written changes.
_FORMAT = 1
# Of a single file, this share of the rows is held out for validation, at most so many.
_VALIDATION_SHARE = 100
_VALIDATION_ROWS = 5_000


@dataclass(frozen=True)
class Corpus:
    """A dataset that is on disk, verified, and split.

    train, val: row groups in reading order; no row is in both.
    split: in words, what trains and what validates.
    identity: tells this text from others, and from itself after a change; of fineweb-edu the same
        for any number of shards.
    empty: documents without text, which the reader skips. Not counted for fineweb-edu.
    """

    name: str
    train: list[RowGroup]
    val: list[RowGroup]
    split: str
    identity: str
    empty: int = 0


def prepare_corpus(
    spec: str,
    *,
    cache: Path,
    train_shards: int | None = None,
    validation: str | None = None,
    progress: bool = False,
) -> Corpus:
    """Fetch, check and, where it is not parquet, convert a dataset; cheap when that was done.

    Call it in one process a node and then in all: the others find everything in the cache.

    Args:
        spec: "fineweb-edu"; "embedded", made from the standard library's own text; or a file or
            folder of parquet, jsonl or txt (the latter two also .gz and .zst). Parquet is used
            where it is, everything else is converted once into the cache.
        cache: folder for what is fetched and converted.
        train_shards: for fineweb-edu, how many shards to train on (240 if None).
        validation: for a folder or file, the file that validates: a path or a name in the
            folder. Otherwise a folder's last file in sorted order does; of a single file, its
            last rows: 1 %, at least one, at most 5,000.
        progress: show progress bars on stderr.

    Raises:
        UserError: one line that names the file (row group, line) or shard and what to do.
    """
    cache = cache.expanduser()
    if validation is not None and spec in ("fineweb-edu", "embedded"):
        raise UserError(f"{spec} has its own validation set; leave validation={validation!r} out")
    if spec == "fineweb-edu":
        train, val = fineweb.fetch_fineweb(cache / spec, train_shards, progress=progress)
        split = _in_words(len(train), val)
        corpus = Corpus(spec, _all_groups(train), _all_groups([val]), split, identity=spec)
    elif spec == "embedded":
        folder = build_once(cache / f"{embedded.NAME}-{_FORMAT}", embedded.write_embedded)
        train, val = (folder / f"{side}.parquet" for side in ("train", "val"))
        split = _in_words(1, val)
        corpus = Corpus(spec, row_groups(train), row_groups(val), split, identity=folder.name)
    else:
        corpus = _corpus_of_files(Path(spec).expanduser(), cache, validation, progress)
    for side, groups in (("training", corpus.train), ("validation", corpus.val)):
        if next(iter_texts(groups), None) is None:
            raise UserError(f"{spec}: the {side} part has no document with text")
    return corpus


def _corpus_of_files(path: Path, cache: Path, validation: str | None, progress: bool) -> Corpus:
    files = _data_files(path)
    held_out = None
    if validation is not None:
        held_out = _validation_file(path, validation)
        files = [file for file in files if not file.samefile(held_out)]
    elif len(files) > 1:
        held_out = files.pop()
    sources = files if held_out is None else [*files, held_out]

    states = [(str(file.absolute()), *_size_and_time(file)) for file in sources]
    digest = hashlib.sha256(json.dumps([_FORMAT, states]).encode()).hexdigest()[:16]
    build = partial(_convert_and_check, sources, progress=progress)
    folder = build_once(cache / f"{path.name or 'root'}-{digest}", build)
    counts = json.loads((folder / "counts.json").read_text())
    if counts["documents"] < 2:
        raise UserError(
            f"{path} holds {counts['documents']} document(s) with text; at least two are needed, "
            "one to train and one to validate"
        )
    parts = _parquet_paths(sources, folder)
    if held_out is None:
        groups = _all_groups(parts)
        rows = sum(group.rows for group in groups)
        last = min(max(rows // _VALIDATION_SHARE, 1), _VALIDATION_ROWS)
        train, val = hold_out(groups, last)
        split = f"{files[0].name} trains, its last {last:,} of {rows:,} document(s) validate"
    else:
        train, val = _all_groups(parts[:-1]), _all_groups(parts[-1:])
        split = _in_words(len(files), held_out)
    return Corpus(str(path), train, val, split, digest, counts["empty"])


def _in_words(train_files: int, validation: Path) -> str:
    return f"{train_files:,} file(s) train, {validation.name} validates"


def _data_files(path: Path) -> list[Path]:
    """The file itself, or the folder's data files in sorted order."""
    if not path.exists():
        raise UserError(
            f"no dataset {path}: it is neither fineweb-edu nor embedded, and no such file or "
            "folder exists"
        )
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in candidates if file.is_file() and _is_data(file)]
    if not files:
        found = ", ".join(file.name for file in candidates[:5]) or "nothing"
        raise UserError(
            f"{path} has no .parquet, .jsonl or .txt (the latter two also .gz or .zst) at its top "
            f"level; it has {found}"
        )
    return files


def _is_data(file: Path) -> bool:
    return not file.name.startswith(".") and (
        file.suffix == ".parquet" or kind_of(file) is not None
    )


def _validation_file(path: Path, validation: str) -> Path:
    for file in (path / validation, Path(validation).expanduser()):
        if file.is_file() and _is_data(file):
            return file
    raise UserError(
        f"validation={validation!r} is no .parquet, .jsonl or .txt file in {path} or elsewhere"
    )


def _size_and_time(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns


def _parquet_paths(files: list[Path], folder: Path) -> list[Path]:
    """Where the parquet of each source file is: the file itself, or its conversion in `folder`."""
    return [
        # Numbered, because files of two folders can have one name.
        file if file.suffix == ".parquet" else folder / f"{i:05d}-{file.name}.parquet"
        for i, file in enumerate(files)
    ]


def _convert_and_check(files: list[Path], folder: Path, progress: bool) -> None:
    """Convert text files into `folder`, read every parquet file once, write counts.json."""

    def ingest(file: Path, parquet: Path) -> tuple[int, int]:
        if file == parquet:
            return count_documents(file)
        return write_documents(parquet, read_text_file(file))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(ingest, files, _parquet_paths(files, folder))
        bar = tqdm(results, "checking text", len(files), unit="file", disable=not progress)
        counts = list(bar)
    documents, empty = (sum(column) for column in zip(*counts))
    record = {"documents": documents, "empty": empty}
    (folder / "counts.json").write_text(json.dumps(record) + "\n")


def _all_groups(files: list[Path]) -> list[RowGroup]:
    return [group for file in files for group in row_groups(file)]
