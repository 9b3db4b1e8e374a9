"""Folders of a speedrun that nobody ran: d20 on four H200s, every stage, figures made up; and
what a report tells of them."""

import json
import math
from pathlib import Path

import pytest

from gptfast.evaluate.core_bundle import CORE_TASKS
from gptfast.report.build import build_report
from gptfast.report.document import Facts, Report, Table
from gptfast.report.runs import read_folders

STEPS, TOKENS_PER_STEP, GPUS = 21_400, 524_288, 4
# A step's seconds, so that a GPU makes 160,000 tokens a second: 558.7 of 989 TFLOP/s.
STEP_SECONDS = TOKENS_PER_STEP / (GPUS * 160_000)
FLOPS_PER_TOKEN = 3_491_758_080
MFU = 160_000 * FLOPS_PER_TOKEN / 989e12
CHAT_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval")
ENVIRONMENT = {
    "command": ["base.py"],
    "git_commit": "0123456789abcdef",
    "git_dirty": False,
    "git_branch": "main",
    "git_message": "A sentence that says what has changed for users and why, as those of this "
    "repository do",
    "platform": "Linux",
    "cpu_count": 64,
    "cpu_cores": 32,
    "memory_bytes": 512 * 2**30,
    "gpu_memory_bytes": 140 * 2**30,
    "python": "3.12.3",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "cuda": "13.0",
    "cudnn": 91900,
    "nccl": "2.28.9",
    "processes": GPUS,
    "nodes": 1,
    "device": "NVIDIA H200",
    "started": "2026-11-22 10:00:00",
}
MODEL = {
    "sequence_len": 2048,
    "vocab_size": 65_536,
    "n_layer": 20,
    "n_head": 10,
    "n_kv_head": 10,
    "n_embd": 1280,
}
SETTINGS = {
    "model": {"depth": 20, "sequence_len": 2048, "vocab_size": 65_536},
    "data": {"data": "/data/corpus", "tokenizer": "runs/tokenizer"},
    "horizon": {
        "num_iterations": None,
        "target_tokens": None,
        "target_flops": None,
        "target_param_data_ratio": 20.0,
    },
    "optim": {"device_batch_size": 32, "total_batch_size": TOKENS_PER_STEP, "grad_clip": 1.0},
    "run": {"eval_every": 250, "save_every": 1000},
}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_row(step: int, loss: float, **more: object) -> dict:
    return {
        "kind": "step",
        "step": step,
        "loss": loss,
        "grad_norm": 0.3,
        "lr_multiplier": min(1.0, (STEPS - step) / (0.2 * STEPS)),
        "seconds": STEP_SECONDS,
        "tokens": (step + 1) * TOKENS_PER_STEP,
        "tokens_per_second": GPUS * 160_000.0,
        "tokens_per_second_per_gpu": 160_000.0,
        "mfu_report": MFU * (1 + 0.004 * math.sin(step)),
        "mfu_own_peak": MFU * (1 + 0.004 * math.sin(step)),
        "peak_memory_bytes": 45 * 2**30,
        "skipped_steps": 0,
        **more,
    }


def write_base(folder: Path, *, steps: int = STEPS, total: int = STEPS, every: int = 40) -> Path:
    """A base run; with fewer steps than in all, one that was killed and left a cut-off line."""
    write(folder / "settings.json", SETTINGS)
    write(folder / "environment.json", ENVIRONMENT)
    rows: list[dict] = [
        {"kind": "event", "step": 0, "first_step_seconds": 9.2, "launch_to_step_1_seconds": 26.0}
    ]
    for step in range(0, steps + 1, every):
        shape = 2.75 + 8.3 / (1 + step / 40) + 0.06 * math.sin(7 * step)
        if step % 1000 == 0 or step == steps:
            bpb = 0.79 + 2.6 / (1 + step / 60)
            tokens = step * TOKENS_PER_STEP
            rows.append({"kind": "eval", "step": step, "tokens": tokens, "val_bpb": bpb})
        if step < steps:
            # Each row stands for all the steps up to the next.
            rows.append(step_row(step, shape, seconds=every * STEP_SECONDS))
    rows.append(step_row(steps - 1, 2.75))
    write_rows(folder / "metrics.jsonl", rows)
    meta = {"model_config": MODEL, "tokenizer": "ab" * 32, "step": steps}
    write(folder / "checkpoints" / f"step_{steps:06d}" / "manifest.json", {"meta": meta})
    if steps < total:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "step", "st')
    else:
        write(folder / "summary.json", {"step": steps, "stopped": False, "loss": 2.75})
    return folder


