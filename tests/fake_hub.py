"""A Hub on loopback that misbehaves, when told to, in every way a real one does."""

import hashlib
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from gptfast.fetch import FetchPolicy

COMMIT = "c0ffee" + "0" * 34
# Gives up soon; what takes longer than that is not what a test waits for.
QUICK = FetchPolicy(workers=2, tries=2, try_seconds=30, wait_seconds=0.05)

_ON_THE_HUB = re.compile(
    r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"
)
_ON_THE_WEB = re.compile(r"/web/(?P<name>.+)")


class Request(NamedTuple):
    method: str
    name: str
    repo: str | None
    revision: str | None
    # The Range header.
    range: str | None


class Hub(ThreadingHTTPServer):
    """Serves `files`, {name: content}, as files of any dataset, and at `url(name)` as a plain web
    server does; `faults` says what to do wrong, in turn.

    faults[name, method]: for each request of that kind a status code, "stall" (half of the body,
    then silence), "cut" (half of it, then the end) or "corrupt"; once it is empty all goes well.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], list[int | str]] = defaultdict(list)
        self.requests: list[Request] = []
        self.closing = threading.Event()

    def url(self, name: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}" + (f"/web/{name}" if name else "")

    def asked(self, method: str) -> list[str]:
        return [request.name for request in self.requests if request.method == method]


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        place = _ON_THE_HUB.fullmatch(self.path) or _ON_THE_WEB.fullmatch(self.path)
        if place is None:
            # What else huggingface_hub is curious about.
            return self._refuse(404)
        asked = {"repo": None, "revision": None, **place.groupdict()}
        request = Request(self.command, range=self.headers.get("Range"), **asked)
        self.server.requests.append(request)
        faults = self.server.faults[request.name, request.method]
        fault = faults.pop(0) if faults else None
        if request.name not in self.server.files or isinstance(fault, int):
            return self._refuse(fault or 404)
        self._send(self.server.files[request.name], request, fault)

    def _send(self, body: bytes, request: Request, fault: str | None) -> None:
        digest = hashlib.sha256(body).hexdigest()
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        begin = 0
        if request.range:
            begin = int(request.range.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if request.range else 200)
        if request.range:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - begin))
        if request.repo:
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if request.method == "GET":
            end = len(body) // 2 if fault in ("stall", "cut") else len(body)
            self.wfile.write(body[begin:end])
            if fault == "stall":
                self.wfile.flush()
                self.server.closing.wait(30)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that huggingface_hub in child processes talks to, without files at first."""
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    hub.closing.set()
    hub.shutdown()
    hub.server_close()
    thread.join()
