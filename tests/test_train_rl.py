"""Runs of train/rl.py: what they leave, exact resume, several processes, GSM8K's files."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gptfast import parallel
from gptfast.model import GPTConfig
from gptfast.rl.config import QuestionSettings, RLSettings, rl_preset
from gptfast.rl.grpo import advantages
from gptfast.rl.loader import RolloutLoader
from gptfast.tasks.toy import Toy
from tests.tuning_cases import (
    figures,
    leave_out_newton_schulz_kernel,
    plain_newton_schulz,
    rows,
    run_stage,
    write_source,
)
from train import rl

pytestmark = pytest.mark.usefixtures("plain_newton_schulz")
__all__ = ["plain_newton_schulz"]
ROOT = Path(__file__).parent.parent


def small(out: Path, **changes: object) -> RLSettings:
    """Six steps of the preset, smaller still."""
    settings = rl_preset(on_gpu=False)
    return replace(
        settings,
        questions=replace(
            settings.questions,
            num_iterations=6,
            examples_per_step=4,
            eval_examples=6,
            eval_samples=2,
        ),
        answers=replace(settings.answers, num_samples=8, normalise_together=4),
        optim=replace(settings.optim, device_batch_size=12),
        run=replace(settings.run, out=out, eval_every=3, save_every=2),
        **changes,
    )


def train(settings: RLSettings) -> list[str]:
    def alone(settings: RLSettings, world: parallel.World, say) -> None:
        # As many threads as cores would wait for each other where tests run in parallel.
        torch.set_num_threads(1)
        rl.train(settings, world, say)

    return run_stage(alone, settings)


def kept(run: Path) -> dict[str, list[dict]]:
    """Rollouts by file."""
    files = sorted((run / "rollouts").iterdir())
    return {f.name: [json.loads(line) for line in f.read_text().splitlines()] for f in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run from beginning to end, and what it said."""
    run = tmp_path_factory.mktemp("rl") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_newton_schulz_kernel(patch)
        said = train(small(run))
    return run, said


def test_a_run_leaves_what_it_promises(whole):
    run, said = whole
    steps, evaluations = rows(run, "step"), rows(run, "eval")
    multipliers = [row["lr_multiplier"] for row in steps]
    assert multipliers == pytest.approx([1 - step / 6 for step in range(6)])
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    # Answers are as long as they are: no count of tokens is known ahead, and none is claimed.
    assert not any(name.startswith("tokens") for row in steps + evaluations for name in row)
    assert all(row.keys() >= {"pass@1", "pass@2"} for row in evaluations)
    assert any("6 steps of 4 x 8 answers, 3 pass(es) each" in line for line in said)
    # A small model once more, and keys and values of 256 rows of 128 positions.
    assert any(line.startswith("memory: ") and "generator 32.6)" in line for line in said)
    files = kept(run)
    assert list(files) == [f"step_{step:06d}.jsonl" for step in range(6)]
    task = Toy(split="train")
    for step, lines in zip(steps, files.values()):
        assert [line["example"] for line in lines[::8]] == [4 * step["step"] + i for i in range(4)]
        assert [line["sample"] for line in lines] == list(range(8)) * 4
        rewards = np.array([line["reward"] for line in lines]).reshape(4, 8)
        gains = [line["advantage"] for line in lines]
        assert gains == pytest.approx(advantages(rewards).ravel().tolist())
        for line in lines:
            assert line["reward"] == task.reward(task[line["example"]], line["completion"])
            assert line["prompt"].endswith("<|user_end|><|assistant_start|>")
        assert step["reward"] == pytest.approx(rewards.mean())
        assert step["supervised_tokens"] == sum(line["tokens"] for line in lines)
        assert step["answer_tokens"] == pytest.approx(step["supervised_tokens"] / 32)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["step"], summary["skipped_steps"]) == (6, 0)
    assert summary["tokens_per_second"] is None
    assert len(rows(run, "sample")[-1]["samples"]) == 3


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    settings = small(run)
    with monkeypatch.context() as patch:
        make_step = RolloutLoader._make_step

        def die(self):
            if self.step == 5:
                # The last checkpoint may be in writing still; a kill might leave that of step 2.
                raise SystemError("killed")
            return make_step(self)

        patch.setattr(RolloutLoader, "_make_step", die)
        with pytest.raises(SystemError, match="killed"):
            train(settings)
    said = train(replace(settings, run=replace(settings.run, resume=True)))
    assert any(line in ("resumed after step 2", "resumed after step 4") for line in said)
    assert figures(run) == figures(whole[0])
    assert kept(run) == kept(whole[0])


