"""RMSNorm and add + RMSNorm: accuracy of results and gradients, behaviour, refusals."""

from functools import partial

import pytest
import torch

from kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
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

# Odd and even, under and over a power of two, several tiles a program and a last one cut short.
SHAPES = [(1, 1280), (3, 33), (2, 7, 64), (37, 130)]
TRAINED = [(65536, 768), (65536, 1280), (32768, 2048), (8, 8192, 1280)]
OPS = [(rms_norm, rms_norm_ref, 1), (add_rms_norm, add_rms_norm_ref, 2)]

over_ops = pytest.mark.parametrize(("op", "ref", "terms"), OPS, ids=["norm", "add_norm"])
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
over_weights = pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])


def make_inputs(terms: int, shape: tuple, dtype: torch.dtype, weight: bool) -> list[torch.Tensor]:
    inputs = [randn(*shape, dtype=dtype) for _ in range(terms)]
    return inputs + [randn(shape[-1], dtype=dtype)] * weight


@over_ops
@over_weights
@over_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accurate(op, ref, terms, weight, dtype, shape):
    inputs = make_inputs(terms, shape, dtype, weight)
    assert_accurate(op, ref, inputs, [randn(*shape, dtype=dtype) for _ in range(terms)])


@pytest.mark.gpu
@over_ops
@over_weights
@over_dtypes
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_accurate_at_trained_shapes(op, ref, terms, weight, dtype, shape):
    inputs = make_inputs(terms, shape, dtype, weight)
    assert_accurate(op, ref, inputs, [randn(*shape, dtype=dtype) for _ in range(terms)])


@over_ops
@pytest.mark.parametrize(
    "fill",
    [lambda x: x * 1e4, lambda x: x * 0 + 3, lambda x: x * 0, lambda x: x * 1e-4],
    ids=["large", "equal", "zero", "tiny"],
)
@over_dtypes
def test_accurate_at_extremes(op, ref, terms, fill, dtype):
    inputs = [fill(x) for x in make_inputs(terms, (4, 96), dtype, False)]
    assert_accurate(op, ref, inputs, [randn(4, 96, dtype=dtype) for _ in range(terms)])


@over_dtypes
def test_single_column(dtype):
    """Its norm is its sign and the gradient nothing but what eps leaves: no figure to compare."""
    x = randn(9, 1, dtype=dtype).abs() + 1
    y, dx = outputs_and_gradients(rms_norm, [x])
    torch.testing.assert_close(y, torch.ones_like(x))
    assert (dx.abs() <= 1e-6).all()


@over_ops
@over_weights
def test_empty_batch(op, ref, terms, weight):
    assert_accurate(op, ref, make_inputs(terms, (0, 16), torch.float32, weight))


def test_weight_of_another_dtype():
    inputs = [randn(6, 64, dtype=torch.bfloat16), randn(64)]
    assert_accurate(rms_norm, rms_norm_ref, inputs, [randn(6, 64, dtype=torch.bfloat16)])


@over_ops
def test_rows_and_gradients_that_are_apart(op, ref, terms):
    """Columns of a wider tensor go in; gradients come back broadcast and transposed."""
    wide = [randn(3, 4, 2 * 48, dtype=torch.bfloat16)[..., :48] for _ in range(terms)]
    broadcast = randn(48, dtype=torch.bfloat16).expand(3, 4, 48)
    constant = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand(3, 4, 48)
    transposed = randn(4, 3, 48, dtype=torch.bfloat16).transpose(0, 1)
    for grad in (broadcast, constant, transposed):
        assert_accurate(op, ref, wide, [grad] * terms)


@pytest.mark.parametrize("weight", [None, torch.ones(16)], ids=["plain", "weight"])
@pytest.mark.parametrize("used", ["sum", "norm"])
def test_output_that_nothing_uses(used, weight):
    """Its gradient is absent, not zeros, and the other's is right."""
    weight = None if weight is None else weight.to(DEVICE)

    def op(norm, residual, branch):
        total, y = norm(residual, branch, weight)
        return total if used == "sum" else y

    inputs = [randn(4, 16) for _ in range(2)]
    assert_accurate(partial(op, add_rms_norm), partial(op, add_rms_norm_ref), inputs)


def test_leaves_accumulate_apart():
    """Both terms get one tensor as gradient; each must still add up a .grad of its own."""
    leaves = [randn(2, 4, 16).requires_grad_() for _ in range(2)]
    for _ in range(2):
        total, y = add_rms_norm(*leaves)
        (total.square() + y).sum().backward()
    total, y = add_rms_norm_ref(*leaves)
    for leaf, once in zip(leaves, torch.autograd.grad((total.square() + y).sum(), leaves)):
        torch.testing.assert_close(leaf.grad, 2 * once)


@over_ops
@over_weights
def test_repeats_bit_for_bit(op, ref, terms, weight):
    assert_repeats(op, make_inputs(terms, (37, 100), torch.bfloat16, weight))


@over_ops
@over_weights
def test_compiles(op, ref, terms, weight):
    assert_compiles(op, make_inputs(terms, (2, 3, 40), torch.bfloat16, weight))


def test_opcheck():
    x, branch, weight = (t.requires_grad_() for t in (randn(3, 20), randn(3, 20), randn(20)))
    plain, rstd = randn(3, 20), randn(3).abs()
    ops = torch.ops.gptfast
    for op, arguments in (
        (ops.rms_norm, (x, weight, 1e-6)),
        (ops.add_rms_norm, (x, branch, None, 1e-6)),
        (ops.rms_norm_bwd, (plain, None, plain, rstd)),
        (ops.rms_norm_weight_bwd, (plain, plain, plain, rstd, randn(20))),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    x = torch.randn(2**31 // 1280 + 64, 1280, dtype=torch.bfloat16, device="cuda")
    y = rms_norm(x)
    assert x.numel() > 2**31
    torch.testing.assert_close(y[-64:], rms_norm_ref(x[-64:]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4, dtype=torch.float64),), "x is torch.float64"),
        ((torch.zeros(2, 4, dtype=torch.int32),), "x is torch.int32"),
        ((torch.zeros(()),), r"shape \(\)"),
        ((torch.zeros(2, 0),), r"shape \(2, 0\)"),
        ((torch.zeros(2, 4).T,), r"strides \(1, 4\).*contiguous"),
        ((torch.zeros(2, 3, 4).transpose(0, 1),), r"strides \(4, 12, 1\)"),
        ((torch.zeros(1, 8193),), "8193 elements; it takes at most 8192"),
        ((torch.zeros(2, 4), torch.zeros(5)), r"weight has shape \(5,\).*\(4,\)"),
        ((torch.zeros(2, 4), torch.zeros(8)[::2]), r"strides \(2,\)"),
        ((torch.zeros(2, 4), torch.zeros(4, device="meta")), "weight is on meta, x on cpu"),
        ((torch.zeros(2, 4, device="meta"),), "x is on meta"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(*arguments)


@pytest.mark.parametrize("branch", [torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.bfloat16)])
def test_add_refuses_terms_that_differ(branch):
    with pytest.raises(ValueError, match="must be alike"):
        add_rms_norm(torch.zeros(2, 4), branch)
