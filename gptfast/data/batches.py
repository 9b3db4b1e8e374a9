"""Documents to (B, T) batches: read and tokenised in one thread, packed and copied in another.

The stream of a rank is its documents in order, each with `<|bos|>` first, epoch after epoch. A
batch takes the next B*T tokens as inputs; the target of the last one is the first input of the
next batch, so no token is dropped. Where the stream is, is told by the token that the next batch
begins with, and from there it continues bit for bit.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from gptfast.batch import Batch
from gptfast.data.parquet import RowGroup, read_documents
from gptfast.data.prefetch import Prefetch
from gptfast.data.staging import StagedBatches
from gptfast.errors import UserError

# Chunks of at most 1,024 documents that wait to be packed.
_CHUNKS_AHEAD = 2
# Row groups a rank from which on whole ones are shared: a rank then has at most a sixteenth more
# than another. With ten on eight ranks, two had twice as much to read as the others.
_WHOLE_GROUPS = 16


class DocumentTokenizer(Protocol):
    """What is asked of a tokenizer."""

    def encode_documents(self, texts: list[str], threads: int) -> np.ndarray:
        """(N,) int32: the ids of all texts in order, `<|bos|>` before each of them."""


class Position(NamedTuple):
    """A token of a rank's stream."""

    epoch: int = 0
    # Index into the rank's own list of row groups.
    unit: int = 0
    # Row of the parquet's row group at which the chunk begins that holds the token.
    row: int = 0
    # Tokens of that chunk that come before it.
    token: int = 0


class _Run(NamedTuple):
    """Of B*T + 1 tokens that make a batch, `count` are of the stream, the rest is padding; the last
    of them is `after`, which the next batch begins with."""

    count: int
    after: Position


class BatchLoader:
    """Endless (inputs, targets) of one rank, prefetched; both (B, T), int32 and int64, on `device`.

    Use it as an iterator, in one thread. Its own threads start with the first batch and end with
    `close()` or with the loader. What goes wrong in them is raised by `next()`.

    Args:
        row_groups: what all ranks read together (`Corpus.train` or `Corpus.val`); see `share`.
        tokenizer: has `encode_documents(texts, threads=...)`.
        batch_size, sequence_len: B and T, of this rank.
        epochs: end after so many passes. The last batch is then filled up with input 0 and
            target -1. None goes on for ever.
        threads: that tokenise at a time.
        prefetch: batches that are ready on the device ahead of use.

    Attributes:
        wait_seconds: how long `next()` has waited for batches so far.

    Raises:
        UserError: if there are fewer documents than ranks, or none of this rank's has any text.
    """

    def __init__(
        self,
        row_groups: Sequence[RowGroup],
        tokenizer: DocumentTokenizer,
        *,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        epochs: int | None = None,
        threads: int = 4,
        prefetch: int = 2,
    ) -> None:
        self._row_groups = list(row_groups)
        self._fingerprint = _fingerprint(self._row_groups)
        self._units = share(row_groups, rank, world_size)
        self._tokenizer = tokenizer
        self._shape = (batch_size, sequence_len)
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._epochs, self._threads, self._prefetch = epochs, threads, prefetch
        self._next = Position()
        self._batches: StagedBatches[_Run] | None = None
        self.wait_seconds = 0.0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch's first token, from 0."""
        return self._next.epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._batches is None:
            self._batches = self._start()
        begin = time.perf_counter()
        batch, run = next(self._batches)
        self.wait_seconds += time.perf_counter() - begin
        self._next = run.after
        return batch.inputs, batch.targets

    def _start(self) -> StagedBatches[_Run]:
        # The threads hold these arguments and nothing of the loader, so that it can be collected.
        chunks = Prefetch(
            token_chunks(self._units, self._tokenizer, self._threads, self._next, self._epochs),
            depth=_CHUNKS_AHEAD,
        )
        packed = _pack(chunks, self._shape[0] * self._shape[1], self._device, self._epochs)
        split = partial(_split, self._shape)
        return StagedBatches(packed, split, self._device, depth=self._prefetch)

    def close(self) -> None:
        """End the threads. The next `next()` would start them again at the same place."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """JSON values that say where the next batch begins, whatever was prefetched."""
        return {
            "fingerprint": self._fingerprint,
            "row_groups": len(self._row_groups),
            "world_size": self._world_size,
            "rank": self._rank,
            **self._next._asdict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the loader that gave `state` was; B and T may differ.

        The tokenizer has to be the same. The dataset too, except that in the first epoch, if whole
        row groups are shared, it may have more of them at its end: a run that is prolonged fetches
        more shards.

        Raises:
            UserError: for the state of another dataset, world size or rank.
        """
        count = state["row_groups"]
        prolonged = (
            state["epoch"] == 0
            and count < len(self._row_groups)
            and not _rows_are_shared(count, self._world_size)
        )
        known = self._row_groups[:count] if prolonged else self._row_groups
        if _fingerprint(known) != state["fingerprint"]:
            raise UserError(
                f"the saved data position belongs to another dataset: it had {count} row groups, "
                f"this one has {len(self._row_groups)}; resume with the data of the first run"
            )
        if (state["world_size"], state["rank"]) != (self._world_size, self._rank):
            raise UserError(
                f"the saved data position is of rank {state['rank']} of {state['world_size']}, "
                f"this is rank {self._rank} of {self._world_size}; reshard_states converts them"
            )
        self.close()
        self._next = Position(*(state[field] for field in Position._fields))

    def load_resharded(self, states: Sequence[dict[str, Any]]) -> str:
        """Continue from the states of all ranks of another world size; where, in words."""
        state = reshard_states(states, self._world_size)[self._rank]
        self.load_state_dict(state)
        if state["epoch"] > max(each["epoch"] for each in states):
            return (
                f"{state['row_groups']} row groups are too few to go on within an epoch: every "
                "rank begins the next one"
            )
        return "every rank goes on at a row group that none has begun"


