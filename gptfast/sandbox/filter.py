"""Which system calls a sandboxed program may not make, as a seccomp filter.

A list of what is denied, so it does not have to know what each version of Python and libc needs.
Denied calls fail with EPERM, calls that are too new to be listed with ENOSYS.
"""

import struct
from typing import NamedTuple


class _Call(NamedTuple):
    """Numbers of a system call, from the kernel's <asm/unistd_64.h> and <asm-generic/unistd.h>."""

    x86_64: int
    # None: there is no such call.
    aarch64: int | None


class _Condition(NamedTuple):
    """Deny a call only if any (or, with `unless`, none) of these bits are in this argument."""

    argument: int
    bits: int
    unless: bool = False


# <linux/audit.h>
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# From this number on, both architectures have the same calls: pidfds, io_uring, clone3, openat2,
# mounting by file descriptor, and whatever is new. Programs get on without them.
_FIRST_RECENT_CALL = 424

# Parts of the kernel that are no program's business, and ways to new privileges.
_ALWAYS = {
    "unshare": _Call(272, 97),
    "setns": _Call(308, 268),
    "mount": _Call(165, 40),
    "umount2": _Call(166, 39),
    "pivot_root": _Call(155, 41),
    "chroot": _Call(161, 51),
    "ptrace": _Call(101, 117),
    "bpf": _Call(321, 280),
    "perf_event_open": _Call(298, 241),
    "userfaultfd": _Call(323, 282),
    "add_key": _Call(248, 217),
    "request_key": _Call(249, 218),
    "keyctl": _Call(250, 219),
}
# Without namespaces: no processes, ...
_CREATE_PROCESSES = {"fork": _Call(57, None), "vfork": _Call(58, None)}
# ... no network, ...
_SOCKETS = {"socket": _Call(41, 198), "socketpair": _Call(53, 199)}
# ... nothing done to other processes, ...
_OTHER_PROCESSES = {
    "kill": _Call(62, 129),
    "tkill": _Call(200, 130),
    "tgkill": _Call(234, 131),
    "rt_sigqueueinfo": _Call(129, 138),
    "rt_tgsigqueueinfo": _Call(297, 240),
    "setpgid": _Call(109, 154),
    "setsid": _Call(112, 157),
    "process_vm_readv": _Call(310, 270),
    "process_vm_writev": _Call(311, 271),
    "kcmp": _Call(312, 272),
    "migrate_pages": _Call(256, 238),
    "move_pages": _Call(279, 239),
    "setpriority": _Call(141, 140),
    "ioprio_set": _Call(251, 30),
    "sched_setparam": _Call(142, 118),
    "sched_setscheduler": _Call(144, 119),
    "sched_setattr": _Call(314, 274),
}
# ... no file made, changed or removed, ...
_CHANGE_FILES = {
    "creat": _Call(85, None),
    "truncate": _Call(76, 45),
    "mkdir": _Call(83, None),
    "mkdirat": _Call(258, 34),
    "rmdir": _Call(84, None),
    "mknod": _Call(133, None),
    "mknodat": _Call(259, 33),
    "link": _Call(86, None),
    "linkat": _Call(265, 37),
    "symlink": _Call(88, None),
    "symlinkat": _Call(266, 36),
    "unlink": _Call(87, None),
    "unlinkat": _Call(263, 35),
    "rename": _Call(82, None),
    "renameat": _Call(264, 38),
    "renameat2": _Call(316, 276),
    "chmod": _Call(90, None),
    "fchmod": _Call(91, 52),
    "fchmodat": _Call(268, 53),
    "chown": _Call(92, None),
    "fchown": _Call(93, 55),
    "lchown": _Call(94, None),
    "fchownat": _Call(260, 54),
    "utime": _Call(132, None),
    "utimes": _Call(235, None),
    "futimesat": _Call(261, None),
    "utimensat": _Call(280, 88),
    "setxattr": _Call(188, 5),
    "lsetxattr": _Call(189, 6),
    "fsetxattr": _Call(190, 7),
    "removexattr": _Call(197, 14),
    "lremovexattr": _Call(198, 15),
    "fremovexattr": _Call(199, 16),
    "open_by_handle_at": _Call(304, 265),
}
# ... and nothing to do with System V or POSIX objects, which are shared and outlive a process.
_SHARED_OBJECTS = {
    "shmget": _Call(29, 194),
    "shmat": _Call(30, 196),
    "shmctl": _Call(31, 195),
    "semget": _Call(64, 190),
    "semop": _Call(65, 193),
    "semctl": _Call(66, 191),
    "semtimedop": _Call(220, 192),
    "msgget": _Call(68, 186),
    "msgsnd": _Call(69, 189),
    "msgrcv": _Call(70, 188),
    "msgctl": _Call(71, 187),
    "mq_open": _Call(240, 180),
    "mq_unlink": _Call(241, 181),
}
_WITHOUT_NAMESPACES = (
    _CREATE_PROCESSES | _SOCKETS | _OTHER_PROCESSES | _CHANGE_FILES | _SHARED_OBJECTS
)

