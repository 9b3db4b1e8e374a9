"""Hostile programs in the sandbox, in both kinds of isolation; none may reach anything outside."""

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptfast.errors import UserError
from gptfast.sandbox import SandboxResult, run_many, run_program
from gptfast.sandbox import runner as sandbox
from tests.sandbox_cases import ENDLESS, NAMED, alive, kind, name, namespaces

__all__ = ["kind", "name", "namespaces"]


def test_a_program_that_reaches_its_end_succeeds(kind):
    source = "import sys\nprint('héllo', 1 + 1)\nsys.stderr.write('warned')\nassert __name__ != 'x'"
    assert run_program(source) == SandboxResult(True, "héllo 2\n", "warned", None, False, False)


def test_a_large_program_and_no_program(kind):
    assert run_program("").success
    assert run_program("x = 1\n" * 100_000 + "print(x)").stdout == "1\n"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def f(", "SyntaxError"),
        ("print('a\0b')", "(SyntaxError|ValueError): source code"),
        ("print('\ud800')", "UnicodeEncodeError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class E(Exception):\n def __str__(self): return 1/0\nraise E", "E$"),
        ("class E(Exception):\n def __str__(self): raise SystemExit\nraise E", "left before"),
        ("raise Exception('x' * 10**6)", "Exception: xxx"),
        ("input()", "EOFError"),
        ("open('/dev/null').fileno()\n[open('/dev/null') for _ in range(99)]", "OSError.*24"),
    ],
)
def test_a_program_that_raises_fails(kind, source, error):
    result = run_program(source)
    assert not result.success
    assert re.match(error, result.error), result.error
    assert len(result.error) <= 2000


@pytest.mark.parametrize(
    "leave",
    [
        "import sys; sys.exit(0)",
        "quit()",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.abort()",
        "import ctypes; ctypes.string_at(0)",
        "import os; os.closerange(0, 64)",
        # Says what the end of a program says, wherever it can.
        "import os\nfor fd in range(1, 64):\n try: os.write(fd, b'+finished ' * 9)\n"
        " except OSError: pass\nos._exit(0)",
        # Would do instead of the runner's own functions.
        "import os, sys\nsys.stdout.flush = sys.exit\nos.write = os._exit = print\nsys.exit(0)",
        "import threading, os\nthreading.Thread(target=os._exit, args=(0,)).start()\n"
        "while True: pass",
    ],
)
def test_leaving_before_the_tests_is_no_success(kind, leave):
    result = run_program(leave + "\nassert False, 'the tests ran'")
    assert not result.success
    assert not result.timed_out
    assert "the tests ran" not in result.error


def test_only_the_first_process_can_succeed(namespaces):
    result = run_program("import os, time\nif os.fork():\n time.sleep(0.2)\n os._exit(0)")
    assert not result.success
    assert run_program("import os\nif os.fork() == 0:\n os._exit(1)").success


@pytest.mark.parametrize(
    "linger",
    [
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
        "import threading\ndef spin():\n while True: pass\nthreading.Thread(target=spin).start()",
        "import os, time\ntry:\n if os.fork() == 0: time.sleep(1000)\nexcept OSError: pass",
        # A daemon: another session, another parent, deaf to signals.
        "import os, signal, time\ntry:\n if os.fork() == 0:\n  os.setsid()\n"
        "  signal.signal(signal.SIGTERM, signal.SIG_IGN)\n  if os.fork(): os._exit(0)\n"
        "  os.closerange(0, 64)\n  time.sleep(1000)\n"
        "except OSError: pass\ntime.sleep(0.2)",
    ],
)
@pytest.mark.parametrize("end", ["", "\nimport os; os._exit(0)", "\nwhile True: pass"])
def test_nothing_lingers(kind, name, linger, end):
    result = run_program(
        NAMED.format(name=name) + linger + end, timeout=0.5 if "while" in end else 5
    )
    assert result.success == (end == "")
    assert not alive(name)


