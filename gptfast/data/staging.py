"""Batches from the host to the device, ahead of use."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from gptfast.batch import Batch
from gptfast.data.prefetch import Prefetch

A = TypeVar("A")


class StagedBatches(Generic[A]):
    """Batches on the device, made by a thread that is at most `depth` of them ahead.

    Args:
        source: (host, about): one int32 tensor with all that a batch holds, pinned if it goes to a
            GPU; and what else there is to know of it.
        split: makes the batch from the copy on the device and `about`, on the copying stream.
    """

    def __init__(
        self,
        source: Iterator[tuple[torch.Tensor, A]],
        split: Callable[[torch.Tensor, A], Batch],
        device: torch.device,
        depth: int,
    ) -> None:
        self._device = device
        self._batches = Prefetch(_copy(source, split, device), depth)

    def __next__(self) -> tuple[Batch, A]:
        batch, about, event = next(self._batches)
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            # They were allocated on the copying stream: their memory is not to be used again
            # there before this stream is done with them.
            for tensor in _tensors(batch):
                tensor.record_stream(stream)
        return batch, about

    def close(self) -> None:
        self._batches.close()


def _copy(
    source: Iterator[tuple[torch.Tensor, A]],
    split: Callable[[torch.Tensor, A], Batch],
    device: torch.device,
) -> Iterator[tuple[Batch, A, torch.Event | None]]:
    """The event is recorded when the copy to the GPU is done; None elsewhere."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        # A thread begins on GPU 0, whatever the process uses.
        torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device) if on_gpu else None
    for host, about in source:
        with torch.cuda.stream(stream):
            batch = split(host.to(device, non_blocking=True), about)
            event = None if stream is None else stream.record_event()
        yield batch, about, event


def _tensors(batch: Batch) -> list[torch.Tensor]:
    found = [batch.inputs, batch.targets, batch.weights]
    if batch.documents is not None:
        found.append(batch.documents.starts)
    return [tensor for tensor in found if tensor is not None]
