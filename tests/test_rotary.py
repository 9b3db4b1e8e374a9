"""Rotary: accuracy, both signs, offsets, grouped-query heads, strides, and what it refuses."""

from functools import partial

import pytest
import torch

from kernels.rotary import rotary, rotary_ref
from tests.operators import (
    DEVICE,
    DTYPES,
    angles,
    assert_accurate,
    assert_compiles,
    assert_repeats,
    dtype_id,
    randn,
)

# B, T, H, Hkv, D: the model's head, one token, grouped queries, odd counts, halves no power of two.
SHAPES = [(1, 3, 2, 2, 128), (2, 1, 3, 1, 64), (1, 5, 5, 5, 24), (2, 2, 8, 2, 2)]
TRAINED = [(32, 2048, 10, 10, 128), (2, 8192, 16, 4, 128), (128, 512, 6, 6, 128)]

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def make_inputs(shape: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    b, t, h, h_kv, d = shape
    return [randn(b, t, n, d, dtype=dtype) for n in (h, h_kv)]


def bind(op, shape: tuple, **options):
    """The operator as a function of q and k, its tables long enough for any offset here."""
    cos, sin = angles(shape[1] + 9, shape[4])
    return partial(lambda q, k: op(q, k, cos, sin, **options))


@over_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"offset": 9, "inverse": True}], ids=["plain", "inverse"])
def test_accurate(shape, dtype, options):
    inputs = make_inputs(shape, dtype)
    ops = (bind(op, shape, **options) for op in (rotary, rotary_ref))
    assert_accurate(*ops, inputs, make_inputs(shape, dtype))


@pytest.mark.gpu
@over_dtypes
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_accurate_at_trained_shapes(shape, dtype):
    inputs = make_inputs(shape, dtype)
    ops = (bind(op, shape, offset=3) for op in (rotary, rotary_ref))
    assert_accurate(*ops, inputs, make_inputs(shape, dtype))


@pytest.mark.parametrize("scale", [0.0, 1e4], ids=["zero", "large"])
@over_dtypes
def test_accurate_at_extremes(scale, dtype):
    shape = (1, 2, 2, 2, 64)
    inputs = [x * scale for x in make_inputs(shape, dtype)]
    assert_accurate(bind(rotary, shape), bind(rotary_ref, shape), inputs, inputs)


def test_empty_batch():
    shape = (0, 4, 2, 2, 16)
    inputs = make_inputs(shape, torch.float32)
    assert_accurate(bind(rotary, shape), bind(rotary_ref, shape), inputs)


def test_any_strides():
    """q and k out of a packed product or (B, H, T, D); gradients strided and broadcast."""
    shape = (2, 3, 4, 4, 16)
    b, t, h, _, d = shape
    q, k = randn(b, t, 2, h, d).unbind(2)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    transposed = randn(b, d, h, t).permute(0, 3, 2, 1)
    constant = torch.ones((), device=DEVICE).expand(b, t, h, d)
    ops = bind(rotary, shape), bind(rotary_ref, shape)
    assert_accurate(*ops, [q, k], [transposed, constant])


def test_inverse_undoes():
    shape = (2, 4, 3, 1, 32)
    q, k = make_inputs(shape, torch.float32)
    turned = bind(rotary, shape, offset=5)(q, k)
    back = bind(rotary, shape, offset=5, inverse=True)(*turned)
    torch.testing.assert_close(back, (q, k))


def test_offset_continues_a_sequence():
    """A token's rotation depends on its position alone, not on where the call began."""
    shape = (1, 6, 2, 1, 16)
    q, k = make_inputs(shape, torch.float32)
    whole = bind(rotary, shape)(q, k)
    last = bind(rotary, shape, offset=4)(q[:, 4:], k[:, 4:])
    assert all(torch.equal(a[:, 4:], b) for a, b in zip(whole, last))


def test_repeats_bit_for_bit():
    shape = (2, 3, 4, 2, 32)
    assert_repeats(bind(rotary, shape), make_inputs(shape, torch.bfloat16))


def test_compiles():
    shape = (2, 3, 4, 2, 32)
    assert_compiles(bind(rotary, shape, offset=2), make_inputs(shape, torch.bfloat16))


def test_opcheck():
    q, k = (x.requires_grad_() for x in make_inputs((2, 3, 4, 2, 8), torch.float32))
    arguments = (q, k, *angles(5, 8), 2, False)
    torch.library.opcheck(torch.ops.gptfast.rotary.default, arguments)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    shape = (2**31 // (2048 * 10 * 128) + 1, 2048, 10, 10, 128)
    q, k = make_inputs(shape, torch.bfloat16)
    assert q.numel() > 2**31
    result = bind(rotary, shape)(q, k)
    torch.testing.assert_close(
        tuple(y[-1:] for y in result), bind(rotary_ref, shape)(q[-1:], k[-1:])
    )


Q, K, TABLE = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 1, 8), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("q", "k", "table", "offset", "message"),
    [
        (Q[0], K, TABLE, 0, r"q is \(4, 2, 8\)"),
        (Q, K.bfloat16(), TABLE, 0, "k .*bfloat16; they must be"),
        (Q, K[:, :3], TABLE, 0, "may differ in heads only"),
        (Q[:, :, :0], K, TABLE, 0, r"q is \(1, 4, 0, 8\)"),
        (Q, K, TABLE.bfloat16(), 0, "cos is torch.bfloat16.*float32"),
        (Q, K, torch.zeros(4, 6).T, 0, r"strides \(1, 6\).*contiguous"),
        (Q, K, torch.zeros(6, 3), 0, "cos has 3 columns; head_dim 8"),
        (Q[..., :7], K[..., :7], torch.zeros(6, 3), 0, "head_dim 7 must be even"),
        (Q, K, TABLE, 3, "positions 3 to 7 do not lie in the 6 rows"),
        (Q, K, TABLE, -1, "positions -1 to 3"),
    ],
)
def test_refuses(q, k, table, offset, message):
    with pytest.raises(ValueError, match=message):
        rotary(q, k, table, table, offset=offset)
