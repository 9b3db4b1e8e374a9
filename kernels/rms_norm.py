"""RMSNorm, and residual add + RMSNorm in one pass.

    rstd = 1 / sqrt(mean(x^2) + eps)        y = x rstd [weight]        (Zhang and Sennrich, 2019)

over the last dimension of x (..., N), N <= 8,192, in bf16, fp16 or fp32; `add_rms_norm` takes
x = residual + branch and returns that sum too. With g = dy [weight] and n = x rstd,

    dx = rstd (g - n mean(g n)) [+ dsum]        dweight = sum over rows of dy n

Everything is computed in fp32 and each result rounded once, when it is stored. The norm reads the
sum before that rounding. rstd (M,) fp32 is kept for backward, and beside it what exists anyhow:
without a weight y, which is n itself and which the next product keeps for its own backward; with a
weight x (or the sum). dweight is summed in two stages, one fp32 row a program and then a sum over
those rows: no atomics, the same bits every time.

Bytes moved, E = M N elements of s bytes; all are limited by memory (about 5 FLOPs an element):

    rms_norm       forward 2 s E    backward 3 s E (reads y or x, dy; writes dx)
    add_rms_norm   forward 4 s E    backward 4 s E (dsum too; 3 s E where the sum is not used again)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import (
    FUSED_MULTIPLY_ADD,
    AotCase,
    as_rows,
    check_tensors,
    runs_kernel,
    upcast,
)

EPS = 1e-6
# Longer rows do not fit the registers of one program.
MAX_COLUMNS = 8192


def rms_norm_ref(x: Tensor, weight: Tensor | None = None, *, eps: float = EPS) -> Tensor:
    """`rms_norm` in plain PyTorch."""
    z = upcast(x)
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * upcast(weight)).to(x.dtype)


def add_rms_norm_ref(
    residual: Tensor, branch: Tensor, weight: Tensor | None = None, *, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch."""
    total = residual + branch
    return total, rms_norm_ref(total, weight, eps=eps)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,  # (M, N)
    branch_ptr,  # (M, N), added to x, or None
    weight_ptr,  # (N,) or None
    sum_ptr,  # (M, N) out; None without a branch
    y_ptr,  # (M, N) out
    rstd_ptr,  # (M,) out
    M,
    x_m,
    branch_m,
    eps,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_N)[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK_M)
    for tile in range(TILES):
        rows = first + tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & (cols < N)
        x = tl.load(x_ptr + rows * x_m + cols, mask=mask, other=0.0).to(tl.float32)
        if branch_ptr is not None:
            x += tl.load(branch_ptr + rows * branch_m + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(sum_ptr + rows * N + cols, x, mask=mask)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / N + tl.cast(eps, tl.float32))
        y = x * rstd
        if weight_ptr is not None:
            y *= weight
        tl.store(y_ptr + rows * N + cols, y, mask=mask)
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,  # (M, N)
    dsum_ptr,  # (M, N), gradient of the sum, or None
    saved_ptr,  # (M, N): y without a weight, x with one
    rstd_ptr,  # (M,)
    weight_ptr,  # (N,) or None
    dx_ptr,  # (M, N) out
    dweight_ptr,  # (programs, N) out, fp32; None without a weight
    M,
    dy_m,
    dy_n,
    dsum_m,
    dsum_n,
    saved_m,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    # 64 bits: a transposed gradient has far apart columns.
    cols = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    pid = tl.program_id(0).to(tl.int64)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(TILES):
        rows = pid * (TILES * BLOCK_M) + tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & (cols < N)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        n = tl.load(saved_ptr + rows * saved_m + cols, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + rows * dy_m + cols * dy_n, mask=mask, other=0.0).to(tl.float32)
        if dsum_ptr is not None:
            # Before the reduction, so that all loads are under way together.
            dsum = tl.load(dsum_ptr + rows * dsum_m + cols * dsum_n, mask=mask, other=0.0)
        if weight_ptr is not None:
            n *= rstd
            dweight += g * n
            g *= weight
        # rstd first: loaded with the rest, not when the sum is known.
        g *= rstd
        dx = g - n * (tl.sum(g * n, axis=1, keep_dims=True) / N)
        if dsum_ptr is not None:
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + rows * N + cols, dx, mask=mask)
    if weight_ptr is not None:
        total = tl.sum(dweight, axis=0, keep_dims=True)
        tl.store(dweight_ptr + pid * N + cols, total, mask=cols < N)


