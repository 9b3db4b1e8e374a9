"""Muon for the blocks' matrices and AdamW for the rest, on parameters that FSDP2 sharded or not.

Momentum and moments are fp32 and lie where their parameter lies. A step, for gradients that are
sums over the tokens of a batch:

1. One all-reduce gives the true global norm and whether everything is finite. One number on the
   device then divides by the count of tokens and clips; one flag lets the step happen or not.
2. Muon, a group of equal shapes at a time: momentum on the row shards, bf16 shards exchanged so
   that every process holds its share of the matrices whole, Newton-Schulz, shards exchanged back.
   Each matrix is orthogonalised on one process. Exchanges run while AdamW, or another group's
   Newton-Schulz, has the device. Beside the products this moves 24 bytes an element of memory, and
   8 more where several shards are put together and taken apart.
3. AdamW, one fused kernel for each learning rate.

The host reads no tensor here, so it never waits for the device.

Muon: https://kellerjordan.github.io/posts/muon; the update rule, its constants and the learning
rates that go with them are nanochat d6d86cb's.
"""

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gptfast.config import LearningSettings
from gptfast.errors import UserError
from gptfast.exchange import (
    Grid,
    all_gather,
    all_to_all,
    assemble,
    disassemble,
    local,
    packet,
    unpack,
)
from gptfast.model import GPT
from kernels.muon import add_update, add_update_ref, nesterov, nesterov_ref
from kernels.newton_schulz import newton_schulz, newton_schulz_ref

# The width at which AdamW's learning rates are stated.
_BASE_WIDTH = 768


def adamw_learning_rate(lr: float, n_embd: int) -> float:
    """AdamW's learning rate for a model of this width: lr * (n_embd / 768)^-0.5."""
    return lr * (n_embd / _BASE_WIDTH) ** -0.5


class MuonOperators(NamedTuple):
    """What Muon calls; signatures are those of the functions named alike in kernels/.

    newton_schulz: (N, R, C) bf16, steps -> the same shape and dtype; zeros give zeros.
    """

    newton_schulz: Callable[[Tensor, int], Tensor]
    nesterov: Callable
    add_update: Callable


def muon_operators(kernels: str, device: torch.device) -> MuonOperators:
    """Our kernels for "triton", plain PyTorch for "reference", and for both on a CPU."""
    if device.type != "cuda":
        # newton_schulz itself takes plain PyTorch there, in fp32: CPUs without bf16 are slow in it.
        return MuonOperators(newton_schulz, nesterov_ref, add_update_ref)
    if kernels == "reference":
        return MuonOperators(newton_schulz_ref, nesterov_ref, add_update_ref)
    return MuonOperators(newton_schulz, nesterov, add_update)


def build_optimizer(
    model: GPT, settings: LearningSettings, *, kernels: str = "triton"
) -> "Optimizer":
    """The optimizer of a stage: Muon on the blocks, AdamW on embedding and head.

    kernels: "triton" or "reference", for Muon; AdamW is PyTorch's own.
    """
    width = model.config.n_embd
    matrices = model.matrices()
    rest = {n: p for n, p in model.named_parameters() if n not in matrices}
    learning_rates = {
        "lm_head.weight": settings.unembedding_lr,
        "transformer.wte.weight": settings.embedding_lr,
    }
    return Optimizer(
        matrices,
        [
            # A parameter without a learning rate is a KeyError here, not one that never trains.
            AdamWGroup({name: parameter}, adamw_learning_rate(learning_rates[name], width))
            for name, parameter in rest.items()
        ],
        operators=muon_operators(kernels, model.lm_head.weight.device),
        matrix_lr=settings.matrix_lr,
        weight_decay=settings.weight_decay,
        max_norm=settings.grad_clip or math.inf,
    )


@dataclass(frozen=True)
class AdamWGroup:
    """Parameters by name that share a learning rate (before the schedule's multiplier)."""

    parameters: Mapping[str, nn.Parameter]
    lr: float


class StepStats(NamedTuple):
    """What a step leaves on the device, 0-dim each; to be read a step later.

    grad_norm: global norm of the mean gradient before clipping, fp32; finite: whether the step
    happened, bool; skipped_steps: how many have not, this one included, int64.
    """

    grad_norm: Tensor
    finite: Tensor
    skipped_steps: Tensor


