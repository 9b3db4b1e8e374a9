"""What a profiled step trained."""

from typing import NamedTuple

from gptfast.model import GPTConfig, flops_per_token


class Job(NamedTuple):
    """What the profiled process trained: enough to know every product's shape, and what of it
    counts in tokens a second and in MFU."""

    config: GPTConfig
    batch: int
    """Sequences of one micro-step on this process."""
    accumulation: int
    processes: int
    shards: int
    tokens_per_step: int | None = None
    """Those that count, of all processes together, in the mean of the run; None: all."""
    flops_per_token: int | None = None
    """By the report's formula over the context that a token has; None: the whole one."""

    @property
    def tokens(self) -> int:
        """Of one micro-step on this process, padding included."""
        return self.batch * self.config.sequence_len

    @property
    def counted_tokens(self) -> float:
        """Of one step on this process."""
        if self.tokens_per_step is None:
            return self.tokens * self.accumulation
        return self.tokens_per_step / self.processes

    @property
    def counted_flops(self) -> int:
        """Of one token that counts."""
        return self.flops_per_token or flops_per_token(self.config)

    @property
    def attention_flops(self) -> int:
        """The part of counted_flops that is attention's: the whole square of the context."""
        return self.counted_flops - flops_per_token(self.config, context=0)