def _config(n: int, has_weight: bool) -> dict[str, int]:
    """Launch rule for rows of n elements.

    A warp takes a whole row of up to 2,048 (64 elements a lane): its sum needs no other warp, and
    as the compiler knows N, what lies past the row's end costs nothing. Shorter rows share a warp.
    With a weight a lane also holds that and its gradient, so a row has twice the warps; a program
    then takes several tiles, as each writes a row of partial sums, but not so many that the last
    programs run alone.
    """
    block_n = triton.next_power_of_2(n)
    elements = 1024 if has_weight else 2048
    return {
        "N": n,
        "BLOCK_M": max(1, elements // block_n),
        "BLOCK_N": block_n,
        "TILES": 16 if has_weight else 1,
        "num_warps": max(1, block_n // elements),
    }


def _forward(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(sum, y, rstd) of x (..., N); the sum is None without a branch."""
    if not runs_kernel(x):
        total = None if branch is None else x + branch
        z = upcast(x if total is None else total)
        y = rms_norm_ref(z, weight, eps=eps).to(x.dtype)
        return total, y, torch.rsqrt(z.square().mean(-1) + eps)
    total = None if branch is None else x.new_empty(x.shape)
    y, rstd = _outputs(x)
    if rstd.numel() == 0:
        return total, y, rstd
    x = as_rows("rms_norm", "x", x)
    branch = None if branch is None else as_rows("add_rms_norm", "branch", branch)
    m, n = x.shape
    config = _config(n, weight is not None)
    grid = (triton.cdiv(m, config["BLOCK_M"] * config["TILES"]),)
    with torch.cuda.device_of(x):
        _rms_norm_fwd_kernel[grid](
            *(x, branch, weight, total, y, rstd),
            *(m, x.stride(0), 0 if branch is None else branch.stride(0), eps),
            **config,
            **FUSED_MULTIPLY_ADD,
        )
    return total, y, rstd


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten (y, rstd) for x (..., N)."""
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward(
    dy: Tensor, dsum: Tensor | None, saved: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) for gradients and saved tensors (..., N); dweight is None without a weight."""
    n = saved.shape[-1]
    if not runs_kernel(saved):
        z, g, r = upcast(saved), upcast(dy), rstd[..., None]
        normed = z if weight is None else z * r
        dweight = None if weight is None else (g * normed).reshape(-1, n).sum(0).to(weight.dtype)
        g = g if weight is None else g * upcast(weight)
        dx = r * (g - normed * (g * normed).mean(-1, keepdim=True))
        dx = dx if dsum is None else dx + dsum
        return dx.to(saved.dtype).contiguous(), dweight
    m, config = rstd.numel(), _config(n, weight is not None)
    programs = triton.cdiv(m, config["BLOCK_M"] * config["TILES"])
    dx = saved.new_empty(saved.shape)
    partial = None if weight is None else rstd.new_empty(programs, n)
    if m > 0:
        # The caller does not choose a gradient's strides: where they do not flatten, it is copied.
        dy = dy.reshape(m, n)
        dsum = None if dsum is None else dsum.reshape(m, n)
        saved = as_rows("rms_norm", "x", saved)
        with torch.cuda.device_of(saved):
            _rms_norm_bwd_kernel[(programs,)](
                *(dy, dsum, saved, rstd, weight, dx, partial),
                *(m, *dy.stride(), *((0, 0) if dsum is None else dsum.stride()), saved.stride(0)),
                **config,
                **FUSED_MULTIPLY_ADD,
            )
    return dx, None if weight is None or partial is None else partial.sum(0).to(weight.dtype)


@torch.library.custom_op("gptfast::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, None, weight, eps)[1:]


@_rms_norm.register_fake
def _(x, weight, eps):
    return _outputs(x)


@torch.library.custom_op("gptfast::add_rms_norm", mutates_args=())
def _add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # pyrefly: ignore[bad-return]  (with a branch there is a sum)
    return _forward(residual, branch, weight, eps)


@_add_rms_norm.register_fake
def _(residual, branch, weight, eps):
    return residual.new_empty(residual.shape), *_outputs(residual)


@torch.library.custom_op("gptfast::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(dy: Tensor, dsum: Tensor | None, y: Tensor, rstd: Tensor) -> Tensor:
    return _backward(dy, dsum, y, rstd, None)[0]


@_rms_norm_bwd.register_fake
def _(dy, dsum, y, rstd):
    return y.new_empty(y.shape)


@torch.library.custom_op("gptfast::rms_norm_weight_bwd", mutates_args=())
def _rms_norm_weight_bwd(
    dy: Tensor, dsum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    # pyrefly: ignore[bad-return]  (with a weight it has a gradient)
    return _backward(dy, dsum, x, rstd, weight)


@_rms_norm_weight_bwd.register_fake
def _(dy, dsum, x, rstd, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _gradients(ctx, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight); an output that nothing used has no gradient and costs nothing."""
    saved, rstd, weight = ctx.saved_tensors
    if dy is None:
        return dsum, None
    if weight is None:
        return _rms_norm_bwd(dy, dsum, saved, rstd), None
    return _rms_norm_weight_bwd(dy, dsum, saved, rstd, weight)


def _setup_context(ctx, inputs, output):
    *_, weight, _ = inputs
    *total, y, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    x = total[0] if total else inputs[0]
    ctx.save_for_backward(y if weight is None else x, rstd, weight)


def _backward_rms_norm(ctx, dy, _):
    return *_gradients(ctx, dy, None), None


def _backward_add_rms_norm(ctx, dsum, dy, _):
    dx, dweight = _gradients(ctx, dy, dsum)
    # One tensor is the gradient of both terms. Autograd copies it before it keeps or adds to one of
    # them, as it sees that both are the same tensor; two views of one memory it would not see, so
    # the operators take and return the shapes that they are called with.
    return dx, dx, dweight, None


_rms_norm.register_autograd(_backward_rms_norm, setup_context=_setup_context)
_add_rms_norm.register_autograd(_backward_add_rms_norm, setup_context=_setup_context)


def _check(op: str, x: Tensor, weight: Tensor | None) -> None:
    n = x.shape[-1]
    if n > MAX_COLUMNS:
        raise ValueError(f"{op}: rows of {n} elements; it takes at most {MAX_COLUMNS}")
    if weight is not None and (weight.shape != (n,) or not weight.is_contiguous()):
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)} and strides {weight.stride()}; "
            f"it must be ({n},) and contiguous"
        )


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = EPS) -> Tensor:
    """x / sqrt(mean(x^2) + eps) [* weight] over the last dimension.

    x (..., N) bf16, fp16 or fp32, rows contiguous and evenly spaced; weight (N,) of any of those
    dtypes. Returns x's shape and dtype, contiguous. ValueError for what it does not take.
    """
    check_tensors("rms_norm", x=x, weight=weight)
    _check("rms_norm", as_rows("rms_norm", "x", x), weight)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor | None = None, *, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """(residual + branch, rms_norm of that sum), in one pass.

    residual and branch (..., N) of one shape and dtype, otherwise as for `rms_norm`. Both returned
    tensors have their shape and dtype and are contiguous.
    """
    op = "add_rms_norm"
    check_tensors(op, residual=residual, branch=branch, weight=weight)
    if (residual.shape, residual.dtype) != (branch.shape, branch.dtype):
        raise ValueError(
            f"{op}: residual is {tuple(residual.shape)} {residual.dtype}, "
            f"branch {tuple(branch.shape)} {branch.dtype}; they must be alike"
        )
    as_rows(op, "branch", branch)
    _check(op, as_rows(op, "residual", residual), weight)
    return _add_rms_norm(residual, branch, weight, eps)[:2]


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """The model's launches at d20, those with a weight, and the heaviest of d32 in fp32."""

    def forward(n, dtype, branch, weight):
        outputs = (branch, dtype, torch.float32)
        strides = (65536, n, 0 if branch is None else n)
        return _rms_norm_fwd_kernel, dtype, branch, weight, *outputs, *strides, EPS

    def backward(n, dtype, dsum, weight):
        partial = None if weight is None else torch.float32
        tensors = (dtype, dsum, dtype, torch.float32, weight, dtype, partial)
        strides = (65536, n, 1, *((0, 0) if dsum is None else (n, 1)), n)
        return _rms_norm_bwd_kernel, *tensors, *strides

    half, full = torch.bfloat16, torch.float32
    return [
        AotCase.of_launch(label, *launch(n, dtype, term, weight), **_config(n, weight is not None))
        for label, launch, n, dtype, term, weight in (
            ("rms_norm_fwd 1280 bf16", forward, 1280, half, None, None),
            ("add_rms_norm_fwd 1280 bf16", forward, 1280, half, half, None),
            ("add_rms_norm_fwd 1280 bf16 weight", forward, 1280, half, half, half),
            ("rms_norm_bwd 1280 bf16", backward, 1280, half, None, None),
            ("add_rms_norm_bwd 1280 bf16", backward, 1280, half, half, None),
            ("add_rms_norm_bwd 1280 bf16 weight", backward, 1280, half, half, half),
            ("add_rms_norm_bwd 2048 fp32", backward, 2048, full, full, None),
            ("add_rms_norm_bwd 2048 fp32 weight", backward, 2048, full, full, full),
        )
    ]
