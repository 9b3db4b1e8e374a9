"""The MLP of a block, one operator: a product, squared ReLU, a product.

    u = x W1^T    h = max(u, 0)^2    y = h W2^T
    du = (dy W2) 2 sqrt(h)    dx = du W1    dW1 = du^T x    dW2 = dy^T h

x (..., C), W1 (F, C), W2 (C, F), all of one dtype. Kept for backward: x and h, not u. On Hopper the
activation and its derivative are in the epilogues of the products before them (kernels/product.py);
elsewhere, and for few rows or few columns, they are kernels of their own behind cuBLAS's products
(kernels/squared_relu.py). The other four products are always cuBLAS's, a weight's gradient in two
parts where that is faster.

FLOPs: 12 M C F, of which 4 M C F forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import as_rows, check_tensors
from kernels.product import product, takes
from kernels.squared_relu import squared_relu, squared_relu_bwd, squared_relu_ref

# A weight's gradient (F, C) or (C, F), and where along F it is cut: the first part's tiles fill the
# multiprocessors once (C = 1,664: twice), and cuBLAS splits the second along M, which it does not
# do to the whole. On an H200, torch 2.11.0+cu130 (2026-11-23), 65,536 tokens, by the time of the
# whole: C = 1,280 0.88 (F, C) and 0.84 (C, F), and no less with 8,192 tokens; 1,152 0.93 and 0.90,
# 1,664 0.95 and 0.91, 1,920 0.94 and 0.95. Of the other depths from 12 to 32, 22 gains 3 %, the
# rest nothing.
_CUTS = {(1152, 4608): 4224, (1280, 5120): 4096, (1664, 6656): 5120, (1920, 7680): 2816}
_LEAST_ROWS_TO_CUT = 8192


def squared_relu_mlp_ref(x: Tensor, fc_weight: Tensor, proj_weight: Tensor) -> Tensor:
    """`squared_relu_mlp` in plain PyTorch."""
    return F.linear(squared_relu_ref(F.linear(x, fc_weight)), proj_weight)


@torch.library.custom_op("gptfast::linear_squared_relu", mutates_args=())
def _linear_squared_relu(x: Tensor, weight: Tensor) -> Tensor:
    if takes(x, weight.t()):
        return product(x, weight.t(), squared_relu=True)
    return squared_relu(x @ weight.t())


@_linear_squared_relu.register_fake
def _(x, weight):
    # Not len(), which would make a constant of a size that may change.
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("gptfast::squared_relu_dgrad", mutates_args=())
def _squared_relu_dgrad(dy: Tensor, weight: Tensor, h: Tensor) -> Tensor:
    if takes(dy, weight):
        return product(dy, weight, gate=h)
    return squared_relu_bwd(dy @ weight, h)


@_squared_relu_dgrad.register_fake
def _(dy, weight, h):
    return h.new_empty(h.shape)


def _cut(dy: Tensor, x: Tensor) -> int | None:
    """Where to cut the larger side of dy^T x, if that is faster."""
    if (
        not dy.is_cuda
        or dy.dtype not in (torch.bfloat16, torch.float16)
        or torch.cuda.get_device_capability(dy.device)[0] != 9
        or len(dy) < _LEAST_ROWS_TO_CUT
    ):
        return None
    smaller, larger = sorted((dy.shape[1], x.shape[1]))
    return _CUTS.get((smaller, larger))


@torch.library.custom_op("gptfast::weight_gradient", mutates_args=())
def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x (N, K) of dy (M, N) and x (M, K)."""
    cut = _cut(dy, x)
    if cut is None:
        return dy.t() @ x
    dw = dy.new_empty(dy.shape[1], x.shape[1])
    by_rows = dy.shape[1] > x.shape[1]
    for part in (slice(None, cut), slice(cut, None)):
        if by_rows:
            torch.mm(dy[:, part].t(), x, out=dw[part])
        else:
            torch.mm(dy.t(), x[:, part], out=dw[:, part])
    return dw


@_weight_gradient.register_fake
def _(dy, x):
    return dy.new_empty(dy.shape[1], x.shape[1])


