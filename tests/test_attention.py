"""Attention on CPU: values of every backend there, the choice, and its reasons."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import (
    _registry,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from gptfast.attention import BACKENDS, Documents, attention, choose_attention
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


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_documents_attend_to_themselves(rows, kv_heads):
    # Three rows of seven tokens; no document crosses a border; one is empty.
    bounds = [0, 7, 10, 10, 14, 15, 21]
    shape = (3, 7) if rows == 3 else (1, 21)
    q = torch.randn(*shape, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(*shape, kv_heads, 8, dtype=torch.float64) for _ in "kv")
    starts = torch.tensor(bounds, dtype=torch.int32)
    got = attention(q, k, v, backend="flash2", documents=Documents(starts, longest=7, rows=rows))
    flat = [x.reshape(1, 21, *x.shape[2:]) for x in (q, k, v)]
    want = torch.cat(
        [attention(*(x[:, a:b] for x in flat), backend="math") for a, b in pairwise(bounds)], dim=1
    )
    torch.testing.assert_close(got, want.view_as(q))
    dout = torch.randn_like(got)
    (a,) = torch.autograd.grad(got, q, dout)
    (b,) = torch.autograd.grad(want.view_as(q), q, dout)
    torch.testing.assert_close(a, b)


def test_positions_restart_with_each_document():
    starts = torch.tensor([0, 3, 3, 4, 9, 9, 9], dtype=torch.int32)
    documents = Documents(starts, longest=5)
    assert documents.positions(9).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert documents.of_tokens(9).tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 3]


def test_a_requested_backend_is_proven():
    choice = choose_attention("math", CPU, torch.float32, 16, documents=True)
    assert choice.backend == "math"
    assert "proven by a forward + backward" in choice.reason


def test_a_backend_that_cannot_run_here_is_refused_with_its_reason():
    with pytest.raises(UserError, match="flash4: RuntimeError: needs a CUDA GPU"):
        choose_attention("flash4", CPU, torch.float32, 16)


def test_whatever_a_backend_raises_is_its_reason(monkeypatch):
    class CompilerError(Exception):
        """As flash-attn-4's compiler raises it."""

    for error, reason in (
        (CompilerError("no such layout\nmore"), "flash4: CompilerError: no such layout$"),
        (AttributeError("no attribute '_flash_attn_fwd'"), "flash4: AttributeError: no attribute"),
        (CompilerError(" "), "flash4: CompilerError: $"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("gptfast.attention._activate", fail)
        with pytest.raises(UserError, match=reason):
            choose_attention("flash4", CPU, torch.float32, 16)


@pytest.fixture
def flash3_in_place(monkeypatch):
    """SDPA's FlashAttention replaced for the whole process, as flash-attn-3's activation does it,
    by one that refuses this device."""

    class Handle:
        def __init__(self):
            self.library = torch.library.Library("aten", "IMPL", "CPU")
            self.library.impl("_scaled_dot_product_flash_attention_for_cpu", refuse, "CPU")

        def remove(self):
            self.library = None

    def refuse(*_, **__):
        raise RuntimeError("FA3 requires compute capability 9.0")

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", Handle)
    with warnings.catch_warnings():
        # That an operator is replaced.
        warnings.simplefilter("ignore", UserWarning)
        activate_flash_attention_impl("FA3")
    yield
    if current_flash_attention_impl():
        restore_flash_attention_impl()


@pytest.mark.usefixtures("flash3_in_place")
def test_flash2_is_not_flash3():
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(RuntimeError, match="compute capability"):
        attention(q, q, q, backend="flash2")
    assert choose_attention("flash2", CPU, torch.float32, 16).backend == "flash2"
    torch.testing.assert_close(
        attention(q, q, q, backend="flash2"), attention(q, q, q, backend="math")
    )


@pytest.mark.usefixtures("flash3_in_place")
def test_a_rejected_flash3_leaves_flash2_as_it_was(monkeypatch):
    monkeypatch.setattr("gptfast.attention._activate", lambda backend, device: None)
    with pytest.raises(UserError, match="flash3: RuntimeError: FA3 requires compute capability"):
        choose_attention("flash3", CPU, torch.float32, 16)
    q = torch.randn(1, 4, 2, 16)
    torch.testing.assert_close(
        attention(q, q, q, backend="flash2"), attention(q, q, q, backend="math")
    )


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"'fast': choose auto or one of flash4, .*math"):
        choose_attention("fast", CPU, torch.float32, 16)


def test_flash4_is_given_what_it_asks_for(monkeypatch):
    """The operator around flash-attn-4, compiled, with stand-ins for its two entry points."""
    seen = []

    def weights(q, k, options):
        """softmax(q k^T / sqrt(D)), (..., H, T, T); autograd does not reach into an operator."""
        seen.append({name: value for name, value in options.items() if "seqlen" in name})
        starts = options.get("cu_seqlens_q", torch.tensor([0, q.shape[-3]]))
        owner = Documents(starts, 0).of_tokens(q.shape[-3])
        visible = (owner[:, None] == owner).tril()
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~visible, -math.inf).softmax(-1)

    def forward(q, k, v, **options):
        p = weights(q, k, options)
        return torch.einsum("...hqk,...khd->...qhd", p, v), p.sum(-1), None, None, None

    def backward(q, k, v, out, dout, lse, *, dq, dk, dv, **options):
        assert lse.shape == (*q.shape[:-3], q.shape[-2], q.shape[-3])
        p = weights(q, k, options)
        dp = torch.einsum("...qhd,...khd->...hqk", dout, v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        dq.copy_(torch.einsum("...hqk,...khd->...qhd", ds, k))
        dk.copy_(torch.einsum("...hqk,...qhd->...khd", ds, q))
        dv.copy_(torch.einsum("...hqk,...qhd->...khd", p, dout))

    kernels = {"forward": forward, "backward": backward}
    monkeypatch.setattr("gptfast.attention._flash4_kernels", kernels)
    op = torch.compile(
        torch.ops.gptfast.flash4_fwd, backend="aot_eager", fullgraph=True, dynamic=False
    )
    q, k, v = (torch.randn(1, 12, 2, 8, requires_grad=True) for _ in "qkv")
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    dout = torch.randn_like(q)
    for documents in (None, Documents(starts, 7)):
        want = attention(q, k, v, backend="math", documents=documents)
        if documents is None:
            got = op(q, k, v)[0]
        else:
            got = op(q[0], k[0], v[0], starts, 7)[0][None]
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), dout),
            torch.autograd.grad(want, (q, k, v), dout),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert seen[0] == seen[1] == {}
    for options in seen[2:]:
        assert options["cu_seqlens_q"].tolist() == options["cu_seqlens_k"].tolist() == [0, 5, 12]
        assert (options["max_seqlen_q"], options["max_seqlen_k"]) == (7, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash2", "math"])
def test_on_a_gpu_the_choice_is_proven(backend):
    choice = choose_attention(backend, torch.device("cuda"), torch.bfloat16, 128)
    assert choice.backend in BACKENDS if backend == "auto" else choice.backend == backend


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_on_a_gpu_documents_attend_to_themselves(kv_heads):
    """Whatever is chosen, in a compiled graph too, with a view of v as the kernels give it."""
    device = torch.device("cuda")
    choice = choose_attention("auto", device, torch.bfloat16, 128, documents=True)
    assert choice.backend != "cudnn"
    packed = torch.randn(1, 4096, 8, 128, device=device)[:, :, : 4 + kv_heads]
    q = packed[:, :, :4].contiguous().requires_grad_()
    v = packed[:, :, 4:].requires_grad_()
    k = torch.randn(v.shape, device=device, requires_grad=True)
    starts = torch.tensor([0, 1000, 1001, 3048, 4096, 4096], dtype=torch.int32, device=device)
    documents = Documents(starts, longest=2048)
    dout = torch.randn_like(q)

    want = attention(q, k, v, backend="math", documents=documents)
    want_grads = torch.autograd.grad(want, (q, k, v), dout)
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    for run in (attention, torch.compile(attention, fullgraph=True, dynamic=False)):
        got = run(*low, backend=choice.backend, documents=documents)
        grads = torch.autograd.grad(got, low, dout.bfloat16())
        for a, b in zip((got, *grads), (want, *want_grads), strict=True):
            torch.testing.assert_close(
                a.float(), b, atol=0.03 * float(b.detach().abs().max()), rtol=0.03
            )


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
