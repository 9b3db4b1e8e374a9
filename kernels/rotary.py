"""Rotary position embedding of q and k, in one pass (Su et al., 2021), half-split.

With (x1, x2) the halves of a head's D elements and theta the angles of its token's position,

    y1 = x1 cos + x2 sin        y2 = x2 cos - x1 sin        (a rotation by -theta)

and with `inverse` the rotation by +theta, which is also the gradient of the first. q (B, T, H, D)
and k (B, T, Hkv, D) in bf16, fp16 or fp32, any strides; cos and sin (T_max, D/2) fp32, of which
token t takes row offset + t. Computed in fp32, rounded once; nothing is saved but cos and sin.

Bytes moved, forward and backward alike: 2 s B T (H + Hkv) D for elements of s bytes, and a row of
cos and sin a token, which stays in L2. 6 FLOPs for two elements: limited by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, check_tensors, runs_kernel, upcast

# Elements of a half of q's heads that a warp takes: at d20 one warp has a token to itself.
ELEMENTS = 1024


def rotary_ref(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, offset: int = 0, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """`rotary` in plain PyTorch."""
    rows = slice(offset, offset + q.shape[1])
    c, s = cos[rows, None, :], sin[rows, None, :]
    if inverse:
        s = -s

    def rotate(x):
        x1, x2 = upcast(x).chunk(2, dim=-1)
        return torch.cat((x1 * c + x2 * s, x2 * c - x1 * s), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


@triton.jit
def load_heads(
    ptr, step_h, step_d, H, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The two halves, (BLOCK_H, BLOCK_D) fp32 each, of one token's H heads; zero beyond them."""
    heads = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    mask = (heads < H) & (cols < HALF)
    ptrs = ptr + heads * step_h + cols * step_d
    x1 = tl.load(ptrs, mask=mask, other=0.0)
    x2 = tl.load(ptrs + HALF * step_d, mask=mask, other=0.0)
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def store_heads(ptr, x1, x2, H, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes one token's H heads, adjacent in memory, from their halves."""
    heads = tl.arange(0, BLOCK_H)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < H) & (cols < HALF)
    ptrs = ptr + heads * (2 * HALF) + cols
    tl.store(ptrs, x1, mask=mask)
    tl.store(ptrs + HALF, x2, mask=mask)


@triton.jit
def load_angles(cos_ptr, sin_ptr, position, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos and sin of one position, (1, BLOCK_D) each."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    cos = tl.load(cos_ptr + position * HALF + cols, mask=cols < HALF, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + cols, mask=cols < HALF, other=0.0)
    return cos, sin


@triton.jit
def _rotary_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, T, HKV, D)
    cos_ptr,  # (T_max, HALF)
    sin_ptr,  # (T_max, HALF)
    q_out_ptr,  # (B, T, H, D) out
    k_out_ptr,  # (B, T, HKV, D) out
    T,
    offset,
    q_b,
    q_t,
    q_h,
    q_d,
    k_b,
    k_t,
    k_h,
    k_d,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    cos, sin = load_angles(cos_ptr, sin_ptr, offset + t, HALF, BLOCK_D)
    if INVERSE:
        sin = -sin
    # All loads before the first store, so that they are under way together.
    q1, q2 = load_heads(q_ptr + b * q_b + t * q_t, q_h, q_d, H, HALF, BLOCK_H, BLOCK_D)
    k1, k2 = load_heads(k_ptr + b * k_b + t * k_t, k_h, k_d, HKV, HALF, BLOCK_HKV, BLOCK_D)
    q_out = q_out_ptr + token * (2 * HALF * H)
    k_out = k_out_ptr + token * (2 * HALF * HKV)
    store_heads(q_out, q1 * cos + q2 * sin, q2 * cos - q1 * sin, H, HALF, BLOCK_H, BLOCK_D)
    store_heads(k_out, k1 * cos + k2 * sin, k2 * cos - k1 * sin, HKV, HALF, BLOCK_HKV, BLOCK_D)


