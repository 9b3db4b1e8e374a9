"""kernels/squared_relu_product.py's two products with the epilogue beside the next tile's
multiplications, in Gluon, for Hopper. A candidate, which bench/tune_squared_relu_product.py is to
measure: the model does not run it.

    h = max(x W^T, 0)^2                    x (M, C), W (F, C), h (M, F)
    du = (dy V) 2 sqrt(h)                  dy (M, C), V (C, F), h and du (M, F)

Triton's tensor cores rest while a tile's epilogue reads its gate and stores its result. Here a
tile's product, rounded, is put down in shared memory in PARTS, and the next tile begins. Without a
gate the parts are stored at once, by the copy engine (TMA). With one, each step of the next tile
that multiplies BLOCK_K columns finishes one part meanwhile: its block of the gate, fetched before,
times 2 sqrt, and stored. The product is rounded before it meets the gate, as it is where two
kernels do this.

FLOPs and bytes: squared_relu_product's. Shared memory at d20's shape: operands 3 x 48 KiB, product
64 KiB, gate 16 KiB, of 227 KiB. Predicted before it was measured, of one H200 in a step of two
(bench/results/mfu-h200-2.json): cuBLAS's product of this size takes 1.27 ms, squared_relu_product
1.36 forward and 1.77 backward, 6.4 us a tile more than cuBLAS. What is left is putting down a tile,
some 700 of 21,000 clocks: 1.31 ms each way, or 10 ms less of a step of 399 ms. It would be proven
wrong by more than 1.45 ms backward.
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
from kernels.squared_relu_product import _operand

# Triton 3.6's names and those from 3.8 on.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

CONFIG = {
    "BLOCK_M": 128,
    "BLOCK_N": 256,
    "BLOCK_K": 64,
    "STAGES": 3,
    "PARTS": 8,
    "GATES": 2,
    "EVERY": 1,
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
def _after(t, k, i, j, steps, blocks_m, blocks_n, GROUP_M: gl.constexpr):
    """The step after step k of tile t, which is (i, j): of the same tile, or this program's next.
    Behind the last one, t is out of range and (i, j) some tile."""
    k += 1
    if k == steps:
        k = 0
        t += gl.num_programs(0)
        i, j = _tile(min(t, blocks_m * blocks_n - 1), blocks_m, blocks_n, GROUP_M)
    return t, k, i, j


@gluon.jit
def _fetch_gate(gate, gates, gate_ready, i, j, part, PARTS: gl.constexpr):
    """Begins to load the gate's block of a part of tile (i, j)."""
    BLOCK_M: gl.constexpr = gate.block_type.shape[0]
    WIDTH: gl.constexpr = gate.block_type.shape[1]
    buffer = part % gates.type.shape[0]
    bar = gate_ready.index(buffer)
    mbarrier.expect(bar, gate.block_type.nbytes)
    async_load(gate, [i * BLOCK_M, (j * PARTS + part) * WIDTH], bar, gates.index(buffer))


