"""Which row of the ledger an event belongs to, and the FLOPs and bytes of the call behind it.

Products are told apart by the shapes of the operator that launched them: the model's layers have
different ones, and forward, input gradient and weight gradient contract different dimensions. Where
shapes leave a choice (the attention projection is square; the MLP's two products are each other's
gradients) the operands' layout decides: `x W^T` transposes the second, `dy W` none, `dy^T x` the
first.
"""

import pkgutil
import re
from functools import cache
from importlib import import_module
from math import prod
from typing import NamedTuple

import torch
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import KernelInterface

import kernels
from gptfast.ledger.job import Job
from gptfast.ledger.trace import BACKWARD, FORWARD, OPTIMIZER, Event, Op

PRODUCTS = "products"
ATTENTION = "attention"
MEMORY = "memory-bound kernels"
OPTIMIZER_GROUP = "optimizer"
COMMUNICATION = "communication"
SHARDING = "FSDP copies and casts"
GAPS = "gaps"
ELSE = "everything else"
GROUPS = (
    PRODUCTS,
    ATTENTION,
    MEMORY,
    OPTIMIZER_GROUP,
    COMMUNICATION,
    SHARDING,
    GAPS,
    ELSE,
)

NEWTON_SCHULZ, ADAMW, GRADIENT_NORM = "Newton-Schulz", "AdamW", "gradient norm"
MUON_ELEMENTWISE = "Muon: momentum, copies, update"
DIRECTIONS = ("forward", "input gradient", "weight gradient")

# Operator -> index of its first matrix; the second follows.
_PRODUCT_OPS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::_scaled_mm": 0,
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "aten::addmm_": 1,
    "aten::baddbmm_": 1,
}
# Kernels of products by name, for those whose operator is not known (a CUDA graph's, say).
_PRODUCT_KERNEL = re.compile(r"nvjet|gemm|cutlass|cublas|splitk|xmma|wgmma", re.IGNORECASE)
_ATTENTION_OP = re.compile(r"attention|::flash\d?_|sdpa|fmha|varlen_attn", re.IGNORECASE)
_ATTENTION_KERNEL = re.compile(
    r"flash|fmha|sdpa|compute_dot_do_o|convert_dq|attention", re.IGNORECASE
)
_COLLECTIVE = re.compile(r"nccl|multimem|Memcpy PtoP|symm_mem", re.IGNORECASE)
_COLLECTIVES = {
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
    "sendrecv": "all-to-all",
    "broadcast": "broadcast",
    "ptop": "all-gather by copy engines",
}
_BACKWARD_NAME = re.compile(r"backward|bwd|bprop|dot_do_o|convert_dq")


class Kind(NamedTuple):
    """A row's name, and what one call costs; 0 where that is not known from the call."""

    group: str
    name: str
    flops: float = 0.0
    bytes: float = 0.0
    call: int | None = None
    """Number of the operator's call: its FLOPs and bytes count once, however many kernels."""


def kind(event: Event, job: Job) -> Kind:
    """The row of one event. Rules from the most certain to the least; the first that fits."""
    rules = (
        _communication,
        _attention,
        _product,
        _optimizer,
        _sharding,
        _operator,
        _generated,
        _eager,
    )
    for rule in rules:
        found = rule(event, job)
        if found is not None:
            return found
    return Kind(ELSE, f"{event.name[:60]}, {event.phase}")


def is_communication(event: Event) -> bool:
    return bool(event.collective) or _COLLECTIVE.search(event.name) is not None


def _communication(event: Event, job: Job) -> Kind | None:
    if not is_communication(event):
        return None
    said = (event.collective or event.name).lower().replace("_", "")
    name = next((v for k, v in _COLLECTIVES.items() if k in said), "other collectives")
    call = event.ops[0].number if event.ops else None
    if event.phase == OPTIMIZER and name in ("all-to-all", "all-gather"):
        name = f"exchange ({name})"
        return Kind(OPTIMIZER_GROUP, name, bytes=event.moved_bytes, call=call)
    return Kind(COMMUNICATION, name, bytes=event.moved_bytes, call=call)