@pytest.mark.parametrize(
    "kill",
    [
        "os.kill(os.getppid(), 9)",
        "os.kill({pid}, 9)",
        "os.kill({pid}, 19)",
        "os.kill(-1, 9)",
        "os.killpg(0, 9)",
        "os.killpg({group}, 9)",
        "signal.pidfd_send_signal(os.pidfd_open({pid}), 9)",
        "resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
        "os.sched_setaffinity({pid}, [0])",
        "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    ],
)
def test_other_processes_cannot_be_reached(kind, kill):
    bystander = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        for pid in (bystander.pid, os.getpid()):
            group = bystander.pid
            call = kill.format(pid=pid, group=group)
            source = f"import os, signal, resource\ntry: {call}\nexcept OSError: pass"
            # Of its own processes it may kill what it likes, itself too.
            assert not run_program(source).timed_out
        time.sleep(0.05)
        assert bystander.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, bystander.pid) == 0
        assert len(os.sched_getaffinity(bystander.pid)) == len(os.sched_getaffinity(0))
    finally:
        bystander.kill()
        bystander.wait()


def test_our_environment_is_not_its(kind, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abracadabra")
    result = run_program("import os, sys\nprint(dict(os.environ), sys.argv)")
    assert "SECRET" not in result.stdout
    assert "abracadabra" not in result.stdout
    assert str(Path(sandbox.__file__).parent) not in result.stdout


def test_our_processes_files_and_user_are_hidden(namespaces, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("abracadabra")
    secret.chmod(0o666)
    for path in (
        secret,
        f"/proc/{os.getpid()}/environ",
        "/proc/1/environ",
        __file__,
        "/sys",
        "/proc",
    ):
        result = run_program(f"open({str(path)!r})")
        assert re.match("FileNotFoundError", result.error), (path, result.error)
    source = "import os\nprint(os.getpid(), os.getuid() != 0, os.geteuid() != 0)\n"
    source += "print([os.access(path, os.W_OK) for path in ('/', '/usr/bin', '/dev/null')])"
    assert run_program(source).stdout == "1 True True\n[False, False, True]\n"


def test_capabilities_are_gone(kind):
    source = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
assert libc.capget(header, data) == 0 and data.raw == bytes(24)
for call in (libc.unshare, libc.chroot, libc.umount2, libc.ptrace):
    assert call(0x10000000 if call is libc.unshare else b"/", 0, 0, 0) == -1
    print(ctypes.get_errno())
"""
    result = run_program(source)
    assert result.error is None
    assert result.stdout == "1\n" * 4


def test_files_outside_cannot_be_changed(kind, tmp_path):
    victim, new = tmp_path / "victim", tmp_path / "new"
    victim.write_text("whole")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    for attempt in (
        f"open({str(victim)!r}, 'w')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"os.truncate({str(victim)!r}, 0)",
        f"os.remove({str(victim)!r})",
        f"os.rename({str(victim)!r}, {str(new)!r})",
        f"os.chmod({str(victim)!r}, 0)",
        f"os.link({str(victim)!r}, {str(new)!r})",
        f"os.symlink('x', {str(new)!r})",
        f"os.mkdir({str(new)!r})",
        f"os.utime({str(victim)!r}, (0, 0))",
        f"os.setxattr({str(victim)!r}, 'user.x', b'')",
        f"os.open({str(tmp_path)!r}, os.O_TMPFILE | os.O_RDWR)",
        f"os.remove(os.readlink('/proc/self/fd/1')); os.rmdir({str(tmp_path)!r})",
        f"shutil.rmtree({str(tmp_path)!r})",
        "open('/usr/x', 'w')",
        "open(os.path.join(sys.prefix, 'x'), 'w')",
    ):
        result = run_program(f"import os, shutil, sys\n{attempt}")
        assert result.error is not None, attempt
        assert re.match(r"(FileNotFound|Permission|OS|NotADirectory)Error", result.error), attempt
    assert victim.read_text() == "whole"
    assert victim.stat().st_mtime > 0
    assert list(tmp_path.iterdir()) == [victim]


def test_its_folder_is_empty_its_own_and_gone_afterwards(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write = "import os, tempfile\nopen('a', 'w').write('b')\nprint(open('a').read())\n"
    write += "os.mkdir('c'); os.chmod('c', 0)\nassert tempfile.mkstemp()[1].startswith('/tmp')"
    for _ in range(2):
        result = run_program(write)
        assert result.success == (kind == "namespaces"), result.error
        assert result.stdout == ("b\n" if result.success else "")
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_network(kind):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.settimeout(0.05)
        unix.bind(b"\0gptfast-" + secrets.token_bytes(4).hex().encode())
        unix.listen()
        for family, address in (("AF_INET", tcp.getsockname()), ("AF_UNIX", unix.getsockname())):
            source = f"import socket\ns = socket.socket(socket.{family})\ns.connect({address!r})"
            result = run_program(source)
            assert re.match(r"(OS|Permission|ConnectionRefused)Error", result.error), result.error
        with pytest.raises(TimeoutError):
            tcp.accept()


ORPHANED = """
import sys, types
package = types.ModuleType("gptfast")
package.__path__ = [{package!r}]
sys.modules["gptfast"] = package
from gptfast.sandbox import runner as sandbox
sandbox.isolation = lambda: {kind!r}
sandbox.run_program({source!r}, timeout=1000.0)
"""


def wait_until(true: Callable[[], object], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_nothing_survives_us(kind, name):
    source = NAMED.format(name=name) + "import time\ntime.sleep(1000)"
    package = str(Path(sandbox.__file__).parent.parent)
    script = ORPHANED.format(package=package, kind=kind, source=source)
    caller = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert wait_until(lambda: alive(name))
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    assert wait_until(lambda: not alive(name))


def test_a_hundred_at_once_take_the_time_of_a_few(kind):
    sources = [f"import time\ntime.sleep(0.5)\nprint({i})" for i in range(100)]
    begin = time.monotonic()
    results = run_many(sources, workers=100, timeout=30.0)
    seconds = time.monotonic() - begin
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(100)]
    # One after the other they would take more than 50.
    assert seconds < 20


def test_many_keep_their_limits_and_order(kind):
    results = run_many(["print(1)", ENDLESS, "1/0"], timeout=0.5, file_bytes=100)
    assert [r.success for r in results] == [True, False, False]
    assert [r.timed_out for r in results] == [False, True, False]
    assert run_many([]) == []


def test_a_sandbox_that_fails_is_no_failed_program(kind, monkeypatch):
    monkeypatch.setattr(sandbox, "_CHILD", Path("/nonexistent.py"))
    with pytest.raises(RuntimeError, match="No such file"):
        run_program("pass")


@pytest.fixture
def undecided() -> Iterator[None]:
    sandbox.isolation.cache_clear()
    yield
    sandbox.isolation.cache_clear()


def test_weaker_isolation_is_said_once(undecided, monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "_failure", {"namespaces": "EPERM", "filter": None}.get)
    with caplog.at_level(logging.WARNING):
        assert [sandbox.isolation() for _ in range(3)] == ["filter"] * 3
    assert len(caplog.records) == 1
    assert "EPERM" in caplog.text


def test_no_isolation_runs_nothing(undecided, monkeypatch):
    monkeypatch.setattr(sandbox, "_failure", {"namespaces": "EPERM", "filter": "EINVAL"}.get)
    with pytest.raises(UserError, match=r"'EPERM'.*'EINVAL'"):
        run_program("pass")


def test_threads_may_run_programs(kind):
    results: list[SandboxResult] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(run_program(f"print({i})")))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.stdout for result in results) == ["0\n", "1\n", "2\n", "3\n"]
