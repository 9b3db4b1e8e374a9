"""What kernels over capped logits share: the soft cap z = cap tanh(u / cap) made of exponentials,
rows that do not count, two bf16 out of 32 bits."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _shared_reciprocal(x, N: tl.constexpr):
    """1 / x (N,) with one special function for every four neighbours; x in [1, 2^30].

    1/a = b / (ab) and 1/b = a / (ab), applied twice. A thread holds at least four neighbours, so
    that nothing moves between threads. rsqrt is one instruction, where a division checks for
    denormals before and after.
    """
    a, b = tl.split(tl.reshape(x, [N // 2, 2]))
    c, d = tl.split(tl.reshape(a * b, [N // 4, 2]))
    root = tl.rsqrt(c * d)
    r = root * root
    ab = tl.reshape(tl.join(r * d, r * c), [N // 2])
    return tl.reshape(tl.join(ab * b, ab * a), [N])


@triton.jit
def cap_gap(u, cap, N: tl.constexpr):
    """(1 - tanh(u / cap)) / 2 = 1 / (1 + exp(2 u / cap)) of u (N,), or of a scalar for N = 1.

    z in units of ln 2 is then (1 - 2 gap) cap log2(e), and dz/du is 4 gap (1 - gap).
    """
    doubled = u * (2.0 * LOG2_E / cap)
    # Past 2^30 tanh is 1 in fp32, and a product of four stays finite. NaN must stay NaN.
    x = 1.0 + tl.exp2(tl.minimum(doubled, 30.0, propagate_nan=tl.PropagateNan.ALL))
    return _shared_reciprocal(x, N) if N > 1 else 1.0 / x


@triton.jit
def ignore_row(logits_ptr, loss_ptr, V, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(loss_ptr, 0.0)
    if GRAD:
        lanes = tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
        for start in range(0, V, BLOCK):
            tl.store(logits_ptr + start + lanes, zero, mask=start + lanes < V)


@triton.jit
def halves(pair):
    """Two bf16 in 32 bits -> both in fp32, that of the lower address first."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
