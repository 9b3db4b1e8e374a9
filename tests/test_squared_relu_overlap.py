"""The Gluon products with squared ReLU: every tile, part and barrier, on the emulator of Gluon;
the operator itself on a Hopper GPU."""

import pytest
import torch

from kernels import squared_relu_overlap as module
from kernels.squared_relu_overlap import CONFIG, least_depth, squared_relu_overlap
from tests.gluon_emulator import Descriptor, Hazard, _Machine, launch

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "STAGES": 3, "GROUP_M": 2, "num_warps": 8}
# PARTS, GATES, EVERY.
PARTS = [(8, 2, 1), (4, 1, 2), (2, 1, 4), (4, 4, 1)]


def expected(a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    if gate is None:
        return ((a.float() @ b.float().t()).relu() ** 2).to(a.dtype)
    product = (a.float() @ b.float()).to(a.dtype)
    return (product.float() * 2 * gate.float().sqrt()).to(a.dtype)


def operands(m: int, n: int, k: int, gated: bool, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator)
    b = torch.randn(*((k, n) if gated else (n, k)), generator=generator) / k**0.5
    gate = torch.randn(m, n, generator=generator).relu() if gated else None
    return [None if x is None else x.to(device, dtype) for x in (a, b, gate)]


def emulated(a, b, gate, parts, programs: int, late: bool) -> torch.Tensor:
    config = SMALL | dict(zip(("PARTS", "GATES", "EVERY"), parts))
    m, k = a.shape
    n = b.shape[1 if gate is not None else 0]
    out = torch.full((m, n), float("nan"), dtype=a.dtype)
    part = [16, 32 // config["PARTS"]]
    launch(
        *(module, "_squared_relu_overlap_kernel", programs),
        Descriptor(a, [16, 16]),
        Descriptor(b, [16, 32] if gate is not None else [32, 16]),
        None if gate is None else Descriptor(gate, part),
        *(Descriptor(out, part), m, n, k),
        late=late,
        **config,
    )
    return out


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids=str)
# A few tiles in an order of groups, tiles that end inside the matrix, one tile; programs that have
# one tile more than others, one for all, and as many as there are tiles.
@pytest.mark.parametrize(("shape", "programs"), [((64, 96), 5), ((56, 72), 1), ((16, 32), 1)])
def test_every_element_is_right_whenever_blocks_come(shape, programs, parts, gated, late):
    depth = 16 * (2 + parts[2] * (parts[0] - 1)) + 8  # the least, and not whole steps
    a, b, gate = operands(*shape, depth, gated)
    out = emulated(a, b, gate, parts, programs, late)
    torch.testing.assert_close(out, expected(a, b, gate), atol=1e-2, rtol=1e-2)


def test_the_emulator_sees_what_is_missing(monkeypatch):
    """A multiplication not waited for, a fence left out, a store not waited for."""
    a, b, gate = operands(64, 96, 16 * 10, True)
    wait = _Machine.warpgroup_mma_wait
    for function, broken, words in (
        ("warpgroup_mma_wait", lambda *a, deps: wait(a[0], 2 * a[1], deps), "operand changed"),
        ("fence_async_shared", lambda *a: None, "without a fence"),
        ("store_wait", lambda *a: None, "ends before its stores"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_Machine, function, broken)
            with pytest.raises(Hazard, match=words):
                emulated(a, b, gate, PARTS[0], 2, late=False)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="not Hopper"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(65536, 5120, 1280), (4096 + 24, 3072, 768), (300, 264, 1024)])
def test_equals_products_in_fp32(shape, gated, dtype):
    m, n, k = shape
    assert not gated or k >= least_depth(CONFIG)
    a, b, gate = operands(m, n, k, gated, dtype, "cuda")
    for _ in range(3):
        out = squared_relu_overlap(a, b, gate)
        torch.testing.assert_close(out, expected(a, b, gate), atol=2e-2, rtol=2e-2)
