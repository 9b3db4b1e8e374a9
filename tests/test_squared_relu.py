"""Squared ReLU and the linear layer that ends in it: accuracy, edges of the dtypes, refusals."""

import math

import pytest
import torch

from kernels.squared_relu import (
    LAUNCH,
    squared_relu,
    squared_relu_ref,
)
from tests.operators import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_repeats,
    dtype_id,
    outputs_and_gradients,
    randn,
)

# One element, odd sizes, a whole block, one more than a block.
SHAPES = [(), (7,), (3, 5, 41), (LAUNCH["BLOCK"],), (LAUNCH["BLOCK"] + 1,)]
TRAINED = [(65536, 5120), (8, 8192, 3072)]

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@over_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accurate(shape, dtype):
    inputs = [randn(*shape, dtype=dtype)]
    assert_accurate(squared_relu, squared_relu_ref, inputs, [randn(*shape, dtype=dtype)])


@pytest.mark.gpu
@over_dtypes
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_accurate_at_trained_shapes(shape, dtype):
    inputs = [randn(*shape, dtype=dtype)]
    assert_accurate(squared_relu, squared_relu_ref, inputs, [randn(*shape, dtype=dtype)])


@over_dtypes
@pytest.mark.parametrize("scale", [0.0, 0.1, 40.0], ids=["zero", "small", "large"])
def test_accurate_at_extremes(scale, dtype):
    inputs = [randn(8, 96, dtype=dtype) * scale]
    assert_accurate(squared_relu, squared_relu_ref, inputs, [randn(8, 96, dtype=dtype)])


@over_dtypes
@pytest.mark.parametrize("scale", [1e-5, 1e-3])
def test_tiny(scale, dtype):
    """Where h underflows in fp16, dx loses at most 2^-11 of dh; bf16 and fp32 keep their rule."""
    x, dh = randn(8, 96, dtype=dtype) * scale, randn(8, 96, dtype=dtype)
    if dtype != torch.float16:
        assert_accurate(squared_relu, squared_relu_ref, [x], [dh])
    _, dx = outputs_and_gradients(squared_relu, [x], [dh])
    assert ((dx - 2 * x.relu() * dh).abs() <= 2**-11 * dh.abs()).all()


# NumPy, which the interpreter computes with, warns of what a GPU does in silence.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@over_dtypes
def test_edges_of_the_dtype(dtype):
    """Nothing below zero; underflow is 0, overflow infinite; NaN stays, so that it is seen."""
    top = torch.finfo(dtype).max
    x = torch.tensor([-top, -1.0, -0.0, 0.0, 1e-30, top, math.inf, math.nan], dtype=dtype).to(
        DEVICE
    )
    h, dx = outputs_and_gradients(squared_relu, [x])
    assert h[:5].tolist() == [0.0] * 5
    assert dx[:5].tolist() == [0.0] * 5
    assert h[5:7].isinf().all()
    assert dx[5:7].isinf().all()
    assert h[7].isnan()
    assert dx[7].isnan()


def test_empty_batch():
    assert_accurate(squared_relu, squared_relu_ref, [randn(0, 16)])


def test_gradient_of_another_layout():
    for grad in (randn(5, 4).T, randn(5).expand(4, 5)):
        assert_accurate(squared_relu, squared_relu_ref, [randn(4, 5)], [grad])


def test_repeats_bit_for_bit():
    assert_repeats(squared_relu, [randn(33, 70, dtype=torch.bfloat16)])


def test_compiles():
    assert_compiles(squared_relu, [randn(2, 9, 24)])


def test_opcheck():
    h = randn(4, 5).square()
    ops = torch.ops.gptfast
    torch.library.opcheck(ops.squared_relu.default, (randn(4, 5).requires_grad_(),))
    torch.library.opcheck(ops.squared_relu_bwd.default, (randn(4, 5), h))


def test_opcheck_of_a_gradient_of_another_layout_where_no_kernel_runs(monkeypatch):
    monkeypatch.setattr("kernels.squared_relu.runs_kernel", lambda x: False)
    dh, h = torch.randn(5, 4).T, torch.randn(4, 5).square()
    torch.library.opcheck(torch.ops.gptfast.squared_relu_bwd.default, (dh, h))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    x = torch.randn(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    h = squared_relu(x)
    assert torch.equal(h[-4096:], squared_relu_ref(x[-4096:]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "x is torch.int64"),
        (torch.zeros(4, 5).T, r"strides \(1, 5\); it must be contiguous"),
        (torch.zeros(4, device="meta"), "x is on meta"),
    ],
)
def test_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        squared_relu(x)
