"""What a model is measured by while it learns to chat: losses, accuracies, answers."""

from collections.abc import Callable, Mapping

import torch

from gptfast.chat_data import RowLoader
from gptfast.conversation import render_messages
from gptfast.engine import Engine
from gptfast.evaluate.base import BaseEvaluation
from gptfast.evaluate.bits_per_byte import losses
from gptfast.evaluate.chat import evaluate_categorical
from gptfast.model import GPT
from gptfast.parallel import World
from gptfast.tasks import Task
from gptfast.tokenizer import Tokenizer

PROMPTS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "What is 12 times 7?",
    "Why is the sky blue?",
    "Write a sentence about the sea.",
)
_ANSWER_TOKENS = 48


class TuningEvaluation(BaseEvaluation):
    """BaseEvaluation on conversations, and the accuracy on questions with letters for answers."""

    def __init__(
        self,
        *,
        world: World,
        model: GPT,
        make_replica: Callable[[], GPT],
        make_loader: Callable[[], RowLoader],
        tokenizer: Tokenizer,
        dtype: torch.dtype,
        tasks: Mapping[str, Task] | None = None,
        tasks_due: Callable[[int], bool] = lambda step: True,
        max_problems: int | None = None,
    ) -> None:
        """tasks: categorical ones by name, of each of which the first max_problems are answered,
        at those steps only that are due."""
        super().__init__(
            world=world,
            model=model,
            make_replica=make_replica,
            make_loader=make_loader,
            tokenizer=tokenizer,
            dtype=dtype,
        )
        self.tasks, self.tasks_due, self.max_problems = tasks or {}, tasks_due, max_problems

    def validate(self, step: int) -> dict:
        """{"val_loss": nats a supervised token, "val_bpb", and the accuracy of each task that is
        due}; the same numbers on every rank."""
        replica, loader = self._replica(), self.make_loader()
        try:
            found = losses(replica, loader, self.token_bytes, self.world.host_group)
        finally:
            loader.close()
        figures = {"val_loss": found.per_token, "val_bpb": found.bits_per_byte}
        if self.tasks_due(step):
            for name, task in self.tasks.items():
                figures[name] = evaluate_categorical(
                    replica,
                    self.tokenizer,
                    task,
                    max_problems=self.max_problems,
                    group=self.world.host_group,
                )
        return figures

    def sample(self, _step: int) -> dict:
        """{"samples": [...]}: the fixed questions and greedy answers, on rank 0; empty on the
        others."""
        replica = self._replica()
        if not self.world.is_main:
            return {"samples": []}
        engine = Engine(replica, self.tokenizer, compiled=False)
        # Only a toy's context is shorter than a question.
        room = engine.context - _ANSWER_TOKENS
        prompts = [
            render_messages(self.tokenizer, [{"role": "user", "content": text}])[-room:]
            for text in PROMPTS
        ]
        sequences, _ = engine.generate_batch(prompts, max_tokens=_ANSWER_TOKENS, temperature=0)
        return {"samples": [self.tokenizer.decode(ids) for ids in sequences]}
