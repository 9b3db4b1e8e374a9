"""A product that ends in squared ReLU, and one that ends in its derivative, for Hopper, in Gluon.

    h = max(x W^T, 0)^2                    x (M, C), W (F, C), h (M, F)
    du = (dy V) 2 sqrt(h)                  dy (M, C), V (C, F), h and du (M, F)

The first is a layer's product with the activation in its epilogue: the pre-activation is never
stored, nor rounded. The second is the input gradient of the layer behind, V, with the activation's
derivative in its epilogue, so that the gradient of h is never stored, though rounded, as where two
kernels do this. bf16 or fp16, sums in fp32. kernels/mlp.py makes a layer of them.

Tensor cores would rest during an epilogue. So a tile's product stays in registers, rounded, and the
next tile begins: while each of its first steps multiplies BLOCK_K columns, one of PARTS of the tile
before is multiplied by its block of the gate, put down and stored. Everything goes through the copy
engine (TMA). As many programs as the GPU has multiprocessors take tiles as they come free, so that
a program whose multiprocessor NCCL holds meanwhile keeps nobody waiting. Why Gluon: Triton's
compiler plans the epilogue behind the loop, and registers with it.

FLOPs: 2 M C F each. Bytes, E = M F elements: 2 E and the operands', and 2 E more with the gate h;
against a product with an elementwise kernel behind it, each saves 4 E (the pre-activation or dh,
written and read). What limits it is shared memory: wgmma reads 80 KiB a step and TMA writes 48, of
the 128 that its 1,024 clocks have room for; the gate, in and out, and the result take 10 % more.
At d20's shape on one H200, under load (bench/tune_squared_relu_product.py, 2026-11-23, Triton 3.6):

                       this kernel    cuBLAS + elementwise    cuBLAS alone    in Triton
    forward            1.339 ms       1.632 ms                1.350 ms        1.381 ms
    input gradient     1.528 ms       1.800 ms                1.378 ms        1.626 ms

In whole steps, two and two in turns: 397.1 ms instead of the 399.8 that they took in Triton.
"""

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.launch import AotCase

# The copy engine takes rows that begin at multiples of 16 bytes; so, it asserts, must matrices.
_ALIGNED_BYTES = 16
ALIGNMENT = 8  # elements of bf16 or fp16

# Triton 3.6's names and those from 3.8 on.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

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


@gluon.jit
def _tile(t, blocks_m, blocks_n, GROUP_M: gl.constexpr):
    """(i, j) of the t-th tile: down GROUP_M, then to the right, so that operands stay in L2."""
    group = t // (GROUP_M * blocks_n)
    height = min(blocks_m - group * GROUP_M, GROUP_M)
    place = t % (GROUP_M * blocks_n)
    return group * GROUP_M + place % height, place // height


