"""Hand-written operators, one a file; they know torch and triton and nothing else of ours.

A model asks for its operators once, by name, and calls them; which implementation runs is that
choice and nothing else:

    ops = operators("triton")
    y = ops.rms_norm(x)

`embedding`, `linear` and `rms_norm` are files and functions: `import kernels.embedding as m` gives
the function; `from kernels.embedding import embedding_ref` finds what else is in the file.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from kernels.cross_entropy import CHUNKS, linear_cross_entropy, linear_cross_entropy_ref
from kernels.embedding import embedding, embedding_ref
from kernels.linear import linear, linear_ref
from kernels.mlp import squared_relu_mlp, squared_relu_mlp_ref
from kernels.qk_norm import rotary_qk_norm, rotary_qk_norm_ref
from kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref


class Operators(NamedTuple):
    """What the model calls; signatures are those of the functions named alike in this package."""

    name: str
    embedding: Callable
    rms_norm: Callable
    add_rms_norm: Callable
    rotary_qk_norm: Callable
    linear: Callable
    squared_relu_mlp: Callable
    linear_cross_entropy: Callable


_OPERATORS = {
    "triton": Operators(
        name="triton",
        embedding=embedding,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rotary_qk_norm=rotary_qk_norm,
        linear=linear,
        squared_relu_mlp=squared_relu_mlp,
        linear_cross_entropy=linear_cross_entropy,
    ),
    # Plain PyTorch, which Inductor may fuse as it likes: the rival that users have for free.
    "reference": Operators(
        name="reference",
        embedding=embedding_ref,
        rms_norm=rms_norm_ref,
        add_rms_norm=add_rms_norm_ref,
        rotary_qk_norm=rotary_qk_norm_ref,
        linear=linear_ref,
        squared_relu_mlp=squared_relu_mlp_ref,
        linear_cross_entropy=partial(linear_cross_entropy_ref, chunks=CHUNKS),
    ),
}


def operators(name: str) -> Operators:
    """The operators called `name`: "triton" or "reference"; ValueError for any other."""
    if name not in _OPERATORS:
        raise ValueError(f"kernels {name!r}: choose one of {', '.join(_OPERATORS)}")
    return _OPERATORS[name]