def _attention(event: Event, job: Job) -> Kind | None:
    op = next((op for op in event.ops if _ATTENTION_OP.search(op.name)), None)
    if op is None and not _ATTENTION_KERNEL.search(event.name):
        return None
    named = op is not None and _BACKWARD_NAME.search(op.name.lower())
    backward = named or event.phase == BACKWARD or _BACKWARD_NAME.search(event.name)
    return Kind(ATTENTION, BACKWARD if backward else FORWARD)


def _product(event: Event, job: Job) -> Kind | None:
    op = next((op for op in event.ops if op.name in _PRODUCT_OPS), None)
    found = _weight_gradient(event, job) or (_fused_product(event, job) if op is None else None)
    if found is not None:
        return found
    if op is None:
        if not _PRODUCT_KERNEL.search(event.name):
            return None
        group = OPTIMIZER_GROUP if event.phase == OPTIMIZER else PRODUCTS
        return Kind(group, NEWTON_SCHULZ if event.phase == OPTIMIZER else "layer not known")
    shape = product_shape(op)
    if shape is None:
        return Kind(PRODUCTS, "shape not known", call=op.number)
    n, m, k, o = shape
    flops = 2.0 * n * m * k * o
    if event.phase == OPTIMIZER:
        return Kind(OPTIMIZER_GROUP, NEWTON_SCHULZ, flops, call=op.number)
    T = job.config.sequence_len
    if n > 1 and T in (m, k, o):
        # The scores and their like, where attention is made of plain products.
        return Kind(ATTENTION, event.phase, call=op.number)
    name = layer(m, k, o, transposed(op), event.phase, job) or f"other ({m} x {k} x {o})"
    return Kind(PRODUCTS, name, flops, call=op.number)


def _weight_gradient(event: Event, job: Job) -> Kind | None:
    """Our operator for dy^T x, which may be several products: dy (M, N) and x (M, K)."""
    op = event.within("gptfast::weight_gradient")
    if op is None or len(op.dims) < 2:
        return None
    (m, n), (_, k) = op.dims[:2]
    name = layer(n, m, k, (True, False), event.phase, job)
    return Kind(PRODUCTS, name or op.name, 2.0 * m * n * k, call=op.number)


def _fused_product(event: Event, job: Job) -> Kind | None:
    """An operator of ours that is a product, perhaps with something in its epilogue: x (..., K) and
    a weight (N, K) or (K, N), with a formula for its FLOPs. The linear cross-entropy is none: its
    products are PyTorch's own."""
    op = event.within("gptfast::")
    if op is None or op.name.startswith("gptfast::linear_cross_entropy") or len(op.dims) < 2:
        return None
    packet = getattr(torch.ops.gptfast, op.name.removeprefix("gptfast::"), None)
    x, weight = op.dims[:2]
    if packet not in flop_registry or len(weight) != 2 or not x:
        return None
    m, k = prod(x[:-1]), x[-1]
    by_rows = weight[1] == k
    n = weight[0] if by_rows else weight[1]
    name = layer(m, k, n, (False, by_rows), event.phase, job)
    return Kind(PRODUCTS, name or op.name, 2.0 * m * k * n, call=op.number)


def product_shape(op: Op) -> tuple[int, int, int, int] | None:
    """(batch, m, k, n) of a product (m, k) x (k, n), as PyTorch's FlopCounter counts it."""
    first = _PRODUCT_OPS[op.name]
    if len(op.dims) < first + 2:
        return None
    a, b = op.dims[first], op.dims[first + 1]
    if len(a) != len(b) or len(a) not in (2, 3):
        return None
    return (a[0] if len(a) == 3 else 1), a[-2], a[-1], b[-1]


