"""The MLP as one operator, its activation in a kernel of its own or in the products before it."""

import pytest
import torch

from kernels import mlp
from kernels.mlp import squared_relu_mlp, squared_relu_mlp_ref
from kernels.product import takes
from tests.gluon_emulator import by_our_product
from tests.operators import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_repeats,
    dtype_id,
    outputs_and_gradients,
    randn,
)

__all__ = ["by_our_product"]

TRAINED = [(65536, 1280, 5120), (4097, 2048, 8192)]

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def operands(m: int, c: int, f: int, dtype: torch.dtype) -> list[torch.Tensor]:
    scales = {(m, c): 1.0, (f, c): c**-0.5, (c, f): f**-0.5}
    return [randn(*shape, dtype=dtype, scale=scale) for shape, scale in scales.items()]


@over_dtypes
def test_accurate(dtype):
    inputs = operands(18, 24, 40, dtype)
    inputs[0] = inputs[0].view(2, 9, 24)
    assert_accurate(squared_relu_mlp, squared_relu_mlp_ref, inputs)


@pytest.mark.usefixtures("by_our_product")
def test_accurate_with_the_activation_in_the_epilogue():
    for m in (0, 3, 130):
        inputs = operands(m, 520, 528, torch.bfloat16)
        assert_accurate(squared_relu_mlp, squared_relu_mlp_ref, inputs)


@pytest.mark.usefixtures("by_our_product")
@pytest.mark.parametrize("place", ["x", "fc", "proj", "dy"])
def test_operands_anywhere_with_the_activation_in_the_epilogue(place):
    """Rows that are not multiples of 16 bytes apart, and what begins at no multiple of them."""
    at = ("x", "fc", "proj", "dy").index(place)
    tensors = [*operands(9, 520, 40, torch.bfloat16), randn(9, 520, dtype=torch.bfloat16)]
    expected = outputs_and_gradients(squared_relu_mlp, tensors[:3], tensors[3:])
    rows, columns = tensors[at].shape
    apart = randn(rows, columns + 4, dtype=torch.bfloat16)[:, :columns]
    shifted = randn(rows * columns + 1, dtype=torch.bfloat16)[1:].view(rows, columns)
    assert shifted.data_ptr() % 16 == 2
    for other in (apart, shifted):
        moved = [*tensors]
        moved[at] = other.copy_(tensors[at])
        found = outputs_and_gradients(squared_relu_mlp, moved[:3], moved[3:])
        # A library may add up strided operands in another order.
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


def test_accurate_with_the_weights_gradients_in_two_parts(monkeypatch):
    monkeypatch.setattr(mlp, "_cut", lambda dy, x: 16)
    for c, f in ((24, 40), (40, 24)):
        inputs = operands(130, c, f, torch.bfloat16)
        assert_accurate(squared_relu_mlp, squared_relu_mlp_ref, inputs)


def test_nan_stays():
    x, fc, proj = operands(4, 16, 24, torch.bfloat16)
    x[1, 3] = float("nan")
    y = squared_relu_mlp(x, fc, proj)
    assert y[1].isnan().all()
    assert not y[[0, 2, 3]].isnan().any()


def test_only_the_gradients_that_are_needed():
    x, fc, proj = operands(9, 24, 40, torch.float32)
    whole = [t.clone().requires_grad_() for t in (x, fc, proj)]
    squared_relu_mlp(*whole).sum().backward()
    for i in range(3):
        alone = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, fc, proj))]
        squared_relu_mlp(*alone).sum().backward()
        torch.testing.assert_close(alone[i].grad, whole[i].grad)
        assert [t.grad is None for t in alone] == [i != j for j in range(3)]


def test_repeats_bit_for_bit():
    assert_repeats(squared_relu_mlp, operands(33, 16, 40, torch.bfloat16))


def test_compiles():
    assert_compiles(squared_relu_mlp, operands(9, 24, 40, torch.float32))


def test_compiles_once_for_any_number_of_rows():
    _, fc, proj = operands(1, 24, 40, torch.float32)
    assert_compiles(squared_relu_mlp, *([randn(m, 24), fc, proj] for m in (5, 9, 33)))


def test_opcheck():
    x, fc, proj = operands(4, 16, 24, torch.float32)
    leaves = tuple(t.requires_grad_() for t in (x, fc, proj))
    torch.library.opcheck(torch.ops.gptfast.squared_relu_mlp.default, leaves)


def test_opcheck_of_backward_by_a_transposed_weight():
    dy, weight, h = randn(4, 16), randn(24, 16).t(), randn(4, 24).square()
    torch.library.opcheck(torch.ops.gptfast.squared_relu_mlp_bwd.default, (dy, weight, h))


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("x", "fc", "proj", "message"),
    [
        (zeros(4, 16).float(), zeros(8, 16), zeros(16, 8), "it takes one dtype"),
        (zeros(4, 16), zeros(8, 24), zeros(16, 8), r"weights \(8, 24\) and \(16, 8\)"),
        (zeros(4, 16), zeros(8, 16), zeros(16, 9), r"it takes \(..., C\), \(F, C\)"),
        (zeros(16, 4).t(), zeros(8, 16), zeros(16, 8), r"has strides \(1, 4\)"),
        (zeros(), zeros(8, 16), zeros(16, 8), r"x has shape \(\); it needs a last dimension"),
    ],
)
def test_refuses(x, fc, proj, message):
    with pytest.raises(ValueError, match=message):
        squared_relu_mlp(x, fc, proj)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_accurate_at_trained_shapes(shape):
    inputs = operands(*shape, torch.bfloat16)
    if torch.cuda.get_device_capability()[0] == 9:
        assert takes(inputs[0], inputs[1].t())
    assert_accurate(squared_relu_mlp, squared_relu_mlp_ref, inputs)
