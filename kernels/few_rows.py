"""Products of a few rows with a matrix, with what stands before and behind them in a decoding step.

    t = x [+ branch]        u = t W^T [/ sqrt(mean(t^2) + eps)]        out = act(u)

act is nothing, the squared ReLU max(u, 0)^2, or the logits' softcap c tanh(u / c). x and branch
(R, K), W (N, K), contiguous, of one dtype: bf16, fp16 or fp32. out (R, N) is of that dtype, logits
are fp32. t, rounded, is the new residual; sums are fp32; u is rounded to the dtype, as a product of
the plain model is. The norm's factor is applied to the sums, not to t: every element is then read
once and waits for no other, and the rounding of the normed row is left out.

With so few rows, a product is limited by reading W once, s N K bytes. A warp has whole rows of W,
or a few warps share them; each lane reads 16 bytes at a time and keeps a sum for each row.

Programmatic dependent launch (`pdl`, GPUs of compute capability 9.0 and later): a kernel starts
when all programs of the one before it have, reads its weights, and only then waits for the other to
end. Hence every kernel of the chain waits before its first store (`wait_for_predecessor`): so
whoever ends has seen all ends before it, and buffers can be used again two kernels later. Its first
kernel is launched without, as it comes behind kernels that know nothing of this. d20's step of one
row took 0.43 ms with it, 0.58 without (H200, 2026-11-23).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, check_tensors, upcast
from kernels.rms_norm import EPS, add_rms_norm_ref
from kernels.squared_relu import squared_relu_ref

ACTIVATIONS = ("none", "squared_relu", "softcap")
# Sums for more rows would leave no registers for weights that are read ahead. ms of d20's step, 384
# positions, by these kernels and by torch.compile's: 1 row 0.39 and 1.35, 4 rows 0.62 and 1.20, 8
# rows 1.05 and 1.14 (H200, 2026-11-23).
MAX_ROWS = 4
# For each of a model's products: rows of W a program takes, and the warps that share them. Chosen
# for d20, so that no lane idles (1,280 columns are 5 times the 256 that a warp reads at once, 5,120
# are 5 times those of 4 warps) and every multiprocessor has several programs' reads under way. Half
# or twice the rows or the warps, of one product at a time, change a step of 0.394 ms by -0.002 to
# 0.027 (H200, 2026-11-23).
CONFIGS = {
    "qkv": {"BLOCK_N": 4, "num_warps": 1},
    "attn_proj": {"BLOCK_N": 2, "num_warps": 1},
    "mlp_fc": {"BLOCK_N": 4, "num_warps": 1},
    "mlp_proj": {"BLOCK_N": 2, "num_warps": 4},
    "head": {"BLOCK_N": 4, "num_warps": 1},
}
# Of more rows than this, the sums leave registers for half as much of W.
_MANY_ROWS = 2
# Bytes of W that a thread reads before it waits: what leaves registers for the sums.
_BYTES_AHEAD = 320


def few_rows_product_ref(
    x: Tensor,
    weight: Tensor,
    *,
    branch: Tensor | None = None,
    norm: bool = False,
    activation: str = "none",
    softcap: float = 1.0,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """(t, out) of `few_rows_product` in plain PyTorch, with the normed row rounded."""
    total = x if branch is None else x + branch
    y = add_rms_norm_ref(total, torch.zeros_like(total), eps=eps)[1] if norm else total
    u = F.linear(y, weight)
    if activation == "squared_relu":
        return total, squared_relu_ref(u)
    if activation == "softcap":
        return total, softcap * torch.tanh(upcast(u) / softcap)
    return total, u


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Lets the next kernel start, and waits for the end of the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _few_rows_product_kernel(
    x_ptr,  # (R, K)
    branch_ptr,  # (R, K), added to x, or None
    weight_ptr,  # (N, K)
    total_ptr,  # (R, K) out; None without a norm
    out_ptr,  # (R, N) out
    N,
    eps,
    softcap,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    rows = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = weight_ptr + rows.to(tl.int64)[None, :, None] * K
    # (lanes, 1, elements that a lane reads at once): a sum over the last is within a lane. Of equal
    # dimensions the compiler spreads the first over the lanes.
    cols = tl.arange(0, LANES)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    within = (rows < N)[None, :, None]
    tiles = ()
    for i in tl.static_range(AHEAD):
        k = i * (LANES * WIDTH) + cols
        tiles += (tl.load(weights + k, mask=within & (k < K), other=0.0),)
    wait_for_predecessor(PDL)
    if total_ptr is not None:  # noqa: SIM102 (known to the compiler, and not)
        # A program of its own: none that has a product to make is late for this.
        if pid == tl.num_programs(0) - 1:
            row = tl.arange(0, BLOCK_K)
            for r in tl.static_range(R):
                total = tl.load(x_ptr + r * K + row, mask=row < K, other=0.0).to(tl.float32)
                if branch_ptr is not None:
                    branch = tl.load(branch_ptr + r * K + row, mask=row < K, other=0.0)
                    total += branch.to(tl.float32)
                tl.store(total_ptr + r * K + row, total, mask=row < K)
    sums = ()
    squares = ()
    for _ in tl.static_range(R):
        sums += (tl.zeros((LANES, BLOCK_N), tl.float32),)
        squares += (tl.zeros((LANES, 1), tl.float32),)
    for i in tl.static_range(TILES):
        k = i * (LANES * WIDTH) + cols
        if i < AHEAD:
            w = tiles[i]
        else:
            w = tl.load(weights + k, mask=within & (k < K), other=0.0)
        w = w.to(tl.float32)
        new_sums = ()
        new_squares = ()
        for r in tl.static_range(R):
            x = tl.load(x_ptr + r * K + k, mask=k < K, other=0.0)
            if branch_ptr is not None:
                branch = tl.load(branch_ptr + r * K + k, mask=k < K, other=0.0)
                # Rounded, as it is in `total`.
                x = (x.to(tl.float32) + branch.to(tl.float32)).to(x.dtype)
            x = x.to(tl.float32)
            new_sums += (sums[r] + tl.sum(w * x, axis=2),)
            new_squares += (squares[r] + tl.sum(x * x, axis=2),)
        sums = new_sums
        squares = new_squares
    for r in tl.static_range(R):
        u = tl.sum(sums[r], axis=0)
        if total_ptr is not None:
            u *= tl.rsqrt(tl.sum(squares[r], axis=0) / K + tl.cast(eps, tl.float32))
        u = u.to(weight_ptr.dtype.element_ty).to(tl.float32)
        if ACTIVATION == "squared_relu":
            # Not tl.maximum, which turns NaN into 0.
            u = tl.where(u < 0, 0.0, u)
            u *= u
        if ACTIVATION == "softcap":
            cap = tl.cast(softcap, tl.float32)
            u = cap * (1 - 2 / (tl.exp(2 * u / cap) + 1))
        tl.store(out_ptr + r * N + rows, u, mask=rows < N)


def product_config(name: str, rows: int) -> dict[str, int]:
    """What `few_rows_product` takes as its `config` for one of CONFIGS."""
    config = CONFIGS[name]
    return config | {"BLOCK_N": config["BLOCK_N"] // (2 if rows > _MANY_ROWS else 1)}


def _constants(rows: int, k: int, itemsize: int, config: dict[str, int]) -> dict[str, int]:
    """Launch rule: 16 bytes a lane, as many times as a row of W takes."""
    lanes, width = 32 * config["num_warps"], 16 // itemsize
    tiles = triton.cdiv(k, lanes * width)
    return {
        "R": rows,
        "K": k,
        "BLOCK_K": triton.next_power_of_2(k),
        "LANES": lanes,
        "WIDTH": width,
        "TILES": tiles,
        "AHEAD": min(tiles, _BYTES_AHEAD // (16 * config["BLOCK_N"])),
        **config,
    }


def few_rows_product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    config: dict[str, int],
    pdl: bool,
    first: bool = False,
    branch: Tensor | None = None,
    total: Tensor | None = None,
    activation: str = "none",
    softcap: float = 1.0,
    eps: float = EPS,
) -> None:
    """Write act((x + branch) W^T) to out, normed if there is a `total` to write x + branch to.

    x, branch and total (R, K), weight (N, K), out (R, N); `check_few_rows` says once what may be
    called. No output may be an input's memory: others read that still. `pdl`: see above; `first` of
    the chain.
    """
    n, k = weight.shape
    grid = (triton.cdiv(n, config["BLOCK_N"]) + (total is not None),)
    _few_rows_product_kernel[grid](
        *(x, branch, weight, total, out, n, eps, softcap),
        ACTIVATION=activation,
        PDL=pdl,
        launch_pdl=pdl and not first,
        **_constants(len(x), k, weight.element_size(), config),
        **FUSED_MULTIPLY_ADD,
    )


def check_few_rows(rows: int, **weights: Tensor) -> None:
    """ValueError unless `few_rows_product` takes so many rows and each of these matrices."""
    check_tensors("few_rows_product", **weights)
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"few_rows_product: {rows} rows; it takes 1 to {MAX_ROWS}")
    for name, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] % 16 or not weight.is_contiguous():
            raise ValueError(
                f"few_rows_product: {name} has shape {tuple(weight.shape)} and strides "
                f"{weight.stride()}; it must be a contiguous matrix of a multiple of 16 columns"
            )


def supports_pdl(device: torch.device) -> bool:
    """Whether kernels on this device can be launched before the one before has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """Products of a step of d20, of one row and of the most: each activation, both widths."""
    half, full = torch.bfloat16, torch.float32
    cases = []
    for name, n, k, activation, rows, dtype in (
        ("qkv", 3840, 1280, "none", 1, half),
        ("mlp_fc", 5120, 1280, "squared_relu", 1, full),
        ("mlp_proj", 1280, 5120, "none", MAX_ROWS, half),
        ("head", 65536, 1280, "softcap", 1, half),
    ):
        term = None if name in ("attn_proj", "mlp_proj") else dtype
        out = full if name == "head" else dtype
        cases.append(
            AotCase.of_launch(
                f"few_rows {name} {rows} x {k} {'bf16' if dtype == half else 'fp32'}",
                *(_few_rows_product_kernel, dtype, term, dtype, term, out, n, EPS, 15.0),
                ACTIVATION=activation,
                PDL=capability >= (9, 0),
                **_constants(rows, k, dtype.itemsize, product_config(name, rows)),
            )
        )
    return cases
