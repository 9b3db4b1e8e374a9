"""The pass over logits (kernels/logits_pass.py) as training runs it: whole tiles of capped bf16.

A program takes a row and looks at it twice: for the sum of exp(z), then, backwards, for the
gradient. Each tile is loaded into registers one ahead of its use, and not by a software pipeline:
of loads that become cp.async Triton drops the eviction policy. So the first look's tiles stay in
L2 for the second, and the gradient, which nobody reads soon, does not push them out. What a row
begins with (its first tile, its target's logit) is under way before anything waits.

Special functions are what comes next, so two are cheap: tanh is the hardware's (sm_75 and newer;
off by 1.0e-5 of itself at most over all bf16 from 0.001 to 60 with a cap of 15, on an H200; PTX
promises 2^-11), and exp of every odd column is a cubic, off by 7.2e-5 at most. A row's loss is
log(sum / exp(z[target])), both by the same formulas: where the target is nearly all of the sum
these errors cancel, and no loss is below 0. The gradient is rounded to bf16, steps of 2^-8.

What has to be done, for 16,384 rows of 65,536 on an H200:

    bytes              4 a logit, read once and written once       1.04 ms at 4.15 TB/s
    special functions  3 a logit: two looks, each with a tanh
                       and half an exponential                     0.77 ms at 1.98 GHz

Measured: 1.28 ms alone (H200, 2026-11-23, Triton 3.6, bench/results/kernels-h200.json), and, before
the start of a row was ordered as it is now, 1.28 to 1.32 behind the product that makes the logits.
Alternatives then, in ms alone / behind it:

    2,048 pairs a tile and 4 warps; 8,192 and 16    1.42 / 1.37; 1.48 / 1.44
    80 registers a thread                           1.51 / 1.46
    no hint at the store; no hint at all            1.38 / 1.40; 1.56 / 1.47
    exact functions (4.5 special functions)         1.46 to 1.50 alone
    the pairs kernel of kernels/logits_pass.py      1.42 / 1.58 to 1.66
"""

import torch
import triton
import triton.language as tl

from kernels.launch import INTERPRETED
from kernels.softcap import LN_2, LOG2_E, cap_gap, halves, ignore_row

# Of both looks: a tanh each, and an exponential for every other logit.
SPECIAL_FUNCTIONS_A_LOGIT = 2 * (1 + 1 / 2)

# In pairs of logits. Sixteen pairs a thread.
_BLOCK = 4096
_LAUNCH = {"BLOCK": _BLOCK, "num_warps": 8, "maxnreg": 128}

# Up to this cap sum / exp(z[target]), at most V exp(2 cap), stays in fp32's range.
_MAX_CAP = 32.0

_INTERPRETED = tl.constexpr(INTERPRETED)
# Added to a number between -2^22 and 2^22, it leaves the nearest integer in the lowest bits.
_ROUND = tl.constexpr(1.5 * 2**23)


@triton.jit
def _tanh(x):
    """tanh by the hardware, or exact in Triton's interpreter, which runs no assembly."""
    if _INTERPRETED:
        return 1.0 - 2.0 * cap_gap(x, 1.0, 1)
    else:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _even_power(t, cap2):
    """exp(z) of an even column: 2^(t cap2)."""
    return tl.exp2(t * cap2)


