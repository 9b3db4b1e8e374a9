"""Step time against GPU count, interconnect and batch: a small model, on paper.

A step is what one GPU computes, what sharding adds to it, and an optimizer that is shared out:

    compute      forward + backward, at the FLOP/s that one GPU was measured to reach
    beside       communication runs beside computation and slows it: a share of its own time
    exposed      the first all-gather and the last reduce-scatter have nothing beside them, and
                 neither has what is longer than the computation
    optimizer    Newton-Schulz by whole matrices over all GPUs, element-wise work over the shards,
                 exchanges as far as they outlast what runs beside them

Its inputs are measured on one GPU (bench/results) and, for the effective bandwidth and the slowing
down, on two; it is checked against the measured steps of more GPUs, each from that of one GPU with
the same code, and has seen no other whole step.
The mesh is the one that train/base.py makes: sharded within a node, replicated between nodes.
"""

import json
from dataclasses import dataclass
from math import ceil, inf, log2
from pathlib import Path
from typing import NamedTuple

from gptfast import hardware
from gptfast.config import at_least_one
from gptfast.errors import UserError
from gptfast.ledger.costs import newton_schulz_flops
from gptfast.ledger.job import Job
from gptfast.memory import GIB, USABLE_SHARE, estimate_memory
from gptfast.model import GPTConfig, flops_per_token, parameter_counts
from gptfast.parallel import blocks_per_unit
from kernels.cross_entropy import CHUNKS

RESULTS = Path(__file__).parent / "results"
BASE = RESULTS / "base-h200.json"
GPU = "NVIDIA H200"

# Effective bytes a second and GPU of all-gathers (0.56 GB in 2.9 ms) and reduce-scatters (1.12 GB
# in 5.0 ms) beside the computation, two H200s with NVLink, d20, 2026-11-23: the mfu-h200-2.json of
# 351f494. Those of the newest pair of cards took 2.8 and 9.1 ms.
NVLINK = 214e9
# How much longer forward and backward took there than on one GPU, 3.9 ms, of that communication:
# FSDP2's copies, and kernels that had fewer multiprocessors.
SLOWED = 0.5
# Assumed, not measured: the share of a network's rate that a collective reaches, and the time of
# one hop of a ring within and between nodes.
NETWORK_EFFICIENCY = 0.8
HOP = {"node": 4e-6, "network": 12e-6}


@dataclass(frozen=True)
class PredictSettings:
    """A step's time on 8 to 1,024 H200s, on paper, behind a check against measured steps."""

    depth: int = 20
    """Layers; the one dial, as in training."""
    device_batch_size: int = 32
    """Sequences of one GPU and micro-step; with --total-batch-size, at most."""
    total_batch_size: int | None = None
    """Tokens of a step, the same for all GPU counts; by default one micro-step a GPU."""
    sequence_len: int = 2048
    vocab_size: int = 65536
    node_gpus: int = 8
    """GPUs that NVLink joins."""
    network_gbit: float = 400.0
    """Gbit/s of each GPU's share of the network between nodes."""
    gpu_memory_gib: float = 139.0
    """Of each GPU."""

    def __post_init__(self) -> None:
        at_least_one(self, "depth", "device_batch_size", "sequence_len", "vocab_size", "node_gpus")
        for name in ("network_gbit", "gpu_memory_gib"):
            if not 0 < getattr(self, name) < inf:
                raise UserError(f"{name} must be a number above 0, got {getattr(self, name)}")
        total, one = self.total_batch_size, self.sequence_len
        if total is not None and (total < one or total % one):
            below = total // one * one
            near = f"{below:,} or {below + one:,}" if below > 0 else f"{one:,}"
            raise UserError(
                f"total_batch_size {total:,} is no multiple of the {one:,} tokens of a sequence; "
                f"the nearest that are: {near}"
            )


class OneGpu(NamedTuple):
    """What one GPU was measured to do."""

    flops: float
    """FLOP/s of forward + backward, by the report's formula."""
    newton_schulz: float
    """FLOP/s of Newton-Schulz, by what its products need."""
    optimizer_bytes: float
    """Bytes/s of the rest of the optimizer, by what its states need."""


