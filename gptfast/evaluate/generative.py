"""Problems that are answered in words or programs: samples from the engine, judged by the task."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gptfast.conversation import render_for_completion
from gptfast.engine import Engine
from gptfast.errors import UserError
from gptfast.evaluate.outcomes import COLUMNS
from gptfast.tasks import Task


@dataclass(frozen=True)
class Answering:
    """How answers are made. A problem counts as solved if one of its samples is right.

    max_new_tokens: of an answer, the calculator's included. temperature, top_k: as in
    gptfast.engine.sampling. seed: a sample depends on it, its problem and its number, nothing else.
    """

    max_new_tokens: int = 512
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int | None = 50
    seed: int = 42


def answer_in_words(
    engine: Engine,
    task: Task,
    indices: Sequence[int],
    answering: Answering,
    *,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Outcomes (len(indices), 4) of these problems of a generative task. The margin is the share of
    samples that are right.

    progress: called with numbers of samples that were made.

    Raises:
        UserError: if no prompt fits the context beside its answer.
    """
    room = engine.context - answering.max_new_tokens
    if room < 1:
        raise UserError(
            f"answers of {answering.max_new_tokens} tokens leave no room for a prompt in the "
            f"model's context of {engine.context}: allow fewer new tokens"
        )
    conversations = [task[index] for index in indices]
    prompts = [render_for_completion(engine.tokenizer, each) for each in conversations]
    samples = range(answering.num_samples)
    sequences = _generate(
        engine,
        [prompt[-room:] for prompt in prompts],
        answering,
        [_seed(answering, index, sample) for index in indices for sample in samples],
        progress or (lambda count: None),
    )
    asked = [conversation for conversation in conversations for _ in samples]
    right = task.evaluate_many(asked, [engine.tokenizer.decode(ids) for ids in sequences])
    shares = np.array(right, dtype=np.float64).reshape(len(prompts), len(samples)).mean(1)
    outcomes = np.ones((len(prompts), COLUMNS))
    outcomes[:, 1:] = np.stack(
        (shares > 0, shares, np.array([len(prompt) > room for prompt in prompts])), axis=1
    )
    return outcomes


def _generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    answering: Answering,
    seeds: Sequence[int],
    progress: Callable[[int], object],
) -> list[list[int]]:
    """What was said behind the prompts, stop tokens left out."""
    stop = engine.stop_ids()
    said: list[list[int]] = [[] for _ in seeds]
    steps = engine.generate(
        prompts,
        max_tokens=answering.max_new_tokens,
        num_samples=answering.num_samples,
        temperature=answering.temperature,
        top_k=answering.top_k,
        seeds=seeds,
    )
    for tokens in steps:
        ended = 0
        for token in tokens:
            stops = token.sampled and token.id in stop
            if not stops:
                said[token.sequence].append(token.id)
            ended += stops or len(said[token.sequence]) == answering.max_new_tokens
        if ended:
            progress(ended)
    return said


def _seed(answering: Answering, index: int, sample: int) -> int:
    return random.Random(f"{answering.seed} {index} {sample}").getrandbits(62)