@torch.library.custom_op("gptfast::squared_relu_mlp", mutates_args=())
def _mlp(x: Tensor, fc_weight: Tensor, proj_weight: Tensor) -> tuple[Tensor, Tensor]:
    h = _linear_squared_relu(x, fc_weight)
    return h @ proj_weight.t(), h


@_mlp.register_fake
def _(x, fc_weight, proj_weight):
    y, h = (x.new_empty(x.shape[0], weight.shape[0]) for weight in (proj_weight, fc_weight))
    return y, h


@torch.library.custom_op("gptfast::squared_relu_mlp_bwd", mutates_args=())
def _mlp_bwd(dy: Tensor, proj_weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    # In this order: when a block's backward begins, the reduction of the gradients of the block
    # behind it is about to start, and takes multiprocessors from the second kernel. cuBLAS's
    # persistent product then waits for the reduction's end, with a fixed share of tiles for each
    # multiprocessor; ours, of which whoever is free takes the next tile, loses no more than those.
    dproj_weight = _weight_gradient(dy, h)
    return _squared_relu_dgrad(dy, proj_weight, h), dproj_weight


@_mlp_bwd.register_fake
def _(dy, proj_weight, h):
    return h.new_empty(h.shape), proj_weight.new_empty(proj_weight.shape)


@register_flop_formula(torch.ops.gptfast.linear_squared_relu)
def _(x, weight, **_) -> int:
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.gptfast.squared_relu_dgrad)
def _(dy, weight, h, **_) -> int:
    return 2 * dy[0] * dy[1] * weight[1]


@register_flop_formula(torch.ops.gptfast.weight_gradient)
def _(dy, x, **_) -> int:
    return 2 * dy[0] * dy[1] * x[1]


@register_flop_formula(torch.ops.gptfast.squared_relu_mlp)
def _(x, fc_weight, proj_weight, **_) -> int:
    return 2 * x[0] * (fc_weight[0] * fc_weight[1] + proj_weight[0] * proj_weight[1])


@register_flop_formula(torch.ops.gptfast.squared_relu_mlp_bwd)
def _(dy, proj_weight, h, **_) -> int:
    return 4 * dy[0] * dy[1] * proj_weight[1]


def _setup_context(ctx, inputs, output):
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, h)


def _backward(ctx, dy, _dh):
    if dy is None:
        return None, None, None
    x, fc_weight, proj_weight, h = ctx.saved_tensors
    needs_x, needs_fc, needs_proj = ctx.needs_input_grad
    du, dproj_weight = _mlp_bwd(dy, proj_weight, h)
    return (
        du @ fc_weight if needs_x else None,
        _weight_gradient(du, x) if needs_fc else None,
        dproj_weight if needs_proj else None,
    )


_mlp.register_autograd(_backward, setup_context=_setup_context)


def squared_relu_mlp(x: Tensor, fc_weight: Tensor, proj_weight: Tensor) -> Tensor:
    """max(x fc_weight^T, 0)^2 proj_weight^T.

    x (..., C), fc_weight (F, C), proj_weight (C', F), all bf16, all fp16 or all fp32 -> (..., C').
    ValueError for what it does not take.
    """
    op = "squared_relu_mlp"
    check_tensors(op, x=x, fc_weight=fc_weight, proj_weight=proj_weight)
    dtypes = [t.dtype for t in (x, fc_weight, proj_weight)]
    if len({*dtypes}) > 1:
        raise ValueError(f"{op}: x and weights are {dtypes}; it takes one dtype")
    rows = as_rows(op, "x", x)
    if (
        fc_weight.ndim != 2
        or proj_weight.ndim != 2
        or fc_weight.shape[1] != rows.shape[1]
        or proj_weight.shape[1] != fc_weight.shape[0]
    ):
        raise ValueError(
            f"{op}: x is {tuple(x.shape)}, weights {tuple(fc_weight.shape)} and "
            f"{tuple(proj_weight.shape)}; it takes (..., C), (F, C) and (C', F)"
        )
    y, _ = _mlp(rows, fc_weight, proj_weight)
    return y.view(*x.shape[:-1], proj_weight.shape[0])
