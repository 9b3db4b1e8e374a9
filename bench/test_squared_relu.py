"""How fast is the squared ReLU, and a linear layer that ends in it?

    pytest bench/test_squared_relu.py

Bytes of the elementwise pair, E = tokens x 4 widths elements of 2: forward reads x and writes h,
backward reads dh and h (or x) and writes dx. The linear layer's rate is that of its products, one
forward and two backward, 2 FLOPs a multiplication. QuACK's product with a squared ReLU in its
epilogue has no gradient through that output (it is meant for pairs of layers) and is not here.
"""

import pytest
import torch.nn.functional as F

from bench.case import DIRECTIONS, Case, Size, rand, with_both
from bench.providers import compiled
from bench.timing import Cost
from kernels.squared_relu import (
    linear_squared_relu,
    linear_squared_relu_ref,
    squared_relu,
    squared_relu_ref,
)


def eager_squared_relu(x):
    return F.relu(x).square()


def eager_linear_squared_relu(x, weight):
    return eager_squared_relu(F.linear(x, weight))


def liger_squared_relu():
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    return LigerReLUSquaredFunction.apply


def liger_linear_squared_relu():
    activation = liger_squared_relu()
    return lambda x, weight: activation(F.linear(x, weight))


SQUARED_RELU = {
    "ours": lambda: squared_relu,
    "eager": lambda: eager_squared_relu,
    "compile": lambda: compiled(eager_squared_relu),
    "liger": liger_squared_relu,
}
LINEAR_SQUARED_RELU = {
    "ours": lambda: linear_squared_relu,
    "eager": lambda: eager_linear_squared_relu,
    "compile": lambda: compiled(eager_linear_squared_relu),
    "liger": liger_linear_squared_relu,
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


def linear(size: Size) -> Case:
    m, c, f = size.tokens, size.config.n_embd, 4 * size.config.n_embd
    return Case(
        "linear_squared_relu",
        lambda: (rand(m, c, grad=True), rand(f, c, grad=True, scale=c**-0.5)),
        linear_squared_relu_ref,
        LINEAR_SQUARED_RELU,
        with_both(
            Cost(flops=2 * m * c * f, bytes=2 * (m * c + f * c + m * f)),
            Cost(flops=4 * m * c * f, bytes=2 * (2 * m * c + 2 * f * c + 2 * m * f)),
        ),
    )


@pytest.mark.parametrize("provider", SQUARED_RELU)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_squared_relu(bench, size, direction, provider):
    bench(elementwise(size), size, direction, provider)


@pytest.mark.parametrize("provider", LINEAR_SQUARED_RELU)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_linear_squared_relu(bench, size, direction, provider):
    bench(linear(size), size, direction, provider)
