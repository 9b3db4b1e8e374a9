"""The products that end in squared ReLU: every tile, part and barrier on the emulator of Gluon, and
on a Hopper GPU."""

import pytest
import torch

from kernels import squared_relu_product as module
from kernels.launch import upcast
from kernels.squared_relu import squared_relu_ref
from kernels.squared_relu_product import CONFIG, least_depth, squared_relu_product
from tests.gluon_emulator import Emulated, Hazard, _Machine
from tests.operators import DEVICE, DTYPES, dtype_id, randn

KERNEL = "_squared_relu_product_kernel"
SMALL = CONFIG | {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2}
BUFFERS = [
    {"PARTS": 8, "GATES": 4, "OUTS": 2},
    {"PARTS": 8, "GATES": 2, "OUTS": 2},
    {"PARTS": 4, "GATES": 1, "OUTS": 1},
    {"PARTS": 2, "GATES": 1, "OUTS": 2},
    {"PARTS": 4, "GATES": 4, "OUTS": 1, "STAGES": 4},
]
# M, N, K: one tile and one part; a tile and a bit of each; trained.
SHAPES = [(3, 16, 520), (130, 264, 584), (257, 520, 776)]
TRAINED = [(65536, 5120, 1280), (4096 + 24, 3072, 768), (4097, 8192, 2048)]

over_halves = pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
gated_or_not = pytest.mark.parametrize("gated", [False, True])


@pytest.fixture
def anywhere(monkeypatch):
    """Hopper's kernel: there, or emulated."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, KERNEL, Emulated(module, KERNEL))
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not Hopper")


def operands(m: int, n: int, k: int, gated: bool, dtype=torch.bfloat16, device=DEVICE):
    a = randn(m, k, dtype=dtype)
    b = randn(*((k, n) if gated else (n, k)), dtype=dtype, scale=k**-0.5)
    gate = randn(m, n, dtype=dtype).relu() if gated else None
    return [None if x is None else x.to(device) for x in (a, b, gate)]


def reference(a, b, gate):
    if gate is None:
        return squared_relu_ref(a @ b.t())
    return (upcast(a @ b) * (2 * upcast(gate).sqrt())).to(gate.dtype)


def assert_exact(found: torch.Tensor, inputs: list[torch.Tensor | None]) -> None:
    """The error rule of the tests, for a function without a gradient."""
    torchs, exact = (
        reference(*(None if x is None else x.to(dtype) for x in inputs))
        for dtype in (found.dtype, torch.float64)
    )
    allowed = 2 * (torchs - exact).abs().max() + torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found.shape, found.dtype) == (exact.shape, inputs[0].dtype)
    assert (found - exact).abs().max() <= allowed


@pytest.mark.parametrize("late", [False, True])
@gated_or_not
@pytest.mark.parametrize(
    "buffers", BUFFERS, ids=lambda buffers: "-".join(map(str, buffers.values()))
)
# The least, and more; each not whole steps.
@pytest.mark.parametrize("more", [0, 4])
# A few tiles in an order of groups, tiles that end inside the matrix, one tile.
@pytest.mark.parametrize("shape", [(64, 96), (56, 72), (16, 32)])
def test_every_element_is_right_whenever_blocks_come(
    shape, more, buffers, gated, late, monkeypatch
):
    monkeypatch.setattr(module, KERNEL, Emulated(module, KERNEL, late=late))
    config = SMALL | buffers
    inputs = operands(*shape, least_depth(config) + 7 + 16 * more, gated, device="cpu")
    assert_exact(squared_relu_product(*inputs, config), inputs)


def test_the_emulator_sees_what_is_missing(monkeypatch):
    """A multiplication not waited for, a fence left out, a store not waited for."""
    inputs = operands(64, 96, 16 * 10, True, device="cpu")
    wait = _Machine.warpgroup_mma_wait
    for function, broken, words in (
        ("warpgroup_mma_wait", lambda *a, deps: wait(a[0], 2 * a[1], deps), "operand changed"),
        ("fence_async_shared", lambda *a: None, "without a fence"),
        ("store_wait", lambda *a: None, "ends before its stores"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_Machine, function, broken)
            patch.setattr(module, KERNEL, Emulated(module, KERNEL, late=False))
            with pytest.raises(Hazard, match=words):
                squared_relu_product(*inputs, SMALL)


@pytest.mark.usefixtures("anywhere")
@over_halves
@gated_or_not
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape, gated, dtype):
    inputs = operands(*shape, gated, dtype)
    assert_exact(squared_relu_product(*inputs), inputs)


@pytest.mark.gpu
@pytest.mark.usefixtures("anywhere")
@over_halves
@gated_or_not
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_exact_at_trained_shapes(shape, gated, dtype):
    inputs = operands(*shape, gated, dtype)
    for _ in range(3):
        assert_exact(squared_relu_product(*inputs), inputs)