def write_base_evaluation(
    run: Path, *, missing: tuple[str, ...] = (), first: int | None = None
) -> None:
    out = run / "evaluation" / f"step_{STEPS:06d}"
    prompts = ("The capital of France is", "The chemical symbol of gold is")
    texts = [f"<|bos|>{prompt} what it is." for prompt in prompts]
    write(out / "loss.json", {"train_bpb": 0.79, "val_bpb": 0.8, "samples": texts})
    tasks = {
        name: {"accuracy": 0.5, "centered": 0.01 * i, "standard_error": 0.01, "examples": 500}
        for i, name in enumerate(CORE_TASKS)
        if name not in missing
    }
    key = "core_metric_partial" if missing or first else "core_metric"
    mean = sum(task["centered"] for task in tasks.values()) / len(tasks)
    limits = {"missing": list(missing), "first_of_each_task": first}
    write(out / "core.json", {key: mean, **limits, "tasks": tasks})


def write_stage(folder: Path, stage: str, *, steps: int = 100) -> Path:
    """A mid, SFT or RL run; finished, not evaluated."""
    write(folder / "settings.json", {"optim": {"init_lr_frac": 0.02}})
    write(folder / "environment.json", {**ENVIRONMENT, "command": [f"{stage}.py"]})
    rows = []
    for step in range(steps):
        more = {"reward": step / steps} if stage == "rl" else {}
        rows.append(step_row(step, 1.2 - 0.001 * step, **more))
        if step % 25 == 0:
            figure = {"val_loss": 1.05 - 0.0002 * step, "ARC-Easy": 0.3}
            if stage == "mid":
                figure = {"val_bpb": 0.41 - 0.0002 * step}
            rows.append({"kind": "eval", "step": step, "tokens": step * 1000, **figure})
    if stage == "sft":
        rows.insert(0, {"kind": "event", "step": 0, "training_rows": 20_843})
    write_rows(folder / "metrics.jsonl", rows)
    write(folder / "summary.json", {"step": steps, "stopped": False})
    return folder


def write_chat(
    run: Path, accuracy: float, *, leave_out: tuple[str, ...] = (), first: int | None = None
) -> None:
    tasks = {
        name: {"accuracy": accuracy, "centered": accuracy, "examples": 100}
        for name in CHAT_TASKS
        if name not in leave_out
    }
    metric = None if leave_out else accuracy
    key = "chatcore_metric_partial" if first else "chatcore_metric"
    limits = {"missing": list(leave_out), "first_of_each_task": first}
    chat = {key: metric, **limits, "tasks": tasks}
    write(run / "evaluation" / "step_000100" / "chat.json", chat)


def write_tokenizer(folder: Path) -> Path:
    training = {"max_chars": 2_000_000_000, "doc_cap": 10_000, "vocab_size": 65_536}
    training |= {"train_time": 143.2, "num_special_tokens": 9, "token_bytes_mean": 6.9}
    row = {"bytes": 1000, "theirs": 250, "ours": 200}
    tables = {
        label: [{"text": name, **row} for name in ("news", "korean", "code")]
        for label in ("GPT-2", "GPT-4")
    }
    write(folder / "tokenizer_config.json", {"training": training})
    write(folder / "report.json", {"training": training, "evaluation": tables})
    return folder


def write_speedrun(folder: Path) -> Path:
    """Steps of 100 s at 2,800 W of all four cards; base and RL took longer."""
    seconds = {"tokenizer": 100.0, "base": 17_532.0, "core": 100.0, "mid": 700.0, "sft": 200.0}
    seconds |= {"rl": 3600.0}
    steps = {
        name: {
            "state": "done",
            "seconds": took,
            "attempts": 2 if name == "base" else 1,
            "ended": "2026-11-22 15:00:00",
            "energy_joules": 2800.0 * took,
        }
        for name, took in seconds.items()
    }
    write(folder / "speedrun.json", {"started": "2026-11-22 09:58:00", "steps": steps})
    return folder


def write_everything(folder: Path) -> Path:
    write_tokenizer(folder / "tokenizer")
    write_base_evaluation(write_base(folder / "base-d20"))
    for stage, accuracy in (("mid", 0.3), ("sft", 0.4)):
        write_chat(write_stage(folder / f"{stage}-d20", stage), accuracy)
    write_stage(folder / "rl-d20", "rl")
    write_speedrun(folder / "speedrun-d20")
    return folder


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_everything(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def report(everything: Path) -> Report:
    return build_report(read_folders([everything]))


def figures(report: Report, title: str) -> dict[str, tuple[str, str]]:
    """label -> (ours, the reference's), of all lists and tables of a section."""
    section = next(s for s in report.sections if s.title == title)
    found: dict[str, tuple[str, str]] = {}
    for block in section.blocks:
        if isinstance(block, Facts):
            found |= {fact.label: (fact.ours, fact.reference) for fact in block.rows}
        elif isinstance(block, Table):
            found |= {row[0]: row[1:] for row in block.rows}
    return found
