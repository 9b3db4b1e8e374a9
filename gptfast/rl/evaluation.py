"""pass@k while a model is trained by reinforcement: how often one of k answers is right."""

from collections.abc import Sequence
from math import comb

from gptfast.conversation import render_for_completion
from gptfast.evaluate.generative import Answering, answer_in_words
from gptfast.evaluate.outcomes import MARGIN
from gptfast.parallel import World
from gptfast.rl.rollouts import Actor
from gptfast.tasks import Task

_SAMPLES = 3


class RLEvaluation:
    """Asks the questions of a task; each rank takes its share of them."""

    def __init__(self, actor: Actor, task: Task, answering: Answering, world: World) -> None:
        self.actor, self.task, self.answering, self.world = actor, task, answering, world

    def pass_at_k(self, _step: int) -> dict[str, float]:
        """{"pass@1": ..., ..., "pass@n": ...}, the same on every rank. The random numbers are the
        same at every step, so that what changes is the model."""
        n, world = self.answering.num_samples, self.world
        mine = range(world.rank, len(self.task), world.size)
        outcomes = answer_in_words(self.actor.engine(), self.task, mine, self.answering)
        right = [round(share * n) for share in outcomes[:, MARGIN]]
        everyone = [count for share in world.gather(right) for count in share]
        return {f"pass@{k}": pass_at_k(everyone, n, k) for k in range(1, n + 1)}

    def sample(self, _step: int) -> dict[str, list[str]]:
        """{"samples": [...]}: the likeliest answers to the first questions, on rank 0."""
        engine = self.actor.engine()
        if not self.world.is_main:
            return {"samples": []}
        conversations = list(self.task[:_SAMPLES])
        sequences, _ = engine.generate_batch(
            [render_for_completion(engine.tokenizer, each) for each in conversations],
            max_tokens=self.answering.max_new_tokens,
            temperature=0,
        )
        return {"samples": [engine.tokenizer.decode(ids) for ids in sequences]}


def pass_at_k(right: Sequence[int], n: int, k: int) -> float:
    """The chance that of k answers one is right, on average over questions of which `right` many of
    n answers were: 1 - C(n - c, k) / C(n, k), without bias (Chen et al., arXiv 2107.03374)."""
    return sum(1 - comb(n - c, k) / comb(n, k) for c in right) / len(right)
