"""Linear, soft cap and cross-entropy in one operator; the logits are never whole.

    u = x W^T     z = cap tanh(u / cap), or z = u     loss_i = w_i (logsumexp(z_i) - z_i[target_i])
    du = w (softmax(z) - onehot(target)) (1 - (z / cap)^2)          dx = du W        dW = du^T x

x (M, C) and weight (V, C) in bf16 or fp32, targets (M,) int64, the loss fp32. The cap is Gemma 2's
(arXiv:2408.00118); taking gradients chunk by chunk in the forward pass is Liger-Kernel's idea
(arXiv:2410.10989). Rows are taken in `chunks` parts that share one buffer: a product writes their
logits, one kernel (kernels/logits_pass.py) replaces these by their gradient, two products use it.
Backward only multiplies the saved dx and dW by the loss's gradient.

Numerics: logits and du are rounded once each to x's dtype, dx once and once more when scaled; all
between is fp32, the target's column as well. The products of all chunks add up in one fp32 dW, each
inside its own epilogue, and that is rounded once, to the weight's dtype, when scaled. No atomics:
the same bits every time. For an fp16 du small probabilities would vanish, as no loss scale reaches
them here: fp16 is refused.

FLOPs: 2 M V C a product; three with both gradients, one without. Memory: a chunk of logits, dx,
fp32 dW; for d20 (M = V = 65,536, C = 1,280) with 4 chunks 2 GiB + 160 MiB + 320 MiB.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, check_tensors, runs_kernel, upcast
from kernels.logits_pass import logits_pass

# Fewer chunks make longer products, and fewer passes over dW, for a larger buffer. d20's head on
# an H200, by its three products alone (of logits, not of their gradient), medians of 24 in turns: 4
# chunks 1.103, 6 chunks 1.121, 8 (of 8,448 rows) 1.113 (2026-11-22).
CHUNKS = 4

# Of the kernel that scales gradients.
_BLOCK = 4096


def chunk_rows(m: int, chunks: int) -> int:
    """Rows of all chunks but the last, which takes what is left; at least 1."""
    return max(1, -(-m // chunks))


def _mean(total: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """`total` by the number of targets that count; 0 where none does."""
    return total / (targets != ignore_index).sum().clamp(min=1)


def linear_cross_entropy_ref(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    softcap: float | None = 15.0,
    ignore_index: int = -1,
    reduction: str = "sum",
    chunks: int = 1,
) -> Tensor:
    """`linear_cross_entropy` in plain PyTorch, differentiable throughout.

    One chunk: all logits exist at once. More: each chunk's are made anew in backward, and autograd
    adds up dW in the weight's dtype.
    """

    def chunk_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        z = upcast(F.linear(x, weight))
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none")

    if chunks == 1:
        losses = chunk_losses(x, weight, targets)
    else:
        rows = chunk_rows(len(x), chunks)
        pairs = zip(x.split(rows), targets.split(rows))
        losses = torch.cat(
            [checkpoint(chunk_losses, a, weight, b, use_reentrant=False) for a, b in pairs]
        )
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else _mean(losses.sum(), targets, ignore_index)


def _add_weight_gradient(dw: Tensor, du: Tensor, x: Tensor, first: bool) -> None:
    """dw += du^T x, in fp32 and inside the product; `first` takes dw as 0, whatever it holds."""
    beta = 0.0 if first else 1.0
    if dw.is_cuda:
        torch.addmm(dw, du.t(), x, beta=beta, out_dtype=torch.float32, out=dw)
    else:
        # PyTorch has no product of bf16 with an fp32 result on the CPU.
        torch.addmm(dw, du.t().float(), x.float(), beta=beta, out=dw)


def _chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    chunks: int,
    x_grad: bool = False,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (M,), dx, dW fp32) of the sum of losses; a gradient not asked for is empty."""
    m, v = len(x), len(weight)
    rows = chunk_rows(m, chunks)
    losses = x.new_empty(m, dtype=torch.float32)
    dx = x.new_empty(x.shape if x_grad else 0)
    dw = weight.new_empty(weight.shape if weight_grad else 0, dtype=torch.float32)
    # Whatever V is, rows begin at multiples of 64 elements: loads stay wide, products fast.
    buffer = x.new_empty(rows, -(-v // 64) * 64)
    targets = targets.contiguous()
    weights = None if weights is None else weights.contiguous()
    # An empty batch is one empty chunk: its products write the zeros.
    for start in range(0, max(m, 1), rows):
        part = slice(start, start + rows)
        logits = buffer[: len(x[part]), :v]
        torch.mm(x[part], weight.t(), out=logits)
        logits_pass(
            logits,
            targets[part],
            losses[part],
            softcap,
            ignore_index,
            x_grad or weight_grad,
            None if weights is None else weights[part],
        )
        if x_grad:
            torch.mm(logits, weight, out=dx[part])
        if weight_grad:
            _add_weight_gradient(dw, logits, x[part], first=start == 0)
    return losses, dx, dw


@torch.library.custom_op("gptfast::linear_cross_entropy_fwd", mutates_args=())
def _linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    chunks: int,
    x_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses, dx, dw = _chunked(
        x, weight, targets, weights, softcap, ignore_index, chunks, x_grad, weight_grad
    )
    return losses.sum(), dx, dw


@_linear_cross_entropy_fwd.register_fake
def _(x, weight, targets, weights, softcap, ignore_index, chunks, x_grad, weight_grad):
    dx = x.new_empty(x.shape if x_grad else 0)
    dw = weight.new_empty(weight.shape if weight_grad else 0, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dw


@triton.jit
def _scale_kernel(
    x_ptr,  # (N,)
    scale_ptr,  # () fp32
    y_ptr,  # (N,) out, of any dtype
    N,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N).to(tl.float32)
    tl.store(y_ptr + at, x * tl.load(scale_ptr), mask=at < N)


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale, fp32 and 0-dim, rounded once to `dtype`.

    Where x and the result differ in dtype torch.mul is slow: d20's two gradients took 0.76 ms with
    it, and take 0.21 (H200, 2026-11-22).
    """
    y = torch.empty_like(x, dtype=dtype)
    if not runs_kernel(x) or x.numel() == 0:
        # Of one dimension, so that promotion makes the product fp32.
        return torch.mul(x, scale.reshape(1), out=y)
    with torch.cuda.device_of(x):
        _scale_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            *(x, scale, y, x.numel()), BLOCK=_BLOCK, num_warps=8, **FUSED_MULTIPLY_ADD
        )
    return y


@torch.library.custom_op("gptfast::linear_cross_entropy_bwd", mutates_args=())
def _linear_cross_entropy_bwd(
    dloss: Tensor, dx: Tensor, dw: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _scaled(dx, dloss, dx.dtype), _scaled(dw, dloss, weight_dtype)


@_linear_cross_entropy_bwd.register_fake
def _(dloss, dx, dw, weight_dtype):
    return torch.empty_like(dx), torch.empty_like(dw, dtype=weight_dtype)


def _setup_context(ctx, inputs, output):
    _, dx, dw = output
    ctx.mark_non_differentiable(dx, dw)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx, dw)
    ctx.weight_dtype = inputs[1].dtype


def _backward(ctx, dloss, _dx, _dw):
    no_more = (None,) * 7
    if dloss is None:
        return None, None, *no_more
    dx, dw = _linear_cross_entropy_bwd(dloss, *ctx.saved_tensors, ctx.weight_dtype)
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    return dx if needs_x else None, dw if needs_weight else None, *no_more


_linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("gptfast::linear_cross_entropy_losses", mutates_args=())
def _linear_cross_entropy_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    chunks: int,
) -> Tensor:
    return _chunked(x, weight, targets, weights, softcap, ignore_index, chunks)[0]


@_linear_cross_entropy_losses.register_fake
def _(x, weight, targets, weights, softcap, ignore_index, chunks):
    return x.new_empty(x.shape[0], dtype=torch.float32)


@register_flop_formula(
    [torch.ops.gptfast.linear_cross_entropy_fwd, torch.ops.gptfast.linear_cross_entropy_losses]
)
def _flops(
    x, weight, targets, weights, cap, ignore, chunks, x_grad=False, weight_grad=False, **_
) -> int:
    return 2 * x[0] * x[1] * weight[0] * (1 + x_grad + weight_grad)


def _check(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    reduction: str,
    chunks: int,
) -> None:
    op = "linear_cross_entropy"
    check_tensors(op, x=x, weight=weight)
    if x.dtype != weight.dtype or x.dtype == torch.float16:
        raise ValueError(
            f"{op}: x is {x.dtype}, weight {weight.dtype}; it takes both in bfloat16 or in float32"
        )
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{op}: x is {tuple(x.shape)}, weight {tuple(weight.shape)}; it takes (M, C) and (V, C)"
        )
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64 or targets.device != x.device:
        raise ValueError(
            f"{op}: targets are {tuple(targets.shape)} {targets.dtype} on {targets.device}; "
            f"for this x they must be ({len(x)},) torch.int64 on {x.device}"
        )
    if weights is not None and (
        weights.shape != targets.shape
        or weights.dtype != torch.float32
        or weights.device != x.device
        or weights.requires_grad
    ):
        raise ValueError(
            f"{op}: weights are {tuple(weights.shape)} {weights.dtype} on {weights.device}, with "
            f"requires_grad={weights.requires_grad}; for this x they must be ({len(x)},) "
            f"torch.float32 on {x.device} without a gradient"
        )
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap is {softcap}; it takes a number above 0, or None")
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"{op}: reduction is {reduction!r}; it takes 'sum', 'mean' or 'none'")
    if chunks < 1:
        raise ValueError(f"{op}: chunks is {chunks}; it takes 1 or more")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    softcap: float | None = 15.0,
    ignore_index: int = -1,
    reduction: str = "sum",
    chunks: int = CHUNKS,
) -> Tensor:
    """Cross-entropy of softcap tanh(x weight^T / softcap) against targets, in fp32.

    x (M, C) and weight (V, C), both bf16 or fp32; targets (M,) int64. Rows whose target is
    ignore_index count nothing and have no gradient; any other target outside [0, V) makes the loss
    NaN, or on a CPU is an IndexError. softcap None leaves the logits as they are. weights (M,)
    fp32, without a gradient, multiply each row's loss: advantages, for a policy gradient.

    reduction "sum", "mean" over the rows that count (0 if none does), or "none": (M,) losses for
    evaluation, through which no gradient flows. The largest tensor of its own has M / chunks rows
    of V logits. Never waits for the device. Gradients are made in the forward pass, so there is no
    second derivative; however many chunks, weight gets one, so FSDP2 reduces it once. ValueError
    for what it does not take.
    """
    _check(x, weight, targets, weights, softcap, reduction, chunks)
    if reduction == "none":
        return _linear_cross_entropy_losses(
            x.detach(), weight.detach(), targets, weights, softcap, ignore_index, chunks
        )
    recording = torch.is_grad_enabled()
    x_grad, weight_grad = recording and x.requires_grad, recording and weight.requires_grad
    total, _, _ = _linear_cross_entropy_fwd(
        x, weight, targets, weights, softcap, ignore_index, chunks, x_grad, weight_grad
    )
    return total if reduction == "sum" else _mean(total, targets, ignore_index)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """d20's gradient of the head's weight."""
    arguments = (torch.float32, torch.float32, torch.bfloat16, 65536 * 1280)
    label = "cross_entropy scaled gradient"
    return [AotCase.of_launch(label, _scale_kernel, *arguments, BLOCK=_BLOCK, num_warps=8)]