def share(row_groups: Sequence[RowGroup], rank: int, world_size: int) -> list[RowGroup]:
    """The part of the row groups that one rank reads; every row is in exactly one rank's.

    Every world_size-th row group from `rank` on. If there are few of them, fewer than 16 a rank,
    all their rows are cut into world_size runs of equal length, and the rank reads its run.

    Raises:
        UserError: if there are fewer rows than ranks.
    """
    rows = sum(group.rows for group in row_groups)
    if rows < world_size:
        raise UserError(f"{rows} document(s) cannot be shared by {world_size} processes")
    if not _rows_are_shared(len(row_groups), world_size):
        return list(row_groups[rank::world_size])
    begin, end = rows * rank // world_size, rows * (rank + 1) // world_size
    part, first = [], 0
    for group in row_groups:
        cut = group._replace(
            start=group.start + max(begin - first, 0),
            stop=group.start + min(end - first, group.rows),
        )
        if cut.rows > 0:
            part.append(cut)
        first += group.rows
    return part


def _rows_are_shared(count: int, world_size: int) -> bool:
    """Whether so few row groups are not shared as wholes. To one rank it is all the same."""
    return world_size > 1 and count < _WHOLE_GROUPS * world_size


def reshard_states(states: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """States for another number of ranks, from the states of all ranks of one step.

    All new ranks continue in the furthest epoch E of the old ones, at row group S: one after the
    last that any rank had finished in E. So no row group that was finished in E is seen again in
    E. One that was only begun is seen again from its start if it is S or later; of those before
    S, the ones that a slower rank had not finished are skipped until epoch E + 1.
    If the old or the new ranks share rows (see `share`), all continue at the start of epoch E + 1.

    Raises:
        UserError: if the states are not those of ranks 0 to N-1 over one dataset.
    """
    states = sorted(states, key=lambda state: state["rank"])
    same = {(state["fingerprint"], state["world_size"]) for state in states}
    ranks = [state["rank"] for state in states]
    if len(same) != 1 or ranks != list(range(states[0]["world_size"])):
        raise UserError(f"resharding needs the states of all ranks of one step; got ranks {ranks}")
    old_size, count = states[0]["world_size"], states[0]["row_groups"]
    epoch = max(state["epoch"] for state in states)
    at = [state for state in states if state["epoch"] == epoch and state["unit"] > 0]
    begin = max((s["rank"] + (s["unit"] - 1) * old_size + 1 for s in at), default=0)
    if _rows_are_shared(count, old_size) or _rows_are_shared(count, world_size):
        epoch, begin = epoch + 1, 0
    return [
        {
            "fingerprint": states[0]["fingerprint"],
            "row_groups": count,
            "world_size": world_size,
            "rank": rank,
            # The rank's first row group that is not before `begin`.
            **Position(epoch, max(0, -(-(begin - rank) // world_size)))._asdict(),
        }
        for rank in range(world_size)
    ]


def _fingerprint(row_groups: Sequence[RowGroup]) -> str:
    """Of the files' names and rows: the same dataset may lie elsewhere when a run is resumed."""
    shape = [(group.path.name, *group[1:]) for group in row_groups]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()


def token_chunks(
    units: Sequence[RowGroup],
    tokenizer: DocumentTokenizer,
    threads: int,
    begin: Position,
    epochs: int | None,
) -> Iterator[tuple[Position, np.ndarray]]:
    """(position of the first token, tokens) of each chunk of documents, from `begin` on."""
    epoch, first_unit, first_row, skip = begin
    while epochs is None or epoch < epochs:
        found = (first_unit, first_row, skip) != (0, 0, 0)
        for unit in range(first_unit, len(units)):
            for row, texts in read_documents(units[unit], first_row):
                tokens = tokenizer.encode_documents(texts, threads=threads)[skip:]
                if len(tokens):
                    found = True
                    yield Position(epoch, unit, row, skip), tokens
                skip = 0
            first_row = 0
        if not found:
            raise UserError(f"no document of this rank's {len(units)} row group(s) has any text")
        epoch, first_unit = epoch + 1, 0


def _pack(
    chunks: Iterator[tuple[Position, np.ndarray]],
    batch_tokens: int,
    device: torch.device,
    epochs: int | None,
) -> Iterator[tuple[torch.Tensor, _Run]]:
    """Cut the stream into runs of batch_tokens + 1 that overlap by one token."""
    pin = device.type == "cuda"

    def new_run() -> torch.Tensor:
        # A pinned tensor comes from a cache, which gives it out again once its copy is done.
        return torch.zeros(batch_tokens + 1, dtype=torch.int32, pin_memory=pin)

    run, count = new_run(), 0
    for position, tokens in chunks:
        used = 0
        while used < len(tokens):
            taken = min(len(tokens) - used, batch_tokens + 1 - count)
            run.numpy()[count : count + taken] = tokens[used : used + taken]
            used, count = used + taken, count + taken
            if count == batch_tokens + 1:
                yield run, _Run(count, position._replace(token=position.token + used - 1))
                last = int(run[-1])
                run, count = new_run(), 1
                run[0] = last
    # One token alone has no target.
    if count > 1 and epochs is not None:
        yield run, _Run(count, Position(epochs))


def _split(shape: tuple[int, int], tokens: torch.Tensor, run: _Run) -> Batch:
    """(B*T + 1,) tokens as inputs and, one further, targets."""
    targets = tokens[1:].to(torch.int64)
    targets[run.count - 1 :] = -1
    return Batch(tokens[:-1].view(shape), targets.view(shape))
