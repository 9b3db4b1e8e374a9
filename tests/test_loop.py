"""The training loop in one process: what is due when, skipped steps, divergence, accumulation."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from gptfast import loop, parallel
from gptfast.checkpoint import Checkpointer
from gptfast.config import OptimSettings
from gptfast.errors import UserError
from gptfast.loop import MAX_SKIPPED_IN_A_ROW, Profiler, Trainer, TrainingDivergedError
from gptfast.metrics import MetricsLog
from gptfast.model import GPT, GPTConfig
from gptfast.optim import build_optimizer
from gptfast.plan import Plan
from tests.tuning_cases import plain_newton_schulz

__all__ = ["plain_newton_schulz"]
pytestmark = pytest.mark.usefixtures("plain_newton_schulz")

CONFIG = GPTConfig(sequence_len=8, vocab_size=32, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)


@dataclass
class Batches:
    """(rows, 8) batches of a learnable sequence, the same stream whatever `rows` is."""

    rows: int
    wait_seconds: float = 0.0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.randint(32, (self.rows, 1), generator=self.generator)
        run = (start + torch.arange(9)) % 32
        return run[:, :-1].int(), run[:, 1:].contiguous()


def train(
    folder: Path,
    *,
    steps: int = 6,
    rows: int = 4,
    accumulation: int = 1,
    profiler: Profiler | None = None,
    **due: int,
):
    """Run a small model; returns (summary, weights, calls of evaluate/sample/save by step)."""
    calls: list[tuple[str, int]] = []
    with parallel.start(cpu=True) as world:
        model = parallel.build_sharded(
            lambda: GPT(CONFIG, attention_backend="flash2"),
            world,
            compute_dtype=torch.float32,
            reshard_after_forward=False,
            compile_blocks=False,
            seed=1,
        )
        trainer = Trainer(
            world=world,
            model=model,
            optimizer=build_optimizer(model, OptimSettings()),
            loader=Batches(rows),
            plan=Plan(
                total_steps=steps,
                accumulation=accumulation,
                tokens_per_step=rows * accumulation * 8,
                flops_per_token=1,
                learning_rate_multiplier=lambda step: 1.0,
                momentum=lambda step: 0.9,
                **due,
            ),
            log=MetricsLog(folder, active=True, total_steps=steps),
            checkpointer=Checkpointer(folder / "checkpoints", keep=1),
            save=lambda step: calls.append(("save", step)),
            evaluate=lambda step: calls.append(("eval", step)) or {"val_bpb": 1.0},
            sample=lambda step: calls.append(("sample", step)) or {"samples": []},
            profiler=profiler,
        )
        try:
            summary = trainer.run()
        finally:
            trainer.log.close()
        weights = {n: p.detach().full_tensor() for n, p in model.named_parameters()}
    return summary, weights, calls


def steps_of(folder: Path) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "step"]


def test_what_is_due_happens_before_its_step_and_once(tmp_path):
    summary, _, calls = train(tmp_path, eval_every=2, sample_every=4, save_every=3)
    assert [s for k, s in calls if k == "eval"] == [0, 2, 4, 6]
    assert [s for k, s in calls if k == "sample"] == [4, 6]
    assert [s for k, s in calls if k == "save"] == [3, 6]
    assert (summary.step, summary.stopped, summary.skipped_steps) == (6, False, 0)
    assert [e["tokens"] for e in summary.evaluations] == [0, 64, 128, 192]


@pytest.mark.parametrize(("every", "steps"), [(4, [0, 3, 4, 6]), (0, [0, 3, 6])])
def test_there_is_an_evaluation_whenever_scores_are_due(tmp_path, every, steps):
    _, _, calls = train(tmp_path, eval_every=every, score_every=3)
    assert [s for k, s in calls if k == "eval"] == steps


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train(tmp_path / "whole", rows=4)
    train(tmp_path / "parts", rows=2, accumulation=2)
    losses = [[row["loss"] for row in steps_of(tmp_path / n)] for n in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], None]) -> None:
    """Something happens in this step's forward pass."""
    forward, count = GPT.forward, iter(range(10**9))

    def disturbed(self, *arguments, **options):
        if next(count) == step:
            happens()
        return forward(self, *arguments, **options)

    monkeypatch.setattr(GPT, "forward", disturbed)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The loss of these steps is NaN, and so is every gradient."""
    forward, step = GPT.forward, iter(range(10**9))

    def poisoned(self, ids, targets=None, reduction="sum", **options):
        loss = forward(self, ids, targets, reduction, **options)
        return loss * math.nan if next(step) in steps else loss

    monkeypatch.setattr(GPT, "forward", poisoned)


def test_a_non_finite_step_is_skipped_counted_and_shown(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {2})
    summary, weights, _ = train(tmp_path, steps=5)
    rows = steps_of(tmp_path)
    assert summary.skipped_steps == 1
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert rows[2]["loss"] is None
    assert all(math.isfinite(row["loss"]) for row in rows[:2] + rows[3:])
    assert all(w.isfinite().all() for w in weights.values())
    assert "1 skipped" in capsys.readouterr().out


def test_ten_in_a_row_stop_the_run_and_leave_the_weights(tmp_path, monkeypatch):
    poison(monkeypatch, set(range(3, 100)))
    with pytest.raises(TrainingDivergedError, match=r"10 steps in a row.*step 12"):
        train(tmp_path, steps=50)
    # The step after the tenth was under way when the tenth was read.
    assert len(steps_of(tmp_path)) == 3 + MAX_SKIPPED_IN_A_ROW


def test_a_diverged_run_whose_last_save_failed_tells_both(tmp_path, monkeypatch):
    def fail(self):
        raise UserError("disk full: 0.000 GB are free")

    monkeypatch.setattr(Checkpointer, "wait", fail)
    poison(monkeypatch, set(range(3, 100)))
    told = r"10 steps in a row.*Last checkpoint in .*: not that after step 12: disk full: 0\.000 GB"
    with pytest.raises(TrainingDivergedError, match=told):
        train(tmp_path, steps=50, save_every=3)


class Told:
    """What a profiler is told; it takes a minute before step 2 and after step 3."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int] | str] = []
        self.clock = 0.0

    def now(self, device: torch.device) -> float:
        """A clock of which every look takes a second, and nothing else any time."""
        self.clock += 1.0
        return self.clock

    def before(self, step: int) -> bool:
        self.calls.append(("before", step))
        self.clock += 60.0 * (step == 2)
        return step == 2

    def after(self, step: int) -> bool:
        self.calls.append(("after", step))
        self.clock += 60.0 * (step == 3)
        return step == 3

    def close(self) -> None:
        self.calls.append("close")


