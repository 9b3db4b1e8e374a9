"""Files and folders in, a split corpus out; every kind of bad input named in one line."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gptfast.data import iter_texts, prepare_corpus
from gptfast.data.parquet import RowGroup, hold_out, row_groups, write_documents
from gptfast.data.text_files import cut_into_documents
from gptfast.errors import UserError

DOCUMENTS = [f"document {i}: Grüße, 世界" for i in range(250)]


def jsonl(texts: list[str | None]) -> bytes:
    return "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts).encode()


def texts_of(groups: list[RowGroup]) -> list[str]:
    return list(iter_texts(groups))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def prepare(tmp_path: Path):
    return lambda spec, **options: prepare_corpus(str(spec), cache=tmp_path / "cache", **options)


def test_one_file_of_each_kind_gives_the_same_documents(source, prepare):
    files = {
        "a.jsonl": jsonl(DOCUMENTS),
        "b.jsonl.gz": gzip.compress(jsonl(DOCUMENTS)),
        "c.jsonl.zst": zstandard.compress(jsonl(DOCUMENTS)),
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    write_documents(source / "d.parquet", DOCUMENTS, rows_per_group=100)
    for name in [*files, "d.parquet"]:
        corpus = prepare(source / name)
        assert corpus.split == f"{name} trains, its last 2 of 250 document(s) validate"
        # 1 % of 250 rows.
        assert texts_of(corpus.train) == DOCUMENTS[:248]
        assert texts_of(corpus.val) == DOCUMENTS[248:]


def test_a_folder_validates_on_its_last_file_or_on_the_one_that_is_named(source, prepare, tmp_path):
    (source / "b.jsonl").write_bytes(jsonl(DOCUMENTS[:3]))
    (source / "a.txt").write_text("first file\n")
    (source / "README.md").write_text("no data")
    (source / ".hidden.txt").write_text("no data")
    write_documents(source / "c.parquet", DOCUMENTS[3:6])
    corpus = prepare(source)
    assert texts_of(corpus.train) == ["first file\n", *DOCUMENTS[:3]]
    assert texts_of(corpus.val) == DOCUMENTS[3:6]
    assert corpus.split == "2 file(s) train, c.parquet validates"

    corpus = prepare(source, validation="a.txt")
    assert corpus.split == "2 file(s) train, a.txt validates"
    assert texts_of(corpus.train) == DOCUMENTS[:6]
    assert texts_of(corpus.val) == ["first file\n"]

    # One of the same name elsewhere.
    elsewhere = tmp_path / "a.txt"
    elsewhere.write_text("elsewhere\n")
    corpus = prepare(source / "a.txt", validation=str(elsewhere))
    assert (texts_of(corpus.train), texts_of(corpus.val)) == (["first file\n"], ["elsewhere\n"])

    with pytest.raises(UserError, match=r"validation='d.txt' is no .parquet, .jsonl or .txt"):
        prepare(source, validation="d.txt")


def test_the_second_call_reads_no_text_again_and_a_changed_file_does(source, prepare, monkeypatch):
    (source / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    write_documents(source / "b.parquet", DOCUMENTS)
    first = prepare(source)
    with monkeypatch.context() as patch:
        for name in ("write_documents", "count_documents"):
            patch.setattr(f"gptfast.data.sources.{name}", lambda *_: pytest.fail("read again"))
        assert prepare(source) == first
    (source / "a.jsonl").write_bytes(jsonl(["changed", "text"]))
    assert texts_of(prepare(source).train) == ["changed", "text"]


def test_processes_that_prepare_at_the_same_time_agree(source, prepare, tmp_path):
    (source / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(prepare, [source] * 8))
    assert corpora == [corpora[0]] * 8
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_single_file_holds_out_at_most_5000_rows_and_cuts_inside_a_row_group():
    groups = [RowGroup(Path("a"), i, 0, 400_000) for i in range(2)]
    train, val = hold_out(groups, 5_000)
    assert val == [RowGroup(Path("a"), 1, 395_000, 400_000)]
    assert train == [groups[0], RowGroup(Path("a"), 1, 0, 395_000)]
    assert hold_out(groups, 400_000) == ([groups[0]], [groups[1]])
    train, val = hold_out(groups, 400_001)
    assert [g.rows for g in train] == [399_999]
    assert [g.rows for g in val] == [1, 400_000]


def test_txt_is_cut_at_blank_lines_and_nothing_is_lost(source, prepare):
    text = "".join(f"line {i}\n" + ("\n" if i % 5 == 4 else "") for i in range(4000))
    (source / "a.txt").write_text("\ufeff" + text)
    corpus = prepare(source / "a.txt")
    documents = texts_of(corpus.train) + texts_of(corpus.val)
    assert "".join(documents) == text
    assert all(8192 <= len(d) < 8192 + 60 and d.endswith("\n\n") for d in documents[:-1])
    # Without blank lines, at the end of a line.
    cut = list(cut_into_documents(["12345\n"] * 10, chars=10))
    assert cut == ["12345\n" * 4, "12345\n" * 4, "12345\n" * 2]


def test_the_embedded_corpus_is_deterministic_split_by_module_and_without_repeats(tmp_path):
    first = prepare_corpus("embedded", cache=tmp_path / "one")
    second = prepare_corpus("embedded", cache=tmp_path / "two")
    train, val = texts_of(first.train), texts_of(first.val)
    assert (train, val) == (texts_of(second.train), texts_of(second.val))
    assert 4e6 < sum(map(len, train)) < 2e7
    assert 1e5 < sum(map(len, val)) < 2e6
    assert len({*train, *val}) == len(train) + len(val)
    assert first.split == "1 file(s) train, val.parquet validates"
    assert len(first.train) >= 8
    with pytest.raises(UserError, match="embedded has its own validation set"):
        prepare_corpus("embedded", cache=tmp_path, validation="a.txt")


def test_empty_documents_are_skipped_and_counted(source, prepare):
    (source / "a.jsonl").write_bytes(jsonl(["one", "", None, "two"]) + b"\n  \n")
    pq.write_table(pa.table({"text": ["three", None, ""]}), source / "b.parquet")
    corpus = prepare(source)
    assert corpus.empty == 4
    assert (texts_of(corpus.train), texts_of(corpus.val)) == (["one", "two"], ["three"])


def test_iter_texts_caps_documents_and_characters(source):
    write_documents(source / "a.parquet", ["abcdef", "ghi", "jklmno", "pq"], rows_per_group=2)
    assert list(iter_texts([source / "a.parquet"], doc_cap=4)) == ["abcd", "ghi", "jklm", "pq"]
    assert list(iter_texts([source / "a.parquet"], doc_cap=4, max_chars=8)) == [
        "abcd",
        "ghi",
        "jklm",
    ]
    assert list(iter_texts(row_groups(source / "a.parquet")[1:], max_chars=1)) == ["jklmno"]


BAD_FILES = {
    "utf8.jsonl": (
        b'{"text": "a"}\n{"text": "\xff"}\n',
        r"utf8.jsonl, line 2 is not UTF-8: byte 0xff",
    ),
    "utf8.txt": (b"fine\nfine\n\xc3(\n", r"utf8.txt, line 3 is not UTF-8: byte 0xc3 at column 1"),
    "json.jsonl": (b'{"text": "a"}\n{"text": \n', r"json.jsonl, line 2 is not JSON"),
    "field.jsonl": (b'{"content": "a"}\n', r'field.jsonl, line 1 is not an object like {"text"'),
    "type.jsonl": (b'{"text": 5}\n', r"type.jsonl, line 1 is not an object like"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', r"half.jsonl, line 1 has half a surrogate pair"),
    "cut.jsonl.gz": (gzip.compress(jsonl(DOCUMENTS))[:-40], r"cut.jsonl.gz cannot be read after"),
    "cut.jsonl.zst": (zstandard.compress(jsonl(DOCUMENTS))[:-9], r"cut.jsonl.zst cannot be read"),
    "no.parquet": (b"PAR1 nothing PAR1", r"no.parquet is no readable parquet file"),
    "empty.parquet": (b"", r"empty.parquet is no readable parquet file"),
    "empty.jsonl": (b"", r"empty.jsonl holds 0 document\(s\) with text"),
    "null.jsonl": (jsonl([None, ""]), r"null.jsonl holds 0 document\(s\) with text"),
    "one.txt": (b"one document\n", r"one.txt holds 1 document\(s\) with text; at least two"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(source, prepare, tmp_path, name):
    content, message = BAD_FILES[name]
    (source / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare(source / name)
    assert "\n" not in str(caught.value)
    # Nothing half made is left behind.
    assert not list((tmp_path / "cache").glob(".*"))


def test_missing_and_empty_datasets(source, prepare):
    with pytest.raises(UserError, match="neither fineweb-edu nor embedded, and no such file"):
        prepare(source / "missing")
    with pytest.raises(UserError, match=r"has no .parquet, .jsonl or .txt .* it has nothing"):
        prepare(source)
    (source / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"it has notes.md"):
        prepare(source)
    (source / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    (source / "b.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="the validation part has no document with text"):
        prepare(source)
    with pytest.raises(UserError, match="the training part has no document with text"):
        prepare(source, validation="a.jsonl")


def test_a_parquet_file_without_a_text_column(source, prepare):
    pq.write_table(pa.table({"content": ["a"], "text": [1]}), source / "a.parquet")
    with pytest.raises(UserError, match=r"needs a column `text` of strings; .* text: int64"):
        prepare(source)


def test_a_corrupt_row_group_is_named(source, prepare):
    write_documents(source / "a.parquet", DOCUMENTS)
    path = source / "b.parquet"
    write_documents(path, DOCUMENTS, rows_per_group=50)
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"b.parquet, row group 3 cannot be read: .*"):
        prepare(source)


def test_invalid_utf8_inside_parquet_is_named(source, prepare):
    write_documents(source / "a.parquet", DOCUMENTS)
    text = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), source / "b.parquet", row_group_size=1)
    with pytest.raises(UserError, match=r"b.parquet, row group 1 cannot be read: .*UTF8"):
        prepare(source)