@triton.jit
def _odd_power(t, cap2):
    """exp(z) of an odd column: 2^(t cap2), |t cap2| < 126, without a special function.

    A power of two is an exponent's bits; what is left, at most 1/2 in size, goes through the cubic
    of the least relative error, 7.2e-5. NaN stays NaN.
    """
    rounded = t * cap2 + _ROUND
    rest = t * cap2 - (rounded - _ROUND)
    cubic = 0.0551716685295105 * rest + 0.2426111251115799
    cubic = cubic * rest + 0.6932609677314758
    cubic = cubic * rest + 0.9999280571937561
    whole = (rounded.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return cubic * whole.to(tl.float32, bitcast=True)


@triton.jit
def _cross_entropy_tiles_kernel(
    logits_ptr,  # (M, V) bf16, the step between rows even: u in, its gradient out
    targets_ptr,  # (M,) int64
    weights_ptr,  # (M,) fp32, or None
    losses_ptr,  # (M,) fp32 out
    V,  # a multiple of 2 BLOCK
    logits_m,
    cap,
    ignore_index,
    BLOCK: tl.constexpr,  # pairs
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_m
    pairs_ptr = logits_ptr.to(tl.pointer_type(tl.int32))
    lanes = tl.arange(0, BLOCK)
    last = V // 2 - BLOCK

    # All that a row begins with is under way before arithmetic waits for any of it: DRAM takes 0.8
    # us to answer, a row 20.
    target = tl.load(targets_ptr + row)
    pair = tl.load(pairs_ptr + lanes, eviction_policy="evict_last")
    weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + row)
    # Before the first gradient is written. A target that is no column makes the loss NaN.
    known = (target >= 0) & (target < V)
    target_u = tl.load(logits_ptr + target, mask=known, other=float("nan"))

    if target == ignore_index:
        ignore_row(logits_ptr, losses_ptr + row, V, True, 2 * BLOCK)
    else:
        cap2 = cap * LOG2_E
        inverse = 1.0 / cap

        totals = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, V // 2, BLOCK, num_stages=1):
            # Behind the last tile that one again: the second look begins with it.
            ahead = tl.minimum(start + BLOCK, last)
            after = tl.load(pairs_ptr + ahead + lanes, eviction_policy="evict_last")
            low, high = halves(pair)
            totals += _even_power(_tanh(low * inverse), cap2)
            totals += _odd_power(_tanh(high * inverse), cap2)
            pair = after
        total = tl.sum(totals)

        target_t = _tanh(target_u.to(tl.float32) * inverse)
        is_even = target % 2 == 0
        of_target = tl.where(is_even, _even_power(target_t, cap2), _odd_power(target_t, cap2))
        loss = tl.log2(tl.div_rn(total, of_target)) * LN_2
        tl.store(losses_ptr + row, weight * loss)

        share = weight / total
        for done in tl.range(0, V // 2, BLOCK, num_stages=1):
            start = last - done
            # Behind the first tile that one again: nobody looks at it.
            ahead = tl.maximum(start - BLOCK, 0)
            after = tl.load(pairs_ptr + ahead + lanes, eviction_policy="evict_first")
            low, high = halves(pair)
            low, high = _tanh(low * inverse), _tanh(high * inverse)
            grad_low = _even_power(low, cap2) * share
            grad_high = _odd_power(high, cap2) * share
            column = target - 2 * start
            if (column >= 0) & (column < 2 * BLOCK):
                here = column.to(tl.int32) - 2 * lanes
                grad_low = tl.where(here == 0, grad_low - weight, grad_low)
                grad_high = tl.where(here == 1, grad_high - weight, grad_high)
            grad_low -= grad_low * (low * low)
            grad_high -= grad_high * (high * high)
            grad = tl.reshape(tl.join(grad_low, grad_high), [2 * BLOCK])
            columns = 2 * start + tl.arange(0, 2 * BLOCK)
            tl.store(logits_ptr + columns, grad, eviction_policy="evict_first")
            pair = after


def tiles_launch(
    dtype: torch.dtype, v: int, step: int, softcap: float | None
) -> tuple[triton.JITFunction, dict] | None:
    """The kernel and its launch's constants, for the gradient of rows of v logits, `step` apart.

    None where it does not apply: for fp32, no cap or one above 32, v that tiles do not divide.
    """
    capped = softcap is not None and softcap <= _MAX_CAP
    if dtype == torch.bfloat16 and capped and v % (2 * _BLOCK) == 0 and step % 2 == 0:
        return _cross_entropy_tiles_kernel, dict(_LAUNCH)
    return None
