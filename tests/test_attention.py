"""Attention on CPU: values of every backend there, the choice, and its reasons."""

import math

import pytest
import torch

from gptfast.attention import BACKENDS, attention, choose_attention
from gptfast.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["flash2", "math"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_and_gradients_equal_plain_mathematics(backend, kv_heads):
    q = torch.randn(2, 7, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 7, kv_heads, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    dout = torch.randn_like(q)

    many_k, many_v = (x.repeat_interleave(4 // kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, many_k) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf)
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), many_v)
    want_grads = torch.autograd.grad(want, (q, k, v), dout)

    got = attention(q, k, v, backend=backend)
    assert got.shape == q.shape
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), dout), want_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_requested_backend_is_proven():
    choice = choose_attention("math", CPU, torch.float32, 16)
    assert choice.backend == "math"
    assert "proven by a forward + backward" in choice.reason


def test_a_backend_that_cannot_run_here_is_refused_with_its_reason():
    with pytest.raises(UserError, match="flash4: RuntimeError: needs a CUDA GPU"):
        choose_attention("flash4", CPU, torch.float32, 16)


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"'fast': choose auto or one of flash4, .*math"):
        choose_attention("fast", CPU, torch.float32, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash2", "math"])
def test_on_a_gpu_the_choice_is_proven(backend):
    choice = choose_attention(backend, torch.device("cuda"), torch.bfloat16, 128)
    assert choice.backend in BACKENDS if backend == "auto" else choice.backend == backend


@pytest.mark.gpu
def test_on_a_gpu_the_deterministic_choice_repeats_bit_for_bit():
    torch.use_deterministic_algorithms(True)
    try:
        device = torch.device("cuda")
        choice = choose_attention("auto", device, torch.bfloat16, 128, deterministic=True)
        q, k, v = torch.randn(
            3, 4, 1024, 2, 128, device=device, dtype=torch.bfloat16, requires_grad=True
        )
        runs = [
            torch.autograd.grad(attention(q, k, v, backend=choice.backend).sum(), (q, k, v))
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