def heads_config(n_head: int, n_kv_head: int, head_dim: int, elements: int) -> dict[str, int]:
    """Launch rule: a program takes one token, all heads, so that it reads its angles once.

    A warp takes `elements` of a half of q's heads, as many as its registers allow: in a warp alone
    the loads past the last head, which the compiler knows, cost nothing.
    """
    block_h, block_d = triton.next_power_of_2(n_head), triton.next_power_of_2(head_dim // 2)
    return {
        "H": n_head,
        "HKV": n_kv_head,
        "HALF": head_dim // 2,
        "BLOCK_H": block_h,
        "BLOCK_HKV": triton.next_power_of_2(n_kv_head),
        "BLOCK_D": block_d,
        "num_warps": min(8, max(1, block_h * block_d // elements)),
    }


@torch.library.custom_op("gptfast::rotary", mutates_args=())
def _rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    if not runs_kernel(q):
        turned = rotary_ref(q, k, cos, sin, offset=offset, inverse=inverse)
        return turned[0].contiguous(), turned[1].contiguous()
    b, t, h, d = q.shape
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if b * t > 0:
        with torch.cuda.device_of(q):
            _rotary_kernel[(b * t,)](
                *(q, k, cos, sin, q_out, k_out),
                *(t, offset, *q.stride(), *k.stride()),
                INVERSE=inverse,
                **heads_config(h, k.shape[2], d, ELEMENTS),
                **FUSED_MULTIPLY_ADD,
            )
    return q_out, k_out


@_rotary.register_fake
def _(q, k, cos, sin, offset, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.offset, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    dq, dk = _rotary(dq, dk, *ctx.saved_tensors, ctx.offset, not ctx.inverse)
    return dq, dk, None, None, None, None


_rotary.register_autograd(_backward, setup_context=_setup_context)


def check_angles(
    op: str, cos: Tensor, sin: Tensor, tokens: int, offset: int, head_dim: int
) -> None:
    """ValueError unless cos and sin are fp32 tables (T_max, head_dim/2) that reach every token."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.ndim != 2 or not table.is_contiguous():
            raise ValueError(
                f"{op}: {name} is {table.dtype} with shape {tuple(table.shape)} and strides "
                f"{table.stride()}; it must be a contiguous float32 (T_max, {head_dim // 2})"
            )
        if head_dim < 2 or head_dim % 2 or table.shape[1] != head_dim // 2:
            raise ValueError(
                f"{op}: {name} has {table.shape[1]} columns; head_dim {head_dim} must be even and "
                "take half as many"
            )
        if not 0 <= offset <= table.shape[0] - tokens:
            raise ValueError(
                f"{op}: positions {offset} to {offset + tokens} do not lie in the "
                f"{table.shape[0]} rows of {name}"
            )


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, offset: int = 0, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k rotated by the angles of their positions, offset to offset + T.

    q (B, T, H, D), k (B, T, Hkv, D) of one dtype, cos and sin (T_max, D/2) fp32; the result is
    contiguous. `inverse` turns the other way. ValueError for shapes, dtypes and devices it does not
    take, and for positions outside the tables.
    """
    check_tensors("rotary", q=q, k=k, cos=cos, sin=sin)
    if q.ndim != 4 or k.ndim != 4 or q.dtype != k.dtype or 0 in (q.shape[2], k.shape[2]):
        raise ValueError(
            f"rotary: q is {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}; they must be "
            "(B, T, heads, D) of one dtype"
        )
    b, t, _, d = q.shape
    if (b, t, d) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(
            f"rotary: q {tuple(q.shape)} and k {tuple(k.shape)} may differ in heads only"
        )
    check_angles("rotary", cos, sin, t, offset, d)
    return _rotary(q, k, cos, sin, offset, inverse)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """The model's heads at d20 in bf16 and at d32 in fp32."""
    cases = []
    for label, h, dtype in (
        ("rotary 10 heads bf16", 10, torch.bfloat16),
        ("rotary 16 heads fp32", 16, torch.float32),
    ):
        tensors = (dtype, dtype, torch.float32, torch.float32, dtype, dtype)
        strides = (2048 * h * 128, h * 128, 128, 1)
        launch = (_rotary_kernel, *tensors, 2048, 0, *strides, *strides)
        constants = heads_config(h, h, 128, ELEMENTS)
        cases.append(AotCase.of_launch(label, *launch, INVERSE=False, **constants))
    return cases
