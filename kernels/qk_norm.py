"""Rotary position embedding + QK-norm over the packed qkv product, one pass each way.

qkv (B, T, (H + 2 Hkv) D) holds each token's q, k and v heads side by side. Every q and k head is
rotated by its position's angles (kernels/rotary.py) and then divided by its root mean square:

    z = R x        rstd = 1 / sqrt(mean(z^2) + eps)        y = z rstd

Forward reads q and k once and writes them as attention takes them, (B, T, H, D) and (B, T, Hkv, D);
v is a view of qkv, nothing is copied. Kept for backward: y, which attention keeps anyhow, and rstd
(B, T, H + Hkv) fp32. While attention keeps v, all of qkv's memory stays, s (H + Hkv) D bytes a
token more than a copy of v would take. Backward undoes the norm, then the rotation,

    dz = rstd (dy - y mean(dy y))        dx = R^-1 dz

and writes dq, dk and dv straight into one packed gradient, so that no stack, cat or transpose is
left. Computed in fp32, rounded once. The gradients may have any strides.

Bytes moved a token, elements of s bytes: forward 2 s (H + Hkv) D + 4 (H + Hkv); backward
s (3 H + 5 Hkv) D + 4 (H + Hkv) (reads dq, dk, dv, q, k; writes as many as qkv has). Angles stay in
L2. About 10 FLOPs an element: limited by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, as_rows, check_tensors, runs_kernel, upcast
from kernels.rms_norm import EPS, rms_norm_ref
from kernels.rotary import (
    check_angles,
    heads_config,
    load_angles,
    load_heads,
    rotary_ref,
    store_heads,
)

# Elements of a half of q's heads that a warp takes (kernels/rotary.py). Backward, which holds more
# tensors, spills at 1,024.
FWD_ELEMENTS = 1024
BWD_ELEMENTS = 512


def rotary_qk_norm_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_head: int,
    n_kv_head: int,
    eps: float = EPS,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotary_qk_norm` in plain PyTorch."""
    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=2)
    q, k = rotary_ref(q, k, cos, sin, offset=offset)
    return rms_norm_ref(q, eps=eps), rms_norm_ref(k, eps=eps), v


@triton.jit
def rotate_and_norm(x1, x2, cos, sin, eps, HALF: tl.constexpr):
    """(y1, y2, rstd) of heads given by their halves; rstd (heads, 1)."""
    z1 = x1 * cos + x2 * sin
    z2 = x2 * cos - x1 * sin
    rstd = tl.rsqrt(tl.sum(z1 * z1 + z2 * z2, axis=1, keep_dims=True) / (2 * HALF) + eps)
    return z1 * rstd, z2 * rstd, rstd


@triton.jit
def _undo_norm_and_rotation(dy1, dy2, y1, y2, rstd, cos, sin, HALF: tl.constexpr):
    """Gradient of the halves that `rotate_and_norm` was given."""
    # rstd first: loaded with the rest, not when the sum is known.
    dy1 *= rstd
    dy2 *= rstd
    c = tl.sum(dy1 * y1 + dy2 * y2, axis=1, keep_dims=True) / (2 * HALF)
    dz1 = dy1 - y1 * c
    dz2 = dy2 - y2 * c
    return dz1 * cos - dz2 * sin, dz2 * cos + dz1 * sin


