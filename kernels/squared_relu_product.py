"""A product that ends in squared ReLU, and one that ends in its derivative, for Hopper.

    h = max(x W^T, 0)^2                    x (M, C), W (F, C), h (M, F)
    du = (dy V) 2 sqrt(h)                  dy (M, C), V (C, F), h and du (M, F)

The first is a layer's product with the activation in its epilogue: the pre-activation is never
stored, nor rounded. The second is the input gradient of the layer behind, V, with the activation's
derivative in its epilogue, so that the gradient of h is never stored. bf16 or fp16, sums in fp32,
each result rounded once. kernels/mlp.py makes a layer of them.

One persistent kernel does both: as many programs as the GPU has multiprocessors, each over tiles
in a flattened loop, so that the next tile's operands are under way during the epilogue. Everything
goes through the copy engine (TMA), which GPUs have from compute capability 9.0 on, the result in
parts, which need less shared memory.

FLOPs: 2 M C F each. Bytes, E = M F elements: 2 E and the operands', and 2 E more with the gate h;
against a product with an elementwise kernel behind it, each saves 4 E (the pre-activation or dh,
written and read). At d20's shape on one H200, under load (bench/tune_squared_relu_product.py,
2026-11-22, Triton 3.6):

                       this kernel    cuBLAS + elementwise    cuBLAS alone
    forward            1.357 ms       1.584 ms                1.346 ms
    input gradient     1.577 ms       1.740 ms                1.360 ms
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import FUSED_MULTIPLY_ADD, INTERPRETED, AotCase

# The copy engine takes rows that begin at multiples of 16 bytes; so, it asserts, must matrices.
_ALIGNED_BYTES = 16
ALIGNMENT = 8  # elements of bf16 or fp16
# Triton's interpreter would multiply the bits of bf16; products of these are exact in fp32.
_OPERANDS = tl.float32 if INTERPRETED else None

# The fastest of eight for both, of what compiles for sm_90 without spills: tiles of 128 x 256 read
# the fewest bytes of shared memory a multiplication, and one program fills an SM.
CONFIG = {
    "BLOCK_M": 128,
    "BLOCK_N": 256,
    "BLOCK_K": 64,
    "PARTS": 2,
    "GROUP_M": 8,
    "num_warps": 8,
    "num_stages": 3,
    "programs": 1,
}


@triton.jit
def _tile(t, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """(i, j) of the t-th tile: down GROUP_M, then to the right, so that operands stay in L2."""
    group = t // (GROUP_M * blocks_n)
    height = min(blocks_m - group * GROUP_M, GROUP_M)
    place = t % (GROUP_M * blocks_n)
    return group * GROUP_M + place % height, place // height


@triton.jit
def _halves(x):
    """The left and the right half of x's columns."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _squared_relu_product_kernel(
    a,  # (M, K) in blocks (BLOCK_M, BLOCK_K)
    b,  # (N, K) in blocks (BLOCK_N, BLOCK_K); with a gate (K, N) in (BLOCK_K, BLOCK_N)
    gate,  # (M, N) in blocks (BLOCK_M, BLOCK_N / PARTS): h, or None for the activation itself
    out,  # (M, N) out, in blocks of the same
    M,
    N,
    K,
    OPERANDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles = blocks_m * blocks_n
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        i, j = _tile(t, blocks_m, blocks_n, GROUP_M)
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            left = a.load([i * BLOCK_M, k * BLOCK_K])
            if gate is None:
                right = b.load([j * BLOCK_N, k * BLOCK_K]).T
            else:
                right = b.load([k * BLOCK_K, j * BLOCK_N])
            if OPERANDS is not None:
                left, right = left.to(OPERANDS), right.to(OPERANDS)
            product = tl.dot(left, right, product)

        if PARTS == 1:
            parts = (product,)
        elif PARTS == 2:
            parts = _halves(product)
        else:
            first, second = _halves(product)
            parts = _halves(first) + _halves(second)
        for p in tl.static_range(PARTS):
            place = [i * BLOCK_M, j * BLOCK_N + p * (BLOCK_N // PARTS)]
            y = parts[p]
            if gate is None:
                # Not tl.maximum, which turns NaN into 0.
                y = tl.where(y < 0, 0.0, y)
                y *= y
            else:
                y *= 2 * tl.sqrt(gate.load(place).to(tl.float32))
            out.store(place, y.to(out.dtype))


def _operand(x: Tensor) -> Tensor:
    """`x` as the copy engine takes it, contiguous and aligned; if it is not so, a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNED_BYTES == 0 else x.clone()


def squared_relu_product(
    a: Tensor, b: Tensor, gate: Tensor | None, config: Mapping[str, int] = CONFIG
) -> Tensor:
    """max(a b^T, 0)^2 of b (N, K), or with a gate (M, N) (a b) 2 sqrt(gate) of b (K, N); a (M, K).

    bf16 or fp16, K and N multiples of ALIGNMENT; what is not contiguous, or not aligned, is copied
    first. config: `programs` is how many share an SM. Checks nothing.
    """
    config = dict(config)
    a, b, gate = _operand(a), _operand(b), None if gate is None else _operand(gate)
    m, k = a.shape
    n = b.shape[0] if gate is None else b.shape[1]
    out = a.new_empty(m, n)
    if out.numel() == 0:
        return out
    rows, cols, depth = (config[f"BLOCK_{letter}"] for letter in "MNK")
    part = [rows, cols // config["PARTS"]]
    descriptors = (
        TensorDescriptor.from_tensor(a, [rows, depth]),
        TensorDescriptor.from_tensor(b, [cols, depth] if gate is None else [depth, cols]),
        None if gate is None else TensorDescriptor.from_tensor(gate, part),
        TensorDescriptor.from_tensor(out, part),
    )
    # Interpreted, three programs take turns over the tiles.
    multiprocessors = (
        torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 3
    )
    tiles = triton.cdiv(m, rows) * triton.cdiv(n, cols)
    programs = min(tiles, config.pop("programs") * multiprocessors)
    with torch.cuda.device_of(a):
        _squared_relu_product_kernel[(programs,)](
            *descriptors, m, n, k, _OPERANDS, **config, **FUSED_MULTIPLY_ADD
        )
    return out


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """d20's two, on GPUs that it was measured on."""
    if capability[0] != 9:
        return []
    return [
        _aot_case("linear_squared_relu bf16", with_gate=False),
        _aot_case("squared_relu_dgrad bf16", with_gate=True),
    ]


def _aot_case(label: str, *, with_gate: bool) -> AotCase:
    m, n, k = (CONFIG[f"BLOCK_{letter}"] for letter in "MNK")
    part = f"tensordesc<bf16[{m}, {n // CONFIG['PARTS']}]>"
    right = (k, n) if with_gate else (n, k)
    signature = {
        "a": f"tensordesc<bf16[{m}, {k}]>",
        "b": f"tensordesc<bf16[{right[0]}, {right[1]}]>",
        "out": part,
        **dict.fromkeys("MNK", "i32:16"),
    }
    constants = {name: CONFIG[name] for name in CONFIG if name.isupper()} | {"OPERANDS": None}
    if with_gate:
        signature["gate"] = part
    else:
        constants["gate"] = None
    return AotCase(
        label,
        _squared_relu_product_kernel,
        signature,
        constants,
        CONFIG["num_warps"],
        CONFIG["num_stages"],
    )
