"""How fast is the squared ReLU, and the MLP around it?

    pytest bench/test_squared_relu.py

Bytes of the elementwise pair, E = tokens x 4 widths elements of 2: forward reads x and writes h,
backward reads dh and h (or x) and writes dx. The MLP's rate is that of its products, two forward
and four backward, 2 FLOPs a multiplication; the provider `pair` is ours with the activation in
kernels of its own instead of the products' epilogues. bench/tune_product.py compares that product
with cuBLAS's. QuACK's product with a squared ReLU in its epilogue has no gradient through that
output (it is meant for pairs of layers) and is not here.
"""

import pytest
import torch.nn.functional as F

from bench.case import BOTH, DIRECTIONS, FORWARD, Case, Size, rand, with_both
from bench.providers import compiled
from bench.timing import Cost
from kernels.mlp import squared_relu_mlp, squared_relu_mlp_ref
from kernels.squared_relu import squared_relu, squared_relu_ref


def eager_squared_relu(x):
    return F.relu(x).square()


def eager_mlp(x, fc_weight, proj_weight):
    return F.linear(eager_squared_relu(F.linear(x, fc_weight)), proj_weight)


def pair_mlp(x, fc_weight, proj_weight):
    return F.linear(squared_relu(F.linear(x, fc_weight)), proj_weight)


def liger_squared_relu():
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    return LigerReLUSquaredFunction.apply


def liger_mlp():
    activation = liger_squared_relu()
    return lambda x, fc, proj: F.linear(activation(F.linear(x, fc)), proj)


SQUARED_RELU = {
    "ours": lambda: squared_relu,
    "eager": lambda: eager_squared_relu,
    "compile": lambda: compiled(eager_squared_relu),
    "liger": liger_squared_relu,
}
MLP = {
    "ours": lambda: squared_relu_mlp,
    "eager": lambda: eager_mlp,
    "compile": lambda: compiled(eager_mlp),
    "liger": liger_mlp,
    "pair": lambda: pair_mlp,
}


def elementwise(size: Size) -> Case:
    m, f = size.tokens, 4 * size.config.n_embd
    return Case(
        "squared_relu",
        lambda: (rand(m, f, grad=True),),
        squared_relu_ref,
        SQUARED_RELU,
        with_both(Cost(bytes=2 * 2 * m * f), Cost(bytes=3 * 2 * m * f)),
    )


def mlp(size: Size) -> Case:
    m, c, f = size.tokens, size.config.n_embd, 4 * size.config.n_embd
    return Case(
        "squared_relu_mlp",
        lambda: (
            rand(m, c, grad=True),
            rand(f, c, grad=True, scale=c**-0.5),
            rand(c, f, grad=True, scale=f**-0.5),
        ),
        squared_relu_mlp_ref,
        MLP,
        with_both(
            Cost(flops=4 * m * c * f, bytes=2 * (2 * m * c + 2 * f * c + 2 * m * f)),
            Cost(flops=8 * m * c * f, bytes=2 * (3 * m * c + 4 * f * c + 4 * m * f)),
        ),
    )


@pytest.mark.parametrize("provider", SQUARED_RELU)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_squared_relu(bench, size, direction, provider):
    bench(elementwise(size), size, direction, provider)


@pytest.mark.parametrize("provider", MLP)
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_squared_relu_mlp(bench, size, direction, provider):
    bench(mlp(size), size, direction, provider)
