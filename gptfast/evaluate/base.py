"""What a base model is measured by while it trains: bits per byte, and samples."""

from collections.abc import Callable, Sequence

import torch

from gptfast.chat_data import RowLoader
from gptfast.data import BatchLoader, RowGroup
from gptfast.data.parquet import hold_out, read_documents
from gptfast.evaluate.bits_per_byte import bits_per_byte
from gptfast.evaluate.samples import samples
from gptfast.model import GPT
from gptfast.parallel import World, gather_replica
from gptfast.tokenizer import Tokenizer


def first_documents(
    row_groups: Sequence[RowGroup], tokenizer: Tokenizer, *, tokens: int, at_least: int
) -> list[RowGroup]:
    """The first documents that hold about so many tokens (as the first thousand do), and not
    fewer than at_least: the same ones however many processes share them."""
    _, texts = next(read_documents(row_groups[0]))
    per_document = max(1, len(tokenizer.encode_documents(texts)) // max(1, len(texts)))
    total = sum(group.rows for group in row_groups)
    wanted = min(total, max(at_least, -(-tokens // per_document)))
    return hold_out(row_groups, total - wanted)[0]


class BaseEvaluation:
    """Evaluates a sharded model on a plain replica that every rank gathers (1.1 GB for d20 in
    bf16) and frees again: no rank ever waits for another inside a forward pass."""

    def __init__(
        self,
        *,
        world: World,
        model: GPT,
        make_replica: Callable[[], GPT],
        make_loader: Callable[[], BatchLoader | RowLoader],
        tokenizer: Tokenizer,
        dtype: torch.dtype,
    ) -> None:
        """make_replica: an unsharded GPT like `model`; make_loader: this rank's share of the
        validation text, one pass over it."""
        self.world, self.model, self.dtype = world, model, dtype
        self.make_replica, self.make_loader, self.tokenizer = make_replica, make_loader, tokenizer
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(world.device)

    def validate(self, step: int) -> dict:
        """{"val_bpb": ...}; the same number on every rank."""
        loader = self.make_loader()
        try:
            value = bits_per_byte(self._replica(), loader, self.token_bytes, self.world.host_group)
        finally:
            loader.close()
        return {"val_bpb": value}

    def sample(self, _step: int) -> dict:
        """{"samples": [...]}: the fixed prompts continued, on rank 0; empty on the others."""
        replica = self._replica()
        if not self.world.is_main:
            return {"samples": []}
        with torch.no_grad():
            return {"samples": samples(replica, self.tokenizer)}

    def _replica(self) -> GPT:
        with torch.device("meta"):
            replica = self.make_replica()
        replica.cast_parameters(self.dtype)
        return gather_replica(self.model, replica.to_empty(device=self.world.device)).eval()
