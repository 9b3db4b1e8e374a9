"""Answers sampled from the model that is being trained, scored by the task, and kept."""

import json
import random
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch

from gptfast.conversation import Conversation, render_for_completion
from gptfast.engine import Engine
from gptfast.engine.engine import READ_CHUNK
from gptfast.engine.kv_cache import bytes_per_position
from gptfast.errors import UserError
from gptfast.model import GPT, GPTConfig, parameter_counts
from gptfast.parallel import gather_replica
from gptfast.rl.config import AnswerSettings
from gptfast.rl.grpo import Rollout
from gptfast.tokenizer import Tokenizer


class RewardedTask(Protocol):
    """Questions with answers that are worth something."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...

    def reward(self, conversation: Conversation, answer: str) -> float: ...


def longest_rollout(
    task: RewardedTask, tokenizer: Tokenizer, max_new_tokens: int, context: int
) -> int:
    """Tokens of the longest prompt and of an answer to it. UserError if the context is shorter."""
    prompts = (render_for_completion(tokenizer, task[i]) for i in range(len(task)))
    longest = max(map(len, prompts))
    if longest + max_new_tokens > context:
        raise UserError(
            f"the longest question has {longest} tokens, which with --max-new-tokens "
            f"{max_new_tokens} exceeds the model's context of {context}; {context - longest} fit"
        )
    return longest + max_new_tokens


class Actor:
    """The model as it is trained right now, ready to generate, on every rank.

    Its weights go from the trainer's shards straight into a plain model in `dtype`, the same memory
    every time: what the engine compiled and captured stays valid.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        make_gpt: Callable[[], GPT],
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int,
    ) -> None:
        """model: sharded. make_gpt: an unsharded one like it. max_rows: see Engine."""
        with torch.device("meta"):
            replica = make_gpt()
        replica.cast_parameters(dtype)
        self._model, self.tokenizer = model, tokenizer
        self._replica = replica.to_empty(device=device).requires_grad_(False).eval()
        self._engine = Engine(self._replica, tokenizer, max_rows=max_rows)

    def engine(self) -> Engine:
        """With the weights as they are now. Every rank calls it, then they go their own ways."""
        gather_replica(self._model, self._replica)
        return self._engine


def generator_bytes(config: GPTConfig, dtype: torch.dtype, *, rows: int, longest: int) -> int:
    """What an Actor keeps reserved while the model trains: its replica, whose weights of q, k and v
    the engine has side by side once more, and keys and values of `rows` answers."""
    parameters = sum(parameter_counts(config).values())
    heads = config.n_head + 2 * config.n_kv_head
    parameters += config.n_layer * config.n_embd * heads * config.head_dim
    positions = rows * (longest + -longest % READ_CHUNK)
    return parameters * dtype.itemsize + positions * bytes_per_position(config, dtype)


def roll_out(
    engine: Engine,
    task: RewardedTask,
    examples: Sequence[int],
    answers: AnswerSettings,
    *,
    step: int,
    seed: int,
) -> list[Rollout]:
    """`num_samples` answers to each of the examples, one example after the other.

    What is sampled depends on seed, step, example and number, not on which examples go together.
    """
    tokenizer, S = engine.tokenizer, answers.num_samples
    conversations = [task[example] for example in examples]
    prompts = [render_for_completion(tokenizer, each) for each in conversations]
    names = [(example, sample) for example in examples for sample in range(S)]
    ids = [list(prompt) for prompt in prompts for _ in range(S)]
    chosen = [[False] * len(prompt) for prompt in ids]
    steps = engine.generate(
        prompts,
        max_tokens=answers.max_new_tokens,
        num_samples=S,
        temperature=answers.temperature,
        top_k=answers.top_k or None,
        seeds=[_seed(seed, step, *name) for name in names],
    )
    for token in chain.from_iterable(steps):
        ids[token.sequence].append(token.id)
        chosen[token.sequence].append(token.sampled)
    stop = engine.stop_ids()
    rollouts = []
    for i, (example, sample) in enumerate(names):
        said = ids[i][len(prompts[i // S]) :]
        text = tokenizer.decode(said[:-1] if said[-1] in stop else said)
        reward = task.reward(conversations[i // S], text)
        rollouts.append(Rollout(example, sample, ids[i], chosen[i], text, reward))
    return rollouts


def write_rollouts(
    path: Path,
    step: int,
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    tokenizer: Tokenizer,
) -> None:
    """All rollouts of a step with their advantages, one JSON object a line."""
    lines = [
        {
            "step": step,
            "example": rollout.example,
            "sample": rollout.sample,
            "reward": rollout.reward,
            "advantage": advantage,
            "tokens": sum(rollout.chosen),
            "prompt": tokenizer.decode(rollout.ids[: rollout.chosen.index(True)]),
            "completion": rollout.text,
        }
        for rollout, advantage in zip(rollouts, advantages, strict=True)
    ]
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def _seed(*names: int) -> int:
    return random.Random(" ".join(map(str, names))).getrandbits(62)
