"""The pass over a chunk's logits: losses out, gradients in place of the logits.

    u (M, V) in       z = cap tanh(u / cap), or z = u      loss = w (logsumexp(z) - z[target])
    du (M, V) out = w (softmax(z) - onehot(target)) (1 - (z / cap)^2)

w is 1 or a weight of each row. kernels/cross_entropy.py calls it between its products. A program
takes a row and looks at it twice: for the sum of exp(z), then for the gradient. The second look
goes backwards, so that what was read last, and is still in L2, comes first.

There are three kernels. Training runs the one of kernels/logits_tiles.py: bf16, a cap of at most
32, whole tiles of 8,192 logits, the gradient asked for. `_cross_entropy_pairs_kernel` takes what
else is bf16 and capped, so that the sum needs no running maximum: evaluation, whose losses are
exact to fp32, and other vocabularies. It takes two logits in 32 bits at a time and loads tiles
ahead of their use. `_cross_entropy_kernel` takes the rest: fp32, no cap or a large one, odd rows.

What these two have to do, with the gradient (without it half):

    bytes              2 s M V: one read, one write of each logit (s bytes each)
    special functions  a logit and look 2 exponentials and, with a cap, a quarter of a reciprocal,
                       as four logits share one: 4.5 with a cap, 3 without; 16 a clock and SM

For d20's chunk (M = 16,384, V = 65,536, bf16) on an H200 these are 1.04 ms at 4.15 TB/s and 1.16 ms
at 1.98 GHz. The pairs kernel took 1.42 ms (2026-11-23, Triton 3.6), and 1.58 to 1.66 behind the
product. With half as many rows 0.72 ms (2026-11-22); slower there: without loads ahead 0.79; a row
kept in registers as 16-bit z, so that the second look costs one special function, 0.81 (they spill,
and an SM holds one row at a time); such z written in place 0.74 (one more pass through L2).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, runs_kernel
from kernels.logits_tiles import tiles_launch
from kernels.softcap import LN_2, LOG2_E, cap_gap, halves, ignore_row

# Up to this cap the sum of exp(z) over a row stays in fp32's range: no running maximum.
MAX_BOUNDED_CAP = 64.0

# Tiles of the pairs kernel under way: 3 are 3 % slower, 5 are 1 % (H200, 2026-11-22).
_STAGES = tl.constexpr(4)


@triton.jit
def _capped(u, softcap, N: tl.constexpr):
    """(z in units of ln 2, dz/du) of u (N,), or of a scalar for N = 1."""
    if softcap is None:
        return u * LOG2_E, 1.0
    else:
        cap = tl.cast(softcap, tl.float32)
        gap = cap_gap(u, cap, N)
        return cap * LOG2_E - 2.0 * cap * LOG2_E * gap, 4.0 * (gap - gap * gap)


@triton.jit
def _target_logit(logits_ptr, target, V, softcap):
    """The target's z in units of ln 2; NaN for a target that is no column."""
    known = (target >= 0) & (target < V)
    u = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    return _capped(u, softcap, 1)[0]


