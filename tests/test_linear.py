"""A linear layer, its product by our kernel or by PyTorch's."""

import pytest
import torch

from kernels.linear import linear, linear_ref
from tests.gluon_emulator import by_our_product
from tests.operators import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_repeats,
    dtype_id,
    randn,
)

__all__ = ["by_our_product"]

TRAINED = [(65536, 1280, 3840), (65536, 1280, 1280), (4097, 1024, 2816)]


def operands(m: int, k: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_accurate(dtype):
    x, weight = operands(18, 24, 40, dtype)
    assert_accurate(linear, linear_ref, [x.view(2, 9, 24), weight])


@pytest.mark.usefixtures("by_our_product")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
def test_accurate_by_our_product(dtype):
    for m in (0, 3, 130):
        assert_accurate(linear, linear_ref, operands(m, 520, 528, dtype))


def test_only_the_gradients_that_are_needed():
    x, weight = operands(9, 24, 40, torch.float32)
    whole = [t.clone().requires_grad_() for t in (x, weight)]
    linear(*whole).sum().backward()
    for i in range(2):
        alone = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, weight))]
        linear(*alone).sum().backward()
        torch.testing.assert_close(alone[i].grad, whole[i].grad)
        assert alone[1 - i].grad is None


def test_repeats_bit_for_bit():
    assert_repeats(linear, operands(33, 16, 40, torch.bfloat16))


def test_compiles_once_for_any_number_of_rows():
    _, weight = operands(1, 24, 40, torch.float32)
    assert_compiles(linear, *([randn(m, 24), weight] for m in (5, 9, 33)))


def test_opcheck():
    leaves = tuple(t.requires_grad_() for t in operands(4, 16, 24, torch.float32))
    torch.library.opcheck(torch.ops.gptfast.linear.default, leaves)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (zeros(4, 16).float(), zeros(8, 16), "weight torch.bfloat16; it takes one dtype"),
        (zeros(4, 16), zeros(8, 24), r"weight \(8, 24\); it takes \(..., K\) and \(N, K\)"),
        (zeros(4, 16), zeros(16), r"weight \(16,\); it takes"),
        (zeros(16, 4).t(), zeros(8, 16), r"has strides \(1, 4\)"),
        (zeros(), zeros(8, 16), r"x has shape \(\); it needs a last dimension"),
    ],
)
def test_refuses(x, weight, message):
    with pytest.raises(ValueError, match=message):
        linear(x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_accurate_at_trained_shapes(shape):
    assert_accurate(linear, linear_ref, operands(*shape, torch.bfloat16))