def transposed(op: Op) -> tuple[bool | None, bool | None]:
    """Whether each operand is laid out as a transpose; None where that cannot be told."""
    first = _PRODUCT_OPS[op.name]

    def one(strides: tuple) -> bool | None:
        if len(strides) < 2 or strides[-1] == strides[-2]:
            return None
        return strides[-2] == 1

    given = op.strides[first : first + 2]
    return (one(given[0]), one(given[1])) if len(given) == 2 else (None, None)


def layer(
    m: int, k: int, n: int, layout: tuple[bool | None, bool | None], phase: str, job: Job
) -> str | None:
    """Such as "mlp fc, input gradient" for the product (m, k) x (k, n); None if no layer has it."""
    config, rows = job.config, job.tokens
    C, KV = config.n_embd, config.n_kv_head * config.head_dim
    layers = {
        "qkv": (C, C + 2 * KV),
        "attention projection": (C, C),
        "mlp fc": (C, 4 * C),
        "mlp projection": (4 * C, C),
        "head": (C, config.vocab_size),
    }
    # Layouts of the two operands and phase, by direction; what fits best wins.
    habits = {
        "forward": ((False, True), FORWARD),
        "input gradient": ((False, False), BACKWARD),
        "weight gradient": ((True, False), BACKWARD),
    }
    best, best_score = None, -1
    for name, (inputs, outputs) in layers.items():
        for direction, contracted in zip(DIRECTIONS, (inputs, outputs, None)):
            if direction == "weight gradient":
                fits = {m, n} == {inputs, outputs} and _some_rows(k, name, rows)
            else:
                to = outputs if direction == "forward" else inputs
                fits = (k, n) == (contracted, to) and _some_rows(m, name, rows)
            if not fits:
                continue
            usual, usual_phase = habits[direction]
            agrees = sum(a is not None and a == b for a, b in zip(layout, usual))
            # Gradients of the head may be taken in the forward pass.
            score = 8 * agrees + 4 * (phase == usual_phase or name == "head")
            # Of dy^T x and x^T dy autograd makes the first; a chunk of the head's is a last resort.
            score += 2 * (n == inputs) + (name != "head")
            if score > best_score:
                best, best_score = f"{name}, {direction}", score
    return best


def _some_rows(rows: int, name: str, all_rows: int) -> bool:
    """Only the head works chunk by chunk."""
    return rows == all_rows or (name == "head" and 0 < rows < all_rows)


def _optimizer(event: Event, job: Job) -> Kind | None:
    if event.name in _jit_functions("newton_schulz"):
        return Kind(OPTIMIZER_GROUP, NEWTON_SCHULZ)
    if event.name in _jit_functions("muon"):
        return Kind(OPTIMIZER_GROUP, MUON_ELEMENTWISE)
    if event.within("aten::_fused_adamw") or "adamw" in event.name.lower():
        return Kind(OPTIMIZER_GROUP, ADAMW)
    if event.phase != OPTIMIZER or event.within("FSDP::"):
        return None
    if event.within("aten::_foreach_norm"):
        return Kind(OPTIMIZER_GROUP, GRADIENT_NORM)
    return Kind(OPTIMIZER_GROUP, MUON_ELEMENTWISE)


def _sharding(event: Event, job: Job) -> Kind | None:
    if event.within("FSDP::", "fsdp::", "c10d::") is None:
        return None
    return Kind(SHARDING, event.phase if event.phase != OPTIMIZER else BACKWARD)


