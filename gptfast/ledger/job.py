"""What a profiled step trained."""

from typing import NamedTuple

from gptfast.model import GPTConfig


class Job(NamedTuple):
    """What the profiled process trained: enough to know every product's shape."""

    config: GPTConfig
    batch: int
    """Sequences of one micro-step on this process."""
    accumulation: int
    processes: int
    shards: int

    @property
    def tokens(self) -> int:
        """Of one micro-step on this process."""
        return self.batch * self.config.sequence_len