@gluon.jit
def _finish(gate, out, gates, gate_ready, product, i, j, part, turn, layout: gl.constexpr):
    """Multiplies a part of tile (i, j), this program's turn-th, with its gate and stores it."""
    BUFFERS: gl.constexpr = gates.type.shape[0]
    PARTS: gl.constexpr = product.type.shape[0]
    BLOCK_M: gl.constexpr = product.type.shape[1]
    WIDTH: gl.constexpr = product.type.shape[2]
    buffer = part % BUFFERS
    mbarrier.wait(gate_ready.index(buffer), (turn * (PARTS // BUFFERS) + part // BUFFERS) & 1)
    factor = 2 * gl.sqrt(gates.index(buffer).load(layout).to(gl.float32))
    y = product.index(part).load(layout).to(gl.float32) * factor
    product.index(part).store(y.to(product.dtype))
    fence_async_shared()
    async_store(out, [i * BLOCK_M, (j * PARTS + part) * WIDTH], product.index(part))
    if part + BUFFERS < PARTS:
        _fetch_gate(gate, gates, gate_ready, i, j, part + BUFFERS, PARTS)


@gluon.jit
def _squared_relu_overlap_kernel(
    a,  # (M, K) in blocks (BLOCK_M, BLOCK_K)
    b,  # (N, K) in blocks (BLOCK_N, BLOCK_K); with a gate (K, N) in (BLOCK_K, BLOCK_N)
    gate,  # (M, N) in blocks (BLOCK_M, BLOCK_N / PARTS): h, or None for the activation itself
    out,  # (M, N) out, in blocks of the same
    M,
    N,
    K,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    GATES: gl.constexpr,
    EVERY: gl.constexpr,
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
    product = gl.allocate_shared_memory(a.dtype, [PARTS, BLOCK_M, WIDTH], out.layout)
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

    # What is fetched next: step next_k of tile next_t, which is (next_i, next_j).
    next_t, next_k = gl.program_id(0), 0
    next_i, next_j = _tile(next_t, blocks_m, blocks_n, GROUP_M)
    for n in gl.static_range(STAGES - 1):
        _fetch_step(*(a, b, slots, ready, n, next_i, next_j, next_k, next_t < tiles), GATED=GATED)
        next_t, next_k, next_i, next_j = _after(
            next_t, next_k, next_i, next_j, steps, blocks_m, blocks_n, GROUP_M
        )

    sums = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
    step, turn, before_i, before_j = 0, 0, 0, 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, j = _tile(t, blocks_m, blocks_n, GROUP_M)
        for k in range(0, steps):
            slot = step % STAGES
            mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
            right = b_slots.index(slot) if GATED else b_slots.index(slot).permute([1, 0])
            sums = warpgroup_mma(a_slots.index(slot), right, sums, use_acc=k > 0, is_async=True)
            # The step before has been multiplied: its slot is free.
            sums = warpgroup_mma_wait(1, deps=[sums])
            _fetch_step(
                *(a, b, slots, ready, step + STAGES - 1, next_i, next_j, next_k, next_t < tiles),
                GATED=GATED,
            )
            next_t, next_k, next_i, next_j = _after(
                next_t, next_k, next_i, next_j, steps, blocks_m, blocks_n, GROUP_M
            )
            step += 1
            if GATED:
                # From the third step on, when the gate's first block has come.
                part = (k - 2) // EVERY
                if (turn > 0) & (k >= 2) & (part < PARTS) & ((k - 2) % EVERY == 0):
                    _finish(
                        *(gate, out, gates, gate_ready, product, before_i, before_j, part),
                        turn=turn - 1,
                        layout=PART,
                    )
        sums = warpgroup_mma_wait(0, deps=[sums])
        parts = _parts(sums, PARTS)
        tma.store_wait(0)
        for n in gl.static_range(PARTS):
            y = parts[n]
            if not GATED:
                # Not gl.maximum, which turns NaN into 0.
                y = gl.where(y < 0, 0.0, y)
                y *= y
            product.index(n).store(y.to(a.dtype))
        if GATED:
            for n in gl.static_range(GATES):
                _fetch_gate(gate, gates, gate_ready, i, j, n, PARTS)
        else:
            fence_async_shared()
            for n in gl.static_range(PARTS):
                async_store(out, [i * BLOCK_M, (j * PARTS + n) * WIDTH], product.index(n))
        turn += 1
        before_i, before_j = i, j
    if GATED:
        for part in range(PARTS):
            _finish(
                *(gate, out, gates, gate_ready, product, before_i, before_j, part),
                turn=turn - 1,
                layout=PART,
            )
    tma.store_wait(0)


def least_depth(config: Mapping[str, int] = CONFIG) -> int:
    """The smallest K with a gate: all parts of a tile are finished within the next one's steps."""
    return config["BLOCK_K"] * (2 + config["EVERY"] * (config["PARTS"] - 1)) + 1


def squared_relu_overlap(
    a: Tensor, b: Tensor, gate: Tensor | None, config: Mapping[str, int] = CONFIG
) -> Tensor:
    """max(a b^T, 0)^2 of b (N, K), or with a gate (M, N) (a b) 2 sqrt(gate) of b (K, N); a (M, K).

    bf16 or fp16 on a Hopper GPU, K and N multiples of 8, with a gate K at least `least_depth`;
    what is not contiguous, or not aligned, is copied first. Checks nothing.
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
    multiprocessors = torch.cuda.get_device_properties(a.device).multi_processor_count
    programs = min(triton.cdiv(m, rows) * triton.cdiv(n, cols), multiprocessors)
    with torch.cuda.device_of(a):
        _squared_relu_overlap_kernel[(programs,)](*descriptors, m, n, k, **config)
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
        _aot_case("linear_squared_relu overlap bf16", with_gate=False),
        _aot_case("squared_relu_dgrad overlap bf16", with_gate=True),
    ]


def _aot_case(label: str, *, with_gate: bool) -> AotCase:
    m, n, k = (CONFIG[f"BLOCK_{letter}"] for letter in "MNK")
    part = _block_type([m, n // CONFIG["PARTS"]])
    signature = {
        "a": _block_type([m, k]),
        "b": _block_type([k, n] if with_gate else [n, k]),
        "out": part,
        **dict.fromkeys("MNK", "i32:16"),
    }
    constants: dict[str, int | None] = dict(CONFIG)
    if with_gate:
        signature["gate"] = part
    else:
        constants["gate"] = None
    return AotCase(label, _squared_relu_overlap_kernel, signature, constants, CONFIG["num_warps"])


def _block_type(block: list[int]) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return f"tensordesc<bf16{block},{layout!r}>"
