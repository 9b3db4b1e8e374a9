"""From logits to tokens: greedy, or drawn at a temperature from the likeliest ones."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptfast.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy, and then nothing else matters. top_k keeps the k likeliest tokens;
    top_p keeps, of those, the fewest that reach the probability p together; None keeps all."""

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


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor | None = None) -> Tensor:
    """One token for each row of logits (B, V): (B,) int64.

    uniforms: (B,) fp64 in [0, 1), needed unless greedy. The token is where the running sum of the
    probabilities passes its row's number, so a row depends on nothing but its logits and that
    number. The sum is taken in fp64: in fp32 its error is of the size of rare tokens' chances.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    # The largest becomes 0 first: no temperature is too small then.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    ids = None
    if sampling.top_k is not None:
        logits, ids = logits.topk(min(sampling.top_k, logits.shape[-1]))
    elif sampling.top_p is not None:
        logits, ids = logits.sort(descending=True)
    probabilities = logits.softmax(-1, dtype=torch.float64)
    running = probabilities.cumsum(-1)
    last = torch.full_like(logits[:, :1], logits.shape[-1] - 1, dtype=torch.int64)
    if sampling.top_p is not None:
        # A token is kept if those before it do not reach top_p.
        last = (running - probabilities < sampling.top_p).sum(-1, keepdim=True) - 1
    threshold = uniforms[:, None] * running.gather(-1, last)
    # Rounding may carry the threshold to the very end of the sum.
    choice = torch.searchsorted(running, threshold, right=True).minimum(last)
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]
