"""The product in Gluon: every tile, part and barrier on the emulator of it, and on a Hopper GPU."""

import pytest
import torch

from kernels import product as module
from kernels.launch import upcast
from kernels.product import CONFIG, LEAST_FILL, fill, fills_gpu, least_depth, product
from kernels.squared_relu import squared_relu_ref
from tests.gluon_emulator import Hazard, _Machine, emulate, emulate_or_skip
from tests.operators import DEVICE, DTYPES, dtype_id, randn

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
# What b is, and what the product ends in.
of_any_kind = pytest.mark.parametrize(
    "kind", ["matrix", "transposed", "transposed, squared_relu", "matrix, gate"]
)


def operands(m: int, n: int, k: int, kind: str, dtype=torch.bfloat16, device=DEVICE) -> dict:
    a = randn(m, k, dtype=dtype).to(device)
    b = randn(k, n, dtype=dtype, scale=k**-0.5).to(device)
    inputs = {"a": a, "b": b.t().contiguous().t() if "transposed" in kind else b}
    if "gate" in kind:
        inputs["gate"] = randn(m, n, dtype=dtype).relu().to(device)
    return inputs | {"squared_relu": "squared_relu" in kind}


def reference(a, b, squared_relu, gate=None):
    y = a @ b
    if squared_relu:
        return squared_relu_ref(y)
    return y if gate is None else (upcast(y) * (2 * upcast(gate).sqrt())).to(gate.dtype)


def assert_exact(found: torch.Tensor, inputs: dict) -> None:
    """The error rule of the tests, for a function without a gradient."""
    torchs, exact = (
        reference(**{n: x if isinstance(x, bool) else x.to(dtype) for n, x in inputs.items()})
        for dtype in (found.dtype, torch.float64)
    )
    allowed = 2 * (torchs - exact).abs().max() + torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found.shape, found.dtype) == (exact.shape, inputs["a"].dtype)
    assert (found - exact).abs().max() <= allowed


@pytest.mark.parametrize("late", [False, True])
@of_any_kind
@pytest.mark.parametrize(
    "buffers", BUFFERS, ids=lambda buffers: "-".join(map(str, buffers.values()))
)
def test_every_element_is_right_whenever_blocks_come(buffers, kind, late, monkeypatch):
    """Tiles that end inside the matrix; the least K and more, neither of whole steps."""
    emulate(monkeypatch, late=late)
    config = SMALL | buffers
    for more in (0, 4):
        inputs = operands(56, 72, least_depth(config) + 7 + 16 * more, kind, device="cpu")
        assert_exact(product(**inputs, config=config), inputs)


@of_any_kind
# A few whole tiles in an order of groups; one.
@pytest.mark.parametrize("shape", [(64, 96), (16, 32)])
def test_whole_tiles(shape, kind, monkeypatch):
    emulate(monkeypatch)
    inputs = operands(*shape, least_depth(SMALL) + 7, kind, device="cpu")
    assert_exact(product(**inputs, config=SMALL), inputs)


def test_fill():
    rows, cols = CONFIG["BLOCK_M"], CONFIG["BLOCK_N"]
    assert fill(3 * rows, cols, 3) == 1
    # A fourth tile begins a second round, which could have ended with six.
    assert fill(4 * rows, cols, 3) == pytest.approx(4 / 6)
    assert fill(rows, cols // 2, 1) == 0.5
    # d20's on 132 multiprocessors, and d10's projections, where half a tile in five is empty.
    assert fill(65536, 1280, 132) > LEAST_FILL
    assert fill(65536, 640, 132) < 0.85


def test_fills_gpu(monkeypatch):
    """In whole tiles, and enough of them; asked as on a GPU of 132 multiprocessors."""
    monkeypatch.setattr(module, "takes", lambda a, b: True)
    monkeypatch.setattr(module, "_multiprocessors", lambda x: 132)
    x = torch.empty(65536, 1, device="meta")
    widths = {"d20's": 1280, "d12's qkv": 2304, "d26's qkv": 4992, "d10's": 640}
    chosen = {name: fills_gpu(x, x.new_empty(1, n)) for name, n in widths.items()}
    assert chosen == {"d20's": True, "d12's qkv": True, "d26's qkv": False, "d10's": False}
    assert not fills_gpu(x[:4096], x.new_empty(1, 1280))


def test_the_emulator_sees_what_is_missing(monkeypatch):
    """A multiplication not waited for, a fence left out, a store not waited for."""
    inputs = operands(64, 96, 16 * 10, "matrix, gate", device="cpu")
    wait = _Machine.warpgroup_mma_wait
    for function, broken, words in (
        ("warpgroup_mma_wait", lambda *a, deps: wait(a[0], 2 * a[1], deps), "operand changed"),
        ("fence_async_shared", lambda *a: None, "without a fence"),
        ("store_wait", lambda *a: None, "ends before its stores"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_Machine, function, broken)
            emulate(patch, late=False)
            with pytest.raises(Hazard, match=words):
                product(**inputs, config=SMALL)


@over_halves
@of_any_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape, kind, dtype, monkeypatch):
    emulate_or_skip(monkeypatch)
    inputs = operands(*shape, kind, dtype)
    assert_exact(product(**inputs), inputs)


@pytest.mark.gpu
@over_halves
@of_any_kind
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_exact_at_trained_shapes(shape, kind, dtype, monkeypatch):
    emulate_or_skip(monkeypatch)
    inputs = operands(*shape, kind, dtype)
    for _ in range(3):
        assert_exact(product(**inputs), inputs)
