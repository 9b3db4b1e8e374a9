"""A product for Hopper, in Gluon, that finishes a tile beside the next one's multiplications.

    y = a b                                a (M, K), b (K, N), y (M, N)
    y = max(a b, 0)^2                      squared_relu
    y = (a b) 2 sqrt(gate)                 gate (M, N): squared ReLU's derivative, of what it gave

bf16 or fp16, sums in fp32. The second is a layer's product with the activation in its epilogue: the
pre-activation is never stored, nor rounded. The third is the input gradient of the layer behind it,
with the activation's derivative in its epilogue, so that the gradient of h is never stored, though
rounded, as where two kernels do this. kernels/linear.py and kernels/mlp.py make layers of them.

Tensor cores would rest during an epilogue. So a tile's product stays in registers, rounded, and the
next tile begins: while each of its first steps multiplies BLOCK_K columns, one of PARTS of the tile
before is multiplied by its block of the gate, put down and stored. Everything goes through the copy
engine (TMA). As many programs as the GPU has multiprocessors take tiles as they come free, so that
a program whose multiprocessor NCCL holds meanwhile keeps nobody waiting. Why Gluon: Triton's
compiler plans the epilogue behind the loop, and registers with it.

FLOPs: 2 M K N. Bytes: the operands', 2 M N, and 2 M N more with a gate; against a product with an
elementwise kernel behind it, squared_relu and gate each save 4 M N (the pre-activation or the
gradient of h, written and read). What limits it is shared memory: wgmma reads 80 KiB a step and TMA
writes 48, of the 128 that its 1,024 clocks have room for; the gate, in and out, and the result take
10 % more. At d20's shape on one H200, under load (bench/tune_product.py, 2026-11-23, Triton 3.6):

                       this kernel    cuBLAS + elementwise    cuBLAS alone    in Triton
    squared_relu       1.339 ms       1.632 ms                1.350 ms        1.381 ms
    gate               1.528 ms       1.800 ms                1.378 ms        1.626 ms

In whole steps, two and two in turns: 397.1 ms instead of the 399.8 that they took in Triton.
"""

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.launch import AotCase
from kernels.product_tiles import product_kernel

# The copy engine takes rows that begin at multiples of 16 bytes; so, it asserts, must matrices.
_ALIGNED_BYTES = 16
ALIGNMENT = 8  # elements of bf16 or fp16

# With fewer rows there are not enough tiles to go round many times.
LEAST_ROWS = 4096
# Of `fill`, if nothing follows.
LEAST_FILL = 0.95

# Tiles of 128 x 256 read the fewest bytes of shared memory a multiplication. STAGES: of operands;
# PARTS: of a tile's result; GATES and OUTS: buffers for such a part of the gate, and of the result.
CONFIG = {
    "BLOCK_M": 128,
    "BLOCK_N": 256,
    "BLOCK_K": 64,
    "STAGES": 3,
    "PARTS": 8,
    "GATES": 4,
    "OUTS": 2,
    "GROUP_M": 8,
    "num_warps": 8,
}


def least_depth(config: Mapping[str, int] = CONFIG) -> int:
    """The smallest K: all parts of a tile are finished within the next one's steps."""
    return config["BLOCK_K"] * config["PARTS"] + 1


def suits(m: int, k: int, n: int) -> bool:
    """Whether the kernel multiplies (m, k) x (k, n), and not in a few tiles only."""
    whole = k % ALIGNMENT == 0 and n % ALIGNMENT == 0
    return m >= LEAST_ROWS and k >= least_depth() and whole