def test_from_a_run_and_on_school_mathematics(tmp_path):
    """GSM8K's files, a source with a tokenizer of its own, and questions that begin anew."""
    source = write_source(tmp_path / "sft-d2")
    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    for split in ("train", "test"):
        questions = {
            "question": ["1+1?", "2+3?", "4*4?"],
            "answer": ["#### 2", "#### 5", "#### 16"],
        }
        path = tmp_path / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.table(questions), path)
    settings = small(tmp_path / "run")
    train(
        replace(
            settings,
            start=replace(settings.start, source=str(source)),
            questions=replace(
                settings.questions, task="gsm8k", chat_data=tmp_path, num_iterations=2
            ),
        )
    )
    files = kept(tmp_path / "run").values()
    assert [[line["example"] for line in lines[::8]] for lines in files] == [
        [0, 1, 2, 0],
        [1, 2, 0, 1],
    ]
    prompts = {line["prompt"] for lines in files for line in lines}
    body = "<|bos|><|user_start|>{}<|user_end|><|assistant_start|>"
    assert prompts == {body.format(question) for question in ("1+1?", "2+3?", "4*4?")}


def test_epochs_decide_how_long():
    with parallel.start(cpu=True) as world:
        settings = RLSettings(questions=QuestionSettings(examples_per_step=16, num_epochs=2))
        config = GPTConfig()
        # The reference's 467 steps of GSM8K, twice; 16 x 16 answers, 8 in a pass.
        plan = rl.make_plan(settings, config, 7473, world)
        assert (plan.total_steps, plan.accumulation) == (934, 32)
        rates = [plan.learning_rate_multiplier(step) for step in (0, 467, 933)]
        assert rates == pytest.approx([0.05, 0.025, 0.05 / 934])
        assert [plan.momentum(step) for step in (0, 900)] == [0.95, 0.95]


@pytest.mark.slow
def test_two_processes_are_as_one_and_one_goes_on_for_two(whole, tmp_path):
    """As users start it. The rollouts of the first step are those of one process, bit for bit; the
    gradient differs by rounding."""
    run = tmp_path / "run"
    flags = ["--num-iterations=6", "--examples-per-step=4", "--eval-examples=6", "--eval-samples=2"]
    flags += ["--num-samples=8", "--normalise-together=4", "--device-batch-size=12"]
    flags += [f"--out={run}", "--eval-every=3", "--save-every=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*torchrun, "--nproc_per_node=2", str(ROOT / "train" / "rl.py"), *flags],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "6 steps of 4 x 8 answers, 2 pass(es) each" in done.stdout
    alone, together = kept(whole[0]), kept(run)
    assert together["step_000000.jsonl"] == alone["step_000000.jsonl"]
    assert list(together) == list(alone)
    norms = [rows(each, "step")[0]["grad_norm"] for each in (whole[0], run)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)

    (run / "checkpoints" / "step_000006").rename(tmp_path / "away")
    said = train(replace(small(run), run=replace(small(run).run, resume=True)))
    assert any("2 processes on 1: they share the examples of a step anew" in s for s in said)
    assert kept(run)["step_000004.jsonl"] == together["step_000004.jsonl"]
    assert [row["step"] for row in rows(run, "step")] == [0, 1, 2, 3, 4, 5]
