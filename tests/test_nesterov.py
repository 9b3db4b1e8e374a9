"""Muon's momentum in one pass: numbers, agreement with plain PyTorch, what is not finite."""

import pytest
import torch

from kernels.nesterov import nesterov, nesterov_ref
from tests.operators import DEVICE, host_never_waits, poisoned_memory, randn


def scalar(value: float | bool) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize("op", [nesterov, nesterov_ref])
def test_looks_ahead_of_the_average(op):
    average = torch.tensor([[[1.0, 2.0]]], device=DEVICE)
    grads = torch.tensor([[[6.0, -8.0]]], device=DEVICE)
    ahead = op(average, grads, scalar(0.5), 0.75, scalar(True))
    assert average.tolist() == [[[1.5, 0.5]]]
    assert ahead.tolist() == [[[1.875, -0.625]]]
    assert ahead.dtype == torch.bfloat16
    assert grads.tolist() == [[[6.0, -8.0]]]


@pytest.mark.parametrize("op", [nesterov, nesterov_ref])
def test_stands_still_unless_finite(op):
    average = torch.tensor([1.0, -0.0, 3.0], device=DEVICE)
    bits = average.view(torch.int32).tolist()
    grads = torch.tensor([6.0, torch.nan, torch.inf], device=DEVICE)
    ahead = op(average, grads, scalar(torch.nan), 0.75, scalar(False))
    assert average.view(torch.int32).tolist() == bits
    assert ahead.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 4, 8), (1, 1, 1), (3, 5, 7), (2, 64, 48)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.85, 0.95])
def test_agrees_with_pytorch(shape, momentum):
    average, grads, scale = randn(*shape), randn(*shape), scalar(0.3)
    theirs = average.clone()
    ahead_ref = nesterov_ref(theirs, grads, scale, momentum, scalar(True))
    with poisoned_memory():
        ahead = nesterov(average, grads, scale, momentum, scalar(True))
    torch.testing.assert_close(average, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ahead, ahead_ref, rtol=2**-7, atol=1e-6)


@pytest.mark.gpu
def test_the_host_never_waits_and_offsets_pass_32_bits():
    average = torch.zeros(2**31 + 2048, device=DEVICE)
    grads, scale, finite = torch.ones_like(average), scalar(1.0), scalar(True)
    with host_never_waits():
        ahead = nesterov(average, grads, scale, 0.5, finite)
    assert average[-1] == 0.5
    assert ahead[-1] == 0.75
