"""The training step of train/base.py, held still to be measured: same model, sharding, optimizer
and loop, tokens made up unless text is given."""

import math
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from gptfast import parallel
from gptfast.attention import choose_attention
from gptfast.clock import median_ms, timed
from gptfast.config import DataSettings, ModelSettings, OptimSettings, SystemSettings
from gptfast.data import BatchLoader
from gptfast.errors import UserError
from gptfast.ledger import Job, Ledger, StepProfiler
from gptfast.loop import Trainer
from gptfast.metrics import MetricsLog
from gptfast.model import GPT, GPTConfig, flops_per_token
from gptfast.optim import Optimizer, build_optimizer
from gptfast.parallel import World
from gptfast.plan import Plan
from gptfast.preflight import MemoryNeed, check_kernels, prepare_text
from gptfast.run import environment
from gptfast.schedule import muon_momentum

SYNTHETIC = "synthetic"
# The first step under the profiler fills the GPU's queue; these follow it.
PROFILED_STEPS = 3
# Of those that are timed apart, the first ones only warm up.
_UNTIMED = 5


@dataclass(frozen=True)
class MeasureSettings:
    device_batch_size: int = 32
    """Sequences in one forward + backward of one GPU."""
    accumulation: int = 1
    """Passes of forward + backward in a step."""
    warmup: int = 20
    """Steps of real training before any that counts: compilation, a hot card, weights that are
    not zero any more."""
    timed: int = 20
    """Steps whose median is the step's time without the profiler."""
    out: Path = Path("mfu.json")
    """The ledger; its table (.txt) and waterfall (.png) go beside it."""
    trace: bool = False
    """Also keep the Chrome trace, for Perfetto (.trace.json.gz)."""
    parts: bool = True
    """Also time forward + backward alone, and the optimizer alone, without the profiler."""
    sharding_cost: bool = False
    """Also time forward + backward of the same model unsharded, in turns with the sharded one."""

    def __post_init__(self) -> None:
        for name, least in (
            ("device_batch_size", 1),
            ("accumulation", 1),
            # Those that a profiler never counts.
            ("warmup", 3),
            ("timed", 2),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.out.suffix != ".json":
            raise UserError(f"--out {self.out}: its name must end in .json")


@dataclass(frozen=True)
class MfuSettings:
    """Everything that `python -m bench.mfu` can be told."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=lambda: DataSettings(data=SYNTHETIC))
    system: SystemSettings = field(default_factory=SystemSettings)
    measure: MeasureSettings = field(default_factory=MeasureSettings)


def preset(*, on_gpu: bool) -> MfuSettings:
    """The report's d20; without a GPU a small model, to see that everything works."""
    if on_gpu:
        return MfuSettings()
    return MfuSettings(
        model=ModelSettings(depth=2, sequence_len=64, vocab_size=512),
        system=SystemSettings(kernels="reference", compile=False, device="cpu"),
        measure=MeasureSettings(device_batch_size=4, warmup=3, timed=4),
    )


def config_of(model: ModelSettings) -> GPTConfig:
    return GPTConfig.from_depth(
        model.depth, vocab_size=model.vocab_size, sequence_len=model.sequence_len
    )


def memory_need(settings: MfuSettings, world: World) -> MemoryNeed:
    system, measure = settings.system, settings.measure
    return MemoryNeed(
        config_of(settings.model),
        measure.device_batch_size,
        measure.accumulation,
        world,
        reshard_after_forward=system.reshard_after_forward,
        kernels=system.kernels,
        evenly=False,
    )


class MadeUpTokens:
    """Batches of random tokens, about as skewed as text is; the same few in turn."""

    wait_seconds = 0.0

    def __init__(self, config: GPTConfig, batch: int, world: World, seed: int, n: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed + world.rank)
        shape = (n, batch, config.sequence_len + 1)
        tokens = (config.vocab_size * torch.rand(shape, generator=generator) ** 3).int()
        tokens = tokens.to(world.device)
        self._batches = [(t[:, :-1].contiguous(), t[:, 1:].long().contiguous()) for t in tokens]
        self._taken = 0

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._taken += 1
        return self._batches[self._taken % len(self._batches)]

    def close(self) -> None:
        pass


class _QuietLog(MetricsLog):
    """metrics.jsonl, and nothing on the console."""

    def say(self, line: str) -> None:
        pass


class NoCheckpoints:
    folder = Path()

    def wait(self) -> None:
        pass


class Session:
    """Model, optimizer and batches of one measurement."""

    def __init__(self, settings: MfuSettings, world: World, say: Callable[[str], None]) -> None:
        self.settings, self.world, self.say = settings, world, say
        model, system, measure = settings.model, settings.system, settings.measure
        self.config = config_of(model)
        self.job = Job(
            self.config,
            measure.device_batch_size,
            measure.accumulation,
            processes=world.size,
            shards=world.local_size,
        )
        check_kernels(system.kernels, world.device)
        say(memory_need(settings, world).check())
        self.dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        self.attention = choose_attention(
            system.attention,
            world.device,
            self.dtype,
            self.config.head_dim,
            deterministic=system.deterministic,
        ).backend
        self.make_gpt = partial(
            GPT, self.config, kernels=system.kernels, attention_backend=self.attention
        )
        self.loader = self._loader()
        self.model: GPT = parallel.build_sharded(
            self.make_gpt,
            world,
            compute_dtype=self.dtype,
            reshard_after_forward=system.reshard_after_forward,
            compile_blocks=system.compile,
            seed=system.seed,
        )
        self.optimizer: Optimizer = build_optimizer(
            self.model, OptimSettings(), kernels=system.kernels
        )

    def _loader(self) -> "BatchLoader | MadeUpTokens":
        data, measure, world = self.settings.data, self.settings.measure, self.world
        batch = measure.device_batch_size
        if data.data == SYNTHETIC:
            return MadeUpTokens(self.config, batch, world, self.settings.system.seed)
        steps = measure.warmup + measure.timed + 64
        corpus, tokenizer = prepare_text(
            data,
            vocab_size=self.config.vocab_size,
            tokens=steps * self.job.tokens * self.job.accumulation * world.size,
            world=world,
            say=self.say,
        )
        return BatchLoader(
            corpus.train,
            tokenizer=tokenizer,
            batch_size=batch,
            sequence_len=self.config.sequence_len,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
        )

    def described(self) -> dict:
        """What a ledger of this session says of its settings."""
        system = self.settings.system
        return {
            "kernels": system.kernels,
            "attention": self.attention,
            "compile": system.compile,
            "reshard_after_forward": system.reshard_after_forward,
            "deterministic": system.deterministic,
            "data": self.settings.data.data,
        }

    def train(self) -> tuple[Ledger | None, dict[str, float]]:
        """Run the loop itself: warm-up, timed and profiled steps. The ledger, None where there
        could be none, and the loop's own figures."""
        measure, world, job = self.settings.measure, self.world, self.job
        first = measure.warmup + measure.timed
        profiler = StepProfiler(
            range(first, first + 1 + PROFILED_STEPS),
            job=job,
            device=world.device,
            out=measure.out,
            say=self.say,
            active=world.is_main,
            unprofiled=measure.timed,
            settings=self.described(),
            environment=environment(world),
            keep_trace=measure.trace,
        )
        plan = Plan(
            total_steps=profiler.steps.stop,
            accumulation=job.accumulation,
            tokens_per_step=job.tokens * job.accumulation * world.size,
            flops_per_token=flops_per_token(self.config),
            learning_rate_multiplier=lambda step: 1.0,
            momentum=muon_momentum,
        )
        with tempfile.TemporaryDirectory() as folder:
            log = _QuietLog(Path(folder), active=world.is_main)
            with closing(log):
                summary = Trainer(
                    world=world,
                    model=self.model,
                    optimizer=self.optimizer,
                    loader=self.loader,
                    plan=plan,
                    log=log,
                    checkpointer=NoCheckpoints(),
                    save=lambda step: None,
                    evaluate=lambda step: {"val_bpb": math.nan},
                    sample=lambda step: {"samples": []},
                    profiler=profiler,
                ).run()
        assert summary.tokens_per_second is not None, "its steps are all alike"
        figures = {"loop_tokens_per_second_per_gpu": summary.tokens_per_second / world.size}
        if world.device.type == "cuda":
            figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(world.device)
        return profiler.ledger, figures

    def parts(self, steps: int = 20) -> dict[str, float]:
        """Medians, in ms, of forward + backward alone and of the optimizer alone."""
        device = self.world.device
        tokens = torch.tensor(float(self.job.tokens * self.world.size), device=device)
        forwards: list = []
        updates: list = []
        for step in range(steps):
            with timed(device, forwards):
                loss = forward_backward(self.model, next(self.loader))
            with timed(device, updates):
                self.optimizer.step(
                    lr_multiplier=1.0, momentum=muon_momentum(step), token_count=tokens, loss=loss
                )
        return {
            "forward_backward_ms": median_ms(forwards[_UNTIMED:]),
            "optimizer_ms": median_ms(updates[_UNTIMED:]),
        }

    def sharding_cost(self, rounds: int = 24) -> dict[str, float]:
        """Forward + backward of the sharded model and of the same one whole, in turns.

        The whole one has bf16 weights and averages nothing: what a GPU would do on its own.
        """
        device = self.world.device
        with torch.device(device):
            whole = self.make_gpt()
        whole.cast_parameters(self.dtype)
        parallel.gather_replica(self.model, whole)
        if self.settings.system.compile:
            for block in whole.blocks:
                block.compile(fullgraph=True, dynamic=False)
        sharded: list = []
        unsharded: list = []
        for _ in range(rounds):
            batch = next(self.loader)
            for model, times in ((self.model, sharded), (whole, unsharded)):
                with timed(device, times):
                    forward_backward(model, batch)
                for parameter in model.parameters():
                    parameter.grad = None
        ms = {
            "sharded_ms": median_ms(sharded[_UNTIMED:]),
            "unsharded_ms": median_ms(unsharded[_UNTIMED:]),
        }
        return {**ms, "sharding_cost_percent": 100 * (ms["sharded_ms"] / ms["unsharded_ms"] - 1)}


def forward_backward(model: GPT, batch: tuple) -> torch.Tensor:
    """One pass that reduces gradients; the loss."""
    loss = model(batch[0], batch[1])
    loss.backward()
    return loss.detach().float()
