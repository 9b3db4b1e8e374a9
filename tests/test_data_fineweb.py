"""Fetching shards from a server on loopback that misbehaves in every way a real one does."""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from gptfast.data import iter_texts, prepare_corpus, shards_for
from gptfast.data.fineweb import REPO, FetchPolicy, fetch_fineweb
from gptfast.data.parquet import write_documents
from gptfast.errors import UserError

COMMIT = "c0ffee" + "0" * 34
QUICK = FetchPolicy(workers=2, tries=2, try_seconds=30, wait_seconds=0.05)
VAL = "shard_01822.parquet"


class Hub(ThreadingHTTPServer):
    """Serves `files` as the Hub serves a dataset; `faults` says what to do wrong, in turn.

    faults[name, method]: for each request of that kind a status code, "stall" (half of the body,
    then silence), "cut" (half of it, then the end) or "corrupt"; once it is empty all goes well.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], list[int | str]] = defaultdict(list)
        # (method, name, Range header) of every request.
        self.requests: list[tuple[str, str, str | None]] = []
        self.closing = threading.Event()

    def asked(self, method: str) -> list[str]:
        return [name for verb, name, _ in self.requests if verb == method]


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args) -> None:
        pass

    def _answer(self) -> None:
        folder, name = self.path.rsplit("/", 1)
        if not folder.startswith(f"/datasets/{REPO}/resolve/"):
            # What else huggingface_hub is curious about.
            return self._refuse(404)
        asked_range = self.headers.get("Range")
        self.server.requests.append((self.command, name, asked_range))
        faults = self.server.faults[name, self.command]
        fault = faults.pop(0) if faults else None
        if name not in self.server.files or isinstance(fault, int):
            return self._refuse(fault or 404)
        body = self.server.files[name]
        digest = hashlib.sha256(body).hexdigest()
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        begin = int(asked_range.removeprefix("bytes=").removesuffix("-")) if asked_range else 0
        self.send_response(206 if asked_range else 200)
        if asked_range:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - begin))
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            half = len(body) // 2 if fault in ("stall", "cut") else len(body)
            self.wfile.write(body[begin:half])
            if fault == "stall":
                self.wfile.flush()
                self.server.closing.wait(30)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    for i, name in enumerate([f"shard_{i:05d}.parquet" for i in range(3)] + [VAL]):
        path = tmp_path / name
        write_documents(path, [f"{name}, document {j} " + "x" * j for j in range(50 + i)])
        server.files[name] = path.read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(folder: Path, shards: int = 1, policy: FetchPolicy = QUICK) -> list[Path]:
    train, val = fetch_fineweb(folder, shards, policy=policy)
    return [*train, val]


def assert_fetched(paths: list[Path], hub: Hub) -> None:
    assert [path.read_bytes() for path in paths] == [hub.files[path.name] for path in paths]
    left = {path.name for path in paths[0].parent.iterdir()}
    assert left == {path.with_suffix(end).name for path in paths for end in (".parquet", ".json")}


def test_first_shards_train_the_last_validates_and_a_second_call_asks_nothing(hub, tmp_path):
    cache = tmp_path / "cache"
    corpus = prepare_corpus("fineweb-edu", cache=cache, train_shards=2)
    folder = cache / "fineweb-edu"
    names = ["shard_00000.parquet", "shard_00001.parquet", VAL]
    assert_fetched([folder / name for name in names], hub)
    assert sorted(hub.asked("GET")) == names
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


@pytest.mark.parametrize("fault", ["stall", "cut"])
def test_a_broken_connection_is_taken_up_where_it_broke(hub, tmp_path, fault):
    # huggingface_hub writes, and resumes, in pieces of 10 MiB.
    hub.files[VAL] = bytes(range(256)) * (24 << 12)
    hub.faults[VAL, "GET"] = [fault]
    assert_fetched(fetch(tmp_path / "data"), hub)
    ranges = [asked for verb, name, asked in hub.requests if (verb, name) == ("GET", VAL)]
    # Versions before 1.0 do not resume after a cut: there our own second try begins anew.
    if fault == "stall" or not huggingface_hub.__version__.startswith("0."):
        assert ranges == [None, f"bytes={10 << 20}-"]


def test_an_overloaded_server_is_asked_again(hub, tmp_path):
    hub.faults[VAL, "HEAD"] = [500, 429]
    policy = FetchPolicy(workers=2, tries=3, wait_seconds=0.05)
    assert_fetched(fetch(tmp_path / "data", policy=policy), hub)
    assert hub.asked("GET").count(VAL) == 1


def test_a_corrupt_shard_is_fetched_again(hub, tmp_path):
    hub.faults[VAL, "GET"] = ["corrupt"]
    assert_fetched(fetch(tmp_path / "data"), hub)
    assert hub.asked("GET").count(VAL) == 2


def test_a_shard_that_stays_corrupt_never_gets_its_name(hub, tmp_path):
    hub.faults[VAL, "GET"] = ["corrupt"] * 9
    with pytest.raises(UserError, match=r"shard_01822.*in 2 tries: the Hub states \{'size'.*"):
        fetch(tmp_path / "data")
    assert hub.asked("GET").count(VAL) == 2
    assert not list((tmp_path / "data").glob("*1822*"))


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_stays_overloaded_is_named_with_what_is_kept(hub, tmp_path, status):
    hub.faults[VAL, "HEAD"] = [status] * 99
    with pytest.raises(UserError) as caught:
        fetch(tmp_path / "data")
    message = str(caught.value)
    assert message.startswith(
        f"{VAL} of {REPO} could not be fetched in 2 tries: HTTP {status} from"
    )
    assert f"run the same command again: finished shards are kept in {tmp_path}" in message
    assert hub.asked("HEAD").count(VAL) >= 2
    # Again, and all is well: the shard that was finished is not asked for.
    hub.faults.clear()
    hub.requests.clear()
    assert_fetched(fetch(tmp_path / "data"), hub)
    assert set(hub.asked("GET")) == {VAL}


def test_a_shard_that_does_not_exist_is_not_tried_again(hub, tmp_path):
    del hub.files[VAL]
    with pytest.raises(
        UserError, match=rf"{VAL} of {REPO} cannot be fetched: HTTP 404.*HF_ENDPOINT"
    ):
        fetch(tmp_path / "data")
    assert hub.asked("HEAD").count(VAL) == 1


def test_a_shard_that_one_may_not_read_is_not_tried_again(hub, tmp_path):
    hub.faults[VAL, "HEAD"] = [401] * 9
    with pytest.raises(UserError, match=rf"{VAL} of {REPO} cannot be fetched: HTTP 401.*HF_TOKEN"):
        fetch(tmp_path / "data")
    assert hub.asked("HEAD").count(VAL) == 1


def test_a_server_that_hangs_for_ever_costs_a_bounded_time(hub, tmp_path):
    hub.faults[VAL, "GET"] = ["stall"] * 99
    policy = FetchPolicy(workers=1, tries=2, try_seconds=2, wait_seconds=0.05)
    with pytest.raises(UserError, match=rf"{VAL} .*in 2 tries: not complete after 2 s"):
        fetch(tmp_path / "data", policy=policy)
    assert not list((tmp_path / "data").glob(".fetch-*"))


def test_no_server_at_all(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"in 2 tries: .*[Cc]onnect"):
        fetch(tmp_path / "data")


def test_a_damaged_local_shard_is_fetched_again(hub, tmp_path):
    paths = fetch(tmp_path / "data")
    paths[0].write_bytes(paths[0].read_bytes()[:-7])
    paths[1].with_suffix(".json").unlink()
    assert_fetched(fetch(tmp_path / "data"), hub)


@pytest.mark.parametrize("count", [0, 1823])
def test_an_impossible_number_of_shards(tmp_path, count):
    with pytest.raises(UserError, match=rf"train_shards is {count}; .* 1 to 1822"):
        fetch_fineweb(tmp_path, count)


def test_shards_for_tokens():
    # d20: 11.2 billion tokens of about 4.8 characters; the reference fetches 240 to be safe.
    assert shards_for(11_200_000_000, 4.8) == 216
    assert shards_for(1, 4.8) == 1
    assert shards_for(10**12, 4.8) == 1822