class Prediction(NamedTuple):
    """Seconds of one step's parts, on a mesh of `replicas` x `shards` GPUs."""

    shards: int
    replicas: int
    passes: int
    batch: int
    compute: float
    beside: float
    exposed: float
    optimizer: float

    @property
    def step(self) -> float:
        return self.compute + self.beside + self.exposed + self.optimizer


class Point(NamedTuple):
    """A measured d20 run of 32 x 2048 tokens a GPU."""

    run: dict
    """As it is kept."""
    one: dict
    """That of one GPU with the same code."""
    newest: bool

    def ratio(self) -> float:
        """The model's step by the measured one."""
        gpus, gpu = self.run["gpus"], one_gpu(self.one)
        guess = predict(gpu, GPTConfig(), 32, 1, gpus, 1, PredictSettings())
        return 1e3 * guess.step / self.run["step_ms"]


def measured_points() -> list[Point]:
    """The newest runs, and behind them those on more GPUs than had the newest code."""
    kept = _kept(BASE)
    points = []
    for each, newest in ((kept, True), *((older, False) for older in kept["more_gpus"])):
        by_gpus = {run["gpus"]: run for run in each["runs"]}
        points += [
            Point(run, by_gpus[1], newest) for gpus, run in by_gpus.items() if newest or gpus > 1
        ]
    return points


