"""The process that runner.py starts for one program: a script that imports nothing of ours.

It reads its orders from stdin, shuts itself in, forks the process that runs the program, ends it
when its time is up, and writes one answer: whether the time was up, the exit code (minus the
signal's number), and the program's own account: "finished", "failed" or "memory", or nothing, and
the exception. runner.py says what this protects and what not.
"""

# One such process is started for each program, so it does without the modules that take long to
# import: pathlib, signal, contextlib, json.
# ruff: noqa: PTH102, PTH103, PTH112, PTH114, PTH115, PTH120, PTH123, PTH211

import ctypes
import marshal
import os
import resource
import select
import struct
import sys
import time

_SIGKILL = 9
# Where the program's process gives its account, and with what it begins.
_ACCOUNT_FD = 3
_CONFINED = b"+"
_ACCOUNT_BYTES = 2000
# Above the limit on memory, for the account of how it was reached.
_MEMORY_RESERVE = 16 << 20

# What is seen of the file system besides the interpreter's own folders; all of it read-only.
_SYSTEM_PATHS = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# <sched.h>: CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NEW_NAMESPACES = 0x20000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
# <sys/mount.h>
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8
_REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
# pivot_root has no function in libc.
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# <sys/prctl.h>, <linux/seccomp.h>, <linux/capability.h>
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    orders = marshal.loads(sys.stdin.buffer.read())
    os.umask(0o022)
    user = os.geteuid()
    if orders["namespaces"]:
        # Root has no limit on processes, so the program gets a user of its own.
        user = user or _spare_id()
        _enter_namespaces(user)
        _change_root(orders["interpreter"], orders["folder_bytes"])
    # New credentials clear this setting, so it comes after them.
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != orders["parent"]:
        sys.exit("the process that wanted this program run has ended")

    account, account_end = os.pipe()
    token = os.urandom(16)
    child = os.fork()
    if child == 0:
        os.close(account)
        _confine(orders, user, account_end)
        _run(orders["source"], token)
    os.close(account_end)
    told, timed_out = _listen(account, orders["timeout"])
    # In case it is not about to end. As the child is the first process of a PID namespace, all
    # others have ended with it when the wait is over.
    os.kill(child, _SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not told.startswith(_CONFINED):
        # The child's exception is on stderr.
        os._exit(1)
    genuine = told.startswith(_CONFINED + token) and not timed_out
    own_account = told.removeprefix(_CONFINED + token) if genuine else b" "
    os.write(orders["answer"], b"%d %d %b" % (timed_out, code, own_account))
    # Not through the interpreter's finalization, which has nothing to do here.
    os._exit(0)


def _listen(account: int, seconds: float) -> tuple[bytes, bool]:
    """All that is written to the pipe until its other end is closed; whether the time was up."""
    deadline = time.monotonic() + seconds
    told = b""
    while len(told) < 2 * _ACCOUNT_BYTES:
        left = max(deadline - time.monotonic(), 0.0)
        if not select.select([account], [], [], left)[0]:
            return told, True
        part = os.read(account, _ACCOUNT_BYTES)
        if not part:
            break
        told += part
    return told, False


def _run(source: str, token: bytes) -> None:
    """Run the program, tell how it ended, and end this process with all its threads."""
    # What is needed afterwards is taken before: the program may put anything in its place.
    write, leave, process, own = os.write, os._exit, os.getpid, os.getpid()
    set_limit, memory = resource.setrlimit, resource.RLIMIT_AS
    _, with_reserve = resource.getrlimit(memory)
    streams = sys.stdout, sys.stderr
    sys.argv[:] = ["program"]
    # Not "__main__", as in the reference and in human-eval: what a script does for itself under
    # that name is no part of a solution.
    module = type(sys)("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
        for stream in streams:
            if not stream.closed:
                stream.flush()
        told = "finished "
    except BaseException as error:  # sys.exit() too: the program did not reach its end
        set_limit(memory, (with_reserve, with_reserve))
        how = "memory" if isinstance(error, MemoryError) else "failed"
        told = f"{how} {_describe(error)}"
        try:
            for stream in streams:
                stream.flush()
        except (OSError, ValueError):  # closed, or too much: it has failed already
            pass
    # A process that the program forked can come here too, but has no say.
    if process() == own:
        write(_ACCOUNT_FD, token + told.encode("utf-8", "replace")[:_ACCOUNT_BYTES])
    leave(0)


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:  # a __str__ of the program's own
        return name
    return f"{name}: {text}" if text else name


def _confine(orders: dict, user: int, account_end: int) -> None:
    """Take from this process, the child, all that the program is not to have."""
    os.setsid()
    os.chdir("/tmp" if orders["namespaces"] else "/")
    os.close(orders["answer"])
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(account_end, _ACCOUNT_FD, inheritable=False)
    for descriptor in {nothing, account_end} - {_ACCOUNT_FD}:
        os.close(descriptor)
    own = os.geteuid()
    if user != own:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    # No capability, and none to be had from set-user-id programs.
    _call("capset", struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    memory, files, processes = (orders[k] for k in ("memory_bytes", "file_bytes", "processes"))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory + _MEMORY_RESERVE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (files, files))
    resource.setrlimit(resource.RLIMIT_NOFILE, (orders["open_files"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if orders["namespaces"]:
        # Of this user in this user namespace, where the parent may be one of them. Outside of
        # one, everything that the user runs would count.
        resource.setrlimit(resource.RLIMIT_NPROC, (processes + (user == own),) * 2)
    code = ctypes.create_string_buffer(orders["filter"], len(orders["filter"]))
    program = struct.pack("HP", len(orders["filter"]) // 8, ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program)
    # Fails if the parent ended before this process was bound to end with it.
    os.write(_ACCOUNT_FD, _CONFINED)


def _spare_id() -> int:
    """An id that is mapped here and in nobody's use: near the end of the last range."""
    with open("/proc/self/uid_map") as file:
        start, _, count = map(int, file.read().split()[-3:])
    return start + count - 2 - os.getpid() % (count // 2)


def _enter_namespaces(user: int) -> None:
    """New user, PID, network, mount, IPC and UTS namespaces, with this user and `user` in them.

    PID: only children are in it, the first one as its process 1, with which all of it ends.
    """
    own, group, process = os.geteuid(), os.getegid(), os.getpid()
    groups = {group, user} if user != own else {group}
    ready, go = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        # Ids can be mapped only by a process outside of the namespace.
        code = 1
        try:
            os.close(go)
            if os.read(ready, 1):
                _map_ids(process, {own, user}, groups)
                code = 0
        finally:
            os._exit(code)
    os.close(ready)
    _call("unshare", _NEW_NAMESPACES)
    os.write(go, b"+")
    os.close(go)
    if os.waitstatus_to_exitcode(os.waitpid(mapper, 0)[1]) != 0:
        raise PermissionError("no user or group ids may be mapped into a user namespace")


def _map_ids(process: int, users: set[int], groups: set[int]) -> None:
    if len(groups) == 1:
        # The condition on which an ordinary user may map the group.
        _write(f"/proc/{process}/setgroups", "deny")
    _write(f"/proc/{process}/uid_map", "\n".join(f"{id_} {id_} 1" for id_ in users))
    _write(f"/proc/{process}/gid_map", "\n".join(f"{id_} {id_} 1" for id_ in groups))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _change_root(interpreter: list[str], folder_bytes: int) -> None:
    """A new root with an interpreter, system libraries, an empty /tmp and nothing else."""
    _mount(None, "/", flags=_PRIVATE | _RECURSIVE)
    # Built in memory, over a folder that every system has and that is needed no more.
    root = "/proc"
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    os.mkdir(f"{root}/tmp")
    options = f"mode=1777,size={folder_bytes},nr_inodes=10000"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, options)
    shown: list[str] = []
    for path in sorted({*_SYSTEM_PATHS, *_DEVICES, *interpreter}):
        if os.path.lexists(path) and not any(path.startswith(f"{other}/") for other in shown):
            _show(path, root)
            shown.append(path)
    # Where libc keeps shared memory and semaphores.
    os.symlink("/tmp", f"{root}/dev/shm")
    _mount(None, root, flags=_REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(root)
    # The old root comes to lie on the new one and is then taken away, as pivot_root(2) describes.
    _call("syscall", _PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", _MNT_DETACH)


def _show(path: str, root: str) -> None:
    """Let `path` be seen, read-only, at the same place under `root`."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        _write(target, "")
    _mount(path, target, flags=_BIND | _RECURSIVE)
    # What the mount forbids already has to stay forbidden.
    kept = os.statvfs(target).f_flag & (_RDONLY | _NOSUID | _NODEV | _NOEXEC)
    _mount(None, target, flags=_REMOUNT | _BIND | _RDONLY | _NOSUID | kept)


def _mount(
    source: str | None, target: str, kind: str | None = None, flags: int = 0, options: str = ""
) -> None:
    names = (None if name is None else os.fsencode(name) for name in (source, target, kind))
    _call("mount", *names, ctypes.c_ulong(flags), options.encode())


def _prctl(option: int, *values: int | bytes) -> None:
    values += (0,) * (4 - len(values))
    _call("prctl", option, *(ctypes.c_ulong(v) if isinstance(v, int) else v for v in values))


def _call(function: str, *arguments: object) -> None:
    """A function of libc that gives -1 and sets errno if it fails."""
    if getattr(_libc, function)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


if __name__ == "__main__":
    main()
