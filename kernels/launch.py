"""What operators share: where a kernel runs, checks, cases to compile ahead."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

# Triton fixes this when a kernel is decorated, so it is read at the same moment.
INTERPRETED = triton.knobs.runtime.interpret

# Given at every launch: Triton's default changes in 3.10, and with it every rounding.
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}

_FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_TRITON_TYPES = _FLOATS | {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


def runs_kernel(x: Tensor) -> bool:
    """Whether an operator called with `x` launches its kernel, or else runs its reference maths."""
    return x.is_cuda or INTERPRETED


def upcast(x: Tensor) -> Tensor:
    """`x` in the dtype that the maths runs in: fp32, or fp64 for an fp64 reference."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """ValueError unless all are bf16, fp16 or fp32 and live on one CPU or CUDA device."""
    given = {name: t for name, t in tensors.items() if t is not None}
    (first, lead), *_ = given.items()
    if lead.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{op}: {first} is on {lead.device}; this operator runs on cuda and cpu")
    for name, t in given.items():
        if t.dtype not in _FLOATS:
            raise ValueError(f"{op}: {name} is {t.dtype}; it takes bfloat16, float16 or float32")
        if t.device != lead.device:
            raise ValueError(f"{op}: {name} is on {t.device}, {first} on {lead.device}")


def as_rows(op: str, name: str, x: Tensor) -> Tensor:
    """`x` (..., N) seen as (M, N), rows of adjacent elements; ValueError if that takes a copy."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; it needs a last dimension >= 1")
    *lead, n = x.shape
    *steps, step = x.stride()
    dims = [dim for dim in zip(lead, steps) if dim[0] != 1]
    nested = all(outer == size * inner for (_, outer), (size, inner) in pairwise(dims))
    if x.numel() and not (nested and (step == 1 or n == 1)):
        raise ValueError(
            f"{op}: {name} of shape {tuple(x.shape)} has strides {x.stride()}; its rows must be "
            "contiguous and evenly spaced: pass .contiguous()"
        )
    return x.view(math.prod(lead), n)


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel that bench/aot.py compiles where there is no GPU."""

    label: str
    kernel: Any
    # Argument -> Triton's type, "*bf16:16" or "i32:16" where the value is divisible by 16.
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    # Registers a thread may take; None leaves that to ptxas.
    maxnreg: int | None = None

    @classmethod
    def of_launch(
        cls,
        label: str,
        kernel: Any,
        *arguments: Any,
        num_warps: int,
        num_stages: int = 3,
        maxnreg: int | None = None,
        **constexprs: Any,
    ) -> "AotCase":
        """The specialisation that a launch with these arguments makes; a dtype stands for a tensor.

        As at a launch, None and 1 become constants, and other integers are told to be divisible by
        16 where they are; tensors are allocated at such addresses.
        """
        signature, constants = {}, dict(constexprs)
        for name, value in zip(kernel.arg_names, arguments):
            if value is None or (isinstance(value, int) and value == 1):
                constants[name] = value
            elif isinstance(value, torch.dtype):
                signature[name] = f"*{_TRITON_TYPES[value]}:16"
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32:16" if value % 16 == 0 else "i32"
        return cls(label, kernel, signature, constants, num_warps, num_stages, maxnreg)
