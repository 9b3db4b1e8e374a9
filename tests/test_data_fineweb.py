"""Which shards are fetched, and what they are for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptfast.data import iter_texts, prepare_corpus, shards_for
from gptfast.data.fineweb import REPO, fetch_fineweb
from gptfast.data.parquet import write_documents
from gptfast.errors import UserError
from tests.fake_hub import QUICK, Hub, fake_hub

VAL = "shard_01822.parquet"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub(tmp_path, monkeypatch) as hub:
        for i, name in enumerate([f"shard_{i:05d}.parquet" for i in range(3)] + [VAL]):
            path = tmp_path / name
            write_documents(path, [f"{name}, document {j} " + "x" * j for j in range(50 + i)])
            hub.files[name] = path.read_bytes()
        yield hub


def test_first_shards_train_the_last_validates_and_a_second_call_asks_nothing(hub, tmp_path):
    cache = tmp_path / "cache"
    corpus = prepare_corpus("fineweb-edu", cache=cache, train_shards=2)
    folder = cache / "fineweb-edu"
    names = ["shard_00000.parquet", "shard_00001.parquet", VAL]
    assert {path.name for path in folder.glob("*.parquet")} == set(names)
    assert all((folder / name).read_bytes() == hub.files[name] for name in names)
    assert corpus.split == f"2 file(s) train, {VAL} validates"
    assert sorted(hub.asked("GET")) == names
    assert {request.repo for request in hub.requests} == {REPO}
    assert next(iter_texts(corpus.train)).startswith("shard_00000.parquet, document 0")
    assert next(iter_texts(corpus.val)).startswith(f"{VAL}, document 0")
    assert len(list(iter_texts(corpus.train))) == 50 + 51

    hub.requests.clear()
    assert prepare_corpus("fineweb-edu", cache=cache, train_shards=2) == corpus
    assert hub.requests == []
    # More shards: only the new one is fetched, and validation stays what it was.
    longer = prepare_corpus("fineweb-edu", cache=cache, train_shards=3)
    assert set(hub.asked("GET")) == {"shard_00002.parquet"}
    assert longer.val == corpus.val


def test_a_shard_that_cannot_be_fetched_is_named(hub, tmp_path):
    del hub.files[VAL]
    with pytest.raises(UserError, match=rf"{VAL} of {REPO} cannot be fetched: HTTP 404"):
        fetch_fineweb(tmp_path / "data", 1, policy=QUICK)


@pytest.mark.parametrize("count", [0, 1823])
def test_an_impossible_number_of_shards(tmp_path, count):
    with pytest.raises(UserError, match=rf"train_shards is {count}; .* 1 to 1822"):
        fetch_fineweb(tmp_path, count)


def test_shards_for_tokens():
    # d20: 11.2 billion tokens of about 4.8 characters; the reference fetches 240 to be safe.
    assert shards_for(11_200_000_000, 4.8) == 216
    assert shards_for(1, 4.8) == 1
    assert shards_for(10**12, 4.8) == 1822
