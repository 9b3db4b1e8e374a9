"""Gluon kernels for Hopper as Python over torch tensors: Triton has no interpreter for them.

What is asynchronous on a GPU is checked, not timed. A block that the copy engine loads lies in
shared memory at once or, `late`, only when its barrier is waited for, and is NaN until then; an
operand must be the same when its multiplication is waited for, and what is stored when the store
is. `Hazard` says what would go wrong. Threads are not emulated: one program is one thread, as in
kernels without warp specialisation, between whose warps the compiler puts barriers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import FunctionType, ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from kernels import product, product_tiles
from tests.operators import DEVICE


class Hazard(AssertionError):
    """What a GPU would not tell."""


@dataclass
class Descriptor:
    """A matrix and the block of it that one copy moves."""

    base: Tensor
    block: list[int]
    layout: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def block_type(self) -> SimpleNamespace:
        rows, cols = self.block
        return SimpleNamespace(shape=self.block, nbytes=rows * cols * self.base.element_size())

    def part(self, place: list[int]) -> Tensor:
        """The block at `place` (row, column), as far as it lies in the matrix."""
        row, col = place
        return self.base[row : row + self.block[0], col : col + self.block[1]]


@dataclass
class Shared:
    """A view of shared memory."""

    data: Tensor
    # Of the whole allocation: whether it was written since the last fence.
    unfenced: set[int]

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=list(self.data.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: int) -> "Shared":
        if not 0 <= i < len(self.data):
            raise Hazard(f"index {i} of {len(self.data)}")
        return Shared(self.data[i], self.unfenced)

    def permute(self, order: list[int]) -> "Shared":
        return Shared(self.data.permute(order), self.unfenced)

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert (value.shape, value.dtype) == (self.data.shape, self.data.dtype)
        self.data.copy_(value)
        self.unfenced.add(self.data.data_ptr())


@dataclass
class Barrier:
    """A phase ends when it was expected once and the bytes that were expected have come."""

    phase: int = 0
    expected: int | None = None
    loads: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def expect(self, nbytes: int, pred: bool = True) -> None:
        if pred and self.expected is not None:
            raise Hazard("a phase is expected twice")
        if pred:
            self.expected = nbytes

    def wait(self, parity: int) -> None:
        if self.phase & 1 != parity:
            return
        asked = sum(value.nbytes for _, value in self.loads)
        if self.expected != asked:
            raise Hazard(f"waits for ever: {self.expected} bytes expected, {asked} on their way")
        for place, value in self.loads:
            place.copy_(value)
        self.phase, self.expected, self.loads = self.phase + 1, None, []


@dataclass
class Sums:
    """An accumulator with multiplications under way: (operand, what it was) of each."""

    value: Tensor
    under_way: list[tuple[tuple[Shared, Tensor], ...]] = field(default_factory=list)


def _same(before: Tensor, now: Tensor) -> bool:
    return torch.equal(before.nan_to_num(), now.nan_to_num())


class _Machine:
    """One program's view of Gluon's language: attributes named as the kernel's globals."""

    def __init__(self, program: int, programs: int, late: bool) -> None:
        self.late = late
        self.unfenced: set[int] = set()
        self.stores: list[tuple[Shared, Tensor]] = []
        self.gl = SimpleNamespace(
            constexpr=None,
            int64="int64",
            float32=torch.float32,
            allocate_shared_memory=self.allocate,
            static_range=range,
            cdiv=lambda a, b: -(-a // b),
            program_id=lambda axis: program,
            num_programs=lambda axis: programs,
            NVMMADistributedLayout=lambda *a: None,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            split=lambda x: x.unbind(-1),
            where=torch.where,
            sqrt=torch.sqrt,
            convert_layout=lambda x, layout, assert_trivial: x,
            atomic_add=self.atomic_add,
        )
        self.mbarrier = SimpleNamespace(
            init=lambda barrier, count: None,
            expect=Barrier.expect,
            wait=Barrier.wait,
            MBarrierLayout=lambda: None,
        )
        self.tma = SimpleNamespace(store_wait=self.store_wait)

    def allocate(self, dtype, shape, layout):
        if dtype == "int64":
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=barriers.__getitem__)
        return Shared(torch.full(shape, float("nan"), dtype=dtype), self.unfenced)

    def atomic_add(self, counter: Tensor, amount: int, sem: str) -> int:
        before = int(counter)
        counter += amount
        return before

    def fence_async_shared(self) -> None:
        self.unfenced.clear()

    def async_load(self, descriptor, place, barrier, result, pred=True) -> None:
        if not pred:
            return
        assert descriptor.block == list(result.data.shape)
        if any(source.data.data_ptr() == result.data.data_ptr() for source, _ in self.stores):
            raise Hazard("loads over what is being stored")
        value, part = torch.zeros_like(result.data), descriptor.part(place)
        value[: part.shape[0], : part.shape[1]] = part
        result.data.copy_(torch.full_like(value, float("nan")) if self.late else value)
        barrier.loads.append((result.data, value))

    def async_store(self, descriptor, place, source) -> None:
        if source.data.data_ptr() in self.unfenced:
            raise Hazard("stores what was written without a fence")
        part = descriptor.part(place)
        part.copy_(source.data[: part.shape[0], : part.shape[1]])
        self.stores.append((source, source.data.clone()))

    def store_wait(self, pendings: int) -> None:
        while len(self.stores) > pendings:
            source, before = self.stores.pop(0)
            if not _same(before, source.data):
                raise Hazard("changed while it was stored")

    def warpgroup_mma(self, a, b, acc, use_acc=True, is_async=False):
        sums = acc if isinstance(acc, Sums) else Sums(acc)
        product = a.data.float() @ b.data.float()
        sums.value = sums.value + product if use_acc else product
        sums.under_way.append(tuple((x, x.data.clone()) for x in (a, b)))
        return sums

    def warpgroup_mma_wait(self, num_outstanding, deps):
        (sums,) = deps
        while len(sums.under_way) > num_outstanding:
            if not all(_same(before, x.data) for x, before in sums.under_way.pop(0)):
                raise Hazard("an operand changed while it was multiplied")
        return sums if sums.under_way else sums.value


