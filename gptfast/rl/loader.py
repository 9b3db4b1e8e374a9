"""Training data that the model makes itself: the batches of a step are its answers of that step."""

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from gptfast.batch import Batch
from gptfast.parallel import World
from gptfast.rl.config import RLSettings
from gptfast.rl.grpo import Rollout, advantages, make_batches, rewards_and_tokens, token_weights
from gptfast.rl.rollouts import Actor, RewardedTask, roll_out, write_rollouts

# Compiled code is for one shape, and torch.compile refuses more than eight of one function. Batches
# have one number of rows and at most so many lengths, each a multiple of what attention works on at
# a time.
_LENGTHS = 6
_TILE = 128


class RolloutLoader:
    """Batches for the Trainer; the first of a step is waited for while the model answers.

    Steps take the task's examples in order, from the beginning again after the end, whatever the
    number of processes. All rollouts of a step are kept in `folder`/step_NNNNNN.jsonl.
    """

    def __init__(
        self,
        actor: Actor,
        task: RewardedTask,
        settings: RLSettings,
        *,
        world: World,
        folder: Path,
        multiple: int,
    ) -> None:
        """multiple: batches are padded to the next multiple of so many tokens."""
        self.actor, self.task, self.settings = actor, task, settings
        self.world, self.folder, self.multiple = world, folder, multiple
        self.step, self.wait_seconds = 0, 0.0
        self._figures: dict[str, float] = {}
        self._batches: deque[Batch] = deque()

    def __next__(self) -> Batch:
        if not self._batches:
            began = time.perf_counter()
            self._batches.extend(self._make_step())
            self.step += 1
            self.wait_seconds += time.perf_counter() - began
        return self._batches.popleft()

    def figures(self) -> dict[str, float]:
        """What is to be known of the rollouts of the step whose batches came last."""
        return self._figures

    def state_dict(self) -> dict:
        """Between two steps there is nothing but their number."""
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]

    def load_resharded(self, states: Sequence[dict]) -> str:
        """From the states of any number of processes; says what that means."""
        self.load_state_dict(states[0])
        return "they share the examples of a step anew"

    def close(self) -> None:
        """There is nothing to close."""

    def _make_step(self) -> list[Batch]:
        world, answers = self.world, self.settings.answers
        in_step = self.settings.questions.examples_per_step
        each = in_step // world.size
        first = self.step * in_step + world.rank * each
        examples = [i % len(self.task) for i in range(first, first + each)]
        began = time.perf_counter()
        mine = roll_out(
            self.actor.engine(),
            self.task,
            examples,
            answers,
            step=self.step,
            seed=self.settings.system.seed,
        )
        seconds = time.perf_counter() - began
        everyone = [rollout for share in world.gather(mine) for rollout in share]
        self._keep(everyone, seconds)

        weights = token_weights(
            *rewards_and_tokens(mine, answers.num_samples),
            together=answers.normalise_together,
            examples=in_step,
        )
        # The loop divides by the number of supervised tokens, which the weights have done already.
        supervised = sum(sum(rollout.chosen) for rollout in everyone)
        return make_batches(
            mine,
            (weights * supervised).ravel().tolist(),
            batch_size=self.settings.optim.device_batch_size,
            multiple=self.multiple,
            device=world.device,
        )

    def _keep(self, rollouts: list[Rollout], seconds: float) -> None:
        rewards, tokens = rewards_and_tokens(rollouts, self.settings.answers.num_samples)
        gains = advantages(rewards)
        self._figures = {
            "reward": float(rewards.mean()),
            # The share of examples whose answers differ in worth: the others teach nothing.
            "mixed_examples": float((gains != 0).any(axis=1).mean()),
            "answer_tokens": float(tokens.mean()),
            "rollout_seconds": seconds,
        }
        if self.world.is_main:
            path = self.folder / f"step_{self.step:06d}.jsonl"
            write_rollouts(path, self.step, rollouts, gains.ravel().tolist(), self.actor.tokenizer)


def length_multiple(longest: int) -> int:
    """What lengths of batches are to be multiples of, if every length is a compilation."""
    return _TILE * -(-longest // (_TILE * _LENGTHS))
