"""Squared ReLU (So et al., 2021).

    h = max(x, 0)^2        dx = dh 2 max(x, 0) = dh 2 sqrt(h)

x contiguous of any shape, in bf16, fp16 or fp32; computed in fp32, rounded once. Only the output h
is kept, which the next product keeps anyhow: not x, so a layer keeps 4 C instead of 8 C values a
token. Where x^2 is too small for the dtype, h and dx are 0 (in fp16 this and the coarse steps near
it cost dx up to 2^-11 |dh|); where it is too large, both are infinite. NaN stays NaN, so that a bad
step can be seen.

Bytes moved, E elements of s bytes: forward 2 s E, backward 3 s E (reads h and dh, writes dx); 2 to
4 FLOPs an element: limited by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSED_MULTIPLY_ADD, AotCase, check_tensors, runs_kernel, upcast

# 16 elements a thread: two 16-byte loads of bf16 under way from each of the two operands.
LAUNCH = {"BLOCK": 2048, "num_warps": 4}


def squared_relu_ref(x: Tensor) -> Tensor:
    """`squared_relu` in plain PyTorch."""
    return torch.relu(upcast(x)).square().to(x.dtype)


@triton.jit
def _squared_relu_fwd_kernel(
    x_ptr,  # (E,)
    h_ptr,  # (E,) out
    E,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < E, other=0.0).to(tl.float32)
    # Not tl.maximum, which turns NaN into 0.
    x = tl.where(x < 0, 0.0, x)
    tl.store(h_ptr + i, x * x, mask=i < E)


@triton.jit
def _squared_relu_bwd_kernel(
    dh_ptr,  # (E,)
    h_ptr,  # (E,)
    dx_ptr,  # (E,) out
    E,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + i, mask=i < E, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + i, mask=i < E, other=0.0).to(tl.float32)
    tl.store(dx_ptr + i, dh * (2 * tl.sqrt(h)), mask=i < E)


@torch.library.custom_op("gptfast::squared_relu", mutates_args=())
def _forward(x: Tensor) -> Tensor:
    if not runs_kernel(x):
        return squared_relu_ref(x)
    h, size = x.new_empty(x.shape), x.numel()
    if size > 0:
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(size, LAUNCH["BLOCK"]),)
            _squared_relu_fwd_kernel[grid](x, h, size, **LAUNCH, **FUSED_MULTIPLY_ADD)
    return h


@_forward.register_fake
def _(x):
    return x.new_empty(x.shape)


@torch.library.custom_op("gptfast::squared_relu_bwd", mutates_args=())
def squared_relu_bwd(dh: Tensor, h: Tensor) -> Tensor:
    """dx of squared_relu, whose output was h."""
    # A gradient that is not laid out like h (a broadcast one, say) is copied first.
    dh = dh.contiguous()
    if not runs_kernel(h):
        return (upcast(dh) * (2 * upcast(h).sqrt())).to(h.dtype)
    dx, size = h.new_empty(h.shape), h.numel()
    if size > 0:
        with torch.cuda.device_of(h):
            grid = (triton.cdiv(size, LAUNCH["BLOCK"]),)
            _squared_relu_bwd_kernel[grid](dh, h, dx, size, **LAUNCH, **FUSED_MULTIPLY_ADD)
    return dx


@squared_relu_bwd.register_fake
def _(dh, h):
    return h.new_empty(h.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output)


def _squared_relu_backward(ctx, dh):
    return squared_relu_bwd(dh, *ctx.saved_tensors)


_forward.register_autograd(_squared_relu_backward, setup_context=_setup_context)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 of a contiguous x in bf16, fp16 or fp32; ValueError for any other."""
    check_tensors("squared_relu", x=x)
    if not x.is_contiguous():
        raise ValueError(
            f"squared_relu: x of shape {tuple(x.shape)} has strides {x.stride()}; it must be "
            "contiguous: pass .contiguous()"
        )
    return _forward(x)


def aot_cases(capability: tuple[int, int]) -> list[AotCase]:
    """The model's hidden layer at d20."""
    half, size = torch.bfloat16, 65536 * 5120
    fwd, bwd = (_squared_relu_fwd_kernel, half, half), (_squared_relu_bwd_kernel, half, half, half)
    return [
        AotCase.of_launch("squared_relu_fwd bf16", *fwd, size, **LAUNCH),
        AotCase.of_launch("squared_relu_bwd bf16", *bwd, size, **LAUNCH),
    ]
