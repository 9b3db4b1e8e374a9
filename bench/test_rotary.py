"""How fast is rotary position embedding of q and k?

    pytest bench/test_rotary.py

Bytes: q and k read once and written once, forward and backward alike; the angles stay in L2.
liger-kernel rotates in place: it gets copies, made before the clock, and moves the same bytes.
"""

import pytest

from bench.case import DIRECTIONS, Case, Size, device, rand, with_both
from bench.providers import compiled, eager_rotary, liger_rotary, quack_rotary
from bench.timing import Cost
from gptfast.model import rotary_table
from kernels.rotary import rotary, rotary_ref


def quack(cos, sin):
    rotate = quack_rotary(cos, sin)
    return lambda q, k, *_: (rotate(q), rotate(k))


def case(size: Size) -> Case:
    c = size.config
    cos, sin = rotary_table(c, device())
    cost = Cost(bytes=2 * 2 * size.tokens * (c.n_head + c.n_kv_head) * c.head_dim)

    def inputs():
        q, k = (
            rand(size.batch, c.sequence_len, heads, c.head_dim, grad=True)
            for heads in (c.n_head, c.n_kv_head)
        )
        return q, k, cos, sin

    providers = {
        "ours": lambda: rotary,
        "eager": lambda: eager_rotary,
        "compile": lambda: compiled(eager_rotary),
        "liger": lambda: liger_rotary(cos, sin),
        "quack": lambda: quack(cos, sin),
    }
    return Case(
        "rotary",
        inputs,
        rotary_ref,
        providers,
        with_both(cost, cost),
        clobbering=frozenset({"liger"}),
    )


@pytest.mark.parametrize("provider", ["ours", "eager", "compile", "liger", "quack"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rotary(bench, size, direction, provider):
    bench(case(size), size, direction, provider)
