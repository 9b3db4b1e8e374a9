"""Who is measured beside us: which are installed here, and the calls that several kernels share."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm import EPS

OURS = "ours"
# The cross-entropy in twice as many chunks as the model takes it.
EIGHT_CHUNKS = "8_chunks"
EAGER = "eager"
COMPILE = "compile"
# PyTorch's own fused operator, where it has one.
TORCH = "torch"

# Provider -> the distribution that it takes, for those that do not come with torch.
DISTRIBUTIONS = {"liger": "liger-kernel", "quack": "quack-kernels"}

# What users would otherwise pick. Whatever else is timed is a floor.
RIVALS = (EAGER, COMPILE, *DISTRIBUTIONS, TORCH)


def installed(distribution: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def missing(provider: str) -> str | None:
    """Why a provider is not here, or None."""
    distribution = DISTRIBUTIONS.get(provider)
    if distribution is not None and installed(distribution) is None:
        return f"{distribution} is not installed"
    if provider == TORCH and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has"
    return None


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` as torch.compile makes it, for exactly the shapes it gets."""
    # What was compiled before is not called again, and would count against the recompile limit.
    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, dynamic=False)


def eager_rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def liger_rms_norm():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Offset, casting, in place: not over dy, which is needed again; it moves the same bytes.
    return lambda x: LigerRMSNormFunction.apply(x, None, EPS, 0.0, "llama", False)


def quack_rms_norm():
    from quack.rmsnorm import rmsnorm

    return lambda x: rmsnorm(x, eps=EPS)


def eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As models write it, with angles in the dtype of q and k."""
    cos, sin = (t[: q.shape[1], None].to(q.dtype) for t in (cos, sin))

    def rotate(x):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)

    return rotate(q), rotate(k)


def liger_rotary(cos: Tensor, sin: Tensor):
    from liger_kernel.ops.rope import LigerRopeFunction

    # It turns the other way, wants its angles doubled, as models keep them, and heads first.
    cos, sin = (torch.cat((t, t), dim=-1)[None] for t in (cos, -sin))

    def call(q, k, *_):
        angles = (t[:, : q.shape[1]] for t in (cos, sin))
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *angles)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def quack_rotary(cos: Tensor, sin: Tensor):
    """One tensor's rotation; it turns the other way."""
    from quack.rotary import apply_rotary_emb

    sin = -sin
    return lambda x: apply_rotary_emb(x, cos, sin)
