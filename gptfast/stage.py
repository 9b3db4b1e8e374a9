"""What the stages of training have in common around their data: base, mid, sft and rl.

source = Source.find(settings.start)
stage = Stage("sft", settings, source.config, world, say)
stage.check(device_batch_size=8, accumulation=1)
stage.build(source)
stage.train(plan, loader, source.tokenizer, evaluate=..., sample=..., title="...")
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from gptfast import parallel
from gptfast.attention import choose_attention
from gptfast.checkpoint import Checkpointer
from gptfast.checkpoint.files import read_manifest
from gptfast.config import LearningSettings, OptimSettings, RunSettings, SystemSettings
from gptfast.config_chat import SourceSettings
from gptfast.evaluate.loading import find_checkpoint, load_tokenizer
from gptfast.ledger import LEDGER_FILE, Job, StepProfiler, parse_steps
from gptfast.loop import Loader, Trainer
from gptfast.metrics import MetricsLog, check_sinks, plain
from gptfast.model import GPT, GPTConfig, parameter_counts
from gptfast.nvml import EnergyMeter
from gptfast.optim import build_optimizer
from gptfast.parallel import World
from gptfast.plan import Plan, Summary
from gptfast.preflight import MemoryNeed, check_disk, check_kernels
from gptfast.run import end_run, environment, find_run, open_run_folder, write_start
from gptfast.schedule import learning_rate_multiplier
from gptfast.state import ResumableLoader, RunState
from gptfast.tokenizer import Tokenizer

_BATCH_SIZES = ("device_batch_size", "total_batch_size")


@dataclass(frozen=True)
class Source:
    """The checkpoint that a stage starts from, and what it says about its model. optim: the batch
    sizes of its run, or the defaults if that is told nowhere."""

    run: Path
    step: int
    config: GPTConfig
    tokenizer: Tokenizer
    optim: OptimSettings

    @classmethod
    def find(cls, settings: SourceSettings) -> "Source":
        """The checkpoint and tokenizer that the settings mean. UserError if they are not there."""
        run = find_run(settings.source)
        checkpoint = find_checkpoint(run, settings.source_step)
        manifest = read_manifest(checkpoint)
        config = GPTConfig(**manifest["meta"]["model_config"])
        tokenizer = load_tokenizer(checkpoint, settings.tokenizer)
        return cls(run, manifest["step"], config, tokenizer, _batch_sizes(run))

    def __str__(self) -> str:
        parameters = sum(parameter_counts(self.config).values())
        return (
            f"{self.run}, step {self.step}: d{self.config.n_layer}, {parameters:,} parameters, "
            f"{self.config.sequence_len} tokens of context"
        )

    def load_into(self, model: GPT, world: World) -> None:
        """Give a model, sharded over any number of processes, the checkpoint's weights."""
        checkpointer = Checkpointer(
            self.run / "checkpoints",
            keep=1,
            process_group=world.new_host_group(),
            rank=world.rank,
            world_size=world.size,
        )
        weights = {name: p.detach() for name, p in model.named_parameters()}
        checkpointer.load(self.step, {"model": weights}, model_config=self.config.to_dict())
        checkpointer.close()


def _batch_sizes(run: Path) -> OptimSettings:
    """As in the run's settings. Runs that were converted have none."""
    path = run / "settings.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    sizes = {name: saved.get("optim", {}).get(name) for name in _BATCH_SIZES}
    return OptimSettings(**{name: size for name, size in sizes.items() if size is not None})


