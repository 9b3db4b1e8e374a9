"""Programs that want too much in the sandbox: time, memory, output, files, processes."""

import time

import pytest

from gptfast.sandbox import SandboxResult, run_program
from tests.sandbox_cases import ENDLESS, MIB, NAMED, alive, kind, name, namespaces

__all__ = ["kind", "name", "namespaces"]


@pytest.mark.parametrize(
    "endless",
    [
        ENDLESS,
        "import time; time.sleep(1000)",
        "import signal\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n"
        " except OSError: pass\nwhile True: signal.pause()",
        "try:\n while True: pass\nfinally:\n while True: pass",
        "2 ** 10**9 % 3; 3 ** 10**8",
    ],
)
def test_an_endless_program_is_ended(kind, name, endless):
    begin = time.monotonic()
    result = run_program(
        NAMED.format(name=name) + "print('on', flush=True)\n" + endless, timeout=0.5
    )
    assert time.monotonic() - begin < 10
    assert result == SandboxResult(False, "on\n", "", "still running after 0.5 s", True, False)
    assert not alive(name)


def test_memory_is_limited(kind):
    for source in ("x = [0] * 10**9", "x = []\nwhile True: x.append(bytearray(2**20))"):
        result = run_program(source)
        assert (result.success, result.memory_exceeded) == (False, True)
        assert result.error.startswith("MemoryError")
    assert run_program("x = bytearray(100 * 2**20)").success
    small = run_program("x = bytearray(100 * 2**20)", memory_bytes=96 * MIB)
    assert small.memory_exceeded
    # One who is content with less goes on.
    caught = run_program("try: x = [0] * 10**9\nexcept MemoryError: print('less')")
    assert (caught.success, caught.stdout) == (True, "less\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_limited(kind, stream):
    flood = f"import sys\nwhile True: sys.{stream}.write('x' * 10**6)"
    result = run_program(flood, file_bytes=MIB)
    assert not result.success
    assert "File too large" in result.error
    assert len(getattr(result, stream)) == MIB


def test_files_are_limited(namespaces):
    result = run_program("with open('a', 'wb') as f: f.write(bytes(2**20 + 1))", file_bytes=MIB)
    assert "File too large" in result.error
    source = "for i in range(9):\n with open(str(i), 'wb') as f: f.write(bytes(2**20))"
    result = run_program(source, file_bytes=MIB)
    assert "No space left" in result.error


FORK_BOMB = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
COUNTED_FORKS = """
import os, time
children = 0
try:
    while True:
        if os.fork() == 0: time.sleep(1000)
        children += 1
except OSError: print(children)
"""
COUNTED_THREADS = """
import threading, time
threads = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        threads += 1
except (RuntimeError, MemoryError): print(threads)
"""


def test_fork_bombs_stay_within_limits(kind, name):
    result = run_program(NAMED.format(name=name) + FORK_BOMB, timeout=1.0)
    assert result.timed_out
    assert not alive(name)


def test_processes_and_threads_are_counted(kind, name):
    allowed = {"namespaces": 5, "filter": 0}[kind]
    result = run_program(NAMED.format(name=name) + COUNTED_FORKS, processes=6)
    assert (result.success, result.stdout) == (True, f"{allowed}\n")
    result = run_program(NAMED.format(name=name) + COUNTED_THREADS, processes=6)
    assert result.success
    if kind == "namespaces":
        assert result.stdout == "5\n"
    else:
        # Each takes 8 MB of its 256 MB for a stack.
        assert 1 < int(result.stdout) < 64
    assert not alive(name)
