"""Embedding lookup whose gradient is summed in one order, near its bytes.

    y[i] = weight[ids[i]]        dweight[r] = sum over the i with ids[i] = r of dy[i]

The lookup is PyTorch's own. In backward a stable sort lays the tokens of each vocabulary row side
by side, in the order of their positions: row r's are order[starts[r]] to order[starts[r + 1] - 1].
One pass over the vocabulary sums the rows of fewer than SPLIT tokens and writes zeros where there
are none, so that nothing has to be cleared before.

Text is skewed: its commonest token is a few percent of all, too many for one program. So the sorted
tokens are also divided into parts of SPLIT. What a row of SPLIT tokens or more has in a part is a
piece, which is summed into a workspace; another kernel adds up the pieces of each such row. A part
holds two pieces at most: of the long row that goes on from the part before, and of the long row
that begins in it. All grids follow from shapes, so that the host waits for no count.

Sums are in fp32, in an order that the ids alone decide, and rounded once: the same bits every time.
PyTorch's CUDA backward sums large inputs in fp32 too, in parts of 10 tokens; its CPU backward
rounds to the gradient's dtype at every addition.

Bytes moved, M ids, weight (V, C) in elements of s bytes:

    forward     2 s M C          (a row in and out for each token; common rows come from L2)
    backward    s (M + V) C      (pieces, not counted, are 1 / SPLIT of the tokens)
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, check_tensors, runs_kernel, upcast

# A row of fewer tokens is one warp's, token by token: the longest of those may be what the end of
# the pass waits for. Smaller parts are a larger workspace and more programs without work. Of d20's
# 65,536 tokens distributed as words are, the whole backward pass on an H200: 16 0.289 ms, 32 0.217,
# 64 0.189, 128 0.214; PyTorch's 0.802 (2026-11-22).
SPLIT = 64
# Pieces of a long row in one tile.
_PIECES = 16
# Ids, starts and their number are int32.
_INT32_MAX = 2**31 - 1


def embedding_ref(ids: Tensor, weight: Tensor) -> Tensor:
    """`embedding` in plain PyTorch."""
    return F.embedding(ids, weight)


@triton.jit
def _embedding_bwd_rows_kernel(
    dy_ptr,  # (M, N)
    order_ptr,  # (M,) int64
    starts_ptr,  # (V + 1,) int32
    dweight_ptr,  # (V, N) out; long rows are left alone
    V,
    dy_m,
    dy_n,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # 64 bits: a transposed gradient has far apart columns.
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    start = tl.load(starts_ptr + rows, mask=rows < V, other=0)
    stop = tl.load(starts_ptr + rows + 1, mask=rows < V, other=0)
    short = (rows < V) & (stop - start < SPLIT)
    stop = tl.where(short, stop, start)
    inside = start < stop
    token = tl.load(order_ptr + start, mask=inside, other=0)
    dy_ptr += cols * dy_n
    dy = tl.load(dy_ptr + token * dy_m, mask=inside & (cols < N), other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # No range: Triton 3.6's interpreter, with NumPy of today, takes no bound that is data.
    longest, i = tl.max(stop - start), 1
    while i < longest:
        inside = start + i < stop
        token = tl.load(order_ptr + start + i, mask=inside, other=0)
        # Under way while the one before is added. Added in its own turn it would pass through one
        # vector's registers, each load waiting for the one before (ptxas 12.9 for sm_90).
        following = tl.load(dy_ptr + token * dy_m, mask=inside & (cols < N), other=0.0)
        total += dy.to(tl.float32)
        dy = following
        i += 1
    total += dy.to(tl.float32)
    tl.store(dweight_ptr + rows * N + cols, total, mask=short & (cols < N))


@triton.jit
def _embedding_bwd_pieces_kernel(
    dy_ptr,  # (M, N)
    keys_ptr,  # (M,) int32, sorted ids
    order_ptr,  # (M,) int64
    starts_ptr,  # (V + 1,) int32
    pieces_ptr,  # (parts, 2, N) out, fp32: of the row that goes on, of the row that begins
    M,
    dy_m,
    dy_n,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    begins = slot % 2 == 1
    first = slot // 2 * SPLIT
    end = tl.minimum(first + SPLIT, M)
    # A long row that goes on holds the part's first token, one that begins the last.
    row = tl.load(keys_ptr + tl.where(begins, end - 1, first))
    start = tl.load(starts_ptr + row)
    stop = tl.load(starts_ptr + row + 1)
    if (stop - start >= SPLIT) & ((start >= first) == begins):
        at = tl.maximum(start, first) + tl.arange(0, SPLIT)[:, None]
        inside = at < tl.minimum(stop, end)
        token = tl.load(order_ptr + at, mask=inside, other=0)
        cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mask = inside & (cols < N)
        dy = tl.load(dy_ptr + token * dy_m + cols * dy_n, mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(dy, axis=0, keep_dims=True)
        tl.store(pieces_ptr + slot * N + cols, total, mask=cols < N)


@triton.jit
def _embedding_bwd_long_rows_kernel(
    pieces_ptr,  # (parts, 2, N) fp32
    keys_ptr,  # (M,) int32, sorted ids
    starts_ptr,  # (V + 1,) int32
    dweight_ptr,  # (V, N) out; short rows are left alone
    M,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Of the part in which the row begins.
    part = tl.program_id(0).to(tl.int64)
    row = tl.load(keys_ptr + tl.minimum((part + 1) * SPLIT, M) - 1).to(tl.int64)
    start = tl.load(starts_ptr + row)
    stop = tl.load(starts_ptr + row + 1)
    if (stop - start >= SPLIT) & (start >= part * SPLIT):
        cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        count = tl.cdiv(stop, SPLIT) - part
        total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        i = 0
        while i < count:
            piece = i + tl.arange(0, BLOCK_P)[:, None]
            # It begins with the first and goes on in all others.
            slot = 2 * (part + piece) + (piece == 0)
            mask = (piece < count) & (cols < N)
            total += tl.load(pieces_ptr + slot * N + cols, mask=mask, other=0.0)
            i += BLOCK_P
        total = tl.sum(total, axis=0, keep_dims=True)
        tl.store(dweight_ptr + row * N + cols, total, mask=cols < N)


def _rows_config(n: int) -> dict[str, int]:
    """Launch rule for short rows: a warp takes up to 2,048 columns, shorter rows share one."""
    block_n = min(2048, triton.next_power_of_2(n))
    return {
        "N": n,
        "SPLIT": SPLIT,
        "BLOCK_M": 2048 // block_n,
        "BLOCK_N": block_n,
        "num_warps": 1,
    }


def _long_config(n: int) -> dict[str, int]:
    """Launch rule for long rows, whose columns are many programs'."""
    return {
        "N": n,
        "SPLIT": SPLIT,
        "BLOCK_N": min(256, triton.next_power_of_2(n)),
        "num_warps": 4,
    }


