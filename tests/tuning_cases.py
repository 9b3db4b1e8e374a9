"""What the tests of the later stages share: a small run to start from, conversations, figures."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptfast import optim, parallel
from gptfast.checkpoint import Checkpointer
from gptfast.evaluate.tuning import TuningEvaluation
from gptfast.model import GPT, GPTConfig
from gptfast.tokenizer import Tokenizer
from kernels.newton_schulz import newton_schulz_ref

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
CONFIG = GPTConfig(
    sequence_len=48, vocab_size=BYTES.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32
)
_ANSWERS = ("yes", "no", "perhaps", "not today", "certainly")


def leave_out_newton_schulz_kernel(patch: pytest.MonkeyPatch) -> None:
    """The optimizer takes what a CPU takes where nothing is interpreted: plain PyTorch, in fp32,
    since bf16 is slow on many. Either the kernel or bf16 would take most of a small run's time."""

    def plain(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
        return newton_schulz_ref(x, steps, torch.float32).bfloat16()

    patch.setattr(optim, "newton_schulz", plain)


@pytest.fixture
def plain_newton_schulz(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what stands around the optimizer."""
    leave_out_newton_schulz_kernel(monkeypatch)


def write_source(folder: Path) -> Path:
    """A run's folder with a checkpoint of step 7, as base training leaves it."""
    BYTES.save(folder / "tokenizer")
    with parallel.start(cpu=True) as world:
        model = parallel.build_sharded(
            lambda: GPT(CONFIG),
            world,
            compute_dtype=torch.float32,
            reshard_after_forward=False,
            compile_blocks=False,
            seed=3,
        )
        checkpointer = Checkpointer(
            folder / "checkpoints", keep=1, process_group=world.new_host_group()
        )
        meta = {
            "model_config": CONFIG.to_dict(),
            "tokenizer": BYTES.fingerprint,
            "tokenizer_folder": str(folder / "tokenizer"),
        }
        weights = {name: p.detach() for name, p in model.named_parameters()}
        checkpointer.save(7, {"model": weights}, {}, meta)
        checkpointer.close()
    settings = {"optim": {"device_batch_size": 2, "total_batch_size": 2 * 48}}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").touch()
    return folder


def write_conversations(path: Path, count: int = 90) -> Path:
    """Short ones; which answer is right can be learned."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            answer = draw.choice(_ANSWERS)
            messages = [
                {"role": "user", "content": answer[0] * draw.randint(1, 9)},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def run_stage(train: Callable, settings: object) -> list[str]:
    """Run a recipe's train() alone on the CPU; what it said."""
    lines: list[str] = []
    with parallel.start(cpu=True) as world:
        # Several would wait for each other longer than they compute.
        torch.set_num_threads(1)
        train(settings, world, lines.append)
    return lines


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM arrives during the evaluation before this step."""
    validate = TuningEvaluation.validate

    def stopped(self: TuningEvaluation, at: int) -> dict:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, at)

    monkeypatch.setattr(TuningEvaluation, "validate", stopped)


def rows(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def figures(run: Path) -> list[tuple]:
    """What must be the same bit for bit in a resumed run."""
    steps = [(r["step"], r["loss"], r["grad_norm"], r["lr_multiplier"]) for r in rows(run, "step")]
    return steps + [tuple(sorted(row.items())) for row in rows(run, "eval")]