class Optimizer:
    """Muon on `matrices`, AdamW on `adamw`; both are fp32 parameters by fully qualified name.

    Parameters are plain tensors, or DTensors on one mesh: rows over at most one dimension
    (Shard(0)), copies over at most one other (Replicate). All have their values and their final
    device when they come here.

    matrix_lr: Muon's learning rate, scaled by sqrt(max(1, rows / columns)) for each shape.
    max_norm: gradients whose global norm is above are scaled down to it; math.inf: never.
    """

    def __init__(
        self,
        matrices: Mapping[str, nn.Parameter],
        adamw: Sequence[AdamWGroup],
        *,
        operators: MuonOperators,
        matrix_lr: float = 0.02,
        newton_schulz_steps: int = 5,
        betas: tuple[float, float] = (0.8, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
    ) -> None:
        self.parameters = dict(matrices)
        for group in adamw:
            self.parameters.update(group.parameters)
        _check(self.parameters, matrices, adamw)
        self.grid = Grid.of(self.parameters)
        self.muon = _group_by_shape(matrices)
        self.adamw = [_AdamWState(group) for group in adamw if group.parameters]
        self.operators, self.newton_schulz_steps = operators, newton_schulz_steps
        self.matrix_lr, self.betas, self.eps = matrix_lr, betas, eps
        self.weight_decay, self.max_norm = weight_decay, max_norm
        device = local(next(iter(self.parameters.values()))).device
        # fp32 because the fused kernel asks for it: exact up to 16,777,216 steps.
        self.applied_steps = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def step(
        self, *, lr_multiplier: float, momentum: float, token_count: Tensor, loss: Tensor
    ) -> StepStats:
        """Update every parameter from its `.grad`, and set `.grad` to None.

        Gradients are summed over ranks and tokens. token_count: supervised tokens on all ranks,
        0-dim, the same everywhere. loss: 0-dim, this rank's or the global one. If a gradient or
        any rank's loss is not finite, or there was no token, then parameters and state stay as
        they are and the step counts as skipped.
        """
        norm, finite = self._global_norm(token_count, loss)
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) / token_count
        self.applied_steps += finite
        self.skipped_steps += ~finite

        updates = [
            self._muon_update(group, scale, finite, momentum, self.matrix_lr * lr_multiplier)
            for group in self.muon
        ]
        for update in updates:
            next(update, None)
        for state in self.adamw:
            self._adamw_update(state, scale, finite, lr_multiplier)
        # Round after round, so that one group's exchange runs beside another's computation.
        for _ in itertools.zip_longest(*updates):
            pass
        return StepStats(norm, finite, self.skipped_steps.clone())

    def _global_norm(self, token_count: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Norm of the mean gradient over all ranks, and whether it and every loss are finite."""
        norms = torch._foreach_norm([_gradient(*item) for item in self.parameters.items()])
        totals = torch.stack([torch.stack(norms).square().sum(), (~loss.isfinite()).float()])
        # Replicas hold equal gradients, but their sums may be rounded differently. Added up and
        # divided they are one number again: otherwise replicas would drift apart bit by bit.
        for group in (self.grid.shard_group, self.grid.replica_group):
            if group is not None:
                dist.all_reduce(totals, group=group)
        sum_of_squares, bad_losses = (totals / self.grid.n_replicas).unbind()
        norm = sum_of_squares.sqrt() / token_count
        return norm, norm.isfinite() & (bad_losses == 0)

    def _muon_update(
        self, group: "_MuonGroup", scale: Tensor, finite: Tensor, momentum: float, lr: float
    ) -> Generator[None, None, None]:
        """One group's step, from gradients to parameters; yields while an exchange is under way."""
        grid, (R, C), own = self.grid, group.shape, group.momentum.shape
        packed = packet(group.momentum, R, grid)
        grads = [_gradient(*item) for item in group.parameters.items()]
        out = unpack(packed, own)
        self.operators.nesterov(group.momentum, grads, scale, momentum, finite, out=out)
        del grads
        _drop_gradients(group.parameters)
        received = yield from all_to_all(packed[grid.replica], grid.shard_group)
        whole = self.operators.newton_schulz(assemble(received, R), self.newton_schulz_steps)
        received = yield from all_to_all(disassemble(whole, grid.n_shards), grid.shard_group)
        received = yield from all_gather(received, grid.replica_group)
        rows = [local(parameter) for parameter in group.parameters.values()]
        alpha = -lr * math.sqrt(max(1.0, R / C))
        self.operators.add_update(rows, unpack(received, own), alpha)

    def _adamw_update(
        self, state: "_AdamWState", scale: Tensor, finite: Tensor, lr_multiplier: float
    ) -> None:
        parameters = state.parameters
        torch._fused_adamw_(
            [local(parameter) for parameter in parameters.values()],
            [_gradient(*item) for item in parameters.items()],
            [local(state.exp_avg[name]) for name in parameters],
            [local(state.exp_avg_sq[name]) for name in parameters],
            [],
            [self.applied_steps] * len(parameters),
            lr=state.lr * lr_multiplier,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            # The kernel divides gradients by grad_scale and does nothing where found_inf is 1.
            grad_scale=scale.reciprocal(),
            found_inf=(~finite).float(),
        )
        _drop_gradients(parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """The live state, flat: `<parameter>.momentum`, `.exp_avg`, `.exp_avg_sq` placed as the
        parameter is, and the counts of steps. torch.distributed.checkpoint loads into it in place,
        under any number of processes."""
        state = {"applied_steps": self.applied_steps, "skipped_steps": self.skipped_steps}
        for group in self.muon:
            for (name, parameter), shard in zip(group.parameters.items(), group.momentum):
                state[f"{name}.momentum"] = _placed_like(parameter, shard)
        for group in self.adamw:
            for name in group.parameters:
                state[f"{name}.exp_avg"] = group.exp_avg[name]
                state[f"{name}.exp_avg_sq"] = group.exp_avg_sq[name]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state_dict of the same parameters, sharded in the same way, into this one."""
        own = self.state_dict()
        if state.keys() != own.keys():
            missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise UserError(
                f"optimizer state of another model: {len(missing)} missing (first {missing[:1]}), "
                f"{len(foreign)} unexpected (first {foreign[:1]})"
            )
        for name, tensor in own.items():
            ours, theirs = local(tensor), local(state[name])
            if ours.shape != theirs.shape:
                raise UserError(
                    f"optimizer state {name}: local shape {tuple(theirs.shape)} given, "
                    f"{tuple(ours.shape)} needed"
                )
            ours.copy_(theirs)


@dataclass(frozen=True)
class _MuonGroup:
    """Matrices of one global shape (R, C); momentum (n, r, C) fp32 stacks their r local rows."""

    shape: tuple[int, ...]
    parameters: dict[str, nn.Parameter]
    momentum: Tensor


def _group_by_shape(matrices: Mapping[str, nn.Parameter]) -> list[_MuonGroup]:
    by_shape: dict[tuple[int, ...], dict[str, nn.Parameter]] = {}
    for name, parameter in matrices.items():
        by_shape.setdefault(tuple(parameter.shape), {})[name] = parameter
    groups = []
    for shape, same in by_shape.items():
        shard = local(next(iter(same.values())))
        groups.append(_MuonGroup(shape, same, shard.new_zeros(len(same), *shard.shape)))
    return groups


class _AdamWState:
    """An AdamWGroup with its moments by name, fp32, each placed as its parameter."""

    def __init__(self, group: AdamWGroup) -> None:
        self.parameters, self.lr = dict(group.parameters), group.lr
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}


def _check(
    parameters: Mapping[str, nn.Parameter],
    matrices: Mapping[str, nn.Parameter],
    adamw: Sequence[AdamWGroup],
) -> None:
    given = len(matrices) + sum(len(group.parameters) for group in adamw)
    if not given or given != len(parameters):
        raise ValueError(f"{given} parameters given under {len(parameters)} different names")
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; master weights are float32")
        if name in matrices and parameter.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; Muon trains matrices")


def _placed_like(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(f"{name} has no gradient: it took no part in the loss of this step")
    return local(parameter.grad)


def _drop_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None
