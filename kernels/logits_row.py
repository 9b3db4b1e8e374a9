"""The pass over a chunk's logits, a row at a time in registers: one read and one write, no more.

The same result as kernels/logits_pass.py (the maths is there), for rows of V = 65,536 bf16 logits
with a cap on Hopper, and with gradients. One program runs on each multiprocessor, and holds a row
in half of its registers while it looks at it twice; meanwhile the copy engine's asynchronous loads
bring the next row into shared memory. Two looks at what lies in L2 instead are limited by L2: with
four rows on each multiprocessor 69 MB are under way.

tanh is the hardware's (one special function; its result was off by 1.0e-5 of itself at most, over
all bf16 logits from 0.001 to 60 with a cap of 15, which is 1/200 of how bf16 rounded the logit),
and every other exponential is a polynomial, as two special functions a logit and look are more than
a multiprocessor does while it moves the bytes. The weight gradient's error is that of exact
functions to four digits (H200, 2026-11-23).

    bytes              4 M V: each logit read and written once
    special functions  3 a logit: two looks, each with a tanh and half an exponential
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSED_MULTIPLY_ADD, INTERPRETED, AotCase
from kernels.softcap import LN_2, LOG2_E, MAX_BOUNDED_CAP, gap, halves

SPECIAL_FUNCTIONS_A_LOGIT = 2 * (1 + 1 / 2)

# 64 pairs a thread: a row of 65,536 logits in 512 threads, who then have as many registers left.
CONFIG = {"BLOCK": 4096, "PARTS": 8, "num_warps": 16, "maxnreg": 128}
V = 2 * CONFIG["BLOCK"] * CONFIG["PARTS"]
_INTERPRETED = tl.constexpr(INTERPRETED)
# Added to a number below 2^22 it leaves the nearest integer in the lowest bits.
_ROUND = tl.constexpr(1.5 * 2**23)


def takes_rows(logits: Tensor, softcap: float | None) -> bool:
    """Whether logits (M, V) are rows that this kernel was made and measured for."""
    return (
        logits.is_cuda
        and logits.dtype == torch.bfloat16
        and logits.shape[1] == V
        and logits.stride(0) % 8 == 0
        and softcap is not None
        and softcap <= MAX_BOUNDED_CAP
        and torch.cuda.get_device_capability(logits.device)[0] == 9
    )


@triton.jit
def _tanh(x):
    if _INTERPRETED:
        return 1.0 - 2.0 * gap(x, 1.0, 1)
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _exp2_of_product(x, scale):
    """2^(x scale) for |x scale| < 126, without a special function; wrong by 7.5e-5 of it at most.

    2^whole is an exponent's bits; 2^rest, |rest| <= 1/2, is a cubic, its coefficients minimax in
    relative error. NaN stays NaN.
    """
    rounded = x * scale + _ROUND
    rest = x * scale - (rounded - _ROUND)
    cubic = 0.0551716685 * rest + 0.2426111251
    cubic = cubic * rest + 0.6932609677
    cubic = cubic * rest + 0.9999280572
    whole = (rounded.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return cubic * whole.to(tl.float32, bitcast=True)


@triton.jit
def _cross_entropy_row_kernel(
    logits_ptr,  # (M, 2 PARTS BLOCK) bf16: u in; its gradient out
    targets_ptr,  # (M,) int64
    weights_ptr,  # (M,) fp32, or None
    losses_ptr,  # (M,) fp32 out
    M,
    logits_m,
    cap,
    ignore_index,
    BLOCK: tl.constexpr,  # pairs
    PARTS: tl.constexpr,
):
    lanes, columns = tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK)
    cap2 = cap * LOG2_E
    by_cap = 1.0 / cap
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=2):
        row_ptr = logits_ptr + tl.cast(row, tl.int64) * logits_m
        pairs_ptr = row_ptr.to(tl.pointer_type(tl.int32))
        parts = ()
        for p in tl.static_range(PARTS):
            # Triton's compiler does not know (*parts, ...).
            parts = parts + (tl.load(pairs_ptr + lanes + p * BLOCK),)  # noqa: RUF005
        target = tl.load(targets_ptr + row)
        known = (target >= 0) & (target < 2 * PARTS * BLOCK)
        of_target = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        place = tl.where(known, target, -1).to(tl.int32)
        weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + row)

        sums = tl.zeros([BLOCK], tl.float32)
        for p in tl.static_range(PARTS):
            low, high = halves(parts[p])
            sums += tl.exp2(_tanh(low * by_cap) * cap2)
            sums += _exp2_of_product(_tanh(high * by_cap), cap2)
        total = tl.sum(sums)
        # The target's exponential as it was added, so that a sure row's loss is not of its errors.
        of_target = _tanh(of_target * by_cap)
        odd = _exp2_of_product(of_target, cap2)
        of_target = tl.where(place % 2 == 0, tl.exp2(of_target * cap2), odd)
        tl.store(losses_ptr + row, weight * tl.log2(total / of_target) * LN_2)

        share = weight / total
        # Always 0, as a sum of exponentials has no sign. The compiler does not know, and so does
        # not keep the first look's 32 bits of each tanh, for which there are no registers.
        nothing = total.to(tl.int32, bitcast=True) >> 31
        for p in tl.static_range(PARTS):
            low, high = halves(parts[p] ^ nothing)
            low, high = _tanh(low * by_cap), _tanh(high * by_cap)
            grad_low = tl.exp2(low * cap2) * share
            grad_high = _exp2_of_product(high, cap2) * share
            column = place - 2 * p * BLOCK
            if (column >= 0) & (column < 2 * BLOCK):
                here = column - 2 * lanes
                grad_low = tl.where(here == 0, grad_low - weight, grad_low)
                grad_high = tl.where(here == 1, grad_high - weight, grad_high)
            grad_low -= grad_low * (low * low)
            grad_high -= grad_high * (high * high)
            grad = tl.reshape(tl.join(grad_low, grad_high), [2 * BLOCK])
            tl.store(row_ptr + columns + 2 * p * BLOCK, grad)

        if target == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            for p in tl.static_range(PARTS):
                zero = tl.zeros([2 * BLOCK], logits_ptr.dtype.element_ty)
                tl.store(row_ptr + columns + 2 * p * BLOCK, zero)


def logits_rows(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    softcap: float,
    ignore_index: int,
    weights: Tensor | None,
    config: dict[str, int] = CONFIG,
) -> None:
    """Writes each row's loss and replaces its logits by their gradient; checks nothing.

    logits (M, 2 BLOCK PARTS) bf16, not capped yet; targets (M,) int64; losses and weights (M,)
    fp32.
    """
    m = len(logits)
    # Interpreted, three programs take turns over the rows.
    programs = (
        torch.cuda.get_device_properties(logits.device).multi_processor_count
        if logits.is_cuda
        else 3
    )
    with torch.cuda.device_of(logits):
        _cross_entropy_row_kernel[(min(m, programs),)](
            *(logits, targets, weights, losses, m, logits.stride(0), softcap, ignore_index),
            **config,
            **FUSED_MULTIPLY_ADD,
        )


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """d20's chunk, without and with a weight for each row, on GPUs that it was measured on."""
    if capability[0] != 9:
        return []
    bf16, fp32, int64 = torch.bfloat16, torch.float32, torch.int64
    return [
        AotCase.of_launch(
            f"cross_entropy row of {V}{' weights' if weights else ''}",
            _cross_entropy_row_kernel,
            *(bf16, int64, weights, fp32, 16384, V, 15.0, -1),
            **CONFIG,
        )
        for weights in (None, fp32)
    ]
