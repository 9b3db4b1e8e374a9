"""Every operator of kernels/ against its plain reference, at a small shape, on this machine.

An operator may err as much as twice what PyTorch's own computation in the same dtype does, against
the reference in fp64 (root mean square over each result), plus one spacing of the dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.cached_attention import AttentionScratch, attend_to_cache, attend_to_cache_ref
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from kernels.embedding import SPLIT, embedding, embedding_ref
from kernels.few_rows import (
    few_rows_product,
    few_rows_product_ref,
    product_config,
    supports_pdl,
)
from kernels.launch import runs_kernel
from kernels.linear import linear, linear_ref
from kernels.mlp import squared_relu_mlp, squared_relu_mlp_ref
from kernels.muon import add_update, add_update_ref, nesterov, nesterov_ref
from kernels.newton_schulz import newton_schulz, newton_schulz_ref
from kernels.product import CONFIG
from kernels.qk_norm import rotary_qk_norm, rotary_qk_norm_ref
from kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from kernels.rotary import rotary, rotary_ref
from kernels.squared_relu import squared_relu, squared_relu_ref

# Tokens, heads, head size, width, vocabulary: small, and between blocks.
_T, _H, _D, _C, _V = 17, 2, 32, 72, 130
# Rows and columns from which on the MLP's activation may be in its products.
MANY = (4096, 520)


@dataclass(frozen=True)
class Case:
    """op and ref take the tensors of `shapes`; their gradients are compared, too, unless backward
    is False. exact: ref in fp64, where calling it with fp64 tensors is not that."""

    name: str
    op: Callable
    ref: Callable
    shapes: tuple[tuple[int, ...], ...]
    backward: bool = True
    dtype: torch.dtype | None = None
    exact: Callable | None = None


def kernel_cases(device: torch.device) -> list[Case]:
    """One for each operator; what is neither input nor gradient is bound already."""
    theta = torch.outer(
        torch.arange(_T, device=device).float(),
        10_000.0 ** -torch.linspace(0, 1, _D // 2, device=device),
    )
    angles = {"cos": theta.cos(), "sin": theta.sin()}
    heads = {**angles, "n_head": _H, "n_kv_head": _H}
    targets = {"targets": torch.arange(_T, device=device) * 7 % _V}
    last = {
        "scale": torch.tensor(0.5, device=device),
        "momentum": 0.95,
        "finite": torch.tensor(True, device=device),
    }
    qkv, head = (1, _T, 3 * _H * _D), (1, _T, _H, _D)
    rows, matrices = (_T, _C), (2, _T, _C)
    full, many = [], []
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        full, many = [full_gpu(multiprocessors)], [MANY]
    # One word is every other token, in several parts of the sum; others are a few, or none.
    numbers = torch.arange(6 * SPLIT, device=device)
    ids = numbers % 2 * numbers % _V
    # One row's new token comes after all others, one's among the first.
    cached = {**angles, "positions": torch.tensor([_T - 1, 3], device=device), "n_head": _H}
    cache = (2, _T, _H, _D)
    return [
        Case("embedding", partial(embedding, ids), partial(embedding_ref, ids), ((_V, _C),)),
        Case("rms_norm", rms_norm, rms_norm_ref, (rows, (_C,))),
        Case("add_rms_norm", add_rms_norm, add_rms_norm_ref, (rows, rows)),
        Case("rotary", *_bound(rotary, rotary_ref, **angles), (head, head)),
        Case("rotary_qk_norm", *_bound(rotary_qk_norm, rotary_qk_norm_ref, **heads), (qkv,)),
        Case("squared_relu", squared_relu, squared_relu_ref, (rows,)),
        *(_linear_case(*size) for size in [rows, *full]),
        *(_mlp_case(*size) for size in [rows, *many]),
        Case(
            "linear_cross_entropy",
            *_bound(linear_cross_entropy, linear_cross_entropy_ref, **targets),
            (rows, (_V, _C)),
        ),
        Case(
            "newton_schulz",
            newton_schulz,
            newton_schulz_ref,
            ((2, 40, 72),),
            backward=False,
            dtype=torch.bfloat16,
            exact=partial(newton_schulz_ref, dtype=torch.float64),
        ),
        Case(
            "nesterov",
            _moved_average(partial(nesterov, **last)),
            _moved_average(partial(nesterov_ref, **last)),
            (matrices, matrices),
            backward=False,
            dtype=torch.float32,
        ),
        Case(
            "add_update",
            _updated(partial(add_update, alpha=-0.02)),
            _updated(partial(add_update_ref, alpha=-0.02)),
            (matrices, matrices),
            backward=False,
            dtype=torch.float32,
        ),
        Case(
            "few_rows_product",
            _few_rows_product,
            _few_rows_product_ref,
            ((2, 80), (2, 80), (_V, 80)),
            backward=False,
        ),
        Case(
            "attend_to_cache",
            partial(_attend_to_cache, **cached),
            partial(_attend_to_cache_ref, **cached),
            ((2, 3 * _H * _D), cache, cache),
            backward=False,
        ),
    ]


def full_gpu(multiprocessors: int) -> tuple[int, int]:
    """(rows, width) of a square layer whose product is ours: its tiles fill the GPU."""
    return CONFIG["BLOCK_M"] * multiprocessors, 3 * CONFIG["BLOCK_N"]


def _linear_case(rows: int, width: int) -> Case:
    name = "linear" if rows == _T else f"linear, {rows} x {width}"
    return Case(name, linear, linear_ref, ((rows, width), (width, width)))


def _mlp_case(rows: int, width: int) -> Case:
    name = "squared_relu_mlp" if rows == _T else f"squared_relu_mlp, {rows} x {width}"
    shapes = ((rows, width), (4 * width, width), (width, 4 * width))
    return Case(name, squared_relu_mlp, squared_relu_mlp_ref, shapes)


def kernel_error(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the operator is right here; otherwise which result is wrong, and by how much."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = case.dtype or dtype
    inputs = [
        (torch.randn(shape, generator=generator, device=device) / 4).to(dtype)
        for shape in case.shapes
    ]
    ours = _results(case.op, inputs, backward=case.backward)
    theirs = _results(case.ref, inputs, backward=case.backward)
    exact = _results(case.exact or case.ref, [x.double() for x in inputs], backward=case.backward)
    for number, (mine, other, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        error, allowed = _distance(mine, true), 2 * _distance(other, true)
        allowed += torch.finfo(mine.dtype).eps * float(torch.linalg.vector_norm(true.double()))
        # Not `error > allowed`, which NaN would pass.
        if mine.shape != other.shape or not error <= allowed:
            return f"result {number} errs by {error:.3g}, {allowed:.3g} is allowed"
    return None


def _results(op: Callable, inputs: Sequence[Tensor], *, backward: bool) -> list[Tensor]:
    """Outputs, then the gradient of every input."""
    leaves = [x.clone().requires_grad_(backward) for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = [y.detach() for y in outputs]
    if backward:
        # Of the same values in every dtype, and unlike each other.
        grads = [torch.linspace(0.5, 1.5, y.numel()).to(y).view(y.shape) for y in outputs]
        found += torch.autograd.grad(outputs, leaves, grads)
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b.double()))


def _bound(op: Callable, ref: Callable, **fixed: object) -> tuple[Callable, Callable]:
    return partial(op, **fixed), partial(ref, **fixed)


def _moved_average(op: Callable) -> Callable:
    """`nesterov`, which writes to what it is given, as a function of tensors."""

    def run(average: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        average, out = average.clone(), torch.empty_like(grads, dtype=torch.bfloat16)
        op(average, grads.unbind(), out=out)
        return out, average

    return run


def _updated(op: Callable) -> Callable:
    """`add_update` in the same way."""

    def run(weights: Tensor, update: Tensor) -> Tensor:
        weights = weights.clone()
        op(weights.unbind(), update.bfloat16())
        return weights

    return run


def _few_rows_product_ref(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    options = {"norm": True, "activation": "squared_relu"}
    return few_rows_product_ref(x, weight, branch=branch, **options)


def _few_rows_product(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`few_rows_product`, which writes to what it is given, as a function of tensors."""
    if not runs_kernel(x):
        return _few_rows_product_ref(x, branch, weight)
    total, out = torch.empty_like(x), x.new_empty(len(x), len(weight))
    config, pdl = product_config("mlp_fc", len(x)), supports_pdl(x.device)
    options = {"branch": branch, "total": total, "activation": "squared_relu"}
    few_rows_product(x, weight, out, config=config, pdl=pdl, first=True, **options)
    return total, out


def _attend_to_cache_ref(qkv: Tensor, keys: Tensor, values: Tensor, **fixed) -> tuple[Tensor, ...]:
    keys, values = keys.clone(), values.clone()
    return attend_to_cache_ref(qkv, keys=keys, values=values, **fixed), keys, values


def _attend_to_cache(qkv: Tensor, keys: Tensor, values: Tensor, **fixed) -> tuple[Tensor, ...]:
    """`attend_to_cache` in the same way."""
    if not runs_kernel(qkv):
        return _attend_to_cache_ref(qkv, keys, values, **fixed)
    keys, values, y = keys.clone(), values.clone(), qkv.new_empty(len(qkv), _H * _D)
    scratch = AttentionScratch(len(qkv), _H, _D, qkv.device)
    attend_to_cache(qkv, keys=keys, values=values, y=y, scratch=scratch, pdl=False, **fixed)
    return y, keys, values
