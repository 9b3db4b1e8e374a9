"""From logits to tokens: greedy, or drawn at a temperature from the likeliest ones, row by row.

A row's token depends on its own logits, sampling and random number, and on nothing of the other
rows: those of a batch may be sampled in different ways, and come and go. Hence one definition for
all of them: the token is where the running sum of the weights that are kept, in order of ids,
passes the random number's share of the whole sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.errors import UserError
from gptfast.transfer import upload

# Of a lower temperature, fp32 would make zero.
_COLDEST = 1e-30
# Weights are summed up in pieces of so many, and one piece in detail: a running sum over a whole
# vocabulary is the work of few threads.
_PIECE = 256


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy, and then nothing else matters. top_k keeps the k likeliest tokens;
    top_p keeps, of those, the fewest that reach the probability p together; None keeps all. Tokens
    as likely as the last one kept are kept too."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, or None for all, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def limited(self) -> bool:
        return not self.greedy and (self.top_k is not None or self.top_p is not None)


def sample(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """One token for each row of logits (B, V): (B,) int64.

    samplings: B of them. uniforms: B random numbers in [0, 1), of which greedy rows make no use.
    """
    if all(sampling.greedy for sampling in samplings):
        return logits.argmax(-1)
    V = logits.shape[-1]
    columns = [
        (
            uniform,
            # Any number: these rows' draws are not used.
            1.0 if sampling.greedy else max(sampling.temperature, _COLDEST),
            min(sampling.top_k or V, V),
            sampling.top_p or math.inf,
            sampling.limited,
            sampling.greedy,
        )
        for sampling, uniform in zip(samplings, uniforms, strict=True)
    ]
    table = upload(columns, logits.device, dtype=torch.float64)
    uniform, temperature, top_k, top_p, limited, greedy = table[:, :, None].unbind(1)
    temperature = temperature.to(logits.dtype)
    # The largest becomes 0: no temperature is too small then.
    logits = logits - logits.amax(-1, keepdim=True)
    weights = (logits / temperature).exp()
    if most := max((int(row[2]) for row in columns if row[4]), default=0):
        lowest = _lowest_kept(logits.topk(most).values, temperature, top_k, top_p)
        weights = weights.where((logits >= lowest) | (limited == 0), 0.0)
    drawn = _draw(weights, uniform)
    return drawn.where(greedy == 0, logits.argmax(-1, keepdim=True))[:, 0]


def _lowest_kept(top: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The lowest logit (B, 1) that each row keeps, of its `top` ones (B, K), sorted."""
    among_k = torch.arange(top.shape[-1], device=top.device) < top_k
    weights = (top / temperature).exp().where(among_k, 0.0).double()
    before = weights.cumsum(-1) - weights
    # A token is kept if those before it do not reach top_p.
    kept = among_k & (before < top_p * weights.sum(-1, keepdim=True))
    return top.gather(-1, kept.sum(-1, keepdim=True) - 1)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where the running sum of weights (B, V) passes the share `uniform` (B, 1) of the whole: (B,
    1). In fp64: in fp32 its error is of the size of rare tokens' chances."""
    pieces = F.pad(weights, (0, -weights.shape[-1] % _PIECE)).unflatten(-1, (-1, _PIECE))
    sums = pieces.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    target = uniform * ends[:, -1:]
    piece = _passes(ends, target)
    inside = pieces.gather(1, piece[:, :, None].expand(-1, -1, _PIECE))[:, 0].double()
    target = target - (ends - sums).gather(-1, piece)
    return piece * _PIECE + _passes(inside.cumsum(-1), target.clamp(min=0))


def _passes(running: Tensor, target: Tensor) -> Tensor:
    """The first index at which the running sum (B, N) is above the target (B, 1); where rounding
    has carried the target to its very end, the last one that adds to it."""
    last = torch.searchsorted(running, running[:, -1:].contiguous())
    return torch.searchsorted(running, target, right=True).minimum(last)
