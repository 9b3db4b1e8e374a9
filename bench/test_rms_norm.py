"""How fast are RMSNorm, and residual add + RMSNorm in one pass, without a weight?

    pytest bench/test_rms_norm.py

Bytes, E = tokens x width elements of 2: the norm reads x and writes y; its backward reads dy and y
(or x) and writes dx. With the sum: reads residual and branch, writes sum and norm; backward reads
dy, dsum and y (or the sum) and writes the one gradient of both. Row statistics are not counted.
"""

import pytest
import torch

from bench.case import DIRECTIONS, Case, Size, rand, with_both
from bench.providers import compiled, eager_rms_norm, liger_rms_norm, quack_rms_norm
from bench.timing import Cost
from kernels.rms_norm import EPS, add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref


def eager_add_rms_norm(residual, branch):
    total = residual + branch
    return total, eager_rms_norm(total)


def liger_add_rms_norm():
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def call(residual, branch):
        # It insists on a weight; ones without a gradient are 2 bytes a column.
        weight = torch.ones(branch.shape[-1], device=branch.device, dtype=branch.dtype)
        y, total = LigerFusedAddRMSNormFunction.apply(branch, residual, weight, EPS)
        return total, y

    return call


def quack_add_rms_norm():
    from quack.rmsnorm import rmsnorm

    def call(residual, branch):
        y, total = rmsnorm(branch, residual=residual, eps=EPS, prenorm=True)
        return total, y

    return call


RMS_NORM = {
    "ours": lambda: rms_norm,
    "eager": lambda: eager_rms_norm,
    "compile": lambda: compiled(eager_rms_norm),
    "liger": liger_rms_norm,
    "quack": quack_rms_norm,
}
ADD_RMS_NORM = {
    "ours": lambda: add_rms_norm,
    "eager": lambda: eager_add_rms_norm,
    "compile": lambda: compiled(eager_add_rms_norm),
    "liger": liger_add_rms_norm,
    "quack": quack_add_rms_norm,
}


def case(name: str, size: Size) -> Case:
    shape = size.tokens, size.config.n_embd
    tensor = 2 * size.tokens * size.config.n_embd
    if name == "rms_norm":
        cost = with_both(Cost(bytes=2 * tensor), Cost(bytes=3 * tensor))
        return Case(name, lambda: (rand(*shape, grad=True),), rms_norm_ref, RMS_NORM, cost)
    return Case(
        name,
        lambda: (rand(*shape, grad=True), rand(*shape, grad=True)),
        add_rms_norm_ref,
        ADD_RMS_NORM,
        with_both(Cost(bytes=4 * tensor), Cost(bytes=4 * tensor)),
    )


@pytest.mark.parametrize("provider", RMS_NORM)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rms_norm(bench, size, direction, provider):
    bench(case("rms_norm", size), size, direction, provider)


@pytest.mark.parametrize("provider", ADD_RMS_NORM)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_add_rms_norm(bench, size, direction, provider):
    bench(case("add_rms_norm", size), size, direction, provider)
