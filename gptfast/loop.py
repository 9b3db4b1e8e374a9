"""The training loop that every stage shares: steps, metrics, what is due when, signals.

No step waits for the host. What the host wants to know of a step (loss, gradient norm, whether it
was finite) is copied to pinned memory behind it and read one step later, when it has long arrived.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from gptfast import hardware
from gptfast.batch import Batch
from gptfast.clock import Moment, elapsed_ms, now
from gptfast.errors import UserError
from gptfast.memory import GIB
from gptfast.metrics import MetricsLog, seconds_since_launch
from gptfast.model import GPT
from gptfast.optim import Optimizer
from gptfast.parallel import SHUTDOWN_VARIABLE, World, seconds_to_save, synchronise_gradients
from gptfast.plan import Plan, Summary
from gptfast.stop import StopRequest

# Steps without a finite loss and gradient, one after the other, until a run stops.
MAX_SKIPPED_IN_A_ROW = 10
# Python's collector stops the host for up to half a second in a process of this size (nanochat's
# log); it runs at these steps instead of whenever it likes.
_COLLECT_EVERY = 1000
# Steps that say nothing about the speed of the rest: compilation, allocation, a cold card.
_WARMUP_STEPS = 20


class Loader(Protocol):
    """What the loop asks of its data: batches of this rank, one for each micro-step.

    `next()` gives a Batch, or the first two of its fields. wait_seconds: how long all calls of it
    have waited so far.
    """

    wait_seconds: float

    def __next__(self) -> Batch | tuple[torch.Tensor, torch.Tensor]: ...


class Checkpoints(Protocol):
    """What the loop asks of a checkpoint.Checkpointer; `save` starts the writing."""

    folder: Path

    def wait(self) -> None: ...


class Profiler(Protocol):
    """Is told when the host begins a step, when it has launched all of it, and when no more
    come. Says whether that took time, which is no step's."""

    def before(self, step: int) -> bool: ...

    def after(self, step: int) -> bool: ...

    def close(self) -> None: ...


class TrainingDivergedError(RuntimeError):
    """Ten steps in a row without a finite loss and gradient."""


@dataclass
class _Pending:
    """A step whose figures are still on their way to the host."""

    step: int
    values: torch.Tensor
    arrived: torch.cuda.Event | None
    start: Moment
    first_batch: Moment
    end: Moment
    data_wait: float
    figures: dict[str, float]


