"""What a model is trained on at a time."""

from typing import NamedTuple

from torch import Tensor

from gptfast.attention import Documents


class Batch(NamedTuple):
    """What `GPT.forward` takes to give a loss.

    inputs: (B, T) int32. targets: (B, T) int64; -1 is not supervised. weights: (B, T) fp32, of each
    token's loss; None: 1. documents: the sequences that the tokens are; None: rows.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None
    documents: Documents | None = None
