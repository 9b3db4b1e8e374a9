"""Newton-Schulz orthogonalisation of batches of matrices, with symmetric products at half price.

    X = x / (|x| + 1e-7)        five times:  A = X X^T,  B = a I + b A + c A A,  X = B X

of each matrix of x (N, R, C), R <= C, |x| its Frobenius norm; a taller one is treated as its
transpose. Pushes every singular value that is not tiny near 1 (Jordan et al., 2024,
github.com/KellerJordan/Muon, where a X is added beside the product and not within B). Not
differentiable: Muon's update takes no gradient.

x is read as it is, and never divided by its norm: the first A is G / s, and the first B has the
norm in it,

    G = x x^T,  |x|^2 = trace G,  s = (|x| + 1e-7)^2,  B = (a I + b G / s + c G G / s^2) / sqrt(s)

which saves two passes over memory, 6 bytes an element. As c / |x|^5 must not vanish in fp32, |x|
may be 1e8 at most: from 5e8 on results are wrong.

A and B are symmetric, so only tiles on and above the diagonal are computed; each is stored a second
time, mirrored. A matrix is never copied to transpose it: the kernel takes strides. a I is added
before B is rounded, which saves baddbmm's copy of X in each step, and near the end, where a and
b A + c A A cancel, the rounding of a large diagonal.

Numerics: X, A and B are rounded once each to bf16; sums are fp32, |x| is of G rounded. No atomics:
the same bits every time. Cost of a step on a matrix, R rows and C columns:

    FLOPs    whole 4 R R C + 2 R R R, of which the kernel saves nearly half of 2 R R C + 2 R R R.
             d20 (80 of 1280 x 1280, 20 each of 5120 x 1280 and 1280 x 5120) in five steps:
             1.26e13 whole; with blocks of 128, 55 of 100 tiles, 9.2e12
    bytes    6 R C + 8 R R of bf16 at least; products this large are bound by FLOPs
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import (
    FUSED_MULTIPLY_ADD,
    INTERPRETED,
    AotCase,
    check_tensors,
    runs_kernel,
)

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7

# Triton's interpreter would multiply the bits of bf16; products of these are exact in fp32.
_OPERANDS = tl.float32 if INTERPRETED else tl.bfloat16


def newton_schulz_ref(x: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`newton_schulz` in plain PyTorch; computes in `dtype` and returns that."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.to(dtype)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@triton.jit
def _upper_tile(t, n):
    """(i, j), i <= j < n, of the t-th tile of n (n + 1) / 2.

    Rows p and n - p, or n - 1 - p where n is even, lie behind each other in one of n | 1 tiles.
    """
    width = n | 1
    even = width - n
    p, q = t // width, t % width
    if q < n - p:
        i = p
        j = p + q
    else:
        i = n - p - even
        j = q - even
    return i, j


@triton.jit
def _symmetric_product_kernel(
    x_ptr,  # (N, R, K)
    gram_ptr,  # (N, R, R) contiguous, or None
    norm_ptr,  # (N,) fp32 contiguous, or None for 1
    out_ptr,  # (N, R, R) contiguous: x x^T; with gram (A I + B gram / s + C x x^T / s^2) / sqrt(s)
    R,
    K,
    x_n,
    x_r,
    x_k,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    OPERANDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(R, BLOCK_R)
    tiles = blocks * (blocks + 1) // 2
    pid = tl.program_id(0)
    i, j = _upper_tile(pid % tiles, blocks)
    n = (pid // tiles).to(tl.int64)
    rows = i * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = j * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    # 64 bits to the matrix, 32 within it.
    x_ptr += n * x_n
    left_ptr = x_ptr + rows[:, None] * x_r + ks[None, :] * x_k
    right_ptr = x_ptr + cols[:, None] * x_r + ks[None, :] * x_k
    place = rows[:, None] * R + cols[None, :]
    mask = (rows[:, None] < R) & (cols[None, :] < R)
    product = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    square, factor = 1.0, C
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + n)
        square = norm * norm
        # Not at once: the norm's fifth power would leave fp32's range sooner.
        factor = C / square / square / norm
    if gram_ptr is not None:
        gram = tl.load(gram_ptr + n * R * R + place, mask=mask, other=0.0).to(tl.float32)
        diagonal = tl.where(rows[:, None] == cols[None, :], A, 0.0)
        product = (B * square * gram + square * square * diagonal) / C
    for k in range(0, K, BLOCK_K):
        inside = ks[None, :] < K - k
        left = tl.load(left_ptr, mask=(rows[:, None] < R) & inside, other=0.0)
        right = tl.load(right_ptr, mask=(cols[:, None] < R) & inside, other=0.0)
        product = tl.dot(left.to(OPERANDS), right.T.to(OPERANDS), product)
        left_ptr += BLOCK_K * x_k
        right_ptr += BLOCK_K * x_k

    if gram_ptr is not None:
        product *= factor
    out_ptr += n * R * R
    result = product.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, result, mask=mask)
    if i != j:
        place = cols[:, None] * R + rows[None, :]
        mask = (cols[:, None] < R) & (rows[None, :] < R)
        tl.store(out_ptr + place, result.T, mask=mask)


def _config(r: int, capability: tuple[int, int]) -> dict[str, Any]:
    """Launch rule for products of r rows.

    Blocks of 128 keep the tensor cores fed from shared memory, 32 KiB a stage; smaller matrices
    take smaller ones, to lose less at the edges. From sm_90 on two programs share an SM, so that
    one stores while the other multiplies: hence the bound on registers, for which the polynomial's
    product may spill a few before its loop. Before, and on sm_120, which multiplies as sm_80 does,
    sums live in registers beside the operands, and one program takes what it needs: bound to 128
    registers, sm_120's spills up to 1,200 bytes a thread (compiled ahead of time).
    """
    block = 128 if r > 256 else 64 if r > 64 else 32
    hopper = (9, 0) <= capability < (12, 0)
    return {
        "BLOCK_R": block,
        "BLOCK_K": 64 if hopper else 32,
        "num_warps": 8 if block == 128 else 4,
        "num_stages": 3 if hopper else 4,
        "maxnreg": 128 if hopper else None,
    }


def _symmetric_product(x: Tensor, gram: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
    """x x^T, or a I + b gram + c x x^T: (N, R, R) bf16 of x (N, R, K) with any strides.

    norm (N,) fp32: gram and x are of matrices that have yet to be divided by it, and so has what
    the polynomial will be multiplied with.
    """
    n, r, k = x.shape
    out = x.new_empty(n, r, r)
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    config = _config(r, capability)
    blocks = triton.cdiv(r, config["BLOCK_R"])
    a, b, c = COEFFICIENTS
    with torch.cuda.device_of(x):
        _symmetric_product_kernel[(n * blocks * (blocks + 1) // 2,)](
            *(x, gram, norm, out, r, k, *x.stride()),
            *(a, b, c, _OPERANDS),
            **config,
            **FUSED_MULTIPLY_ADD,
        )
    return out


def _norm(gram: Tensor) -> Tensor:
    """Frobenius norms (N,) fp32 of the matrices that gram (N, R, R) is of."""
    return gram.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float32).sqrt()


@torch.no_grad()
def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """The matrices of x with their singular values pushed near 1.

    x (N, R, C) bf16, fp16 or fp32 with any strides, norms up to 1e8; returns x's shape in bf16,
    contiguous on a GPU. Zeros give zeros. ValueError for what it does not take.
    """
    check_tensors("newton_schulz", x=x)
    if x.ndim != 3 or x[:1].numel() >= 2**31 or steps < 1:
        raise ValueError(
            f"newton_schulz: x is {tuple(x.shape)}, steps {steps}; it takes (N, R, C) of fewer "
            "than 2^31 elements a matrix, and at least 1 step"
        )
    if not runs_kernel(x) or x.numel() == 0:
        # A CPU without bf16 arithmetic takes several times longer in bf16.
        return newton_schulz_ref(x, steps, torch.float32).bfloat16()
    y = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    for step in range(steps):
        gram = _symmetric_product(y.mT if tall else y)
        norm = _norm(gram) + EPS if step == 0 else None
        polynomial = _symmetric_product(gram, gram, norm)
        y = torch.bmm(y, polynomial) if tall else torch.bmm(polynomial, y)
    return y


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """d20's products: of wide and tall matrices, and the square of what they give."""
    half, r, k = torch.bfloat16, 1280, 5120
    config = _config(r, capability)
    cases = []
    for label, gram, norm, depth, strides in (
        ("newton_schulz gram wide", None, None, k, (r * k, k, 1)),
        ("newton_schulz gram tall", None, None, k, (r * k, 1, r)),
        ("newton_schulz polynomial first", half, torch.float32, r, (r * r, r, 1)),
        ("newton_schulz polynomial", half, None, r, (r * r, r, 1)),
    ):
        constants: dict[str, Any] = {**dict(zip("ABC", COEFFICIENTS)), "OPERANDS": tl.bfloat16}
        launch = (_symmetric_product_kernel, half, gram, norm, half, r, depth, *strides)
        cases.append(AotCase.of_launch(label, *launch, **constants, **config))
    return cases