class Trainer:
    """Runs a Plan. `save(step)` starts a checkpoint; `evaluate(step)` returns figures by name and
    `sample(step)` {"samples": texts}, to be logged; all three are called on every rank, at step
    boundaries."""

    def __init__(
        self,
        *,
        world: World,
        model: GPT,
        optimizer: Optimizer,
        loader: Loader,
        plan: Plan,
        log: MetricsLog,
        checkpointer: Checkpoints,
        save: Callable[[int], None],
        evaluate: Callable[[int], dict],
        sample: Callable[[int], dict],
        step_figures: Callable[[], dict[str, float]] = dict,
        profiler: Profiler | None = None,
        summary: Summary | None = None,
    ) -> None:
        """step_figures: what else the row of the step that was just launched is to hold; summary:
        of the steps done before; up to date whenever `save` is called."""
        self.world, self.model, self.optimizer, self.loader = world, model, optimizer, loader
        self.plan, self.log, self.checkpointer = plan, log, checkpointer
        self.save, self.evaluate, self.sample = save, evaluate, sample
        self.step_figures, self.profiler = step_figures, profiler
        self.summary = Summary() if summary is None else summary
        on_gpu = world.device.type == "cuda"
        self._own_peak = hardware.peak(torch.cuda.get_device_name()) if on_gpu else None
        self._step_seconds: list[float] = []
        self._pending: _Pending | None = None
        self._skipped_in_a_row = 0
        self._stop_here, self._stop_everywhere = StopRequest(), False
        self._saved_at = -1

    def run(self, start_step: int = 0) -> Summary:
        """Train from start_step to the plan's end, or until SIGTERM, SIGINT or SIGHUP: then save at
        the next step boundary and return. TrainingDivergedError after ten non-finite steps in a
        row."""
        self._saved_at = start_step if start_step else -1
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            with self._stop_here.heeded():
                self._run(start_step)
        finally:
            if self.profiler is not None:
                self.profiler.close()
            gc.enable()
            gc.unfreeze()
        return self.summary

    def _run(self, start_step: int) -> None:
        plan = self.plan
        clock: Moment | None = None
        for step in range(start_step, plan.total_steps + 1):
            stop = self._stop_everywhere or step == plan.total_steps
            if self._boundary_work(step, stop=stop):
                clock = None
            if stop:
                break
            if step % _COLLECT_EVERY == _COLLECT_EVERY - 1:
                gc.collect()
            began = time.perf_counter()
            if self.profiler is not None and self.profiler.before(step):
                clock = None
            clock = self._train_step(step, clock)
            if self.profiler is not None and self.profiler.after(step):
                clock = None
            if step == start_step:
                self._settle()
                first, launched = time.perf_counter() - began, seconds_since_launch()
                self.summary.first_step_seconds = first
                self.summary.launch_to_step_1_seconds = launched
                self.log.row(
                    "event",
                    step,
                    first_step_seconds=first,
                    launch_to_step_1_seconds=launched,
                )
                self.log.say(
                    f"first step (compilation included): {first:.1f} s; {launched:.1f} s since "
                    "launch"
                )
                clock = None
        self._finish(step)

    def _boundary_work(self, step: int, *, stop: bool) -> bool:
        """Validation, samples and checkpoint as far as they are due before this step."""
        plan, done = self.plan, False
        last = step == plan.total_steps
        wanted = plan.due(plan.eval_every, step) or plan.due(plan.score_every, step)
        if wanted and (last or not stop):
            self._settle()
            figures, tokens = self.evaluate(step), plan.tokens(step)
            self.summary.evaluations.append({"step": step, **tokens, **figures})
            self.log.row("eval", step, **tokens, **figures)
            found = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            at = "".join(f" at {count:,} {name}" for name, count in tokens.items())
            self.log.say(f"step {step}: {found}{at}")
            done = True
        if (last or (step and plan.due(plan.sample_every, step))) and (last or not stop):
            self._settle()
            values = self.sample(step)
            self.log.row("sample", step, **values)
            for text in values["samples"]:
                self.log.say(f"  {text!r}")
            done = True
        if step and step != self._saved_at and (stop or plan.due(plan.save_every, step)):
            self._settle()
            self._note_speed()
            self.save(step)
            self._saved_at = step
            done = True
        return done

    def _train_step(self, step: int, start: Moment | None):
        plan, device = self.plan, self.world.device
        start = now(device) if start is None else start
        first_batch, waited = start, self.loader.wait_seconds
        # Loss in nats, supervised tokens, whether any rank was asked to stop. fp64 counts exactly.
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for micro in range(plan.accumulation):
            batch = next(self.loader)
            batch = batch if isinstance(batch, Batch) else Batch(*batch)
            if micro == 0:
                first_batch = now(device)
            synchronise_gradients(self.model, micro == plan.accumulation - 1)
            loss = self.model(
                batch.inputs, batch.targets, weights=batch.weights, documents=batch.documents
            )
            loss.backward()
            sums[0] += loss.detach()
            sums[1] += (batch.targets >= 0).sum()
        sums[2].fill_(float(self._stop_here.made))
        dist.all_reduce(sums)
        stats = self.optimizer.step(
            lr_multiplier=plan.learning_rate_multiplier(step),
            momentum=plan.momentum(step),
            token_count=sums[1].float(),
            loss=sums[0].float(),
        )
        figures = torch.stack(
            [sums[0] / sums[1], stats.grad_norm.double(), stats.finite.double(), *sums[1:]]
        )
        end = now(device)
        # The step before has finished by now or is about to: reading it does not stall the next.
        self._settle()
        data_wait = self.loader.wait_seconds - waited
        further = (start, first_batch, end, data_wait, self.step_figures())
        self._pending = self._send(step, figures, *further)
        return end

    def _send(self, step: int, figures: torch.Tensor, *further) -> _Pending:
        if figures.device.type != "cuda":
            return _Pending(step, figures, None, *further)
        values = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        values.copy_(figures, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Pending(step, values, arrived, *further)

    def _settle(self) -> None:
        """Read the pending step's figures, if there is one; log it and act on it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.arrived is not None:
            pending.arrived.synchronize()
        loss, grad_norm, finite, supervised, stop = pending.values.tolist()
        if stop and not self._stop_everywhere:
            self.log.say(_told_to_stop())
        self._stop_everywhere = stop > 0
        seconds = elapsed_ms(pending.start, pending.end) / 1e3
        self._account(pending, seconds, loss, bool(finite))
        self._report(pending, seconds, loss, grad_norm, int(supervised))
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDivergedError(
                f"{self._skipped_in_a_row} steps in a row without a finite loss and gradient, the "
                f"last of them step {pending.step} (loss {loss}); no weights were changed by them. "
                f"Last checkpoint in {self.checkpointer.folder}: {self._last_save()}"
            )

    def _last_save(self) -> str:
        try:
            self.checkpointer.wait()
        except UserError as error:
            return f"not that after step {self._saved_at}: {error}"
        return f"after step {self._saved_at}" if self._saved_at > 0 else "none was written"

    def _account(self, pending: _Pending, seconds: float, loss: float, finite: bool) -> None:
        summary = self.summary
        summary.step, summary.loss = pending.step + 1, loss
        summary.training_seconds += seconds
        summary.skipped_steps += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self._step_seconds.append(seconds)

    def _report(
        self, pending: _Pending, seconds: float, loss: float, grad_norm: float, supervised: int
    ) -> None:
        plan, step = self.plan, pending.step
        values = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr_multiplier": plan.learning_rate_multiplier(step),
            "seconds": seconds,
            "supervised_tokens": supervised,
            "data_wait_seconds": pending.data_wait,
            # Between two steps the device had nothing to do for so long: the host was late.
            "host_gap_seconds": elapsed_ms(pending.start, pending.first_batch) / 1e3,
            "skipped_steps": self.summary.skipped_steps,
            **pending.figures,
        }
        parts = [
            f"step {step + 1:>5}/{plan.total_steps}",
            f"loss {loss:.4f}",
            f"lr x{values['lr_multiplier']:.2f}",
            f"{1e3 * seconds:.1f} ms",
            *(f"{name} {value:.3g}" for name, value in pending.figures.items()),
        ]
        if plan.tokens_per_step is not None:
            per_gpu = plan.tokens_per_step / seconds / self.world.size
            values |= plan.tokens(step + 1)
            values["tokens_per_second"] = per_gpu * self.world.size
            values["tokens_per_second_per_gpu"] = per_gpu
            parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
            if self.world.device.type == "cuda":
                values |= self._mfu(per_gpu)
                own = values["mfu_own_peak"]
                parts.append(
                    f"MFU {100 * values['mfu_report']:.2f} % of 989 TFLOP/s"
                    + (f", {100 * own:.2f} % of this GPU's peak" if own is not None else "")
                )
        if self.world.device.type == "cuda":
            self.summary.peak_memory_bytes = torch.cuda.max_memory_allocated()
            values["peak_memory_bytes"] = self.summary.peak_memory_bytes
            parts.append(f"{self.summary.peak_memory_bytes / GIB:.1f} GiB")
        left = (plan.total_steps - step - 1) * statistics.median(self._step_seconds[-20:])
        parts.append(f"{int(left // 3600)}h{int(left % 3600 // 60):02d}m{int(left % 60):02d}s left")
        if self.summary.skipped_steps:
            parts.append(f"{self.summary.skipped_steps} skipped")
        self.log.row("step", step, **values)
        self.log.say(" | ".join(parts))
        self.log.progress(step + 1)

    def _mfu(self, tokens_per_second: float) -> dict:
        flops = tokens_per_second * self.plan.flops_per_token
        own = self._own_peak
        return {
            "mfu_report": hardware.mfu(flops, hardware.REPORT_PEAK_FLOPS),
            "mfu_own_peak": hardware.mfu(flops, own.bf16_flops) if own else None,
        }

    def _note_speed(self) -> None:
        steady = self._step_seconds[_WARMUP_STEPS:] or self._step_seconds[1:] or self._step_seconds
        if steady and self.plan.tokens_per_step is not None:
            self.summary.tokens_per_second = self.plan.tokens_per_step / statistics.median(steady)

    def _finish(self, step: int) -> None:
        self._settle()
        self.checkpointer.wait()
        self._note_speed()
        self.summary.step = step
        self.summary.stopped = step < self.plan.total_steps


def _told_to_stop() -> str:
    told, seconds = "asked to stop: saving, then ending", seconds_to_save()
    if seconds is None:
        return told
    return (
        f"{told}; torchrun kills what takes longer than {seconds} s (from torch 2.12 on, "
        f"{SHUTDOWN_VARIABLE} sets more)"
    )
