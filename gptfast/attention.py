"""Causal self-attention behind one function, and the choice of who computes it.

A batch is rows of one length, or documents of any lengths packed one after the other, each of which
attends to itself alone.

A backend is chosen by running it: a tiny forward and backward on the device, compared with plain
mathematics. That a package can be imported proves nothing (community FlashAttention-3 builds load
on sm_120 and die at the first launch).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from gptfast.errors import UserError

# In the order in which they are tried. Measured on one H200 at 32 x 2048 tokens, 10 heads of 128
# (torch 2.11, 2026-11-22), forward + backward a layer: flash4 2.59 ms, cudnn 2.85, flash2 4.49.
BACKENDS = {
    "flash4": "flash-attn-4, called directly",
    "flash3": "flash-attn-3 behind SDPA",
    "cudnn": "cuDNN behind SDPA",
    "flash2": "SDPA's own FlashAttention-2",
    "math": "plain products and softmax",
}
_SDPA = {
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash2": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
# PyTorch holds cuDNN's backward for not repeatable bit for bit; the others are, or have a switch.
_DETERMINISTIC = ("flash4", "flash3", "flash2", "math")
# Of the largest value, for bf16 against fp32 mathematics: far above rounding (2^-8 of a value),
# far below what a wrong mask, scale or layout would do.
_PROBE_TOLERANCE = 0.05


class Documents(NamedTuple):
    """Sequences that follow each other in a batch of tokens.

    starts: (N + 1,) int32, on the device: the first token of each, and the count of all tokens.
        Empty documents at the end keep N the same from batch to batch.
    longest: none has more tokens.
    rows: parts of equal length of which no document crosses a border; what attention that has to
        mask computes by itself.
    """

    starts: Tensor
    longest: int
    rows: int = 1

    def of_tokens(self, tokens: int) -> Tensor:
        """(tokens,) int64: the document of each token."""
        numbers = torch.arange(tokens, dtype=torch.int32, device=self.starts.device)
        return torch.searchsorted(self.starts, numbers, right=True) - 1

    def positions(self, tokens: int) -> Tensor:
        """(tokens,) int32: the position of each token in its document."""
        numbers = torch.arange(tokens, dtype=torch.int32, device=self.starts.device)
        return numbers - self.starts[self.of_tokens(tokens)]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str, documents: Documents | None = None
) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v, in every row, or in every document.

    q (B, T, H, D), k and v (B, T, Hkv, D), H a multiple of Hkv; returns (B, T, H, D) in q's dtype.
    documents: of the B T tokens in order. ValueError if the backend cannot take them.
    """
    if documents is not None:
        return _attention_in_documents(q, k, v, backend, documents)
    if backend == "flash4":
        return torch.ops.gptfast.flash4_fwd(q, k, v)[0]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(_SDPA[backend]):
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    return y.transpose(1, 2)