def fill(m: int, n: int, programs: int) -> float:
    """The share of what `programs` could compute until the last ends that is y (m, n)."""
    rows, cols = CONFIG["BLOCK_M"], CONFIG["BLOCK_N"]
    rounds = triton.cdiv(triton.cdiv(m, rows) * triton.cdiv(n, cols), programs)
    return m * n / (rounds * programs * rows * cols)


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether `product` should multiply these if something follows that it can end in."""
    on_hopper = a.is_cuda and torch.cuda.get_device_capability(a.device)[0] == 9
    return on_hopper and a.dtype in (torch.bfloat16, torch.float16) and suits(len(a), *b.shape)


def fills_gpu(a: Tensor, b: Tensor) -> bool:
    """Whether `product` takes these and its tiles leave few gaps. Where they do, cuBLAS has other
    tiles: for d26's qkv, 19.5 wide, it takes 0.973 of the time (bench/results/product-h200.json).
    Where they don't, ours need not be faster: for d20's head it is not."""
    m, n = len(a), b.shape[1]
    whole = n % CONFIG["BLOCK_N"] == 0
    return takes(a, b) and whole and fill(m, n, _multiprocessors(a)) >= LEAST_FILL


def _multiprocessors(x: Tensor) -> int:
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    # Emulated, three programs take one tile each, and the first all others.
    return 3


def _operand(x: Tensor) -> Tensor:
    """`x` as the copy engine takes it, contiguous and aligned; if it is not so, a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNED_BYTES == 0 else x.clone()


def product(
    a: Tensor,
    b: Tensor,
    *,
    squared_relu: bool = False,
    gate: Tensor | None = None,
    config: Mapping[str, int] = CONFIG,
) -> Tensor:
    """a b of a (M, K) and b (K, N), a matrix or a transposed one -> (M, N).

    squared_relu: max(a b, 0)^2. gate (M, N): (a b) 2 sqrt(gate). One of them at most.

    All bf16, or all fp16, on a Hopper GPU; K and N multiples of ALIGNMENT, K at least
    `least_depth`; what is not contiguous, or not aligned, is copied first. Checks nothing.
    """
    config = dict(config)
    transposed = b.stride(0) == 1
    a, b = _operand(a), _operand(b.t() if transposed else b)
    m, k = a.shape
    n = b.shape[0] if transposed else b.shape[1]
    out = a.new_empty(m, n)
    if out.numel() == 0:
        return out
    rows, cols, depth = (config[f"BLOCK_{letter}"] for letter in "MNK")
    part = [rows, cols // config["PARTS"]]
    descriptors = (
        _descriptor(a, [rows, depth]),
        _descriptor(b, [cols, depth] if transposed else [depth, cols]),
        None if gate is None else _descriptor(_operand(gate), part),
        _descriptor(out, part),
    )
    programs = min(triton.cdiv(m, rows) * triton.cdiv(n, cols), _multiprocessors(a))
    with torch.cuda.device_of(a):
        taken = torch.zeros(1, dtype=torch.int32, device=a.device)
        product_kernel[(programs,)](
            *(*descriptors, taken, m, n, k),
            TRANSPOSED=transposed,
            SQUARED_RELU=squared_relu,
            **config,
        )
    return out


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(x, block, layout)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """d20's three, for Hopper."""
    if capability[0] != 9:
        return []
    return [
        _aot_case("linear bf16", transposed=True),
        _aot_case("linear_squared_relu bf16", transposed=True, squared_relu=True),
        _aot_case("squared_relu_dgrad bf16", transposed=False, gated=True),
    ]


def _aot_case(
    label: str, *, transposed: bool, squared_relu: bool = False, gated: bool = False
) -> AotCase:
    m, n, k = (CONFIG[f"BLOCK_{letter}"] for letter in "MNK")
    part = _block_type([m, n // CONFIG["PARTS"]])
    signature = {
        "a": _block_type([m, k]),
        "b": _block_type([n, k] if transposed else [k, n]),
        "out": part,
        "taken": "*i32",
        **dict.fromkeys("MNK", "i32:16"),
    }
    constants: dict[str, int | None] = dict(CONFIG)
    constants |= {"TRANSPOSED": transposed, "SQUARED_RELU": squared_relu}
    if gated:
        signature["gate"] = part
    else:
        constants["gate"] = None
    return AotCase(label, product_kernel, signature, constants, CONFIG["num_warps"])


def _block_type(block: list[int]) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return f"tensordesc<bf16{block},{layout!r}>"