@triton.jit
def _cross_entropy_pairs_kernel(
    logits_ptr,  # (M, V) bf16, V and the step between rows even: u in; with GRAD its gradient out
    targets_ptr,  # (M,) int64
    weights_ptr,  # (M,) fp32, or None
    losses_ptr,  # (M,) fp32 out
    V,
    logits_m,
    cap,
    ignore_index,
    GRAD: tl.constexpr,
    EVEN: tl.constexpr,  # V is a multiple of 2 BLOCK
    BLOCK: tl.constexpr,  # pairs
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_m
    pairs_ptr = logits_ptr.to(tl.pointer_type(tl.int32))
    pairs = V // 2
    target = tl.load(targets_ptr + row)
    lanes = tl.arange(0, BLOCK)

    if target == ignore_index:
        ignore_row(logits_ptr, losses_ptr + row, V, GRAD, 2 * BLOCK)
    else:
        cap2 = cap * LOG2_E
        weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + row)
        # Before the first gradient is written.
        target2 = _target_logit(logits_ptr, target, V, cap)

        total = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, pairs, BLOCK, num_stages=_STAGES):
            at = start + lanes
            inside = None if EVEN else at < pairs
            low, high = halves(tl.load(pairs_ptr + at, mask=inside, eviction_policy="evict_last"))
            sums = tl.exp2(cap2 - 2.0 * cap2 * cap_gap(low, cap, BLOCK))
            sums += tl.exp2(cap2 - 2.0 * cap2 * cap_gap(high, cap, BLOCK))
            total += sums if EVEN else tl.where(inside, sums, 0.0)
        lse2 = tl.log2(tl.sum(total))
        tl.store(losses_ptr + row, weight * (lse2 - target2) * LN_2)

        if GRAD:
            last = (tl.cdiv(pairs, BLOCK) - 1) * BLOCK
            # Slopes are 4 (gap - gap^2); the 4 is in the exponent.
            shift2 = cap2 - lse2 + 2.0
            for done in tl.range(0, pairs, BLOCK, num_stages=_STAGES):
                start = last - done
                at = start + lanes
                pair = tl.load(
                    pairs_ptr + at,
                    mask=None if EVEN else at < pairs,
                    eviction_policy="evict_first",
                )
                low, high = halves(pair)
                low, high = cap_gap(low, cap, BLOCK), cap_gap(high, cap, BLOCK)
                grad_low = tl.exp2(shift2 - 2.0 * cap2 * low)
                grad_high = tl.exp2(shift2 - 2.0 * cap2 * high)
                column = target - 2 * start
                if (column >= 0) & (column < 2 * BLOCK):
                    here = column.to(tl.int32) - 2 * lanes
                    grad_low = tl.where(here == 0, grad_low - 4.0, grad_low)
                    grad_high = tl.where(here == 1, grad_high - 4.0, grad_high)
                grad_low *= low - low * low
                grad_high *= high - high * high
                if weights_ptr is not None:
                    grad_low *= weight
                    grad_high *= weight
                grad = tl.reshape(tl.join(grad_low, grad_high), [2 * BLOCK])
                columns = 2 * start + tl.arange(0, 2 * BLOCK)
                tl.store(logits_ptr + columns, grad, mask=None if EVEN else columns < V)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (M, V): u in; with GRAD its gradient out
    targets_ptr,  # (M,) int64
    weights_ptr,  # (M,) fp32, or None
    losses_ptr,  # (M,) fp32 out
    V,
    logits_m,
    softcap,  # or None
    ignore_index,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_m
    target = tl.load(targets_ptr + row)
    lanes = tl.arange(0, BLOCK)

    if target == ignore_index:
        ignore_row(logits_ptr, losses_ptr + row, V, GRAD, BLOCK)
    else:
        weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + row)
        target2 = _target_logit(logits_ptr, target, V, softcap)

        # A lane has a maximum of its own: nothing crosses lanes before the end of the row.
        top2 = tl.full([BLOCK], -3e38, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            valid = start + lanes < V
            u = tl.load(
                logits_ptr + start + lanes, mask=valid, other=0.0, eviction_policy="evict_last"
            ).to(tl.float32)
            z2 = tl.where(valid, _capped(u, softcap, BLOCK)[0], float("-inf"))
            higher2 = tl.maximum(top2, z2, propagate_nan=tl.PropagateNan.ALL)
            total = total * tl.exp2(top2 - higher2) + tl.exp2(z2 - higher2)
            top2 = higher2
        row_top2 = tl.max(top2)
        lse2 = row_top2 + tl.log2(tl.sum(total * tl.exp2(top2 - row_top2)))
        tl.store(losses_ptr + row, weight * (lse2 - target2) * LN_2)

        if GRAD:
            last = (tl.cdiv(V, BLOCK) - 1) * BLOCK
            for done in range(0, V, BLOCK):
                start = last - done
                valid = start + lanes < V
                u = tl.load(
                    logits_ptr + start + lanes, mask=valid, other=0.0, eviction_policy="evict_first"
                ).to(tl.float32)
                z2, slope = _capped(u, softcap, BLOCK)
                grad = tl.exp2(z2 - lse2)
                if (start <= target) & (target < start + BLOCK):
                    here = lanes == (target - start).to(tl.int32)
                    grad = tl.where(here, grad - 1.0, grad)
                tl.store(logits_ptr + start + lanes, grad * slope * weight, mask=valid)


def _launch(
    dtype: torch.dtype, v: int, step: int, softcap: float | None, grad: bool
) -> tuple[triton.JITFunction, dict]:
    """The kernel for rows of v logits that are `step` apart, and its launch's constants."""
    tiles = tiles_launch(dtype, v, step, softcap) if grad else None
    if tiles is not None:
        return tiles
    bounded = softcap is not None and softcap <= MAX_BOUNDED_CAP
    if dtype == torch.bfloat16 and bounded and v % 2 == 0 and step % 2 == 0:
        # Sixteen pairs a thread, four rows to an SM: of tiles of 512 to 4,096 pairs, 2 to 16 warps
        # and 56 to 128 registers these are the fastest (H200, 2026-11-22).
        block = min(2048, max(128, triton.next_power_of_2(v // 2)))
        warps = max(1, block // 512)
        even = v % (2 * block) == 0
        return _cross_entropy_pairs_kernel, {
            "GRAD": grad,
            "EVEN": even,
            "BLOCK": block,
            "num_warps": warps,
            "maxnreg": 128,
        }
    # Sixteen logits a thread. Rows so long that four to an SM leave L2: one to an SM.
    block = 16384 if v * dtype.itemsize > 160 * 1024 else 4096
    block = min(block, max(128, triton.next_power_of_2(v)))
    warps = max(1, block // 512)
    constants = {"GRAD": grad, "BLOCK": block, "num_warps": warps, "maxnreg": 64}
    return _cross_entropy_kernel, constants


def logits_pass(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    softcap: float | None,
    ignore_index: int,
    grad: bool,
    weights: Tensor | None = None,
) -> None:
    """Writes each row's loss; with `grad` replaces the logits by the gradient of their sum.

    logits (M, V) bf16 or fp32, not capped yet, rows of adjacent elements; targets (M,) int64;
    losses and weights (M,) fp32. Checks nothing.
    """
    m, v = logits.shape
    if m == 0:
        return
    if not runs_kernel(logits):
        _logits_pass_ref(logits, targets, losses, softcap, ignore_index, grad, weights)
        return
    kernel, constants = _launch(logits.dtype, v, logits.stride(0), softcap, grad)
    with torch.cuda.device_of(logits):
        kernel[(m,)](
            *(logits, targets, weights, losses, v, logits.stride(0), softcap, ignore_index),
            **constants,
            **FUSED_MULTIPLY_ADD,
        )


def _logits_pass_ref(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    softcap: float | None,
    ignore_index: int,
    grad: bool,
    weights: Tensor | None,
) -> None:
    t = logits.float() if softcap is None else torch.tanh(logits.float() / softcap)
    log_p = torch.log_softmax(t if softcap is None else t * softcap, dim=-1)
    losses.copy_(F.nll_loss(log_p, targets, ignore_index=ignore_index, reduction="none"))
    factor = (targets != ignore_index).float()
    if weights is not None:
        factor *= weights
        losses.mul_(weights)
    if grad:
        columns = targets.where(targets != ignore_index, 0)[:, None]
        du = log_p.exp().scatter_add_(1, columns, -torch.ones_like(factor)[:, None])
        du *= factor[:, None]
        logits.copy_(du if softcap is None else du * (1 - t * t))


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """d20's logits with their gradient, with weights, and for evaluation; a vocabulary that the
    tiles do not divide, with and without weights; no cap; rows too long for four to an SM."""
    bf16, fp32, int64 = torch.bfloat16, torch.float32, torch.int64
    cases = []
    for label, v, softcap, grad, weights in (
        ("cross_entropy 65536 cap grad", 65536, 15.0, True, None),
        ("cross_entropy 65536 cap grad weights", 65536, 15.0, True, fp32),
        ("cross_entropy 65536 cap", 65536, 15.0, False, None),
        ("cross_entropy 50304 cap grad", 50304, 15.0, True, None),
        ("cross_entropy 50304 cap grad weights", 50304, 15.0, True, fp32),
        ("cross_entropy 65536 grad", 65536, None, True, None),
        ("cross_entropy 131072 grad", 131072, None, True, None),
    ):
        kernel, constants = _launch(bf16, v, v, softcap, grad)
        arguments = (bf16, int64, weights, fp32, v, v, softcap, -1)
        cases.append(AotCase.of_launch(label, kernel, *arguments, **constants))
    return cases
