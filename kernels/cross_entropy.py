"""Linear, soft cap and cross-entropy in one operator; the logits are never whole.

    u = x W^T        z = cap tanh(u / cap), or z = u        loss_i = logsumexp(z_i) - z_i[target_i]
    du = (softmax(z) - onehot(target)) (1 - (z / cap)^2)    dx = du W        dW = du^T x

x (M, C) and weight (V, C) in bf16 or fp32, targets (M,) int64, the loss fp32. The cap is Gemma 2's
(arXiv:2408.00118); taking gradients chunk by chunk in the forward pass is Liger-Kernel's idea
(arXiv:2410.10989). Rows are taken in `chunks` parts that share one buffer: a product writes their
logits, one kernel replaces these by their gradient, two products use it. Backward only multiplies
the saved dx and dW by the loss's gradient.

Numerics: logits and du are rounded once each to x's dtype, dx once and once more when scaled; all
between is fp32, the target's column as well. The products of all chunks add up in one fp32 dW, each
inside its own epilogue, and that is rounded once, to the weight's dtype, when scaled. No atomics:
the same bits every time. For an fp16 du small probabilities would vanish, as no loss scale reaches
them here: fp16 is refused.

FLOPs: 2 M V C a product; three with both gradients, one without. What the kernel has to do:

    bytes              2 s M V: one read, one write of each logit (s bytes each); the second look
                       at a row finds it in L1 and L2. d20 (M = V = 65,536, bf16): 17.2 GB, 4.0 ms
                       at an H200's 4.28 TB/s
    special functions  4.5 a logit (derived below), 16 a clock and SM: 4.6 ms at 1.98 GHz

so with a cap special functions bound it; without one there are 3 a logit, 3.1 ms, and bytes do.
Memory: a chunk of logits, dx, fp32 dW; for d20 with 8 chunks 1 GiB + 160 MiB + 320 MiB.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, check_tensors, runs_kernel, upcast

# Fewer chunks make longer products, and fewer passes over dW, for a larger buffer.
CHUNKS = 8

# Of the logits pass with a cap: two looks, each with two powers of two and, as four logits share
# one, a quarter of a reciprocal.
SPECIAL_FUNCTIONS_A_LOGIT = 2 * (2 + 1 / 4)

# Up to this cap the sum of exp(z) over a row stays in fp32's range: no running maximum.
MAX_BOUNDED_CAP = 64.0


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
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else _mean(losses.sum(), targets, ignore_index)


@triton.jit
def _shared_reciprocal(x, N: tl.constexpr):
    """1 / x (N,) with one special function for every four neighbours; x in [1, 2^30].

    1/a = b / (ab) and 1/b = a / (ab), applied twice. A thread holds at least four neighbours, so
    that nothing moves between threads. rsqrt is one instruction, where a division checks for
    denormals before and after.
    """
    a, b = tl.split(tl.reshape(x, [N // 2, 2]))
    c, d = tl.split(tl.reshape(a * b, [N // 4, 2]))
    root = tl.rsqrt(c * d)
    r = root * root
    ab = tl.reshape(tl.join(r * d, r * c), [N // 2])
    return tl.reshape(tl.join(ab * b, ab * a), [N])


@triton.jit
def _capped(u, softcap, N: tl.constexpr):
    """(z in units of ln 2, dz/du) of u (N,), or of a scalar for N = 1.

    tanh(v) = 1 - 2 gap with gap = 1 / (1 + exp(2 v)).
    """
    log2_e = 1.4426950408889634
    if softcap is None:
        return u * log2_e, 1.0
    else:
        cap = tl.cast(softcap, tl.float32)
        cap2 = cap * log2_e
        # Past 2^30 tanh is 1 in fp32, and a product of four stays finite. NaN must stay NaN.
        doubled = tl.minimum(u * (2.0 * log2_e / cap), 30.0, propagate_nan=tl.PropagateNan.ALL)
        x = 1.0 + tl.exp2(doubled)
        gap = _shared_reciprocal(x, N) if N > 1 else 1.0 / x
        tanh = 1.0 - 2.0 * gap
        return cap2 - 2.0 * cap2 * gap, 1.0 - tanh * tanh


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (M, V): u in; with GRAD its gradient out
    targets_ptr,  # (M,) int64
    losses_ptr,  # (M,) fp32 out
    V,
    logits_m,
    softcap,  # or None
    ignore_index,
    BOUNDED: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_m
    target = tl.load(targets_ptr + row)
    lanes = tl.arange(0, BLOCK)

    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRAD:
            for start in range(0, V, BLOCK):
                zero = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + lanes, zero, mask=start + lanes < V)
    else:
        known = (target >= 0) & (target < V)
        u_target = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        z2_target = _capped(u_target, softcap, 1)[0]

        # First look: the sum of exp(z), as powers of two.
        top2 = tl.full([BLOCK], 0.0 if BOUNDED else -3e38, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            valid = start + lanes < V
            u = tl.load(
                logits_ptr + start + lanes, mask=valid, other=0.0, eviction_policy="evict_last"
            ).to(tl.float32)
            z2 = tl.where(valid, _capped(u, softcap, BLOCK)[0], float("-inf"))
            if BOUNDED:
                total += tl.exp2(z2)
            else:
                # A lane's own maximum: nothing crosses lanes before the end of the row.
                higher2 = tl.maximum(top2, z2, propagate_nan=tl.PropagateNan.ALL)
                total = total * tl.exp2(top2 - higher2) + tl.exp2(z2 - higher2)
                top2 = higher2
        row_top2 = 0.0 if BOUNDED else tl.max(top2)
        lse2 = row_top2 + tl.log2(tl.sum(total if BOUNDED else total * tl.exp2(top2 - row_top2)))
        tl.store(losses_ptr + row, (lse2 - z2_target) * 0.6931471805599453)

        # Second look, backwards: what was read last is nearest.
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
                tl.store(logits_ptr + start + lanes, grad * slope, mask=valid)


def _config(v: int, itemsize: int) -> dict[str, int]:
    """Launch rule for rows of v logits: a program a row, sixteen logits a lane at a time.

    What keeps the second look in L2 is the number of rows under way: with 16 warps and up to 64
    registers two to an SM, 2 x 132 rows of 128 KiB of an H200's 50 MB. Longer rows: one to an SM.
    """
    block = 16384 if v * itemsize > 160 * 1024 else 8192
    block = min(block, max(128, triton.next_power_of_2(v)))
    return {"BLOCK": block, "num_warps": max(1, block // 512), "maxnreg": 64}


def logits_pass(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    softcap: float | None,
    ignore_index: int,
    grad: bool,
) -> None:
    """Writes each row's loss; with `grad` replaces the logits by the gradient of their sum.

    What comes between a chunk's products. logits (M, V) bf16 or fp32, not capped yet, rows of
    adjacent elements; targets (M,) int64; losses (M,) fp32. Checks nothing.
    """
    m, v = logits.shape
    if m == 0:
        return
    if runs_kernel(logits):
        with torch.cuda.device_of(logits):
            _cross_entropy_kernel[(m,)](
                *(logits, targets, losses, v, logits.stride(0), softcap, ignore_index),
                BOUNDED=softcap is not None and softcap <= MAX_BOUNDED_CAP,
                GRAD=grad,
                **_config(v, logits.itemsize),
                **FUSED_MULTIPLY_ADD,
            )
        return
    t = logits.float() if softcap is None else torch.tanh(logits.float() / softcap)
    log_p = torch.log_softmax(t if softcap is None else t * softcap, dim=-1)
    losses.copy_(F.nll_loss(log_p, targets, ignore_index=ignore_index, reduction="none"))
    if grad:
        keep = (targets != ignore_index)[:, None]
        du = log_p.exp().scatter_add_(1, targets[:, None] * keep, -keep.float())
        logits.copy_(du * keep if softcap is None else du * keep * (1 - t * t))


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
    buffer = x.new_empty(rows, triton.cdiv(v, 64) * 64)
    targets = targets.contiguous()
    # An empty batch is one empty chunk: its products write the zeros.
    for start in range(0, max(m, 1), rows):
        part = slice(start, start + rows)
        logits = buffer[: len(x[part]), :v]
        torch.mm(x[part], weight.t(), out=logits)
        logits_pass(
            logits, targets[part], losses[part], softcap, ignore_index, x_grad or weight_grad
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
    softcap: float | None,
    ignore_index: int,
    chunks: int,
    x_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses, dx, dw = _chunked(
        x, weight, targets, softcap, ignore_index, chunks, x_grad, weight_grad
    )
    return losses.sum(), dx, dw


@_linear_cross_entropy_fwd.register_fake
def _(x, weight, targets, softcap, ignore_index, chunks, x_grad, weight_grad):
    dx = x.new_empty(x.shape if x_grad else 0)
    dw = weight.new_empty(weight.shape if weight_grad else 0, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dw


@torch.library.custom_op("gptfast::linear_cross_entropy_bwd", mutates_args=())
def _linear_cross_entropy_bwd(
    dloss: Tensor, dx: Tensor, dw: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # Of one dimension, so that promotion makes the product fp32; `out` rounds it in the same pass.
    scale = dloss.reshape(1)
    scaled_dw = torch.empty_like(dw, dtype=weight_dtype)
    return (
        torch.mul(dx, scale, out=torch.empty_like(dx)),
        torch.mul(dw, scale, out=scaled_dw),
    )


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
    no_more = (None,) * 6
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
    softcap: float | None,
    ignore_index: int,
    chunks: int,
) -> Tensor:
    return _chunked(x, weight, targets, softcap, ignore_index, chunks)[0]


@_linear_cross_entropy_losses.register_fake
def _(x, weight, targets, softcap, ignore_index, chunks):
    return x.new_empty(x.shape[0], dtype=torch.float32)


@register_flop_formula(
    [torch.ops.gptfast.linear_cross_entropy_fwd, torch.ops.gptfast.linear_cross_entropy_losses]
)
def _flops(x, weight, targets, cap, ignore, chunks, x_grad=False, weight_grad=False, **_) -> int:
    return 2 * x[0] * x[1] * weight[0] * (1 + x_grad + weight_grad)


def _check(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
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
    softcap: float | None = 15.0,
    ignore_index: int = -1,
    reduction: str = "sum",
    chunks: int = CHUNKS,
) -> Tensor:
    """Cross-entropy of softcap tanh(x weight^T / softcap) against targets, in fp32.

    x (M, C) and weight (V, C), both bf16 or fp32; targets (M,) int64. Rows whose target is
    ignore_index count nothing and have no gradient; any other target outside [0, V) makes the loss
    NaN. softcap None leaves the logits as they are.

    reduction "sum", "mean" over the rows that count (0 if none does), or "none": (M,) losses for
    evaluation, through which no gradient flows. The largest tensor of its own has M / chunks rows
    of V logits. Never waits for the device. Gradients are made in the forward pass, so there is no
    second derivative; however many chunks, weight gets one, so FSDP2 reduces it once. ValueError
    for what it does not take.
    """
    _check(x, weight, targets, softcap, reduction, chunks)
    if reduction == "none":
        return _linear_cross_entropy_losses(
            x.detach(), weight.detach(), targets, softcap, ignore_index, chunks
        )
    recording = torch.is_grad_enabled()
    x_grad, weight_grad = recording and x.requires_grad, recording and weight.requires_grad
    total, _, _ = _linear_cross_entropy_fwd(
        x, weight, targets, softcap, ignore_index, chunks, x_grad, weight_grad
    )
    return total if reduction == "sum" else _mean(total, targets, ignore_index)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """d20's logits with their gradient, and for evaluation; no cap; rows too long for two an SM."""
    tensors = (torch.bfloat16, torch.int64, torch.float32)
    cases = []
    for label, v, softcap, grad in (
        ("cross_entropy 65536 cap grad", 65536, 15.0, True),
        ("cross_entropy 65536 cap", 65536, 15.0, False),
        ("cross_entropy 65536 grad", 65536, None, True),
        ("cross_entropy 131072 cap grad", 131072, 15.0, True),
    ):
        launch = (_cross_entropy_kernel, *tensors, v, v, softcap, -1)
        constants = {"BOUNDED": softcap is not None, "GRAD": grad, **_config(v, 2)}
        cases.append(AotCase.of_launch(label, *launch, **constants))
    return cases
