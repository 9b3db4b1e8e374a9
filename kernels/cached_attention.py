"""Attention of one new token a row to the keys and values kept of those before it.

qkv (R, (H + 2 Hkv) D) is each row's packed product. q and k are rotated by the angles of the row's
position and divided by their root mean square (kernels/qk_norm.py), k and v written to the cache at
that position, and

    y = softmax(q k^T / sqrt(D)) v        over positions up to and with the row's own

Computed in fp32; q, k and y are rounded to the dtype, bf16, fp16 or fp32, scores and weights are
not.

A program takes a part of the positions for one head of q, a block at a time; it leaves the sum of
its values, its largest score and the sum of its weights (flash-decoding), and the last one of a
head to end puts the parts together. The new key and value come from registers where their position
is read, not from the cache, to which one of the programs writes them.

Bytes moved: 2 s Hkv D for each position of each row (heads that share keys read them from L2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.few_rows import wait_for_predecessor
from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, upcast
from kernels.qk_norm import rotary_qk_norm_ref, rotate_and_norm
from kernels.rms_norm import EPS

HEAD_DIMS = (16, 32, 64, 128, 256)
# Parts of the positions, each for a program of one warp, which waits for no other in all its sums
# (two where heads are wider than 128 columns: one would spill when it puts the parts together).
# ms of d20's step, one row, H200, 2026-11-23, of 384, 1,024, 2,048 and 4,096 positions:
#   32 parts                 0.391  0.420  0.470  0.558
#   64                       0.409  0.443  0.475  0.535
#   16 (of 4 warps)          0.407  0.441  0.478  0.567
#   32 (of 4 warps)          0.413  0.445  0.549  0.605
MAX_SPLITS = 32
# Bytes of a block's keys for each warp: with as much of values, and the next block's, half of a
# thread's registers.
_BLOCK_BYTES = 4096
_MAX_BLOCK = 64


def attend_to_cache_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    n_head: int,
    eps: float = EPS,
) -> Tensor:
    """`attend_to_cache` in plain PyTorch; returns y (R, H D)."""
    heads = {"n_head": n_head, "n_kv_head": keys.shape[2]}
    # Rows stand where a sequence's tokens would.
    q, k, v = rotary_qk_norm_ref(qkv[None], cos[positions], sin[positions], eps=eps, **heads)
    rows = torch.arange(len(qkv), device=qkv.device)
    keys[rows, positions], values[rows, positions] = k[0], v[0]
    group = n_head // keys.shape[2]
    k, v = (upcast(x.repeat_interleave(group, 2)) for x in (keys, values))
    scores = torch.einsum("rhd,rthd->rht", upcast(q[0]), k) / q.shape[-1] ** 0.5
    hidden = torch.arange(keys.shape[1], device=qkv.device) > positions[:, None]
    weight = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    return torch.einsum("rht,rthd->rhd", weight, v).flatten(1).to(qkv.dtype)


@triton.jit
def _query_or_key(head_ptr, cos, sin, eps, D: tl.constexpr):
    """The halves (1, D/2) of one head of qkv, rotated, normed and rounded."""
    half = tl.arange(0, D // 2)[None, :]
    x1, x2 = tl.load(head_ptr + half), tl.load(head_ptr + D // 2 + half)
    y1, y2, _ = rotate_and_norm(x1.to(tl.float32), x2.to(tl.float32), cos, sin, eps, D // 2)
    return y1.to(x1.dtype), y2.to(x1.dtype)


@triton.jit
def _load_block(keys_ptr, values_ptr, start, end, cache_t, BLOCK: tl.constexpr, D: tl.constexpr):
    """Both halves of the keys (BLOCK, D/2), and the values (BLOCK, D), of positions from start;
    zero from `end` on."""
    positions = start + tl.arange(0, BLOCK)[:, None]
    visible = positions < end
    offsets = positions.to(tl.int64) * cache_t
    half = tl.arange(0, D // 2)[None, :]
    k1 = tl.load(keys_ptr + offsets + half, mask=visible, other=0.0)
    k2 = tl.load(keys_ptr + offsets + D // 2 + half, mask=visible, other=0.0)
    v = tl.load(values_ptr + offsets + tl.arange(0, D)[None, :], mask=visible, other=0.0)
    return k1, k2, v


@triton.jit
def _attend_to_cache_kernel(
    qkv_ptr,  # (R, (H + 2 HKV) D)
    cos_ptr,  # (T_max, D/2)
    sin_ptr,  # (T_max, D/2)
    positions_ptr,  # (R,)
    keys_ptr,  # (R, T, HKV, D) in and out
    values_ptr,  # (R, T, HKV, D) in and out
    part_ptr,  # (R, H, splits, D)
    part_stats_ptr,  # (2, R, H, splits): largest score, sum of weights
    ended_ptr,  # (R, H), zero before and after
    y_ptr,  # (R, H, D) out
    split_size,
    cache_r,
    cache_t,
    cache_h,
    eps,
    scale,
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(0)
    kv_head = head // (H // HKV)
    # This and the positions before it were written by steps that have ended.
    position = tl.load(positions_ptr + row).to(tl.int32)
    first = split * split_size
    end = tl.minimum(first + split_size, position)
    keys_ptr += row * cache_r + kv_head * cache_h
    values_ptr += row * cache_r + kv_head * cache_h
    k1, k2, v = _load_block(keys_ptr, values_ptr, first, end, cache_t, BLOCK, D)
    half = tl.arange(0, D // 2)[None, :]
    cos = tl.load(cos_ptr + position * (D // 2) + half)
    sin = tl.load(sin_ptr + position * (D // 2) + half)
    wait_for_predecessor(PDL)

    eps = tl.cast(eps, tl.float32)
    d = tl.arange(0, D)[None, :]
    heads = qkv_ptr + row * ((H + 2 * HKV) * D)
    q1, q2 = _query_or_key(heads + head * D, cos, sin, eps, D)
    new_k1, new_k2 = _query_or_key(heads + (H + kv_head) * D, cos, sin, eps, D)
    new_v = tl.load(heads + (H + HKV + kv_head) * D + d)
    q1 = q1.to(tl.float32) * tl.cast(scale, tl.float32)
    q2 = q2.to(tl.float32) * tl.cast(scale, tl.float32)

    # The new position belongs to one of the splits, which begins with it.
    owns = (position >= first) & (position < first + split_size)
    if owns & (head % (H // HKV) == 0):
        offset = position.to(tl.int64) * cache_t
        tl.store(keys_ptr + offset + half, new_k1)
        tl.store(keys_ptr + offset + D // 2 + half, new_k2)
        tl.store(values_ptr + offset + d, new_v)
    score = tl.sum(q1 * new_k1.to(tl.float32) + q2 * new_k2.to(tl.float32))
    largest = tl.where(owns, score, float("-inf"))
    total = tl.where(owns, 1.0, 0.0)
    y = tl.where(owns, new_v.to(tl.float32), 0.0)
    for start in range(first, end, BLOCK):
        after1, after2, after_v = _load_block(
            keys_ptr, values_ptr, start + BLOCK, end, cache_t, BLOCK, D
        )
        scores = tl.sum(q1 * k1.to(tl.float32) + q2 * k2.to(tl.float32), axis=1, keep_dims=True)
        scores = tl.where(start + tl.arange(0, BLOCK)[:, None] < end, scores, float("-inf"))
        # Finite: the first of a block is always visible.
        new_largest = tl.maximum(largest, tl.max(scores))
        weights = tl.exp(scores - new_largest)
        old = tl.exp(largest - new_largest)
        total = total * old + tl.sum(weights)
        y = y * old + tl.sum(weights * v.to(tl.float32), axis=0, keep_dims=True)
        largest = new_largest
        k1, k2, v = after1, after2, after_v

    pair = row * H + head
    stats_ptr = part_stats_ptr + pair * splits
    sums_ptr = stats_ptr + tl.num_programs(2).to(tl.int64) * H * splits
    tl.store(part_ptr + (pair * splits + split) * D + d, y)
    tl.store(stats_ptr + split, largest)
    tl.store(sums_ptr + split, total)
    # All threads' stores are before the count, and the last one's reads behind it.
    tl.debug_barrier()
    if tl.atomic_add(ended_ptr + pair, 1, sem="acq_rel") == splits - 1:
        s = tl.arange(0, MAX_SPLITS)[:, None]
        parts = part_ptr + (pair * splits + s) * D + d
        mask = s < splits
        # ".cg": from L2, where the others wrote them.
        ms = tl.load(stats_ptr + s, mask=mask, other=float("-inf"), cache_modifier=".cg")
        ls = tl.load(sums_ptr + s, mask=mask, other=0.0, cache_modifier=".cg")
        ys = tl.load(parts, mask=mask, other=0.0, cache_modifier=".cg")
        share = tl.exp(ms - tl.max(ms))
        merged = tl.sum(ys * share, axis=0, keep_dims=True) / tl.sum(ls * share)
        tl.store(y_ptr + pair * D + d, merged)
        tl.store(ended_ptr + pair, 0)


def _constants(head_dim: int, itemsize: int) -> dict[str, int]:
    """Launch rule, for caches of any length."""
    warps = max(1, head_dim // 128)
    block = max(4, min(_MAX_BLOCK, _BLOCK_BYTES // (head_dim * itemsize))) * warps
    return {"D": head_dim, "BLOCK": block, "MAX_SPLITS": MAX_SPLITS, "num_warps": warps}


class AttentionScratch:
    """What the programs for R rows leave for each other; its users take turns.

    parts (R, H, MAX_SPLITS, D) and stats (2, R, H, MAX_SPLITS) fp32, ended (R, H) int32, zeros.
    """

    def __init__(self, rows: int, n_head: int, head_dim: int, device: torch.device) -> None:
        shape = (rows, n_head, MAX_SPLITS)
        self.parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(2, *shape, dtype=torch.float32, device=device)
        self.ended = torch.zeros(rows, n_head, dtype=torch.int32, device=device)


def attend_to_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    y: Tensor,
    scratch: AttentionScratch,
    *,
    n_head: int,
    pdl: bool,
    eps: float = EPS,
) -> None:
    """Write each row's k and v to the cache at its position, and its attention to y (R, H D).

    qkv (R, (H + 2 Hkv) D) and y contiguous; cos and sin (T_max, D/2) fp32; positions (R,) int64,
    below T; keys and values (R, T, Hkv, D) of equal strides, heads contiguous. `check_attention`
    says once what may be called; `pdl`: see kernels/few_rows.py.
    """
    rows, length, kv_heads, head_dim = keys.shape
    constants = _constants(head_dim, keys.element_size())
    split_size = constants["BLOCK"] * triton.cdiv(length, constants["BLOCK"] * MAX_SPLITS)
    _attend_to_cache_kernel[(triton.cdiv(length, split_size), n_head, rows)](
        *(qkv, cos, sin, positions, keys, values),
        *(scratch.parts, scratch.stats, scratch.ended, y),
        *(split_size, *keys.stride()[:3], eps, head_dim**-0.5),
        H=n_head,
        HKV=kv_heads,
        PDL=pdl,
        launch_pdl=pdl,
        **constants,
        **FUSED_MULTIPLY_ADD,
    )


def check_attention(n_head: int, n_kv_head: int, head_dim: int) -> None:
    """ValueError unless `attend_to_cache` takes such heads."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"attend_to_cache: head_dim {head_dim}; it takes {HEAD_DIMS}")
    if n_head % n_kv_head:
        raise ValueError(
            f"attend_to_cache: {n_head} heads do not share {n_kv_head} heads of keys evenly"
        )


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """d20's heads in bf16, and the widest in fp32."""
    cases = []
    for heads, dim, dtype in ((10, 128, torch.bfloat16), (8, 256, torch.float32)):
        full, step = torch.float32, heads * dim
        tensors = (dtype, full, full, torch.int64, dtype, dtype, full, full, torch.int32, dtype)
        cases.append(
            AotCase.of_launch(
                f"attend_to_cache {heads} x {dim} {'bf16' if dim == 128 else 'fp32'}",
                *(_attend_to_cache_kernel, *tensors),
                *(256, step, step, dim, EPS, dim**-0.5),
                H=heads,
                HKV=heads,
                PDL=capability >= (9, 0),
                **_constants(dim, dtype.itemsize),
            )
        )
    return cases
