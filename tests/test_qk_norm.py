"""Rotary + QK-norm over the packed product: accuracy, packed gradient, v as a view, refusals."""

import pytest
import torch
import torch.nn.functional as F

from kernels.qk_norm import rotary_qk_norm, rotary_qk_norm_ref
from tests.operators import (
    DEVICE,
    DTYPES,
    angles,
    assert_accurate,
    assert_compiles,
    assert_repeats,
    dtype_id,
    outputs_and_gradients,
    randn,
)

# B, T, H, Hkv, D: the model's head, one token, grouped queries, odd counts, halves no power of two.
SHAPES = [(1, 3, 2, 2, 128), (2, 1, 3, 1, 64), (1, 5, 5, 5, 24), (2, 2, 8, 2, 4)]
TRAINED = [(32, 2048, 10, 10, 128), (2, 8192, 16, 4, 128), (128, 512, 6, 6, 128)]

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def packed(shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    b, t, h, h_kv, d = shape
    return randn(b, t, (h + 2 * h_kv) * d, dtype=dtype)


def make_grads(shape: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    b, t, h, h_kv, d = shape
    return [randn(b, t, n, d, dtype=dtype) for n in (h, h_kv, h_kv)]


def bind(op, shape: tuple, offset: int = 0):
    """The operator as a function of qkv."""
    _, t, h, h_kv, d = shape
    cos, sin = angles(t + offset, d)
    return lambda qkv: op(qkv, cos, sin, n_head=h, n_kv_head=h_kv, offset=offset)


@over_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accurate(shape, dtype):
    ops = (bind(op, shape, offset=7) for op in (rotary_qk_norm, rotary_qk_norm_ref))
    assert_accurate(*ops, [packed(shape, dtype)], make_grads(shape, dtype))


@pytest.mark.gpu
@over_dtypes
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_accurate_at_trained_shapes(shape, dtype):
    ops = (bind(op, shape) for op in (rotary_qk_norm, rotary_qk_norm_ref))
    assert_accurate(*ops, [packed(shape, dtype)], make_grads(shape, dtype))


@over_dtypes
@pytest.mark.parametrize(
    "fill",
    [lambda x: x * 1e4, lambda x: x * 0 + 3, lambda x: x * 0, lambda x: x * 1e-4],
    ids=["large", "equal", "zero", "tiny"],
)
def test_accurate_at_extremes(fill, dtype):
    shape = (1, 2, 2, 1, 64)
    ops = (bind(op, shape) for op in (rotary_qk_norm, rotary_qk_norm_ref))
    assert_accurate(*ops, [fill(packed(shape, dtype))], make_grads(shape, dtype))


def test_empty_batch():
    shape = (0, 4, 2, 2, 16)
    ops = (bind(op, shape) for op in (rotary_qk_norm, rotary_qk_norm_ref))
    assert_accurate(*ops, [packed(shape, torch.float32)])


def test_rows_and_gradients_that_are_apart():
    """qkv as columns of something wider; gradients as SDPA returns them, strided and broadcast."""
    shape = (2, 3, 4, 2, 16)
    b, t, h, h_kv, d = shape
    width = (h + 2 * h_kv) * d
    qkv = randn(b, t, width + 8)[..., :width]
    dq = randn(b, h, t, d).transpose(1, 2)
    dk = randn(b, d, h_kv, t).permute(0, 3, 2, 1)
    dv = torch.ones((), device=DEVICE).expand(b, t, h_kv, d)
    ops = (bind(op, shape) for op in (rotary_qk_norm, rotary_qk_norm_ref))
    assert_accurate(*ops, [qkv], [dq, dk, dv])


def test_v_is_a_view_and_its_gradient_arrives_unchanged():
    shape = (2, 3, 4, 2, 16)
    qkv = packed(shape, torch.bfloat16)
    v = bind(rotary_qk_norm, shape)(qkv)[2]
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    grads = make_grads(shape, torch.bfloat16)
    dqkv = outputs_and_gradients(bind(rotary_qk_norm, shape), [qkv], grads)[3]
    assert dqkv.is_contiguous()
    assert torch.equal(dqkv[..., -2 * 16 :], grads[2].flatten(2))


def test_only_one_output_used():
    shape = (1, 3, 2, 1, 32)
    for i in range(3):
        ops = (bind(op, shape) for op in (rotary_qk_norm, rotary_qk_norm_ref))
        one_of = (lambda x, op=op, i=i: op(x)[i] for op in ops)
        assert_accurate(*one_of, [packed(shape, torch.float32)])


def attend(op, shape: tuple):
    """A whole attention from x, so that autograd meets the views around the operator."""
    q_and_kv = bind(op, shape)

    def run(x, weight):
        q, k, v = (y.transpose(1, 2) for y in q_and_kv(x @ weight))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    return run


def test_inside_attention():
    shape = (2, 6, 2, 2, 32)
    inputs = [randn(2, 6, 40), randn(40, 6 * 32, scale=0.2)]
    ops = (attend(op, shape) for op in (rotary_qk_norm, rotary_qk_norm_ref))
    assert_accurate(*ops, inputs, [randn(2, 6, 64)])


def test_repeats_bit_for_bit():
    shape = (2, 3, 4, 2, 32)
    assert_repeats(bind(rotary_qk_norm, shape), [packed(shape, torch.bfloat16)])


def test_compiles():
    shape = (2, 6, 2, 2, 32)
    assert_compiles(bind(rotary_qk_norm, shape, offset=2), [packed(shape, torch.bfloat16)])
    assert_compiles(attend(rotary_qk_norm, shape), [randn(2, 6, 40), randn(40, 6 * 32, scale=0.2)])


def test_opcheck():
    shape = (2, 3, 4, 2, 8)
    qkv, grads, tables = (
        packed(shape, torch.float32),
        make_grads(shape, torch.float32),
        angles(5, 8),
    )
    ops = torch.ops.gptfast
    torch.library.opcheck(ops.rotary_qk_norm.default, (qkv, *tables, 4, 2, 1e-6, 2))
    q, k, rstd = ops.rotary_qk_norm(qkv, *tables, 4, 2, 1e-6, 2)
    torch.library.opcheck(ops.rotary_qk_norm_bwd.default, (*grads, q, k, rstd, *tables, 2))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    shape = (2**31 // (2048 * 30 * 128) + 1, 2048, 10, 10, 128)
    qkv, grads = packed(shape, torch.bfloat16), make_grads(shape, torch.bfloat16)
    assert qkv.numel() > 2**31
    result = outputs_and_gradients(bind(rotary_qk_norm, shape), [qkv], grads)
    last = [qkv[-1:]], [g[-1:] for g in grads]
    expected = outputs_and_gradients(bind(rotary_qk_norm, shape), *last)
    assert all(torch.equal(a[-1:], b) for a, b in zip(result, expected, strict=True))


QKV, TABLE = torch.zeros(1, 3, 32), torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("qkv", "table", "heads", "offset", "message"),
    [
        (QKV[0], TABLE, (2, 1), 0, r"shape \(3, 32\).*\(B, T, 4 D\)"),
        (QKV, TABLE, (3, 1), 0, r"3 heads and 1 key-value heads it must be \(B, T, 5 D\)"),
        (QKV, TABLE, (2, 0), 0, "0 key-value heads"),
        (QKV.double(), TABLE, (2, 1), 0, "qkv is torch.float64"),
        (torch.zeros(2, 3, 32).transpose(0, 1), TABLE, (2, 1), 0, r"strides \(32, 96, 1\)"),
        (torch.zeros(1, 3, 64)[..., ::2], TABLE, (2, 1), 0, "qkv .*strides"),
        (QKV, TABLE.half(), (2, 1), 0, "cos is torch.float16"),
        (QKV, TABLE[:, :3].contiguous(), (2, 1), 0, "3 columns; head_dim 8"),
        (QKV, TABLE, (2, 1), 2, "positions 2 to 5 do not lie in the 4 rows"),
    ],
)
def test_refuses(qkv, table, heads, offset, message):
    n_head, n_kv_head = heads
    with pytest.raises(ValueError, match=message):
        rotary_qk_norm(qkv, table, table, n_head=n_head, n_kv_head=n_kv_head, offset=offset)
