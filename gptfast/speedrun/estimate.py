"""What a plan will take on this machine, before any of it is spent: each figure with its ground.

Times of training follow from FLOPs and a rate; those of evaluations from the reference report's
timestamps. Both are guesses until a run has been made, and say what they rest on.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptfast import hardware
from gptfast.checkpoint.files import list_steps
from gptfast.config import BaseSettings, SystemSettings, accumulation_steps
from gptfast.config_chat import MidSettings, SFTSettings
from gptfast.data import shards_for
from gptfast.memory import GIB, MemoryEstimate, checkpoint_bytes, estimate_memory
from gptfast.model import GPTConfig, flops_per_token, parameter_counts
from gptfast.report.prices import price
from gptfast.report.reference import gpu_peak, reference
from gptfast.report.spelling import count, duration
from gptfast.schedule import horizon
from gptfast.speedrun.decide import CONTINUE, SKIP, decide_all
from gptfast.speedrun.fetching import missing_bytes
from gptfast.speedrun.plan import Plan, Step
from gptfast.speedrun.state import State
from kernels.cross_entropy import CHUNKS

# Share of a GPU's own dense bf16 peak that whole steps reached (H200, torch 2.11, 2026-11-23,
# bench/results): d8 with a vocabulary of 16,384, and d20; d12 with that vocabulary had 0.56.
_MEASURED_MFU = ((8, 0.55), (20, 0.57))
_MFU_SOURCE = "MFU between d8's 55 % and d20's 57 %, measured on H200s"
# Seconds of the reference report's steps by its timestamps, on its eight GPUs.
_REFERENCE_SECONDS = {"loss": 88, "core": 445, "chat-mid": 1129, "sft": 272, "chat-sft": 977}
_REFERENCE_TOKENIZER_SECONDS = 103
_MID_TOKENS = 765 * 524_288
# Starting Python, building a model and compiling it.
_START_SECONDS = {"gpu": 40.0, "cpu": 12.0}
# Of a CPU's own rate for products of 256 x 256, what training of a toy reaches; and what the toy's
# other steps take (two cores, 2026-11-22).
_CPU_SHARE = 0.3
_CPU_SECONDS = {"tokenizer": 15, "loss": 30, "core": 600, "mid": 60, "sft": 60, "rl": 120}
SHARD_BYTES = 100e6
_FETCH_BYTES_PER_SECOND = 20e6


@dataclass(frozen=True)
class Here:
    """The machine: what decides how long a plan takes. gpus: on one node."""

    gpu: str | None
    gpus: int
    nodes: int
    gpu_memory: int
    cpu_flops: float

    @classmethod
    def look(cls, plan: Plan, nodes: int) -> "Here":
        on = plan.on_gpu
        return cls(
            gpu=torch.cuda.get_device_name(0) if on else None,
            gpus=plan.gpus,
            nodes=nodes,
            gpu_memory=torch.cuda.get_device_properties(0).total_memory if on else 0,
            cpu_flops=0.0 if on else _measure_cpu(),
        )

    def sharing(self, system: SystemSettings, *, accumulates: bool) -> dict[str, Any]:
        """What an estimate of memory asks of the machine and of how it is used."""
        return {
            "shards": max(1, self.gpus),
            "accumulates": accumulates,
            "logits_chunks": CHUNKS,
            "bytes_per_value": 2 if self.gpu else 4,
            "reshard_after_forward": system.reshard_after_forward,
            "kernels": system.kernels,
        }

    @property
    def peak(self) -> float | None:
        """Dense bf16 FLOP/s of all GPUs of all nodes; None if unknown."""
        own = hardware.peak(self.gpu) if self.gpu else None
        return own.bf16_flops * self.gpus * self.nodes if own else None


@dataclass(frozen=True)
class Estimate:
    """seconds, disk: None where nobody can tell; work: tokens or such, in words."""

    step: str
    seconds: float | None
    ground: str
    work: str = ""
    disk: float = 0.0


@dataclass(frozen=True)
class DiskNeed:
    """Bytes to be written in a folder (the nearest one that exists), and bytes free there."""

    folder: Path
    needed: float
    free: int

    @property
    def enough(self) -> bool:
        return self.needed < self.free

    def __str__(self) -> str:
        return f"{self.needed / 1e9:.1f} GB of {self.free / 1e9:.1f} GB free at {self.folder}"


def describe_plan(
    plan: Plan,
    stages: Mapping[str, Any],
    here: Here,
    disks: Sequence[DiskNeed],
    state: State,
    *,
    price_per_gpu_hour: float | None = None,
) -> list[str]:
    """Lines for a terminal: each step, then the totals of what is left of them.

    stages: base, mid, sft, rl -> the settings that the plan's commands come to. state: what has
    been done.
    """
    todo = decide_all(plan.steps, state)
    found = [
        _left(step, todo[step.name], estimate(step, stages, here), stages, state)
        for step in plan.steps
    ]
    where = f"{here.gpus * here.nodes} x {here.gpu}" if here.gpu else "CPU"
    lines = [f"speedrun of d{plan.depth} on {where}, {here.nodes} node(s)", ""]
    lines.append(f"  {'step':10} {'about':>10}  {'work':26} {'disk':>8}  resting on")
    for e in found:
        took = duration(e.seconds) if e.seconds is not None else "unknown"
        took = "done" if todo[e.step] == SKIP else took
        disk = f"{e.disk / 1e9:.1f} GB" if e.disk else ""
        lines.append(f"  {e.step:10} {took:>10}  {e.work:26} {disk:>8}  {e.ground}")
    lines += [f"  {name:10} left out: {why}" for name, why in plan.missing]
    return [*lines, "", *_totals(found, stages["base"], here, disks, price_per_gpu_hour)]


def _left(
    step: Step, todo: str, whole: Estimate, stages: Mapping[str, Any], state: State
) -> Estimate:
    """What of the step is still to be spent."""
    if todo == SKIP:
        took = f"it took {duration(state.records[step.name].seconds)}"
        return replace(whole, seconds=0.0, ground=took, disk=0.0)
    if todo != CONTINUE or step.owns is None:
        return whole
    done = max(list_steps(step.owns / "checkpoints"))
    if step.name != "base" or whole.seconds is None:
        return replace(whole, ground=f"the whole of it; it goes on at step {done:,}")
    share = 1 - done / steps_of(stages["base"])
    return replace(whole, seconds=share * whole.seconds, work=f"{whole.work}, {done:,} done")


def _totals(
    found: list[Estimate],
    base: BaseSettings,
    here: Here,
    disks: Sequence[DiskNeed],
    asked: float | None,
) -> list[str]:
    seconds = math.fsum(e.seconds or 0 for e in found)
    least = "at least " if any(e.seconds is None for e in found) else ""
    lines = [f"time    {least}{duration(seconds)}"]
    if here.gpu:
        hours = seconds / 3600 * here.gpus * here.nodes
        rate = price(here.gpu, asked)
        money = "unknown: no price of this GPU; --price-per-gpu-hour"
        if rate:
            money = f"{least}${hours * rate.dollars:,.2f} at ${rate.dollars:.2f} ({rate.source})"
        lines += [f"GPUs    {least}{hours:.1f} GPU-hours", f"money   {money}"]
    lines += [f"disk    {need}{'' if need.enough else '   TOO LITTLE'}" for need in disks]
    room = f" of {here.gpu_memory / GIB:.1f} GiB a GPU" if here.gpu else " of main memory a process"
    return [*lines, f"memory  about {memory_estimate(base, here)}{room}, base training"]


def memory_estimate(base: BaseSettings, here: Here) -> MemoryEstimate:
    """Of one GPU, or of one process on CPU, in base training."""
    config, optim = config_of(base), base.optim
    world = max(1, here.gpus) * here.nodes
    accumulates = accumulation_steps(optim, config.sequence_len, world) > 1
    sharing = here.sharing(base.system, accumulates=accumulates)
    return estimate_memory(config, device_batch_size=optim.device_batch_size, **sharing)


def estimate(step: Step, stages: Mapping[str, Any], here: Here) -> Estimate:
    if step.name == "report":
        return Estimate(step.name, 10.0, "run folders")
    if step.name == "fetch":
        size = missing_bytes(step)
        ground = f"{_FETCH_BYTES_PER_SECOND / 1e6:.0f} MB/s, supposed" if size else "all is there"
        return Estimate(step.name, size / _FETCH_BYTES_PER_SECOND, ground, "", size)
    if step.name == "base":
        return _base(stages["base"], here)
    if step.name in ("mid", "sft", "rl"):
        return _tuned(step.name, stages, here)
    if step.name == "tokenizer":
        seconds = _REFERENCE_TOKENIZER_SECONDS if here.gpu else _CPU_SECONDS["tokenizer"]
        ground = "the reference's time on 240 cores" if here.gpu else "the toy on two cores"
        chars = f"{count(stages['base'].data.tokenizer_chars)} characters"
        return Estimate(step.name, seconds, ground, chars, 3e6)
    return Estimate(step.name, *_scaled(step.name, config_of(stages["base"]), here))


def config_of(base: BaseSettings) -> GPTConfig:
    model = base.model
    return GPTConfig.from_depth(
        model.depth, vocab_size=model.vocab_size, sequence_len=model.sequence_len
    )


def steps_of(base: BaseSettings) -> int:
    """How many steps base training has."""
    config, length = config_of(base), base.horizon
    return horizon(
        n_params=sum(parameter_counts(config).values()),
        flops_per_token=flops_per_token(config),
        total_batch_size=base.optim.total_batch_size,
        iterations=length.iterations(base.system.device),
        tokens=length.target_tokens,
        target_flops=length.target_flops,
        tokens_per_param=length.target_param_data_ratio,
    )


def _base(base: BaseSettings, here: Here) -> Estimate:
    config, steps = config_of(base), steps_of(base)
    tokens = steps * base.optim.total_batch_size
    validations = 2 + (steps // base.run.eval_every if base.run.eval_every else 0)
    # A forward pass alone is a third of a training step's FLOPs.
    work = tokens + validations * base.run.eval_tokens / 3
    seconds, ground = _training_seconds(config, work, steps, here)
    disk = (base.run.keep + 1) * checkpoint_bytes(config)
    if base.data.data == "fineweb-edu":
        disk += shards_for(tokens) * SHARD_BYTES
    return Estimate("base", seconds, ground, f"{count(tokens)} tokens, {steps:,} steps", disk)


def _tuned(stage: str, stages: Mapping[str, Any], here: Here) -> Estimate:
    """mid, sft, rl: known where the mixture is the reference's."""
    settings, base = stages[stage], stages["base"]
    config = config_of(base)
    disk = (settings.run.keep + 1) * checkpoint_bytes(config)
    if not here.gpu:
        seconds = _CPU_SECONDS[stage] * (config.n_layer / 2) ** 2
        return Estimate(stage, seconds, "the toy on two cores", "", disk)
    if isinstance(settings, MidSettings):
        batch = settings.optim.total_batch_size or base.optim.total_batch_size
        tokens = settings.num_iterations * batch if settings.num_iterations else _MID_TOKENS
        if settings.num_iterations or not settings.mixture.train:
            seconds, ground = _training_seconds(config, tokens, tokens // batch, here)
            return Estimate(stage, seconds, ground, f"{count(tokens)} tokens", disk)
    if isinstance(settings, SFTSettings) and not settings.mixture.train:
        seconds, ground = _scaled("sft", config, here)
        return Estimate(stage, seconds, ground, "20,843 conversations", disk)
    return Estimate(stage, None, "as long as its mixture, which is not read here", "", disk)


def _training_seconds(
    config: GPTConfig, tokens: float, steps: int, here: Here
) -> tuple[float | None, str]:
    if here.gpu is None:
        work = tokens * flops_per_token(config) + steps * _newton_schulz_flops(config)
        ground = f"{_CPU_SHARE:.0%} of {here.cpu_flops / 1e9:.0f} GFLOP/s, measured here"
        return _START_SECONDS["cpu"] + work / (_CPU_SHARE * here.cpu_flops), ground
    if here.peak is None:
        return None, f"the peak of {here.gpu} is not known"
    (low, at_low), (high, at_high) = _MEASURED_MFU
    place = min(1.0, max(0.0, (config.n_layer - low) / (high - low)))
    share = at_low + place * (at_high - at_low)
    seconds = tokens * flops_per_token(config) / (share * here.peak)
    return _START_SECONDS["gpu"] + seconds, f"{share:.0%} of its peak ({_MFU_SOURCE})"


def _scaled(name: str, config: GPTConfig, here: Here) -> tuple[float | None, str]:
    """The reference's time, scaled by the GPUs' dense bf16 peaks and the models' FLOPs a token."""
    if here.gpu is None:
        return _CPU_SECONDS.get(name), "the toy on two cores"
    theirs = _REFERENCE_SECONDS.get(name)
    if theirs is None or here.peak is None:
        return None, "nothing to compare with"
    gpus, base = reference()["gpus"], reference()["sections"]["Base model training"]
    larger = flops_per_token(config) / base["Number of FLOPs per token"]
    ground = f"the reference's {duration(theirs)} on {gpus} A100s, by dense bf16 peaks and FLOPs"
    return theirs * larger * gpus * gpu_peak() / here.peak, ground


def _newton_schulz_flops(config: GPTConfig) -> float:
    """Of one step of Muon: five iterations of three products for each matrix of the blocks."""
    width = config.n_embd
    square, long = 5 * 6 * width**3, 5 * (4 * width**2 * 4 * width + 2 * width**3)
    return config.n_layer * (4 * square + 2 * long)


def _measure_cpu() -> float:
    """FLOP/s of fp32 products of 256 x 256, over a tenth of a second."""
    a = torch.randn(256, 256)
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        a @ a
        products += 1
    return products * 2 * 256**3 / (time.perf_counter() - began)