@torch.library.custom_op("gptfast::embedding", mutates_args=())
def _embedding(ids: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(ids, weight)


@_embedding.register_fake
def _(ids, weight):
    return weight.new_empty(*ids.shape, weight.shape[1])


@torch.library.custom_op("gptfast::embedding_bwd", mutates_args=())
def _embedding_bwd(dy: Tensor, ids: Tensor, rows: int) -> Tensor:
    m, n = ids.numel(), dy.shape[-1]
    # The caller does not choose a gradient's strides: where they do not flatten, it is copied.
    dy, ids = dy.reshape(m, n), ids.flatten()
    if not runs_kernel(dy):
        dweight = upcast(dy).new_zeros(rows, n)
        return dweight.index_add_(0, ids, upcast(dy)).to(dy.dtype)
    dweight = dy.new_empty(rows, n)
    if dweight.numel() == 0:
        return dweight
    keys, order = ids.int().sort(stable=True)
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=ids.device)
    starts = torch.searchsorted(keys, numbers, out_int32=True)
    with torch.cuda.device_of(dy):
        if m > 0:
            _sum_long_rows(dy, keys, order, starts, dweight)
        config = _rows_config(n)
        grid = (triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"]))
        _embedding_bwd_rows_kernel[grid](
            *(dy, order, starts, dweight, rows, *dy.stride()), **config, **FUSED_MULTIPLY_ADD
        )
    return dweight


def _sum_long_rows(
    dy: Tensor, keys: Tensor, order: Tensor, starts: Tensor, dweight: Tensor
) -> None:
    """Write the rows of dweight that have SPLIT tokens or more."""
    m, n = dy.shape
    config = _long_config(n)
    parts, columns = triton.cdiv(m, SPLIT), triton.cdiv(n, config["BLOCK_N"])
    pieces = dy.new_empty(parts, 2, n, dtype=torch.float32)
    _embedding_bwd_pieces_kernel[(2 * parts, columns)](
        *(dy, keys, order, starts, pieces, m, *dy.stride()), **config, **FUSED_MULTIPLY_ADD
    )
    _embedding_bwd_long_rows_kernel[(parts, columns)](
        *(pieces, keys, starts, dweight, m), BLOCK_P=_PIECES, **config, **FUSED_MULTIPLY_ADD
    )


@_embedding_bwd.register_fake
def _(dy, ids, rows):
    return dy.new_empty(rows, dy.shape[-1])


def _setup_context(ctx, inputs, output):
    ids, weight = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx, dy):
    (ids,) = ctx.saved_tensors
    return None, _embedding_bwd(dy, ids, ctx.rows)


