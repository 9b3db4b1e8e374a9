"""Bits per byte: the loss in a unit that does not depend on the tokenizer."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from gptfast.model import GPT


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    group: dist.ProcessGroup | None = None,
) -> float:
    """sum of nats over targets that stand for bytes / (ln 2 * the bytes they stand for).

    batches: (inputs, targets) of shape (B, T), targets -1 ignored; each rank brings its own and
    may bring another number of them. token_bytes: int32 (V,), 0 for special tokens, which count
    neither as nats nor as bytes. The sums, fp64 nats and int64 bytes, are added over `group`
    once, at the end. NaN where there was no byte.
    """
    nats = torch.zeros((), dtype=torch.float64, device=token_bytes.device)
    total = torch.zeros((), dtype=torch.int64, device=token_bytes.device)
    for inputs, targets in batches:
        loss = model(inputs, targets, reduction="none")
        length = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        nats += torch.where(length > 0, loss, 0.0).sum(dtype=torch.float64)
        total += length.sum()
    sums = torch.stack((nats, total.double())).cpu()
    if group is not None:
        dist.all_reduce(sums, group=group)
    return float(sums[0] / sums[1] / math.log(2)) if sums[1] else math.nan
