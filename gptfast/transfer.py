"""Small tensors between host and device, neither of which waits for the other."""

import numpy as np
import torch
from torch import Tensor


def upload(
    values: list | np.ndarray, device: torch.device | str, *, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A tensor of these (nested) numbers on the device, without waiting for it."""
    device = torch.device(device)
    # From pinned memory, as otherwise the host waits for the copy.
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


class Download:
    """A tensor on its way to the host, which waits for it where it reads."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._ready = tensor, None
        if tensor.is_cuda:
            self._tensor = tensor.to("cpu", non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> list:
        if self._ready is not None:
            self._ready.synchronize()
        return self._tensor.tolist()
