"""What train/evaluate.py can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptfast.config import at_least_one
from gptfast.errors import UserError
from gptfast.evaluate.forward import BATCH_TOKENS
from gptfast.tasks import CHAT_TASKS


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and how it runs."""

    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None
    """Which of the run's checkpoints; the newest otherwise."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; the run's otherwise."""
    cache: Path | None = None
    """Where fetched text and tasks are kept; as in the run otherwise."""
    out: Path | None = None
    """Folder for results; evaluation/step_NNNNNN in the run's otherwise."""
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto: bfloat16 on a GPU, float32 elsewhere."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """auto: triton on a GPU, reference elsewhere."""
    attention: str = "auto"
    """auto, flash4, flash3, cudnn, flash2 or math; CORE and questions have their own."""
    device: Literal["auto", "cpu"] = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateBaseSettings(ModelSettings):
    run: tyro.conf.Positional[str | None] = None
    """Folder of the run whose model to evaluate; or base, the deepest of runs/base-d*."""
    only: tuple[Literal["bpb", "samples", "core"], ...] = ("bpb", "samples", "core")
    """What to evaluate."""

    data: str | None = None
    """Text for bits per byte; what the run was trained on otherwise."""
    validation: str | None = None
    """File of the text's folder that validates; as in the run otherwise."""
    split_tokens: int = 20 * 524_288
    """Tokens of each of the two texts."""
    device_batch_size: int = 32
    """Sequences in one forward pass for bits per byte."""

    core_bundle: Path | None = None
    """Folder of the CORE bundle; fetched (162 MB) otherwise."""
    max_per_task: int | None = None
    """Score only the first examples of each CORE task, and say so with the result."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens in one forward pass for CORE."""
    compare_one_at_a_time: bool = False
    """Score CORE a second time, one sequence at a time, and list every example that differs."""

    random_weights: bool = False
    """Evaluate a model that knows nothing, to see what guessing gives."""
    depth: int = 2
    """Its layers."""
    sequence_len: int = 2048
    """Its sequence length."""

    def __post_init__(self) -> None:
        if (self.run is None) != self.random_weights:
            raise UserError(
                "name a run's folder, or give --random-weights, --depth and --tokenizer"
            )
        if self.random_weights and self.tokenizer is None:
            raise UserError("--random-weights needs --tokenizer")
        at_least_one(self, "split_tokens", "device_batch_size", "max_per_task", "batch_tokens")


@dataclass(frozen=True, kw_only=True)
class EvaluateChatSettings(ModelSettings):
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])]
    """mid, sft or rl: the stage's run of the largest depth, the newest one; or a run's folder."""
    model_tag: Annotated[str | None, tyro.conf.arg(aliases=["-g"])] = None
    """Which run of the stage: with --source sft, d20 is runs/sft-d20."""
    task: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-a"])] = tuple(CHAT_TASKS)
    """Some of ARC-Easy, ARC-Challenge, MMLU, GSM8K and HumanEval, with spaces or | between."""
    chat_data: Path | None = None
    """Folder with arc, mmlu, gsm8k and humaneval as on the Hub; fetched (60 MB) otherwise."""
    max_problems: Annotated[int | None, tyro.conf.arg(aliases=["-x"])] = None
    """Ask only the first problems of each task, and say so with the result."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"])] = None
    """The most questions in one pass, and answers written together; else what fills a GPU."""

    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.0
    """Of answers in words; 0: greedy."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512
    """Of an answer."""
    num_samples: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Answers to a problem, of which one must be right."""
    top_k: Annotated[int | None, tyro.conf.arg(aliases=["-k"])] = 50
    """Draw from so many tokens."""
    seed: int = 42

    def __post_init__(self) -> None:
        if unknown := [name for name in self.tasks if name not in CHAT_TASKS]:
            raise UserError(f"no chat task {unknown[0]!r}; there are {', '.join(CHAT_TASKS)}")
        names = ("max_problems", "batch_size", "max_new_tokens", "num_samples", "top_k")
        at_least_one(self, *names)

    @property
    def tasks(self) -> list[str]:
        return [name for names in self.task for name in names.split("|")]
