"""Bits per byte: the loss in a unit that does not depend on the tokenizer."""

import math
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gptfast.batch import Batch
from gptfast.data import BatchLoader, Corpus
from gptfast.model import GPT
from gptfast.parallel import World
from gptfast.tokenizer import Tokenizer


class Losses(NamedTuple):
    """per_token: nats a supervised token. bits_per_byte: of those tokens that stand for bytes.
    NaN where there was none."""

    per_token: float
    bits_per_byte: float


@torch.no_grad()
def losses(
    model: GPT,
    batches: Iterable[Batch | tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Losses:
    """The model's losses over all batches of all ranks.

    batches: a Batch each, or its (inputs, targets) alone; each rank brings its own and may bring
    another number of them. token_bytes: int32 (V,), 0 for special tokens, which count neither as
    nats nor as bytes in bits per byte: sum of nats / (ln 2 * bytes). The sums, fp64 nats and int64
    counts, are added over `group` once, at the end.
    """
    nats = torch.zeros(2, dtype=torch.float64, device=token_bytes.device)
    counts = torch.zeros(2, dtype=torch.int64, device=token_bytes.device)
    for batch in batches:
        inputs, targets, _, documents = batch if isinstance(batch, Batch) else Batch(*batch)
        loss = model(inputs, targets, reduction="none", documents=documents)
        length = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        of_bytes = torch.where(length > 0, loss, 0.0)
        nats += torch.stack((loss.sum(dtype=torch.float64), of_bytes.sum(dtype=torch.float64)))
        counts += torch.stack(((targets >= 0).sum(), length.sum()))
    sums = torch.cat((nats, counts.double())).cpu()
    if group is not None:
        dist.all_reduce(sums, group=group)
    all_nats, byte_nats, tokens, length = sums.tolist()
    return Losses(
        all_nats / tokens if tokens else math.nan,
        byte_nats / length / math.log(2) if length else math.nan,
    )


def bits_per_byte(
    model: GPT,
    batches: Iterable[Batch | tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    group: dist.ProcessGroup | None = None,
) -> float:
    """See `losses`."""
    return losses(model, batches, token_bytes, group).bits_per_byte


def corpus_bits_per_byte(
    model: GPT,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    split_tokens: int,
    batch_size: int,
    world: World,
) -> dict[str, float]:
    """{"train_bpb", "val_bpb"}: each of the beginning of its text, `split_tokens` in all, by a
    plain model that every rank has.

    batch_size: sequences in one forward pass of a rank.
    """
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(world.device)
    length = model.config.sequence_len
    batches = max(1, split_tokens // (batch_size * length * world.size))
    figures = {}
    for split, groups in (("train", corpus.train), ("val", corpus.val)):
        loader = BatchLoader(
            groups,
            tokenizer,
            batch_size=batch_size,
            sequence_len=length,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            epochs=1,
        )
        try:
            figures[f"{split}_bpb"] = bits_per_byte(
                model, islice(loader, batches), token_bytes, world.host_group
            )
        finally:
            loader.close()
    return figures
