"""How fast is rotary + QK-norm over the packed qkv product, with its packed gradient?

    pytest bench/test_qk_norm.py

Bytes a token, H and Hkv heads of D elements of 2: forward reads q and k and writes them, 2 (H +
Hkv) D elements; backward reads dq, dk, dv and q and k (or their products) and writes dq, dk and dv,
(3 H + 5 Hkv) D. Row statistics are not counted. Rivals have no such operator: theirs are made of a
rotation and norms, as their users make them.
"""

from functools import partial

import pytest

from bench.case import DIRECTIONS, Case, Size, device, rand, with_both
from bench.providers import (
    compiled,
    eager_rms_norm,
    eager_rotary,
    liger_rms_norm,
    liger_rotary,
    quack_rms_norm,
    quack_rotary,
)
from bench.timing import Cost
from gptfast.model import GPTConfig, rotary_table
from kernels.qk_norm import rotary_qk_norm, rotary_qk_norm_ref


def composed(rotate, norm, c: GPTConfig):
    """The operator, of a rotation of q and k and a norm of the last dimension."""

    def call(qkv, cos, sin):
        heads = qkv.unflatten(-1, (-1, c.head_dim))
        q, k, v = heads.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
        q, k = rotate(q, k, cos, sin)
        return norm(q), norm(k), v

    return call


def quack(cos, sin, c: GPTConfig):
    """The same, with q and k in one launch each."""
    rotate, norm = quack_rotary(cos, sin), quack_rms_norm()

    def call(qkv, *_):
        heads = qkv.unflatten(-1, (-1, c.head_dim))
        qk, v = heads.split((c.n_head + c.n_kv_head, c.n_kv_head), dim=2)
        q, k = norm(rotate(qk)).split((c.n_head, c.n_kv_head), dim=2)
        return q, k, v

    return call


def case(size: Size) -> Case:
    c = size.config
    cos, sin = rotary_table(c, device())
    width = (c.n_head + 2 * c.n_kv_head) * c.head_dim
    # One head of every token.
    head = 2 * size.tokens * c.head_dim
    heads = {"n_head": c.n_head, "n_kv_head": c.n_kv_head}
    eager = composed(eager_rotary, eager_rms_norm, c)
    providers = {
        "ours": lambda: partial(rotary_qk_norm, **heads),
        "eager": lambda: eager,
        "compile": lambda: compiled(eager),
        "liger": lambda: composed(liger_rotary(cos, sin), liger_rms_norm(), c),
        "quack": lambda: quack(cos, sin, c),
    }
    return Case(
        "rotary_qk_norm",
        lambda: (rand(size.batch, c.sequence_len, width, grad=True), cos, sin),
        partial(rotary_qk_norm_ref, **heads),
        providers,
        with_both(
            Cost(bytes=head * 2 * (c.n_head + c.n_kv_head)),
            Cost(bytes=head * (3 * c.n_head + 5 * c.n_kv_head)),
        ),
    )


@pytest.mark.parametrize("provider", ["ours", "eager", "compile", "liger", "quack"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_qk_norm(bench, size, direction, provider):
    bench(case(size), size, direction, provider)