def _operator(event: Event, job: Job) -> Kind | None:
    """Our operators by name, the embedding, and the adding up of micro-steps' gradients."""
    # Ours, whose lookup is PyTorch's own; its backward's sort is in the row too.
    op = event.within("gptfast::embedding") or event.within("aten::embedding")
    if op is not None:
        # A row is read and written for each token; backward, a token's read and a word's written.
        C, V, M = job.config.n_embd, job.config.vocab_size, job.tokens
        moved = 2 * (M * C + (V * C if event.phase == BACKWARD else M * C))
        return Kind(MEMORY, f"embedding, {event.phase}", bytes=moved, call=op.number)
    op = event.within("gptfast::")
    if op is not None:
        name, tokens = op.name.removeprefix("gptfast::"), job.tokens
        if name.startswith("linear_cross_entropy") and not name.endswith("bwd"):
            # Of its products the operator's own shapes say nothing: a chunk of logits, in place.
            moved = 2 * 2 * tokens * job.config.vocab_size
        else:
            moved = operator_bytes(op)
        return Kind(MEMORY, name, bytes=moved, call=op.number)
    if event.name in _jit_functions("embedding"):
        return Kind(MEMORY, f"embedding, {BACKWARD}")
    if event.name in _jit_functions():
        return Kind(MEMORY, event.name.strip("_").removesuffix("_kernel"))
    if event.within("torch::autograd::AccumulateGrad"):
        return Kind(MEMORY, "gradients added up")
    return None


def _generated(event: Event, job: Job) -> Kind | None:
    """What Inductor generated: a row for each, its name says what it fused."""
    if not event.name.startswith(("triton_", "cpp_fused", "graph_")):
        return None
    op = event.within(event.name)
    moved = tensor_bytes(op.dims, op.types) if op else 0.0
    return Kind(MEMORY, event.name, bytes=moved, call=op.number if op else None)


def _eager(event: Event, job: Job) -> Kind | None:
    """PyTorch's own small kernels, named by the outermost operator, which says most."""
    op = next((op for op in reversed(event.ops) if op.name.startswith("aten::")), None)
    if op is None or event.name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
        return None
    return Kind(MEMORY, f"{op.name}, {event.phase}")


@cache
def _jit_functions(module: str | None = None) -> frozenset[str]:
    """Names of the Triton kernels in kernels/, or in one file of it."""
    names = set()
    for found in pkgutil.iter_modules(kernels.__path__):
        if module in (None, found.name):
            loaded = vars(import_module(f"kernels.{found.name}"))
            names |= {n for n, value in loaded.items() if isinstance(value, KernelInterface)}
    return frozenset(names)


_TYPES = {
    "c10::BFloat16": torch.bfloat16,
    "c10::Half": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
    "long int": torch.int64,
    "long": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
    "unsigned char": torch.uint8,
}


def tensor_bytes(dims: tuple, types: tuple[str, ...]) -> float:
    """Of all tensors among an operator's arguments."""
    return float(
        sum(prod(d) * _TYPES[t].itemsize for d, t in zip(dims, types) if t in _TYPES and d)
    )


def operator_bytes(op: Op) -> float:
    """The least that one of our operators moves: each tensor read or written once.

    What it returns follows from its fake, called on meta tensors of the recorded shapes. 0 if the
    record does not say enough to call it.
    """
    try:
        overload = getattr(torch.ops.gptfast, op.name.removeprefix("gptfast::")).default
        arguments = overload._schema.arguments
        given = [
            _argument(argument, *of)
            for argument, of in zip(
                arguments, zip(op.dims, op.types, op.scalars, strict=True), strict=True
            )
        ]
        results = overload(*given)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return 0.0
    written = [a for a, s in zip(given, arguments) if s.alias_info and s.alias_info.is_write]
    results = results if isinstance(results, tuple | list) else (results,)
    return float(sum(t.nbytes for t in (*given, *written, *results) if isinstance(t, torch.Tensor)))


def _argument(argument: torch.Argument, dims: tuple, kind: str, scalar: str) -> object:
    """One recorded argument as a value to call with: a meta tensor, or the scalar."""
    if kind in _TYPES:
        return torch.empty(dims, dtype=_TYPES[kind], device="meta")
    if scalar in ("", "None"):
        return None
    declared = str(argument.type).removeprefix("Optional[").removesuffix("]")
    if declared == "bool":
        return scalar == "True"
    if declared == "int":
        # A dtype is recorded as a number too, and is not needed: fakes take either.
        return int(scalar)
    if declared in ("float", "number"):
        return float(scalar)
    raise ValueError(f"{argument.name}: {declared} {scalar!r}")
