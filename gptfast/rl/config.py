"""The settings of reinforcement learning."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptfast.config import (
    DEFAULT_CACHE,
    LearningSettings,
    RunSettings,
    SystemSettings,
    at_least_one,
)
from gptfast.config_chat import CPU_SYSTEM, SourceSettings
from gptfast.engine.sampling import Sampling
from gptfast.errors import UserError
from gptfast.model import GPTConfig
from gptfast.tokenizer import SMALLEST_VOCAB, Tokenizer

# In place of a run to start from: a small model that knows nothing and reads bytes.
SCRATCH = "scratch"


@dataclass(frozen=True)
class QuestionSettings:
    task: Literal["gsm8k", "toy"] = "gsm8k"
    """What is asked: school mathematics, or for a digit."""
    chat_data: Path | None = None
    """Folder with a local copy of gsm8k/, laid out as on the Hub; fetched otherwise."""
    cache: Path = DEFAULT_CACHE
    """Where fetched questions are kept."""
    examples_per_step: int = 16
    """Questions in a step, of all GPUs together."""
    num_epochs: int = 1
    num_iterations: int | None = None
    """Steps; --num-epochs times the questions otherwise."""
    eval_examples: int = 400
    """Test questions for pass@k."""
    eval_samples: int = 8
    """Answers to each of them: pass@1 up to pass@ this."""

    def __post_init__(self) -> None:
        at_least_one(self, "examples_per_step", "num_epochs", "num_iterations")
        at_least_one(self, "eval_examples", "eval_samples")


@dataclass(frozen=True)
class AnswerSettings:
    num_samples: int = 16
    """Answers to a question; their mean reward is what each is compared with."""
    normalise_together: int = 8
    """Of these answers, so many together weigh what as many of another question weigh."""
    max_new_tokens: int = 256
    """The longest answer, the calculator's tokens included."""
    temperature: float = 1.0
    top_k: int = 50
    """Draw from so many of the likeliest tokens; 0: from all."""
    max_rows: int = 256
    """Answers that one GPU generates at once; keys and values of so many stay reserved."""

    def __post_init__(self) -> None:
        at_least_one(self, "num_samples", "normalise_together", "max_new_tokens", "max_rows")
        if self.num_samples % self.normalise_together:
            raise UserError(
                f"{self.num_samples} samples cannot be normalised {self.normalise_together} "
                f"together; {math.gcd(self.num_samples, self.normalise_together)} would divide them"
            )
        Sampling(self.temperature, self.top_k or None)


@dataclass(frozen=True)
class RLOptimSettings(LearningSettings):
    grad_clip: float = 0.0
    init_lr_frac: float = 0.05
    warmdown_ratio: float = 1.0
    device_batch_size: int = 8
    """Answers in one forward + backward of one GPU, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "device_batch_size")


@dataclass(frozen=True)
class RLSettings:
    """Everything that train/rl.py can be told. --source scratch: a small model that knows
    nothing."""

    start: SourceSettings = field(default_factory=lambda: SourceSettings(source="sft"))
    questions: QuestionSettings = field(default_factory=QuestionSettings)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    optim: RLOptimSettings = field(default_factory=RLOptimSettings)
    system: SystemSettings = field(default_factory=SystemSettings)
    run: RunSettings = field(
        default_factory=lambda: RunSettings(eval_every=60, sample_every=0, save_every=60)
    )

    def __post_init__(self) -> None:
        if self.run.profile_steps is not None:
            raise UserError(
                "--profile-steps: in reinforcement learning every step has another number of "
                "tokens, so there is no ledger of them; profile base, mid or sft"
            )


def rl_preset(*, on_gpu: bool) -> RLSettings:
    """The defaults of train/rl.py here: the reference's on GPUs; elsewhere a toy that a small model
    learns from nothing in a minute."""
    if on_gpu:
        return RLSettings()
    return RLSettings(
        start=SourceSettings(source=SCRATCH),
        questions=QuestionSettings(task="toy", num_iterations=200, eval_examples=50),
        answers=AnswerSettings(max_new_tokens=4, top_k=0),
        optim=RLOptimSettings(init_lr_frac=1.0, device_batch_size=64),
        system=CPU_SYSTEM,
        run=RunSettings(eval_every=50, sample_every=0, save_every=50),
    )


def passes_of_step(settings: RLSettings, world_size: int) -> int:
    """Forward + backward passes of a step on each GPU. UserError, with the next number that works,
    if the GPUs cannot share its examples."""
    examples = settings.questions.examples_per_step
    if examples % world_size:
        raise UserError(
            f"{examples} examples a step cannot be shared by {world_size} process(es); the next "
            f"number that can is {-(-examples // world_size) * world_size}"
        )
    answers = examples // world_size * settings.answers.num_samples
    return -(-answers // settings.optim.device_batch_size)


def scratch_model() -> tuple[GPTConfig, Tokenizer]:
    """What --source scratch means."""
    config = GPTConfig(
        sequence_len=64, vocab_size=SMALLEST_VOCAB, n_layer=2, n_head=2, n_kv_head=2, n_embd=64
    )
    return config, Tokenizer({bytes([byte]): byte for byte in range(256)})
