"""Muon's two passes over memory: momentum before the orthogonalisation, the update after it.

    nesterov     g = scale grad    average += (1 - momentum) (g - average)
                 out = g + momentum (average - g)
    add_update   weight += alpha update

Both take a group of n equal matrices. Gradients and weights are read where they lie, through a
table of their addresses, so nothing is stacked before. The bf16 on the other side, `out` and
`update`, is (n, r, C) of which only the matrices need be contiguous: they may lie among the padding
that processes exchange, so nothing is packed or unpacked either.

Numerics: fp32 throughout, `out` rounded once to bf16; on a GPU weight + alpha update is one fused
multiply-add, in PyTorch's own kernel, too. Bytes an element: 14 (two reads and a write of fp32, a
write of bf16) and 10 (a read and a write of fp32, a read of bf16); d20's 393 million are 5.5 and
3.9 GB. In PyTorch's own operators momentum is seven passes, which took 12 ms of a step on one H200,
and `_foreach_add_` of bf16 to fp32 is one kernel a matrix, at 40 % of a copy's bandwidth there
(2026-11-22).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, runs_kernel

# As many elements of one matrix a program.
_BLOCK = 2048
_WARPS = 4


def nesterov_ref(
    average: Tensor,
    grads: Sequence[Tensor],
    scale: Tensor,
    momentum: float,
    finite: Tensor,
    *,
    out: Tensor,
) -> None:
    """`nesterov` in plain PyTorch."""
    scaled = torch.stack(tuple(grads)) * scale
    moved = average.lerp(scaled, 1.0 - momentum)
    torch.where(finite, moved, average, out=average)
    out.copy_(scaled.lerp(average, momentum).masked_fill_(~finite, 0))


def add_update_ref(weights: Sequence[Tensor], update: Tensor, alpha: float) -> None:
    """`add_update` in plain PyTorch."""
    torch._foreach_add_(tuple(weights), update.unbind(), alpha=alpha)


@triton.jit
def _matrix(table_ptr, number, ALIGNED: tl.constexpr):
    """Pointer to the fp32 matrix of this number."""
    matrix_ptr = tl.load(table_ptr + number).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        matrix_ptr = tl.multiple_of(matrix_ptr, 16)
    return matrix_ptr


@triton.jit
def _nesterov_kernel(
    average_ptr,  # (n, N) fp32, in and out
    grads_ptr,  # (n,) int64, addresses of (N,) fp32
    out_ptr,  # (n, N) bf16 out, matrices out_n apart
    scale_ptr,  # () fp32
    finite_ptr,  # () uint8
    momentum,
    N,
    out_n,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits to the matrix, 32 within it.
    n = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    finite = tl.load(finite_ptr) != 0
    average_ptr += n * N
    average = tl.load(average_ptr + at, mask=inside, other=0.0)
    grad = tl.load(_matrix(grads_ptr, n, ALIGNED) + at, mask=inside, other=0.0)
    g = grad * tl.load(scale_ptr)
    moved = average + (1.0 - momentum) * (g - average)
    # As torch.lerp does it for a weight of half and more.
    ahead = moved - (1.0 - momentum) * (moved - g)
    tl.store(average_ptr + at, tl.where(finite, moved, average), mask=inside)
    tl.store(out_ptr + n * out_n + at, tl.where(finite, ahead, 0.0), mask=inside)


@triton.jit
def _add_update_kernel(
    weights_ptr,  # (n,) int64, addresses of (N,) fp32, in and out
    update_ptr,  # (n, N) bf16, matrices update_n apart
    alpha,
    N,
    update_n,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    weight_ptr = _matrix(weights_ptr, n, ALIGNED)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    update = tl.load(update_ptr + n * update_n + at, mask=inside, other=0.0)
    tl.store(weight_ptr + at, weight + alpha * update.to(tl.float32), mask=inside)


@lru_cache(maxsize=64)
def _table(
    addresses: tuple[int, ...], device: torch.device, stream: torch.cuda.Stream | None
) -> Tensor:
    """Addresses as int64 on the device, where kernels of this stream may read them.

    Tensors mostly lie where they lay a step ago, and then nothing is copied. Where they do not, the
    host does not wait: the copy is from pinned memory of its own, which PyTorch's allocator gives
    to nobody before the copy is done.
    """
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=stream is not None)
    return table.to(device, non_blocking=True)


def _locate(matrices: Sequence[Tensor], device: torch.device) -> tuple[Tensor, bool]:
    """Table of the addresses, and whether 128 bits may be read at once from each of them.

    FSDP2's gradients are views into one buffer, and may begin at any multiple of 4 bytes.
    """
    addresses = tuple(matrix.data_ptr() for matrix in matrices)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return _table(addresses, device, stream), all(address % 16 == 0 for address in addresses)


def _check(op: str, half: Tensor, matrices: Sequence[Tensor]) -> None:
    """ValueError unless `half` is (n, r, C) bf16 and `matrices` are n of (r, C) fp32, one like the
    other contiguous, on one device."""
    if half.dtype != torch.bfloat16 or half.ndim != 3 or len(matrices) != len(half):
        raise ValueError(
            f"{op}: {len(matrices)} matrices and {half.dtype} {tuple(half.shape)}; it takes "
            "bfloat16 (n, r, C) for n matrices"
        )
    if len(half) >= 2**16 or half[:1].numel() >= 2**31:
        raise ValueError(f"{op}: {tuple(half.shape)}; fewer than 2^16 matrices of 2^31 elements")
    for i, (matrix, like) in enumerate(zip(matrices, half)):
        if (matrix.dtype, matrix.shape, matrix.device) != (torch.float32, like.shape, like.device):
            raise ValueError(
                f"{op}: matrix {i} is {matrix.dtype} {tuple(matrix.shape)} on {matrix.device}; it "
                f"takes float32 {tuple(like.shape)} on {like.device}"
            )
        if not (matrix.is_contiguous() and like.is_contiguous()):
            raise ValueError(
                f"{op}: matrix {i} of shape {tuple(like.shape)} has strides {matrix.stride()}, in "
                f"bfloat16 {like.stride()}; it must be contiguous"
            )


def _grid(half: Tensor) -> tuple[int, int]:
    return triton.cdiv(half[0].numel(), _BLOCK), len(half)


def nesterov(
    average: Tensor,
    grads: Sequence[Tensor],
    scale: Tensor,
    momentum: float,
    finite: Tensor,
    *,
    out: Tensor,
) -> None:
    """Move `average`, in place, towards `grads` * `scale`; write the point ahead of it to `out`.

    average (n, r, C) fp32, contiguous; grads: n of (r, C) fp32, contiguous; out (n, r, C) bf16, its
    matrices contiguous; scale fp32 and finite bool, 0-dim; all on one device. Unless finite,
    average keeps its bits and out is zeros, so that nothing is updated. Not differentiable.
    ValueError for what it does not take.
    """
    if not runs_kernel(average):
        return nesterov_ref(average, grads, scale, momentum, finite, out=out)
    _check("nesterov", out, grads)
    if (average.dtype, average.shape) != (torch.float32, out.shape) or not average.is_contiguous():
        raise ValueError(
            f"nesterov: average is {average.dtype} {tuple(average.shape)}, strides "
            f"{average.stride()}; it takes float32 {tuple(out.shape)}, contiguous"
        )
    if average.numel() == 0:
        return
    table, aligned = _locate(grads, average.device)
    with torch.cuda.device_of(average):
        _nesterov_kernel[_grid(out)](
            *(average, table, out, scale, finite.view(torch.uint8)),
            *(momentum, out[0].numel(), out.stride(0)),
            ALIGNED=aligned,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            **FUSED_MULTIPLY_ADD,
        )


def add_update(weights: Sequence[Tensor], update: Tensor, alpha: float) -> None:
    """Add alpha * `update` to `weights`, in place.

    weights: n of (r, C) fp32, contiguous; update (n, r, C) bf16, its matrices contiguous, on the
    same device. Not differentiable. ValueError for what it does not take.
    """
    if not runs_kernel(update):
        return add_update_ref(weights, update, alpha)
    _check("add_update", update, weights)
    if update.numel() == 0:
        return
    table, aligned = _locate(weights, update.device)
    with torch.cuda.device_of(update):
        _add_update_kernel[_grid(update)](
            *(table, update, alpha, update[0].numel(), update.stride(0)),
            ALIGNED=aligned,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            **FUSED_MULTIPLY_ADD,
        )
    # Autograd would not notice what is written through an address.
    torch.autograd.graph.increment_version(weights)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """One group of d20's matrices, at addresses that allow loads of 128 bits and at others."""
    fp32, bf16, table, elements = torch.float32, torch.bfloat16, torch.int64, 1280 * 1280
    launches = {
        "nesterov": (
            *(_nesterov_kernel, fp32, table, bf16, fp32, torch.uint8, 0.95),
            *(elements, elements),
        ),
        "add_update": (_add_update_kernel, table, bf16, -0.02, elements, elements),
    }
    return [
        AotCase.of_launch(
            f"{name} {how}", *launch, ALIGNED=how == "aligned", BLOCK=_BLOCK, num_warps=_WARPS
        )
        for name, launch in launches.items()
        for how in ("aligned", "unaligned")
    ]
