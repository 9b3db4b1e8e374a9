"""Rows to batches on the device: which rank takes which rows of a step, prefetched."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from gptfast.attention import Documents
from gptfast.batch import Batch
from gptfast.data.staging import StagedBatches
from gptfast.errors import UserError


class Rows(Protocol):
    """See gptfast.chat_data.rows."""

    identity: str
    sequence_len: int
    documents_per_row: int

    def __len__(self) -> int: ...

    def fill(self, row: int, inputs: np.ndarray, targets: np.ndarray) -> list[int]: ...


class RowLoader:
    """Batches of one rank, (B, T) each, step after step, then the end.

    A step takes the next `rows_per_step` rows, whatever the number of ranks and of micro-steps;
    those rows of a batch that a step does not fill, or that are no longer there, hold no target.

    Args:
        batch_size: B, rows of one micro-step of this rank.
        prefetch: batches that are ready on the device ahead of use.

    Attributes:
        accumulation: micro-steps, and so batches, of a step.
        steps: of the whole data, the last one perhaps not full.
        wait_seconds: how long `next()` has waited for batches so far.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        rows_per_step: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
    ) -> None:
        self._rows, self._rows_per_step = rows, rows_per_step
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._device = torch.device(device)
        self._prefetch = prefetch
        self.accumulation = -(-rows_per_step // (batch_size * world_size))
        self.steps = -(-len(rows) // rows_per_step)
        # Micro-steps done.
        self._done = 0
        self._batches: StagedBatches[None] | None = None
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            split = partial(
                _split, self._batch_size, self._rows.sequence_len, self._rows.documents_per_row
            )
            self._batches = StagedBatches(self._host(), split, self._device, self._prefetch)
        begin = time.perf_counter()
        batch, _ = next(self._batches)
        self.wait_seconds += time.perf_counter() - begin
        self._done += 1
        return batch

    def close(self) -> None:
        """End the thread. The next `next()` would start it again at the same place."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """JSON values that say which step comes next; to be asked for between steps."""
        return {
            "identity": self._rows.identity,
            "rows_per_step": self._rows_per_step,
            "step": self._done // self.accumulation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the loader that gave `state` was; B and the world may differ.

        Raises:
            UserError: for the state of other conversations, or of steps of another size.
        """
        if state["identity"] != self._rows.identity:
            raise UserError(
                "the saved data position belongs to other conversations, or to others' tokens: "
                "resume with the mixture of the first run"
            )
        if state["rows_per_step"] != self._rows_per_step:
            raise UserError(
                f"the saved steps have {state['rows_per_step']} rows, these {self._rows_per_step}: "
                "resume with the batch size of the first run"
            )
        self.close()
        self._done = state["step"] * self.accumulation

    def load_resharded(self, states: Sequence[dict[str, Any]]) -> str:
        """Continue from the states of all ranks of another world size; where, in words."""
        self.load_state_dict(states[0])
        return "every rank goes on at its share of the next step"

    def _host(self) -> Iterator[tuple[torch.Tensor, None]]:
        """This rank's batches from the next on, each as one tensor; see _split."""
        for micro in range(self._done, self.steps * self.accumulation):
            step, part = divmod(micro, self.accumulation)
            first = (part * self._world_size + self._rank) * self._batch_size
            # Rows of the step that this batch takes.
            mine = range(first, min(first + self._batch_size, self._rows_per_step))
            numbers = [step * self._rows_per_step + row for row in mine]
            yield self._fill([number for number in numbers if number < len(self._rows)]), None

    def _fill(self, numbers: list[int]) -> torch.Tensor:
        """A batch with the rows of these numbers, at most B; see _split."""
        B, T = self._batch_size, self._rows.sequence_len
        documents = B * self._rows.documents_per_row
        size = 2 * B * T + (documents + 1 if documents else 0)
        host = torch.zeros(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        values = host.numpy()
        inputs, targets = values[: 2 * B * T].reshape(2, B, T)
        targets.fill(-1)
        starts: list[int] = []
        for place in range(B):
            lengths = []
            if place < len(numbers):
                lengths = self._rows.fill(numbers[place], inputs[place], targets[place])
            # What is left of a row is a document, too.
            ends = np.cumsum([0, *lengths])
            starts += (place * T + ends[ends < T]).tolist()
        if documents:
            values[2 * B * T :] = B * T
            values[2 * B * T : 2 * B * T + len(starts)] = starts
        return host


def _split(
    batch_size: int, sequence_len: int, documents_per_row: int, values: torch.Tensor, _: None
) -> Batch:
    """(2 B T + documents + 1,): inputs, targets, and where documents start."""
    shape = (batch_size, sequence_len)
    tokens = batch_size * sequence_len
    inputs, targets = values[:tokens].view(shape), values[tokens : 2 * tokens].to(torch.int64)
    documents = None
    if documents_per_row:
        documents = Documents(values[2 * tokens :], sequence_len, rows=batch_size)
    return Batch(inputs, targets.view(shape), documents=documents)