def test_a_profiler_is_told_the_end_be_it_an_error(tmp_path, monkeypatch):
    whole, broken = Told(), Told()
    train(tmp_path, steps=1, profiler=whole)
    assert whole.calls == [("before", 0), ("after", 0), "close"]
    monkeypatch.setattr(GPT, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, steps=1, profiler=broken)
    assert broken.calls == [("before", 0), "close"]


def test_what_a_profiler_takes_is_no_steps_time(tmp_path, monkeypatch):
    profiler = Told()
    monkeypatch.setattr(loop, "now", profiler.now)
    summary, _, _ = train(tmp_path, steps=6, profiler=profiler)
    assert [row["seconds"] for row in steps_of(tmp_path)] == [2.0] * 6
    assert summary.training_seconds == 12.0


@pytest.mark.usefixtures("not_under_nohup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_it_saves_what_is_done_and_ends(tmp_path, monkeypatch, capsys, number):
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    summary, _, calls = train(tmp_path, steps=50)
    # The step after the one in which it came was under way when that was read.
    assert [step for kind, step in calls if kind == "save"] == [4]
    # Once, and nothing of torchrun, which did not start this.
    assert capsys.readouterr().out.count("asked to stop: saving, then ending\n") == 1
    assert (summary.step, summary.stopped) == (4, True)


@pytest.mark.parametrize(
    ("torch_version", "asked", "seconds"), [("2.11.0", "90", 30), ("2.12.0", "90", 90)]
)
def test_asked_to_stop_it_says_how_long_torchrun_waits(monkeypatch, torch_version, asked, seconds):
    monkeypatch.setenv(parallel.SHUTDOWN_VARIABLE, asked)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "__version__", TorchVersion(torch_version))
    assert f"torchrun kills what takes longer than {seconds} s (" in loop._told_to_stop()