def _kept(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the prediction needs {path}: {error}") from error


def one_gpu(run: dict) -> OneGpu:
    """From a kept run of one H200."""
    job = Job(GPTConfig(), 32, 1, 1, 1)
    optimizer_ms, newton_schulz_ms = run["optimizer_ms"], run["newton_schulz_ms"]
    compute_ms = run["step_ms"] - optimizer_ms
    return OneGpu(
        flops=job.tokens * flops_per_token(job.config) / (compute_ms / 1e3),
        newton_schulz=newton_schulz_flops(job) / (newton_schulz_ms / 1e3),
        optimizer_bytes=optimizer_bytes(job.config) / ((optimizer_ms - newton_schulz_ms) / 1e3),
    )


def optimizer_bytes(config: GPTConfig) -> float:
    """Read and written of fp32 states by AdamW (28 a parameter), Muon (24) and the norm (4)."""
    counts = parameter_counts(config)
    rest = counts["embedding"] + counts["head"]
    return 32 * rest + 28 * counts["blocks"]


def predict(
    gpu: OneGpu,
    config: GPTConfig,
    batch: int,
    passes: int,
    shards: int,
    replicas: int,
    at: PredictSettings,
) -> Prediction:
    """A step of `passes` micro-steps of `batch` sequences on `replicas` nodes of `shards` GPUs."""
    counts = parameter_counts(config)
    parameters, blocks = sum(counts.values()), counts["blocks"]
    network = NETWORK_EFFICIENCY * at.network_gbit / 8 * 1e9
    units = ceil(config.n_layer / blocks_per_unit(replicas, reshard_after_forward=False)) + 2
    others, copies = (shards - 1) / shards, (replicas - 1) / replicas

    compute = passes * batch * config.sequence_len * flops_per_token(config) / gpu.flops
    hops = units * (shards - 1) * HOP["node"]
    gather = 2 * parameters * others / NVLINK + hops
    reduce = 4 * parameters * others / NVLINK + hops
    # Replicas add up their shards' gradients, each unit as it comes, along a tree and back.
    average = 2 * 4 * parameters / shards * copies / network
    average += units * 2 * ceil(log2(replicas)) * HOP["network"]
    talk = gather + reduce + average
    beside = SLOWED * min(talk, compute)
    # The embedding's unit is the first to be gathered and the last to be reduced.
    edge = counts["embedding"] / parameters * (gather + reduce + average)
    exposed = (edge if shards * replicas > 1 else 0.0) + max(0.0, talk - compute)

    job = Job(config, batch, passes, shards * replicas, shards)
    work = newton_schulz_flops(job) / gpu.newton_schulz
    work += optimizer_bytes(config) / shards / gpu.optimizer_bytes
    swap = 2 * 2 * blocks / (shards * replicas) * others / NVLINK
    swap += 2 * blocks / shards * copies / network
    # Two groups of shapes take turns: half of an exchange always runs beside the other's products.
    optimizer = work + max(swap / 2, swap - work)
    return Prediction(shards, replicas, passes, batch, compute, beside, exposed, optimizer)


def on_gpus(gpus: int, config: GPTConfig, at: PredictSettings) -> Prediction:
    """The step on so many GPUs. UserError where they cannot share its sequences equally, or where
    it should not fit their memory."""
    batch, passes = at.device_batch_size, 1
    if at.total_batch_size is not None:
        sequences = at.total_batch_size // at.sequence_len
        each, rest = divmod(sequences, gpus)
        if rest:
            raise UserError(f"{sequences:,} sequences a step cannot be shared equally by so many")
        passes = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= batch)
        batch = each // passes
    # As few nodes as can be, each with as many of the GPUs.
    shards = max(n for n in range(1, at.node_gpus + 1) if gpus % n == 0)
    need = estimate_memory(
        config,
        device_batch_size=batch,
        shards=shards,
        accumulates=passes > 1,
        logits_chunks=CHUNKS,
    )
    if need.total > USABLE_SHARE * at.gpu_memory_gib * GIB:
        raise UserError(
            f"{passes} x {batch} sequences a GPU take {need.total / GIB:.1f} of "
            f"{at.gpu_memory_gib:g} GiB, {USABLE_SHARE:.0%} can be planned with"
        )
    gpu = one_gpu(measured_points()[0].one)
    return predict(gpu, config, batch, passes, shards, gpus // shards, at)


def lines(at: PredictSettings) -> list[str]:
    """The check against what was measured, then the table."""
    out = [f"Checked against measured steps of train/base.py, d20, 32 x 2048 tokens, {GPU}:"]
    for point in measured_points():
        gpus, ms = point.run["gpus"], point.run["step_ms"]
        note = f"commit {point.run['commit']}"
        if gpus == 1:
            note += ", the model's input"
        elif not point.newest:
            note += f", older code, whose {point.one['step_ms']:.1f} ms on one GPU are the input"
        out.append(
            f"  {gpus} GPU(s): measured {ms:.1f} ms, model {point.ratio() * ms:.1f} ms, "
            f"{point.ratio():.3f} of it ({note})"
        )
    config = GPTConfig.from_depth(at.depth, vocab_size=at.vocab_size, sequence_len=at.sequence_len)
    batch = (
        f"{at.total_batch_size:,} tokens a step"
        if at.total_batch_size
        else f"{at.device_batch_size} x {at.sequence_len} tokens a GPU and step"
    )
    out += [
        "",
        f"PREDICTIONS: nothing below was run. d{at.depth}, {batch}, {GPU}s, {at.node_gpus} to a "
        f"node, {at.network_gbit:g} Gbit/s a GPU between nodes.",
        f"{'GPUs':>5}{'shard x replicate':>19}{'a GPU':>12}{'step ms':>9}{'compute':>9}"
        f"{'beside':>8}{'exposed':>9}{'optimizer':>11}{'tok/s a GPU':>13}{'tok/s':>13}{'MFU':>8}",
    ]
    own = hardware.peak(GPU)
    assert own is not None, "a GPU of hardware's table"
    gpus = 8
    while gpus <= 1024:
        try:
            found = on_gpus(gpus, config, at)
        except UserError as error:
            out.append(f"{gpus:>5}  {error}")
        else:
            per_gpu = found.passes * found.batch * config.sequence_len / found.step
            mfu = hardware.mfu(per_gpu * flops_per_token(config), own.bf16_flops)
            out.append(
                f"{gpus:>5}{f'{found.shards} x {found.replicas}':>19}"
                f"{f'{found.passes} x {found.batch} seq':>12}{1e3 * found.step:>9.1f}"
                f"{1e3 * found.compute:>9.1f}{1e3 * found.beside:>8.1f}"
                f"{1e3 * found.exposed:>9.1f}{1e3 * found.optimizer:>11.1f}"
                f"{per_gpu:>13,.0f}{per_gpu * gpus:>13,.0f}{mfu:>8.1%}"
            )
        gpus *= 2
    out += [
        "",
        "Sharded within a node, replicated between nodes, as train/base.py does it. Assumed, not "
        f"measured: collectives reach {NETWORK_EFFICIENCY:.0%} of the network, hops take "
        f"{1e6 * HOP['node']:.0f} and {1e6 * HOP['network']:.0f} microseconds, no GPU waits for a "
        "slower one, and a smaller batch of a GPU costs no efficiency.",
    ]
    return out