@triton.jit
def _rotary_qk_norm_fwd_kernel(
    qkv_ptr,  # (B, T, (H + 2 HKV) D)
    cos_ptr,  # (T_max, HALF)
    sin_ptr,  # (T_max, HALF)
    q_ptr,  # (B, T, H, D) out
    k_ptr,  # (B, T, HKV, D) out
    rstd_ptr,  # (B, T, H + HKV) out
    T,
    offset,
    qkv_m,
    eps,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    cos, sin = load_angles(cos_ptr, sin_ptr, offset + token % T, HALF, BLOCK_D)
    # All loads before the first store, so that they are under way together.
    row = qkv_ptr + token * qkv_m
    q1, q2 = load_heads(row, D, 1, H, HALF, BLOCK_H, BLOCK_D)
    k1, k2 = load_heads(row + H * D, D, 1, HKV, HALF, BLOCK_HKV, BLOCK_D)
    eps = tl.cast(eps, tl.float32)
    q1, q2, q_rstd = rotate_and_norm(q1, q2, cos, sin, eps, HALF)
    k1, k2, k_rstd = rotate_and_norm(k1, k2, cos, sin, eps, HALF)
    store_heads(q_ptr + token * (H * D), q1, q2, H, HALF, BLOCK_H, BLOCK_D)
    store_heads(k_ptr + token * (HKV * D), k1, k2, HKV, HALF, BLOCK_HKV, BLOCK_D)
    q_heads = tl.arange(0, BLOCK_H)[:, None]
    k_heads = tl.arange(0, BLOCK_HKV)[:, None]
    rstd = rstd_ptr + token * (H + HKV)
    tl.store(rstd + q_heads, q_rstd, mask=q_heads < H)
    tl.store(rstd + H + k_heads, k_rstd, mask=k_heads < HKV)


@triton.jit
def _rotary_qk_norm_bwd_kernel(
    dq_ptr,  # (B, T, H, D)
    dk_ptr,  # (B, T, HKV, D)
    dv_ptr,  # (B, T, HKV, D)
    q_ptr,  # (B, T, H, D), contiguous
    k_ptr,  # (B, T, HKV, D), contiguous
    rstd_ptr,  # (B, T, H + HKV)
    cos_ptr,  # (T_max, HALF)
    sin_ptr,  # (T_max, HALF)
    dqkv_ptr,  # (B, T, (H + 2 HKV) D) out
    T,
    offset,
    dq_b,
    dq_t,
    dq_h,
    dq_d,
    dk_b,
    dk_t,
    dk_h,
    dk_d,
    dv_b,
    dv_t,
    dv_h,
    dv_d,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    q_heads = tl.arange(0, BLOCK_H)[:, None]
    k_heads = tl.arange(0, BLOCK_HKV)[:, None]
    rstd = rstd_ptr + token * (H + HKV)
    # All loads before the first store, so that they are under way together.
    cos, sin = load_angles(cos_ptr, sin_ptr, offset + t, HALF, BLOCK_D)
    q_rstd = tl.load(rstd + q_heads, mask=q_heads < H, other=0.0)
    k_rstd = tl.load(rstd + H + k_heads, mask=k_heads < HKV, other=0.0)
    q1, q2 = load_heads(q_ptr + token * (H * D), D, 1, H, HALF, BLOCK_H, BLOCK_D)
    k1, k2 = load_heads(k_ptr + token * (HKV * D), D, 1, HKV, HALF, BLOCK_HKV, BLOCK_D)
    dq = dq_ptr + b * dq_b + t * dq_t
    dk = dk_ptr + b * dk_b + t * dk_t
    dv = dv_ptr + b * dv_b + t * dv_t
    dq1, dq2 = load_heads(dq, dq_h, dq_d, H, HALF, BLOCK_H, BLOCK_D)
    dk1, dk2 = load_heads(dk, dk_h, dk_d, HKV, HALF, BLOCK_HKV, BLOCK_D)
    dv1, dv2 = load_heads(dv, dv_h, dv_d, HKV, HALF, BLOCK_HKV, BLOCK_D)
    dq1, dq2 = _undo_norm_and_rotation(dq1, dq2, q1, q2, q_rstd, cos, sin, HALF)
    dk1, dk2 = _undo_norm_and_rotation(dk1, dk2, k1, k2, k_rstd, cos, sin, HALF)
    row = dqkv_ptr + token * ((H + 2 * HKV) * D)
    store_heads(row, dq1, dq2, H, HALF, BLOCK_H, BLOCK_D)
    store_heads(row + H * D, dk1, dk2, HKV, HALF, BLOCK_HKV, BLOCK_D)
    store_heads(row + (H + HKV) * D, dv1, dv2, HKV, HALF, BLOCK_HKV, BLOCK_D)


@torch.library.custom_op("gptfast::rotary_qk_norm", mutates_args=())
def _forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, eps: float, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, rstd)."""
    b, t, width = qkv.shape
    d = width // (n_head + 2 * n_kv_head)
    if not runs_kernel(qkv):
        q, k, _ = upcast(qkv).unflatten(-1, (-1, d)).split((n_head, n_kv_head, n_kv_head), 2)
        q, k = rotary_ref(q, k, cos, sin, offset=offset)
        rstd = torch.rsqrt(torch.cat((q, k), 2).square().mean(-1) + eps)
        q, k = (rms_norm_ref(x, eps=eps).to(qkv.dtype) for x in (q, k))
        return q, k, rstd
    q, k = qkv.new_empty(b, t, n_head, d), qkv.new_empty(b, t, n_kv_head, d)
    rstd = qkv.new_empty(b, t, n_head + n_kv_head, dtype=torch.float32)
    if b * t > 0:
        rows = as_rows("rotary_qk_norm", "qkv", qkv)
        with torch.cuda.device_of(qkv):
            _rotary_qk_norm_fwd_kernel[(b * t,)](
                *(rows, cos, sin, q, k, rstd),
                *(t, offset, rows.stride(0), eps),
                **heads_config(n_head, n_kv_head, d, FWD_ELEMENTS),
                **FUSED_MULTIPLY_ADD,
            )
    return q, k, rstd


@_forward.register_fake
def _(qkv, cos, sin, n_head, n_kv_head, eps, offset):
    b, t, width = qkv.shape
    d = width // (n_head + 2 * n_kv_head)
    return (
        qkv.new_empty(b, t, n_head, d),
        qkv.new_empty(b, t, n_kv_head, d),
        qkv.new_empty(b, t, n_head + n_kv_head, dtype=torch.float32),
    )


@torch.library.custom_op("gptfast::rotary_qk_norm_bwd", mutates_args=())
def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    offset: int,
) -> Tensor:
    """dqkv (B, T, (H + 2 Hkv) D) from the gradients of q, k and v."""
    b, t, h, d = q.shape
    h_kv = k.shape[2]
    if not runs_kernel(q):
        y, dy = upcast(torch.cat((q, k), 2)), upcast(torch.cat((dq, dk), 2))
        dz = rstd[..., None] * (dy - y * (dy * y).mean(-1, keepdim=True))
        dz_q, dz_k = dz.split((h, h_kv), 2)
        dx = rotary_ref(dz_q, dz_k, cos, sin, offset=offset, inverse=True)
        return torch.cat((*dx, upcast(dv)), 2).flatten(2).to(q.dtype)
    dqkv = q.new_empty(b, t, (h + 2 * h_kv) * d)
    if b * t > 0:
        with torch.cuda.device_of(q):
            _rotary_qk_norm_bwd_kernel[(b * t,)](
                *(dq, dk, dv, q, k, rstd, cos, sin, dqkv),
                *(t, offset, *dq.stride(), *dk.stride(), *dv.stride()),
                **heads_config(h, h_kv, d, BWD_ELEMENTS),
                **FUSED_MULTIPLY_ADD,
            )
    return dqkv


@_backward.register_fake
def _(dq, dk, dv, q, k, rstd, cos, sin, offset):
    b, t, h, d = q.shape
    return q.new_empty(b, t, (h + 2 * k.shape[2]) * d)


class _RotaryQKNorm(torch.autograd.Function):
    """Ties the two operators together; a custom operator of its own may not return a view as v."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_head, n_kv_head, eps, offset):
        q, k, rstd = _forward(qkv, cos, sin, n_head, n_kv_head, eps, offset)
        ctx.save_for_backward(q, k, rstd, cos, sin)
        ctx.offset = offset
        v = qkv.unflatten(-1, (-1, q.shape[-1]))[:, :, n_head + n_kv_head :]
        return q, k, v

    @staticmethod
    # pyrefly: ignore[bad-override]  (torch calls it with one gradient an output)
    def backward(ctx, dq, dk, dv):
        dqkv = _backward(dq, dk, dv, *ctx.saved_tensors, ctx.offset)
        return dqkv, None, None, None, None, None, None


def rotary_qk_norm(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_head: int,
    n_kv_head: int,
    eps: float = EPS,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) for attention: q and k rotated, then normalised; v as it is, a view of qkv.

    qkv (B, T, (n_head + 2 n_kv_head) D) bf16, fp16 or fp32, rows contiguous and evenly spaced; cos
    and sin (T_max, D/2) fp32, token t takes row offset + t. Returns q (B, T, n_head, D), k and v
    (B, T, n_kv_head, D) of qkv's dtype. ValueError for what it does not take.
    """
    op = "rotary_qk_norm"
    check_tensors(op, qkv=qkv, cos=cos, sin=sin)
    heads = n_head + 2 * n_kv_head
    if qkv.ndim != 3 or min(n_head, n_kv_head) < 1 or qkv.shape[2] % heads or not qkv.shape[2]:
        raise ValueError(
            f"{op}: qkv has shape {tuple(qkv.shape)}; with {n_head} heads and {n_kv_head} "
            f"key-value heads it must be (B, T, {heads} D)"
        )
    check_angles(op, cos, sin, qkv.shape[1], offset, qkv.shape[2] // heads)
    as_rows(op, "qkv", qkv)
    return _RotaryQKNorm.apply(qkv, cos, sin, n_head, n_kv_head, eps, offset)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """The model's heads at d20 in bf16, grouped-query heads, and d32's in fp32."""
    cases, full = [], torch.float32
    for label, h, h_kv, dtype in (
        ("10+10 heads bf16", 10, 10, torch.bfloat16),
        ("16+4 heads bf16", 16, 4, torch.bfloat16),
        ("16+16 heads fp32", 16, 16, torch.float32),
    ):
        q_strides, kv_strides = ((2048 * n * 128, n * 128, 128, 1) for n in (h, h_kv))
        cases += [
            AotCase.of_launch(
                f"rotary_qk_norm_fwd {label}",
                *(_rotary_qk_norm_fwd_kernel, dtype, full, full, dtype, dtype, full),
                *(2048, 0, (h + 2 * h_kv) * 128, EPS),
                **heads_config(h, h_kv, 128, FWD_ELEMENTS),
            ),
            AotCase.of_launch(
                f"rotary_qk_norm_bwd {label}",
                *(_rotary_qk_norm_bwd_kernel, *[dtype] * 5, full, full, full, dtype),
                *(2048, 0, *q_strides, *kv_strides, *kv_strides),
                **heads_config(h, h_kv, 128, BWD_ELEMENTS),
            ),
        ]
    return cases
