"""Keys and values of what was computed already, for every layer and every row of a batch."""

import torch
from torch import Tensor

from gptfast.errors import UserError
from gptfast.model import GPTConfig


class KVCache:
    """k and v, (L, B, T, Hkv, D): T positions in each of B rows, reserved at once.

    In memory a position comes after the other, each of all rows: strides do not depend on T, and
    what was compiled for one cache serves those of any length.

    Whose position is valid is for its user to know: rows are overwritten from the front, and what
    lies behind a row's last position is whatever was there before.

    Raises UserError if the device has no room for it.
    """

    def __init__(
        self,
        config: GPTConfig,
        rows: int,
        length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (2, config.n_layer, length, rows, config.n_kv_head, config.head_dim)
        try:
            # Zeros, as masked positions are multiplied by zero too, and NaN would stay NaN.
            self.k, self.v = torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3)
        except torch.OutOfMemoryError as error:
            gib = rows * length * bytes_per_position(config, dtype) / 2**30
            raise UserError(
                f"no room for keys and values of {rows} rows of {length} positions, {gib:.1f} GiB: "
                "generate fewer rows at once, or fewer tokens"
            ) from error
        self.rows, self.length = rows, length

    def layer(self, index: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's first rows and positions, (rows, length, Hkv, D) each."""
        return self.k[index, :rows, :length], self.v[index, :rows, :length]

    def copy(self, source: int, rows: Tensor, length: int) -> None:
        """Give `rows` (N,) int64 the first `length` positions of row `source`."""
        for tensor in (self.k, self.v):
            tensor[:, rows, :length] = tensor[:, source, None, :length]


def bytes_per_position(config: GPTConfig, dtype: torch.dtype) -> int:
    """What one position of one row takes, all layers together (d20 in bf16: 102,400)."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * dtype.itemsize