class Emulated:
    """A kernel of a module, with the functions that it calls: launched as on a GPU, on CPU tensors.

    late: see above. Launches raise Hazard for what would go wrong.
    """

    def __init__(self, module: ModuleType, kernel: str, *, late: bool = True) -> None:
        self._names, self._kernel, self._late = dict(vars(module)), kernel, late

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self._launch, grid[0])

    def _launch(self, programs: int, *arguments: object, **constants: object) -> None:
        described = [
            Descriptor(a.base, a.block_shape) if isinstance(a, TensorDescriptor) else a
            for a in arguments
        ]
        for program in range(programs):
            machine = _Machine(program, programs, self._late)
            names = self._names | {name: getattr(machine, name) for name in _LANGUAGE}
            for name, function in self._names.items():
                if isinstance(function, JITFunction):
                    names[name] = FunctionType(function.fn.__code__, names, name)
            names[self._kernel](*described, **constants)
            if machine.stores:
                raise Hazard("ends before its stores")


_LANGUAGE = (
    *("gl", "mbarrier", "tma", "async_load", "async_store"),
    *("fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait"),
)


def emulate(monkeypatch: pytest.MonkeyPatch, *, late: bool = True) -> None:
    """kernels/product.py's kernel is emulated."""
    emulated = Emulated(product_tiles, "product_kernel", late=late)
    monkeypatch.setattr(product, "product_kernel", emulated)


def emulate_or_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU it is emulated; on one that is not Hopper the test is skipped."""
    if DEVICE == "cpu":
        emulate(monkeypatch)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not Hopper")


@pytest.fixture
def by_our_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators multiply by kernels/product.py's kernel, emulated or on Hopper, however few rows
    there are; where a row is too short for it, as ever."""
    emulate_or_skip(monkeypatch)
    for module, name in (("kernels.linear", "fills_gpu"), ("kernels.mlp", "takes")):
        monkeypatch.setattr(
            import_module(module), name, lambda a, b: a.shape[1] >= product.least_depth()
        )
