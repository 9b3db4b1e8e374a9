"""What a run is to do at which step, and what it came to."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    """What to do at which step. Callables are pure functions of the step.

    tokens_per_step: None if each step has another number of tokens; then nothing is said of how
    many there were, nor of speed and MFU.
    """

    total_steps: int
    accumulation: int
    tokens_per_step: int | None
    flops_per_token: int
    learning_rate_multiplier: Callable[[int], float]
    momentum: Callable[[int], float]
    eval_every: int = 0
    # What an evaluation adds only now and then; there is one then, whatever eval_every says.
    score_every: int = 0
    sample_every: int = 0
    save_every: int = 0

    def due(self, every: int, step: int) -> bool:
        """Before the first step, after the last, and every so many in between."""
        return step in (0, self.total_steps) or (every > 0 and step % every == 0)

    def tokens(self, steps: int) -> dict[str, int]:
        """{"tokens": of so many steps}, as far as it is known."""
        return {} if self.tokens_per_step is None else {"tokens": steps * self.tokens_per_step}


@dataclass
class Summary:
    """What a run came to; `stopped` is set when a signal ended it early. None: there is no such
    figure.

    A resumed run goes on with its checkpoint's: seconds of training, skipped steps, energy and
    evaluations are of all its steps, the rest is of the last session that trained.
    """

    step: int = 0
    stopped: bool = False
    first_step_seconds: float | None = None
    launch_to_step_1_seconds: float | None = None
    training_seconds: float = 0.0
    tokens_per_second: float | None = None
    loss: float | None = None
    skipped_steps: int = 0
    peak_memory_bytes: int = 0
    # Of all GPUs of the run while it trained; None where they do not count it.
    energy_joules: float | None = None
    evaluations: list[dict] = field(default_factory=list)
