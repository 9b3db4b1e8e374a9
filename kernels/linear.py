"""A linear layer: y = x W^T, dx = dy W, dW = dy^T x.

x (..., K), W (N, K), all of one dtype. Where its tiles fill a Hopper GPU, y is our product's
(kernels/product.py), which is faster there; else it is cuBLAS's, as dx and dW are. FLOPs: 2 M K N
each.

d20's on one H200, under load, and a layer's in whole steps (bench/tune_product.py, bench/mfu.py;
2026-11-23, torch 2.11.0+cu130, Triton 3.6):

                            by itself             in a step
                            ours      cuBLAS      ours       cuBLAS
    qkv                     0.958     0.994 ms    0.920      0.987 ms
    attention projection    0.333     0.345       0.320      0.344

By cuBLAS's time, by itself: d12's 0.97 and 0.98, d32's 0.99 and 0.95; d26's 1.03 and 0.98, of which
neither is whole tiles wide, stay cuBLAS's (bench/results/product-h200.json).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import as_rows, check_tensors
from kernels.product import fills_gpu, product


def linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` in plain PyTorch."""
    return F.linear(x, weight)


@torch.library.custom_op("gptfast::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight.t()) if fills_gpu(x, weight.t()) else x @ weight.t()


@_linear.register_fake
def _(x, weight):
    # Not len(), which would make a constant of a size that may change.
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.gptfast.linear)
def _(x, weight, **_) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad
    return dy @ weight if needs_x else None, dy.t() @ x if needs_weight else None


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T: x (..., K) and weight (N, K), both bf16, fp16 or fp32 -> (..., N).

    ValueError for what it does not take.
    """
    op = "linear"
    check_tensors(op, x=x, weight=weight)
    if x.dtype != weight.dtype:
        raise ValueError(f"{op}: x is {x.dtype}, weight {weight.dtype}; it takes one dtype")
    rows = as_rows(op, "x", x)
    if weight.ndim != 2 or weight.shape[1] != rows.shape[1]:
        raise ValueError(
            f"{op}: x is {tuple(x.shape)}, weight {tuple(weight.shape)}; "
            "it takes (..., K) and (N, K)"
        )
    return _linear(rows, weight).view(*x.shape[:-1], weight.shape[0])