@gluon.jit
def _parts(x, PARTS: gl.constexpr):
    """x's columns in PARTS equal parts."""
    if PARTS == 1:
        return (x,)
    else:
        halves = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1])
        left, right = gl.split(halves)
        return _parts(left, PARTS // 2) + _parts(right, PARTS // 2)


@gluon.jit
def _rounded(parts, dtype: gl.constexpr, layout: gl.constexpr):
    """The parts in dtype, where they are in registers."""
    first = (gl.convert_layout(parts[0].to(dtype), layout, assert_trivial=True),)
    if len(parts) == 1:
        return first
    else:
        return first + _rounded(parts[1:], dtype, layout)


@gluon.jit
def _fetch_step(a, b, slots, ready, step, i, j, k, wanted, GATED: gl.constexpr):
    """Begins to load step k's operands of tile (i, j), the step-th of all, if it is wanted."""
    a_slots, b_slots = slots
    slot = step % a_slots.type.shape[0]
    bar = ready.index(slot)
    BLOCK_K: gl.constexpr = a.block_type.shape[1]
    BLOCK_N: gl.constexpr = b.block_type.shape[1] if GATED else b.block_type.shape[0]
    from_b = [k * BLOCK_K, j * BLOCK_N] if GATED else [j * BLOCK_N, k * BLOCK_K]
    mbarrier.expect(bar, a.block_type.nbytes + b.block_type.nbytes, pred=wanted)
    async_load(a, [i * a.block_type.shape[0], k * BLOCK_K], bar, a_slots.index(slot), pred=wanted)
    async_load(b, from_b, bar, b_slots.index(slot), pred=wanted)


@gluon.jit
def _multiply_step(a, b, slots, ready, sums, step, k, steps, tile, following, GATED: gl.constexpr):
    """Begins step k of a tile, the step-th of all, and to load the one STAGES - 1 after it, of the
    same tile or of the one that follows: its (i, j), and whether it exists."""
    a_slots, b_slots = slots
    STAGES: gl.constexpr = a_slots.type.shape[0]
    slot = step % STAGES
    mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
    right = b_slots.index(slot) if GATED else b_slots.index(slot).permute([1, 0])
    sums = warpgroup_mma(a_slots.index(slot), right, sums, use_acc=k > 0, is_async=True)
    # The step before has been multiplied: its slot is free.
    sums = warpgroup_mma_wait(1, deps=[sums])
    ahead = k + STAGES - 1
    here = ahead < steps
    i = tile[0] if here else following[0]
    j = tile[1] if here else following[1]
    ahead = ahead if here else ahead - steps
    _fetch_step(
        *(a, b, slots, ready, step + STAGES - 1, i, j, ahead, here | following[2]), GATED=GATED
    )
    return sums


@gluon.jit
def _fetch_gate(gate, gates, gate_ready, tile, part: gl.constexpr, PARTS: gl.constexpr):
    """Begins to load the gate's block of a part of a tile."""
    BLOCK_M: gl.constexpr = gate.block_type.shape[0]
    WIDTH: gl.constexpr = gate.block_type.shape[1]
    BUFFER: gl.constexpr = part % gates.type.shape[0]
    bar = gate_ready.index(BUFFER)
    mbarrier.expect(bar, gate.block_type.nbytes)
    async_load(
        *(gate, [tile[0] * BLOCK_M, (tile[1] * PARTS + part) * WIDTH], bar, gates.index(BUFFER))
    )


@gluon.jit
def _finish(
    gate,
    gates,
    gate_ready,
    out,
    outs,
    y,
    tile,
    turn,
    part: gl.constexpr,
    PARTS: gl.constexpr,
    layout: gl.constexpr,
):
    """Multiplies a part y of a tile, this program's turn-th, with its gate, if any; stores it."""
    GATED: gl.constexpr = gate is not None
    BLOCK_M: gl.constexpr = out.block_type.shape[0]
    WIDTH: gl.constexpr = out.block_type.shape[1]
    OUTS: gl.constexpr = outs.type.shape[0]
    BUFFER: gl.constexpr = part % OUTS
    GATES: gl.constexpr = gates.type.shape[0] if GATED else PARTS
    if GATED:
        mbarrier.wait(gate_ready.index(part % GATES), (turn * (PARTS // GATES) + part // GATES) & 1)
        factor = 2 * gl.sqrt(gates.index(part % GATES).load(layout).to(gl.float32))
        y = (y.to(gl.float32) * factor).to(y.dtype)
    tma.store_wait(OUTS - 1)
    outs.index(BUFFER).store(y)
    fence_async_shared()
    async_store(*(out, [tile[0] * BLOCK_M, (tile[1] * PARTS + part) * WIDTH], outs.index(BUFFER)))
    if part + GATES < PARTS:
        _fetch_gate(gate, gates, gate_ready, tile, part + GATES, PARTS)


@gluon.jit
def _squared_relu_product_kernel(
    a,  # (M, K) in blocks (BLOCK_M, BLOCK_K)
    b,  # (N, K) in blocks (BLOCK_N, BLOCK_K); with a gate (K, N) in (BLOCK_K, BLOCK_N)
    gate,  # (M, N) in blocks (BLOCK_M, BLOCK_N / PARTS): h, or None for the activation itself
    out,  # (M, N) out, in blocks of the same
    taken,  # (1,) int32, 0: tiles that programs have taken, beyond each one's first
    M,
    N,
    K,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    GATES: gl.constexpr,
    OUTS: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    GATED: gl.constexpr = gate is not None
    WIDTH: gl.constexpr = BLOCK_N // PARTS
    B_ROWS: gl.constexpr = BLOCK_K if GATED else BLOCK_N
    B_COLS: gl.constexpr = BLOCK_N if GATED else BLOCK_K
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDTH, 16])

    a_slots = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_M, BLOCK_K], a.layout)
    b_slots = gl.allocate_shared_memory(a.dtype, [STAGES, B_ROWS, B_COLS], b.layout)
    slots = (a_slots, b_slots)
    outs = gl.allocate_shared_memory(a.dtype, [OUTS, BLOCK_M, WIDTH], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(ready.index(n), count=1)
    if GATED:
        gates = gl.allocate_shared_memory(a.dtype, [GATES, BLOCK_M, WIDTH], gate.layout)
        gate_ready = gl.allocate_shared_memory(gl.int64, [GATES, 1], mbarrier.MBarrierLayout())
        for n in gl.static_range(GATES):
            mbarrier.init(gate_ready.index(n), count=1)
    else:
        gates = None
        gate_ready = None
    fence_async_shared()

    blocks_m = gl.cdiv(M, BLOCK_M)
    blocks_n = gl.cdiv(N, BLOCK_N)
    tiles = blocks_m * blocks_n
    steps = gl.cdiv(K, BLOCK_K)

    t = gl.program_id(0)
    i, j = _tile(t, blocks_m, blocks_n, GROUP_M)
    for n in gl.static_range(STAGES - 1):
        _fetch_step(*(a, b, slots, ready, n, i, j, n, True), GATED=GATED)

    sums = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
    # The tile before this one, and its product in registers.
    held = _rounded(_parts(sums, PARTS), a.dtype, PART)
    # (Numbers, for Triton does not carry a tuple that only changes places through a loop.)
    step, turn, before_i, before_j = 0, 0, 0, 0
    while t < tiles:
        following = (i, j, False)
        sums = _multiply_step(
            *(a, b, slots, ready, sums, step, 0, steps, (i, j), following), GATED=GATED
        )
        # While that multiplies. Whoever is free takes the next tile: another kernel may hold some
        # multiprocessors for a while.
        t = gl.num_programs(0) + gl.atomic_add(taken, 1, sem="relaxed")
        next_i, next_j = _tile(min(t, tiles - 1), blocks_m, blocks_n, GROUP_M)
        following = (next_i, next_j, t < tiles)
        for part in gl.static_range(PARTS):
            sums = _multiply_step(
                *(a, b, slots, ready, sums, step + 1 + part, 1 + part, steps, (i, j), following),
                GATED=GATED,
            )
            if turn > 0:
                before = (before_i, before_j)
                # (Not in a tuple, which cannot hold None.)
                _finish(
                    gate,
                    gates,
                    gate_ready,
                    out,
                    outs,
                    held[part],
                    before,
                    turn - 1,
                    part,
                    PARTS,
                    PART,
                )
        for k in range(1 + PARTS, steps):
            sums = _multiply_step(
                *(a, b, slots, ready, sums, step + k, k, steps, (i, j), following), GATED=GATED
            )
        sums = warpgroup_mma_wait(0, deps=[sums])
        y = sums
        if not GATED:
            # Not gl.maximum, which turns NaN into 0.
            y = gl.where(y < 0, 0.0, y)
            y *= y
        held = _rounded(_parts(y, PARTS), a.dtype, PART)
        if GATED:
            for n in gl.static_range(GATES):
                _fetch_gate(gate, gates, gate_ready, (i, j), n, PARTS)
        step += steps
        turn += 1
        before_i, before_j = i, j
        i, j = next_i, next_j
    for part in gl.static_range(PARTS):
        before = (before_i, before_j)
        _finish(gate, gates, gate_ready, out, outs, held[part], before, turn - 1, part, PARTS, PART)
    tma.store_wait(0)


def least_depth(config: Mapping[str, int] = CONFIG) -> int:
    """The smallest K: all parts of a tile are finished within the next one's steps."""
    return config["BLOCK_K"] * config["PARTS"] + 1


def _operand(x: Tensor) -> Tensor:
    """`x` as the copy engine takes it, contiguous and aligned; if it is not so, a copy."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNED_BYTES == 0 else x.clone()


def squared_relu_product(
    a: Tensor, b: Tensor, gate: Tensor | None, config: Mapping[str, int] = CONFIG
) -> Tensor:
    """max(a b^T, 0)^2 of b (N, K), or with a gate (M, N) (a b) 2 sqrt(gate) of b (K, N); a (M, K).

    bf16 or fp16 on a Hopper GPU, K and N multiples of ALIGNMENT, K at least `least_depth`; what is
    not contiguous, or not aligned, is copied first. Checks nothing.
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
        _descriptor(a, [rows, depth]),
        _descriptor(b, [cols, depth] if gate is None else [depth, cols]),
        None if gate is None else _descriptor(gate, part),
        _descriptor(out, part),
    )
    # Emulated, three programs take one tile each, and the first all others.
    multiprocessors = (
        torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 3
    )
    programs = min(triton.cdiv(m, rows) * triton.cdiv(n, cols), multiprocessors)
    with torch.cuda.device_of(a):
        taken = torch.zeros(1, dtype=torch.int32, device=a.device)
        _squared_relu_product_kernel[(programs,)](*descriptors, taken, m, n, k, **config)
    return out


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(x, block, layout)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """d20's two, for Hopper."""
    if capability[0] != 9:
        return []
    return [
        _aot_case("linear_squared_relu bf16", with_gate=False),
        _aot_case("squared_relu_dgrad bf16", with_gate=True),
    ]


def _aot_case(label: str, *, with_gate: bool) -> AotCase:
    m, n, k = (CONFIG[f"BLOCK_{letter}"] for letter in "MNK")
    part = _block_type([m, n // CONFIG["PARTS"]])
    signature = {
        "a": _block_type([m, k]),
        "b": _block_type([k, n] if with_gate else [n, k]),
        "out": part,
        "taken": "*i32",
        **dict.fromkeys("MNK", "i32:16"),
    }
    constants: dict[str, int | None] = dict(CONFIG)
    if with_gate:
        signature["gate"] = part
    else:
        constants["gate"] = None
    return AotCase(label, _squared_relu_product_kernel, signature, constants, CONFIG["num_warps"])


def _block_type(block: list[int]) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return f"tensordesc<bf16{block},{layout!r}>"
