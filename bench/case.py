"""What one benchmark is: a size that we train, an operator's case at it, buffers, and passes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.timing import Cost, Stages
from gptfast.model import GPTConfig

FORWARD = "forward"
BACKWARD = "backward"
BOTH = "both"
DIRECTIONS = (FORWARD, BACKWARD, BOTH)


@dataclass(frozen=True)
class Size:
    """A model that we train, and the batch of one micro-step."""

    name: str
    config: GPTConfig
    batch: int = 32

    @property
    def tokens(self) -> int:
        return self.batch * self.config.sequence_len


def sizes(on_gpu: bool, every: bool) -> list[Size]:
    """The report's d20; `every`: more depths from d12 to d32. Without a GPU one tiny model."""
    if not on_gpu:
        config = GPTConfig(
            sequence_len=16, vocab_size=192, n_layer=1, n_head=2, n_kv_head=2, n_embd=64
        )
        return [Size("tiny", config, batch=4)]
    depths = (20, 12, 26, 32) if every else (20,)
    return [Size(f"d{d}", GPTConfig.from_depth(d, vocab_size=65536)) for d in depths]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def rand(*shape: int, grad: bool = False, scale: float = 1.0) -> Tensor:
    """A fresh bf16 tensor of normal numbers."""
    x = torch.randn(shape, device=device()).mul_(scale).to(torch.bfloat16)
    return x.requires_grad_(grad)


@dataclass(frozen=True)
class Case:
    """One operator at one size."""

    name: str
    inputs: Callable[[], tuple[Any, ...]]
    """A fresh set of arguments; the tensors to differentiate require grad."""
    reference: Callable[..., Any]
    """The operator in plain PyTorch; its arguments come in fp32."""
    providers: Mapping[str, Callable[[], Any]]
    """Name -> a function that imports and compiles what is needed and returns the call, or, for
    forward only, Stages over the arguments."""
    cost: Mapping[str, Cost]
    """Direction -> what it has to do at the least."""
    floors: Mapping[str, Stages] = field(default_factory=dict)
    """Timed beside the providers: what they cannot beat. Not compared with the reference."""
    clobbering: frozenset[str] = frozenset()
    """Providers that write into their arguments; each call gets copies, made before the clock."""


def with_both(forward: Cost, backward: Cost) -> dict[str, Cost]:
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


@dataclass(frozen=True)
class Buffers:
    """One set: the arguments of a call, and the gradients of its outputs."""

    arguments: tuple[Any, ...]
    grads: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, case: Case, call: Callable[..., Any]) -> "Buffers":
        """A fresh set; `call` tells the outputs' shapes. The gradient of a scalar is 1."""
        arguments = case.inputs()
        if not any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
            return cls(arguments)
        with torch.no_grad():
            results = as_tuple(call(*arguments))
        grads = (torch.randn_like(y) if y.ndim else torch.ones_like(y) for y in results)
        return cls(arguments, tuple(grads))

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.arguments, *self.grads) if isinstance(t, Tensor)]

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors if t.requires_grad]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Buffers":
        def changed(value):
            if not isinstance(value, Tensor):
                return value
            return change(value.detach()).requires_grad_(value.requires_grad)

        return Buffers(tuple(map(changed, self.arguments)), tuple(map(changed, self.grads)))

    def copies(self) -> "Buffers":
        return self.map(torch.clone)

    def fp32(self) -> "Buffers":
        return self.map(lambda t: t.float() if t.is_floating_point() else t)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def outputs(call: Any, buffers: Buffers) -> tuple[Tensor, ...]:
    if isinstance(call, Stages):
        return as_tuple(call.run(call.prepare(buffers.arguments)))
    return as_tuple(call(*buffers.arguments))


def gradients(results: tuple[Tensor, ...], buffers: Buffers) -> tuple[Tensor, ...]:
    return torch.autograd.grad(results, buffers.leaves, buffers.grads)


def again_and_again(call: Any, direction: str, buffers: Buffers) -> Callable[[], Any] | None:
    """A pass over one set that can be repeated, without what comes before the clock; None if each
    needs a preparation of its own."""
    if isinstance(call, Stages):
        return None
    if direction != BACKWARD:
        run = stages(call, direction).run
        return lambda: run(buffers)
    results = outputs(call, buffers)
    return lambda: torch.autograd.grad(results, buffers.leaves, buffers.grads, retain_graph=True)


def stages(call: Any, direction: str, clobbers: bool = False) -> Stages:
    """One direction of a call, over Buffers: what comes before the clock, and what it times.

    The forward pass before every timed backward pass is a new one, so a backward pass may free or
    overwrite what was saved for it.
    """

    def fresh(buffers: Buffers) -> Buffers:
        return buffers.copies() if clobbers else buffers

    def forward(buffers: Buffers) -> tuple[tuple[Tensor, ...], Buffers]:
        return outputs(call, buffers), buffers

    if isinstance(call, Stages):
        return Stages(lambda buffers: call.prepare(buffers.arguments), call.run)
    if direction == FORWARD:
        return Stages(fresh, forward)
    if direction == BACKWARD:
        return Stages(lambda buffers: forward(fresh(buffers)), lambda state: gradients(*state))
    return Stages(fresh, lambda buffers: gradients(*forward(buffers)))