class StageSettings(Protocol):
    """What the settings of every stage hold: dataclasses that nobody writes to."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def optim(self) -> LearningSettings: ...

    @property
    def system(self) -> SystemSettings: ...

    @property
    def run(self) -> RunSettings: ...


class StageLoader(Loader, ResumableLoader, Protocol):
    """Training data: see gptfast.data.BatchLoader."""

    def close(self) -> None: ...


class Stage:
    """A run of one stage, from its folder to its last checkpoint.

    Attributes:
        folder: of the run.
        make_gpt: an unsharded GPT like the one that is trained, on the current device.
        dtype: of the weights in computations.
        model, optimizer: from `build` on.
    """

    def __init__(
        self,
        name: str,
        settings: StageSettings,
        config: GPTConfig,
        world: World,
        say: Callable[[str], None],
        *,
        documents: bool = False,
    ) -> None:
        """Open the run's folder (NAME-dDEPTH by default) and choose the attention.

        documents: batches will be packed documents.
        """
        self.name, self.settings, self.config = name, settings, config
        self.world, self.say = world, say
        system, run = settings.system, settings.run
        self._profile_steps = parse_steps(run.profile_steps) if run.profile_steps else None
        check_sinks(run.log_to)
        check_kernels(system.kernels, world.device)
        self.folder = open_run_folder(
            run.out, f"{name}-d{config.n_layer}", settings, world, resume=run.resume, say=say
        )
        self.dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        attention = choose_attention(
            system.attention,
            world.device,
            self.dtype,
            config.head_dim,
            deterministic=system.deterministic,
            documents=documents,
        )
        self._attention = attention.backend
        say(f"attention: {attention.backend} ({attention.reason}); kernels: {system.kernels}")
        self.make_gpt = partial(
            GPT, config, kernels=system.kernels, attention_backend=attention.backend
        )

    @property
    def tokenizer_folder(self) -> Path:
        """In the run, so that the run is all that later stages need."""
        return (self.folder / "tokenizer").absolute()

    def check(
        self,
        *,
        device_batch_size: int,
        accumulation: int,
        longest: int | None = None,
        generator: int = 0,
    ) -> None:
        """UserError unless GPU memory and disk suffice for the run.

        longest: tokens of the longest sequence that is trained on; the model's otherwise.
        generator: bytes that stay reserved to generate those sequences.
        """
        check_disk(self.folder, self.settings.run.keep, self.config)
        system = self.settings.system
        self._memory = MemoryNeed(
            self.config if longest is None else replace(self.config, sequence_len=longest),
            device_batch_size,
            accumulation,
            self.world,
            reshard_after_forward=system.reshard_after_forward,
            kernels=system.kernels,
            # Where a step is so many tokens; where it is rows or answers, a pass may be less full.
            evenly=isinstance(self.settings.optim, OptimSettings),
            generator=generator,
        )
        self.say(self._memory.check())

    def build(self, source: Source | None = None) -> None:
        """Make the sharded model, with the source's weights if there is one, and its optimizer."""
        system, self._source = self.settings.system, source
        with self._memory.told():
            self.model = parallel.build_sharded(
                self.make_gpt,
                self.world,
                compute_dtype=self.dtype,
                reshard_after_forward=system.reshard_after_forward,
                compile_blocks=system.compile,
                seed=system.seed,
            )
        if source is not None and not self.settings.run.resume:
            source.load_into(self.model, self.world)
        self.optimizer = build_optimizer(self.model, self.settings.optim, kernels=system.kernels)

    def train(
        self,
        plan: Plan,
        loader: StageLoader,
        tokenizer: Tokenizer,
        *,
        evaluate: Callable[[int], dict],
        sample: Callable[[int], dict],
        step_figures: Callable[[], dict[str, float]] = dict,
        title: str,
        data_figures: Mapping[str, int] | None = None,
    ) -> Summary:
        """Run the plan, from the newest checkpoint if that is asked for; close the loader. What
        `evaluate`, `sample` and `step_figures` give: see Trainer. The title is that of the curves;
        data_figures are noted in the metrics before the first step.
        """
        world, run, state = self.world, self.settings.run, self._state(loader, tokenizer)
        start_step, summary = 0, Summary(energy_joules=0.0)
        if run.resume:
            start_step, summary = self._resume(state, plan)
        if world.is_main:
            tokenizer.save(self.tokenizer_folder)
        log = self._open_log(plan, start_step)
        if data_figures:
            log.row("event", start_step, **data_figures)
        meter = EnergyMeter(range(world.local_rank, world.local_rank + 1))
        before = summary.energy_joules

        def save(step: int) -> None:
            summary.energy_joules = self._joules(meter, before)
            state.save(step, plain(summary))

        trainer = Trainer(
            world=world,
            model=self.model,
            optimizer=self.optimizer,
            loader=loader,
            plan=plan,
            log=log,
            checkpointer=state.checkpointer,
            save=save,
            evaluate=evaluate,
            sample=sample,
            step_figures=step_figures,
            profiler=self._profiler(plan, start_step),
            summary=summary,
        )
        try:
            with self._memory.told():
                trainer.run(start_step)
        finally:
            log.close()
            loader.close()
        state.checkpointer.close()
        summary.energy_joules = self._joules(meter, before)
        end_run(self.folder, summary, world, title=title, say=self.say)
        return summary

    def _open_log(self, plan: Plan, start_step: int) -> MetricsLog:
        # Rank 0 alone opens anything; if it cannot, all end.
        with self.world.node_leader_first():
            return MetricsLog(
                self.folder,
                active=self.world.is_main,
                start_step=start_step,
                total_steps=plan.total_steps,
                sinks=self.settings.run.log_to,
                settings=self.settings,
            )

    def _state(self, loader: StageLoader, tokenizer: Tokenizer) -> RunState:
        return RunState(
            world=self.world,
            model=self.model,
            optimizer=self.optimizer,
            loader=loader,
            folder=self.folder / "checkpoints",
            keep=self.settings.run.keep,
            meta=self._meta(tokenizer),
            say=self.say,
        )

    def _resume(self, state: RunState, plan: Plan) -> tuple[int, Summary]:
        """Restore the newest checkpoint: the number of steps done, and what they came to."""
        step, saved = state.restore(total_steps=plan.total_steps)
        write_start(self.folder, self.settings, self.world, resume=True)
        summary = Summary(**saved)
        summary.skipped_steps = int(self.optimizer.skipped_steps)
        # That of this step is made again.
        summary.evaluations = [e for e in summary.evaluations if e["step"] < step]
        return step, summary

    def _joules(self, meter: EnergyMeter, before: float | None) -> float | None:
        """Of all GPUs, with those of the sessions before; None unless all are known."""
        mine = meter.joules() if self.world.device.type == "cuda" else None
        found = [before, *self.world.gather(mine)]
        known = [joules for joules in found if joules is not None]
        return sum(known) if len(known) == len(found) else None

    def _profiler(self, plan: Plan, start_step: int) -> StepProfiler | None:
        steps, world = self._profile_steps, self.world
        if steps is None:
            return None
        if not start_step <= steps.start < steps.stop <= plan.total_steps:
            self.say(
                f"no profile of steps {steps.start}:{steps.stop}: the run does steps "
                f"{start_step}:{plan.total_steps}"
            )
            return None
        assert plan.tokens_per_step is not None, "RLSettings refuses to profile"
        job = Job(
            self.config,
            self._memory.batch,
            plan.accumulation,
            processes=world.size,
            shards=world.local_size,
            tokens_per_step=plan.tokens_per_step,
            flops_per_token=plan.flops_per_token,
        )
        settings = asdict(self.settings)
        # Not "auto": what of it was chosen is what a step's time depends on.
        settings["system"]["attention"] = self._attention
        return StepProfiler(
            steps,
            job=job,
            device=world.device,
            out=self.folder / LEDGER_FILE,
            say=self.say,
            active=world.is_main,
            settings=settings,
            environment=environment(world),
        )

    def _meta(self, tokenizer: Tokenizer) -> dict:
        """What is told of the model in its checkpoints."""
        return {
            "stage": self.name,
            "model_config": self.config.to_dict(),
            "tokenizer": tokenizer.fingerprint,
            "tokenizer_folder": str(self.tokenizer_folder),
            **({"source": str(self._source.run.absolute())} if self._source else {}),
        }


def learning_rate(optim: LearningSettings, total_steps: int) -> Callable[[int], float]:
    """Step -> what every learning rate is multiplied by."""
    schedule = partial(
        learning_rate_multiplier,
        total_steps=total_steps,
        warmup_ratio=optim.warmup_ratio,
        warmdown_ratio=optim.warmdown_ratio,
        final_fraction=optim.final_lr_frac,
    )
    return lambda step: optim.init_lr_frac * schedule(step)
