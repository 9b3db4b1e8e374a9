"""What the tests of the sandbox share: both kinds of isolation, names for what runs inside."""

import functools
import secrets
from pathlib import Path

import pytest

from gptfast.sandbox import runner as sandbox

MIB = 1 << 20
# Gives the program's processes and threads a name, by which they are found from outside.
NAMED = "import ctypes\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"
ENDLESS = "while True: pass"


@functools.cache
def failure(kind: str) -> str | None:
    return sandbox._failure(kind)


@pytest.fixture(params=["namespaces", "filter"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if cause := failure(request.param):
        pytest.skip(f"no {request.param} on this system: {cause}")
    monkeypatch.setattr(sandbox, "isolation", lambda: request.param)
    return request.param


@pytest.fixture
def namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    if cause := failure("namespaces"):
        pytest.skip(f"no namespaces on this system: {cause}")
    monkeypatch.setattr(sandbox, "isolation", lambda: "namespaces")


@pytest.fixture
def name() -> str:
    return "sb-" + secrets.token_hex(5)


def alive(name: str) -> list[int]:
    """Processes with a thread of this name."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/task/[0-9]*/comm"):
        try:
            if comm.read_text().strip() == name:
                found.append(int(comm.parts[2]))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found