def _attention_in_documents(
    q: Tensor, k: Tensor, v: Tensor, backend: str, documents: Documents
) -> Tensor:
    if backend == "math" or q.device.type == "cpu":
        return _masked_attention(q, k, v, documents)
    if backend == "cudnn":
        raise ValueError("PyTorch has no variable-length attention by cuDNN")
    # (B T, heads, D) each.
    packed = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    starts, longest = documents.starts, documents.longest
    if backend == "flash4":
        y = torch.ops.gptfast.flash4_fwd(*packed, starts, longest)[0]
    else:
        y = _varlen_attention(*packed, starts, longest)
    return y.view_as(q)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """PyTorch's, by FlashAttention-2, or by FlashAttention-3 where that is activated."""
    # Imported here: it brings the whole of torch.compile, and most machines do not need it.
    from torch.nn.attention.varlen import varlen_attn

    if q.shape[1] != k.shape[1]:
        # torch 2.11 does not take fewer heads of k and v.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # A window that is open to the left and closed to the right: causal.
    # pyrefly: ignore[bad-return]  (a pair only where the log-sum-exp is asked for)
    return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """All pairs of tokens of a row, those of two documents and of the future masked."""
    owner = documents.of_tokens(q.shape[0] * q.shape[1]).view(documents.rows, -1)
    visible = (owner[:, :, None] == owner[:, None, :]).tril()[:, None]
    rows = (x.reshape(*owner.shape, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        *rows, attn_mask=visible, enable_gqa=q.shape[2] != k.shape[2]
    )
    return y.transpose(1, 2).reshape(q.shape)


@dataclass(frozen=True)
class AttentionChoice:
    """What runs, and why: `reason` is one line for the log."""

    backend: str
    reason: str


def choose_attention(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    deterministic: bool = False,
    documents: bool = False,
) -> AttentionChoice:
    """The first backend that gives the right numbers here, or the requested one, proven.

    requested: "auto" or a name in BACKENDS. documents: it must take documents, too. UserError if
    the requested one does not work here.
    """
    if requested != "auto" and requested not in BACKENDS:
        raise UserError(f"attention {requested!r}: choose auto or one of {', '.join(BACKENDS)}")
    if device.type == "cpu" and requested == "auto":
        return AttentionChoice("flash2", "SDPA on CPU")
    rejected = []
    for backend in BACKENDS if requested == "auto" else (requested,):
        if deterministic and backend not in _DETERMINISTIC:
            rejected.append(f"{backend}: not deterministic")
            continue
        problem = _probe(backend, device, dtype, head_dim, documents=False)
        if problem is None and documents:
            problem = _probe(backend, device, dtype, head_dim, documents=True)
        if problem is None:
            why = "; ".join([f"{BACKENDS[backend]}, proven by a forward + backward", *rejected])
            return AttentionChoice(backend, why)
        _restore_flash2()
        rejected.append(f"{backend}: {problem}")
    raise UserError(f"no attention backend works on {device}: {'; '.join(rejected)}")


def _probe(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, *, documents: bool
) -> str | None:
    """None if a small forward + backward agrees with fp32 mathematics, else what went wrong."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, 256, 2, head_dim)
    qkv, dout = (
        torch.randn(n, *shape, generator=generator, device=device, dtype=dtype) for n in (3, 1)
    )
    packed = None
    if documents:
        # Odd lengths, one token alone, and empty documents at the end.
        starts = torch.tensor([0, 97, 98, 256, 256, 256], dtype=torch.int32, device=device)
        packed = Documents(starts, longest=256)
    try:
        _activate(backend, device)
        got = _forward_backward(qkv, dout[0], backend, packed)
    except Exception as error:
        # Whatever a package raises that is missing, of another version, or not made for this device
        # (flash-attn-4's compiler has exceptions of its own): it is told, and the next one tried.
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    want = _forward_backward(qkv.float(), dout[0].float(), "math", packed)
    worst = max(float((g.float() - w).abs().max()) for g, w in zip(got, want, strict=True))
    if not worst <= _PROBE_TOLERANCE * max(1.0, float(want[1].abs().max())):
        return f"wrong numbers{' in documents' if documents else ''}, off by {worst:.3g}"
    return None


def _forward_backward(
    qkv: Tensor, dout: Tensor, backend: str, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """qkv (3, B, T, H, D) -> output (B, T, H, D) and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    out = attention(*qkv.unbind(), backend=backend, documents=documents)
    (gradient,) = torch.autograd.grad(out, qkv, dout)
    return out.detach(), gradient


def _activate(backend: str, device: torch.device) -> None:
    """Make a backend callable in this process; ImportError or RuntimeError if it cannot be."""
    if backend != "flash3":
        _restore_flash2()
    if backend in ("flash3", "flash4"):
        if device.type != "cuda":
            raise RuntimeError("needs a CUDA GPU")
        if backend == "flash3":
            activate_flash_attention_impl("FA3")
        else:
            _activate_flash4()


def _restore_flash2() -> None:
    """SDPA's own FlashAttention for the whole process, where flash3 has taken its place."""
    if current_flash_attention_impl():
        restore_flash_attention_impl()


def _activate_flash4() -> None:
    # Imported here: it builds CUDA code and takes seconds, and most machines do not have it.
    from flash_attn.cute import interface

    # cutlass-dsl says so of flash-attn-4's own arguments, once for every kernel; they work.
    warnings.filterwarnings(
        "ignore", r"Argument aux_data .* cannot be converted to a JitArgument", UserWarning
    )

    _flash4_kernels.update(forward=interface._flash_attn_fwd, backward=interface._flash_attn_bwd)


# flash-attn-4's entry points, set by _activate_flash4. As one opaque operator each way they do
# not break torch.compile's graph (called directly they do; torch 2.11's own "FA4" activation
# fails with flash-attn-4 4.0.0b36: too many values to unpack).
_flash4_kernels: dict[str, Callable] = {}


@torch.library.custom_op("gptfast::flash4_fwd", mutates_args=())
def _flash4_fwd(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None, longest: int = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse). Rows (B, T, heads, D); with starts documents, (tokens, heads, D)."""
    out, lse, *_ = _flash4_kernels["forward"](
        q, k, v, causal=True, return_lse=True, **_flash4_documents(starts, longest)
    )
    return out, lse


@_flash4_fwd.register_fake
def _(q, k, v, starts=None, longest=0):
    *batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((*batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("gptfast::flash4_bwd", mutates_args=())
def _flash4_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    longest: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    options = {"causal": True, "deterministic": deterministic, "dq": dq, "dk": dk, "dv": dv}
    _flash4_kernels["backward"](
        q, k, v, out, dout, lse, **options, **_flash4_documents(starts, longest)
    )
    return dq, dk, dv


@_flash4_bwd.register_fake
def _(dout, q, k, v, out, lse, starts, longest, deterministic):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _flash4_documents(starts: Tensor | None, longest: int) -> dict:
    if starts is None:
        return {}
    return {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def _flash4_setup(ctx, inputs, output) -> None:
    q, k, v, starts, ctx.longest = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _flash4_backward(ctx, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    gradients = torch.ops.gptfast.flash4_bwd(dout, *ctx.saved_tensors, ctx.longest, deterministic)
    return *gradients, None, None


_flash4_fwd.register_autograd(_flash4_backward, setup_context=_flash4_setup)
