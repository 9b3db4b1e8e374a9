"""What is learned from sampled answers: simplified GRPO, which is REINFORCE with a group's mean as
its baseline (nanochat d6d86cb, scripts/chat_rl.py).

For every example of a step, S answers are sampled from the model as it is. The advantage of an
answer is its reward minus the mean of its example's S rewards; it is not divided by their standard
deviation. There is no second model to stay close to, and no ratio to clip: every answer is used
once, by the model that gave it. What is minimised is

    - mean over groups of (sum over the group's tokens of advantage * log p(token)) / tokens

where a group is `normalise_together` answers to one example, and a token counts if the model chose
it: not the prompt, nor what the calculator put in. In a group every token weighs the same, be its
answer long or short (the normalisation of DAPO, arXiv 2503.14476).

So every token has a weight that is known before the forward pass, and the objective is a weighted
cross-entropy, however answers are put into batches and over processes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from gptfast.batch import Batch


class Rollout(NamedTuple):
    """An answer that was sampled, and what it is worth.

    example: its index in the task. sample: its number among the example's answers.
    ids: prompt and answer. chosen: for each of them, whether the model chose it; the token that
    ends the answer is one of those.
    """

    example: int
    sample: int
    ids: list[int]
    chosen: list[bool]
    text: str
    reward: float


def rewards_and_tokens(
    rollouts: Sequence[Rollout], num_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and numbers of chosen tokens, (examples, samples) each, of rollouts in order."""
    rewards = np.array([rollout.reward for rollout in rollouts])
    tokens = np.array([sum(rollout.chosen) for rollout in rollouts])
    return rewards.reshape(-1, num_samples), tokens.reshape(-1, num_samples)


def advantages(rewards: np.ndarray) -> np.ndarray:
    """(examples, samples) rewards -> the same, less the mean of the example."""
    return rewards - rewards.mean(axis=1, keepdims=True)


def token_weights(
    rewards: np.ndarray, tokens: np.ndarray, *, together: int, examples: int
) -> np.ndarray:
    """What the nats of each chosen token of an answer are multiplied by; their sum is the loss.

    rewards: (E, S) of this process's examples. tokens: (E, S), how many were chosen in each answer.
    together: answers of a group; divides S. examples: of all processes. Returns (E, S) fp64.
    """
    E, S = rewards.shape
    in_group = tokens.reshape(E, S // together, together).sum(axis=2).repeat(together, axis=1)
    groups = examples * (S // together)
    return advantages(rewards) / (np.maximum(in_group, 1) * groups)


def make_batches(
    rollouts: Sequence[Rollout],
    weights: Sequence[float],
    *,
    batch_size: int,
    multiple: int,
    device: torch.device | str,
) -> list[Batch]:
    """The answers in as few batches as have at most `batch_size` rows, the longest first, so that
    rows are of about one length; each batch is padded to the next multiple of `multiple` tokens.

    All have equally many rows; those of the last that no answer is left for hold no target.
    """
    order = sorted(range(len(rollouts)), key=lambda i: -len(rollouts[i].ids))
    passes = -(-len(order) // batch_size)
    height = -(-len(order) // passes)
    batches = []
    for start in range(0, len(order), height):
        rows = order[start : start + height]
        longest = len(rollouts[rows[0]].ids) - 1
        shape = (height, longest + -longest % multiple)
        inputs = torch.zeros(shape, dtype=torch.int32)
        targets = torch.full(shape, -1, dtype=torch.int64)
        scale = torch.zeros(shape, dtype=torch.float32)
        for row, index in enumerate(rows):
            ids, chosen = torch.tensor(rollouts[index].ids), torch.tensor(rollouts[index].chosen)
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:].where(chosen[1:], -1)
            scale[row, : len(ids) - 1] = weights[index] * chosen[1:]
        batches.append(Batch(inputs.to(device), targets.to(device), scale.to(device)))
    return batches