_embedding.register_autograd(_backward, setup_context=_setup_context)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids].

    ids int32 or int64 of any shape, weight (V, C) bf16, fp16 or fp32 -> (*ids.shape, C) of weight's
    dtype; both on one device. An id outside [0, V) is what it is to F.embedding: an IndexError on a
    CPU, a device-side assertion on a GPU. ValueError for what it does not take.
    """
    op = "embedding"
    check_tensors(op, weight=weight)
    if ids.dtype not in (torch.int32, torch.int64) or ids.device != weight.device:
        raise ValueError(
            f"{op}: ids are {ids.dtype} on {ids.device}; they must be int32 or int64 "
            f"on {weight.device}"
        )
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; it must be (V, C)")
    if max(ids.numel(), weight.shape[0]) >= _INT32_MAX:
        raise ValueError(
            f"{op}: {ids.numel()} ids and {weight.shape[0]} rows; "
            f"it takes fewer than {_INT32_MAX} of each"
        )
    return _embedding(ids, weight)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """The model's launches at d20, and those of d32 in fp32."""

    def launches(n, dtype):
        ids, order, starts, pieces = torch.int32, torch.int64, torch.int32, torch.float32
        sizes = (65536, n, 1)
        rows = (_embedding_bwd_rows_kernel, dtype, order, starts, dtype, *sizes)
        split = (_embedding_bwd_pieces_kernel, dtype, ids, order, starts, pieces, *sizes)
        join = (_embedding_bwd_long_rows_kernel, pieces, ids, starts, dtype, 65536)
        yield "rows", rows, _rows_config(n)
        yield "pieces", split, _long_config(n)
        yield "long rows", join, {"BLOCK_P": _PIECES, **_long_config(n)}

    return [
        AotCase.of_launch(f"embedding_bwd {part} {name}", *launch, **config)
        for name, n, dtype in (
            ("1280 bf16", 1280, torch.bfloat16),
            ("2048 fp32", 2048, torch.float32),
        )
        for part, launch, config in launches(n, dtype)
    ]
