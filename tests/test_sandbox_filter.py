"""The sandbox's system call filter, run as the kernel would run it."""

import struct

import pytest

from gptfast.sandbox.filter import filter_for


def decide(machine: str, namespaces: bool, number: int, *arguments: int) -> int:
    """What the kernel would make of the filter: 0 for allowed, an errno, -1 for killed."""
    code = filter_for(machine, namespaces=namespaces)
    call = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003}
    data = struct.pack("<iIQ6Q", number, call[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    return simulate(code, data)


def simulate(code: bytes, data: bytes) -> int:
    position, word = 0, 0
    while True:
        operation, if_true, if_false, k = struct.unpack_from("HBBI", code, 8 * position)
        position += 1
        if operation == 0x06:
            return {0x7FFF0000: 0, 0x80000000: -1}.get(k, k & 0xFFFF)
        if operation == 0x20:
            word = int.from_bytes(data[k : k + 4], "little")
        else:
            test = {0x15: word == k, 0x35: word >= k, 0x45: bool(word & k)}[operation]
            position += if_true if test else if_false


@pytest.mark.parametrize(
    ("call", "numbers", "arguments", "with_namespaces", "without"),
    [
        ("read", (0, 63), (), 0, 0),
        ("write", (1, 64), (), 0, 0),
        ("mmap", (9, 222), (), 0, 0),
        ("execve", (59, 221), (), 0, 0),
        ("socket", (41, 198), (), 0, 1),
        ("kill", (62, 129), (), 0, 1),
        ("unlinkat", (263, 35), (), 0, 1),
        ("mount", (165, 40), (), 1, 1),
        ("ptrace", (101, 117), (), 1, 1),
        ("clone a process", (56, 220), (0x1200011,), 0, 1),
        ("clone a thread", (56, 220), (0x3D0F00,), 0, 0),
        ("clone a user namespace", (56, 220), (0x10000011,), 1, 1),
        ("openat O_RDONLY|O_CLOEXEC", (257, 56), (0, 0, 0o2000000), 0, 0),
        ("openat O_WRONLY", (257, 56), (0, 0, 1), 0, 1),
        ("openat O_CREAT", (257, 56), (0, 0, 0o100), 0, 1),
        ("fcntl F_DUPFD_CLOEXEC", (72, 25), (0, 1030), 0, 0),
        ("fcntl F_SETOWN", (72, 25), (0, 8), 0, 1),
        ("prlimit64 of itself", (302, 261), (0,), 0, 0),
        ("prlimit64 of another", (302, 261), (1,), 0, 1),
        ("clone3", (435, 435), (), 38, 38),
        ("io_uring_setup", (425, 425), (), 38, 38),
        ("pidfd_send_signal", (424, 424), (), 38, 38),
    ],
)
def test_filter(call, numbers, arguments, with_namespaces, without):
    for machine, number in zip(("x86_64", "aarch64"), numbers):
        assert decide(machine, True, number, *arguments) == with_namespaces
        assert decide(machine, False, number, *arguments) == without


def test_filter_knows_its_machine():
    for machine, other in (("x86_64", "aarch64"), ("aarch64", "x86_64")):
        foreign = struct.pack("<iIQ6Q", 0, 0x40000003, 0, *[0] * 6)
        assert simulate(filter_for(machine, namespaces=True), foreign) == -1
        assert filter_for(machine, namespaces=False) != filter_for(other, namespaces=False)
    # The x32 calls of x86_64 have this bit.
    assert decide("x86_64", False, 0x40000000 | 41) == 38
    with pytest.raises(KeyError):
        filter_for("riscv64", namespaces=True)
