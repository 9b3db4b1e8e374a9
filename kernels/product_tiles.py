"""The Gluon kernel of kernels/product.py: its loop over tiles, and what a tile ends in.

Threads wait for the copy engine at barriers: one a slot of operands, one a buffer of the gate. A
step is counted over all tiles of a program, and its slot is that number modulo STAGES.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.6's names and those from 3.8 on.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


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
def _fetch_step(a, b, slots, ready, step, i, j, k, wanted, TRANSPOSED: gl.constexpr):
    """Begins to load step k's operands of tile (i, j), the step-th of all, if it is wanted."""
    a_slots, b_slots = slots
    slot = step % a_slots.type.shape[0]
    bar = ready.index(slot)
    BLOCK_K: gl.constexpr = a.block_type.shape[1]
    BLOCK_N: gl.constexpr = b.block_type.shape[0] if TRANSPOSED else b.block_type.shape[1]
    from_b = [j * BLOCK_N, k * BLOCK_K] if TRANSPOSED else [k * BLOCK_K, j * BLOCK_N]
    mbarrier.expect(bar, a.block_type.nbytes + b.block_type.nbytes, pred=wanted)
    async_load(a, [i * a.block_type.shape[0], k * BLOCK_K], bar, a_slots.index(slot), pred=wanted)
    async_load(b, from_b, bar, b_slots.index(slot), pred=wanted)


@gluon.jit
def _multiply_step(
    a, b, slots, ready, sums, step, k, steps, tile, following, TRANSPOSED: gl.constexpr
):
    """Begins step k of a tile, the step-th of all, and to load the one STAGES - 1 after it, of the
    same tile or of the one that follows: its (i, j), and whether it exists."""
    a_slots, b_slots = slots
    STAGES: gl.constexpr = a_slots.type.shape[0]
    slot = step % STAGES
    mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
    right = b_slots.index(slot).permute([1, 0]) if TRANSPOSED else b_slots.index(slot)
    sums = warpgroup_mma(a_slots.index(slot), right, sums, use_acc=k > 0, is_async=True)
    # The step before has been multiplied: its slot is free.
    sums = warpgroup_mma_wait(1, deps=[sums])
    ahead = k + STAGES - 1
    here = ahead < steps
    i = tile[0] if here else following[0]
    j = tile[1] if here else following[1]
    ahead = ahead if here else ahead - steps
    wanted = here | following[2]
    _fetch_step(*(a, b, slots, ready, step + STAGES - 1, i, j, ahead, wanted), TRANSPOSED)
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
def product_kernel(
    a,  # (M, K) in blocks (BLOCK_M, BLOCK_K)
    b,  # (K, N) in blocks (BLOCK_K, BLOCK_N); TRANSPOSED: (N, K) in (BLOCK_N, BLOCK_K)
    gate,  # (M, N) in blocks (BLOCK_M, BLOCK_N / PARTS), or None
    out,  # (M, N) out, in blocks of the same
    taken,  # (1,) int32, 0: tiles that programs have taken, beyond each one's first
    M,
    N,
    K,
    TRANSPOSED: gl.constexpr,
    SQUARED_RELU: gl.constexpr,
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
    B_ROWS: gl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    B_COLS: gl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
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
        _fetch_step(*(a, b, slots, ready, n, i, j, n, True), TRANSPOSED)

    sums = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
    # The tile before this one, and its product in registers.
    held = _rounded(_parts(sums, PARTS), a.dtype, PART)
    # (Numbers, for Triton does not carry a tuple that only changes places through a loop.)
    step, turn, before_i, before_j = 0, 0, 0, 0
    while t < tiles:
        following = (i, j, False)
        sums = _multiply_step(
            *(a, b, slots, ready, sums, step, 0, steps, (i, j), following), TRANSPOSED
        )
        # While that multiplies. Whoever is free takes the next tile: another kernel may hold some
        # multiprocessors for a while.
        t = gl.num_programs(0) + gl.atomic_add(taken, 1, sem="relaxed")
        next_i, next_j = _tile(min(t, tiles - 1), blocks_m, blocks_n, GROUP_M)
        following = (next_i, next_j, t < tiles)
        for part in gl.static_range(PARTS):
            sums = _multiply_step(
                *(a, b, slots, ready, sums, step + 1 + part, 1 + part, steps, (i, j), following),
                TRANSPOSED,
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
                *(a, b, slots, ready, sums, step + k, k, steps, (i, j), following), TRANSPOSED
            )
        sums = warpgroup_mma_wait(0, deps=[sums])
        y = sums
        if SQUARED_RELU:
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
