"""How fast is Newton-Schulz's orthogonalisation of all matrices that Muon has, on one GPU?

    pytest bench/test_newton_schulz.py

d20: 80 of 1280 x 1280, 20 of 5120 x 1280, 20 of 1280 x 5120. FLOPs of one of five steps, r rows and
c columns, r <= c: 2 r r c for X X^T, 2 r r r for its square, 2 r r c for the last product. They
count whole products: who computes half of a symmetric one may pass the ceiling. QuACK's row is made
of its symmetric products; liger-kernel has nothing here. Forward only: Muon needs no gradient.
"""

import pytest
import torch

from bench.case import FORWARD, Case, Size, rand
from bench.providers import compiled
from bench.timing import Cost
from kernels.newton_schulz import COEFFICIENTS, EPS, newton_schulz

STEPS = 5
A, B, C = COEFFICIENTS


def by_products(gram, polynomial):
    """Five steps, of gram(x) = x x^T and polynomial(g) = B g + C g g, in x's dtype."""

    def call(x):
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
        for _ in range(STEPS):
            x = torch.baddbmm(x, polynomial(gram(x)), x, beta=A)
        return x.mT if tall else x

    return lambda *batches: tuple(map(call, batches))


by_bmm = by_products(
    lambda x: torch.bmm(x, x.mT),
    lambda g: torch.baddbmm(g, g, g, beta=B, alpha=C),
)


def ours(*batches):
    return tuple(newton_schulz(x, steps=STEPS) for x in batches)


def quack():
    from quack.gemm_interface import gemm_symmetric

    return by_products(
        lambda x: gemm_symmetric(x, x.mT),
        lambda g: gemm_symmetric(g, g.mT, C=g, alpha=C, beta=B),
    )


PROVIDERS = {
    "ours": lambda: ours,
    "eager": lambda: by_bmm,
    "compile": lambda: compiled(by_bmm),
    "quack": quack,
}


def flops(n: int, rows: int, columns: int) -> int:
    r, c = sorted((rows, columns))
    return n * STEPS * (4 * r * r * c + 2 * r**3)


def case(size: Size) -> Case:
    layers, width = size.config.n_layer, size.config.n_embd
    # q, k, v and the attention's projection; the two of the MLP.
    shapes = (
        (4 * layers, width, width),
        (layers, 4 * width, width),
        (layers, width, 4 * width),
    )
    return Case(
        "newton_schulz",
        lambda: tuple(rand(*shape) for shape in shapes),
        by_bmm,
        PROVIDERS,
        {
            FORWARD: Cost(
                flops=sum(flops(*shape) for shape in shapes),
                bytes=sum(2 * 2 * n * r * c for n, r, c in shapes),
            )
        },
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", [FORWARD])
def test_newton_schulz(bench, size, direction, provider):
    bench(case(size), size, direction, provider)