_CLONE = _Call(56, 220)
_CLONE_THREAD = 0x10000
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_CLONE_NEW = 0x7E020000
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC.
_TO_WRITE = 0o1 | 0o2 | 0o100 | 0o1000
# The bit that F_SETOWN, F_SETSIG and F_SETOWN_EX share: signals to others by way of a file.
_SIGNAL_BY_FILE = 8
_ANY_OTHER = 0xFFFFFFFF

_CONDITIONS_ALWAYS = [(_CLONE, _Condition(0, _CLONE_NEW))]
_CONDITIONS_WITHOUT_NAMESPACES = [
    (_CLONE, _Condition(0, _CLONE_THREAD, unless=True)),
    (_Call(2, None), _Condition(1, _TO_WRITE)),  # open
    (_Call(257, 56), _Condition(2, _TO_WRITE)),  # openat
    (_Call(72, 25), _Condition(1, _SIGNAL_BY_FILE)),  # fcntl
    # 0 is the calling process.
    (_Call(302, 261), _Condition(0, _ANY_OTHER)),  # prlimit64
    (_Call(203, 122), _Condition(0, _ANY_OTHER)),  # sched_setaffinity
]

# <linux/filter.h>, <linux/seccomp.h>: load a word of the call's description, jump, return.
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_KILL_PROCESS, _ALLOW = 0x80000000, 0x7FFF0000
_EPERM, _ENOSYS = 0x00050001, 0x00050026


def filter_for(machine: str, *, namespaces: bool) -> bytes:
    """The filter as an array of `struct sock_filter`, for a program with or without namespaces.

    Raises:
        KeyError: if the machine is neither x86_64 nor aarch64.
    """
    denied, conditions = dict(_ALWAYS), list(_CONDITIONS_ALWAYS)
    if not namespaces:
        denied |= _WITHOUT_NAMESPACES
        conditions += _CONDITIONS_WITHOUT_NAMESPACES
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        # Calls of another architecture, such as 32-bit x86, have other numbers.
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_AT_LEAST, 0, 1, _FIRST_RECENT_CALL),
        (_RETURN, 0, 0, _ENOSYS),
    ]
    for call in denied.values():
        number = getattr(call, machine)
        if number is not None:
            program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    for call, condition in conditions:
        number = getattr(call, machine)
        if number is not None:
            program += _conditional(number, condition)
    program.append((_RETURN, 0, 0, _ALLOW))
    # Jumps are over so many instructions if true, if false.
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _conditional(number: int, condition: _Condition) -> list[tuple[int, int, int, int]]:
    # The low half of a 64-bit argument; both architectures are little-endian.
    word = _ARGUMENTS + 8 * condition.argument
    if_set, if_clear = (1, 0) if condition.unless else (0, 1)
    return [
        (_JUMP_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, word),
        (_JUMP_ANY_BIT, if_set, if_clear, condition.bits),
        (_RETURN, 0, 0, _EPERM),
        (_LOAD, 0, 0, _NUMBER),
    ]
