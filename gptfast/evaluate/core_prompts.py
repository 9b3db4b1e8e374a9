"""CORE's prompts: which examples, in what order, with which shots, as which tokens.

The protocol is nanochat's (commit d6d86cb): examples shuffled with seed 1337 and cut to the first
`max_per_task`; the shots of example i drawn from the others with seed 1234 + i; solved examples
and the question joined by blank lines; `<|bos|>` first.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptfast.errors import UserError
from gptfast.evaluate.core_bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, Example, Task
from gptfast.tokenizer import Tokenizer

_SHUFFLE_SEED = 1337
_SHOTS_SEED = 1234


@dataclass(frozen=True)
class Item:
    """One example, ready to be scored.

    index: of the example, after the shuffle. sequences: the prompt with each of its options, int32
    ids. starts: where the scored part of each begins, at least 1; it goes on to the end. gold: the
    right option. cropped: whether a sequence was longer than the context and lost its beginning.
    """

    index: int
    sequences: list[np.ndarray]
    starts: list[int]
    gold: int
    cropped: bool


def select_examples(task: Task, max_per_task: int | None = None) -> list[Example]:
    """Shuffled and cut. UserError if there are then too few to draw the task's shots from."""
    examples = list(task.examples)
    random.Random(_SHUFFLE_SEED).shuffle(examples)
    examples = examples[:max_per_task]
    if len(examples) <= task.shots:
        limit = "" if max_per_task is None else f" after the cut to {max_per_task} a task"
        advice = "the bundle is incomplete"
        if len(task.examples) > task.shots:
            advice = f"take {task.shots + 1} or more a task"
        raise UserError(
            f"{task.label} has {len(examples)} example(s){limit}, but shows {task.shots} others "
            f"before each: {advice}"
        )
    return examples


def draw_shots(index: int, count: int, shots: int) -> list[int]:
    """Indices of the examples shown before example `index` of `count`."""
    # As drawn from the list of all others, which need not be made: sample() looks at its length.
    drawn = random.Random(_SHOTS_SEED + index).sample(range(count - 1), shots)
    return [i + (i >= index) for i in drawn]


class Prompter:
    """Makes the items of one task."""

    def __init__(
        self, task: Task, tokenizer: Tokenizer, *, context: int, max_per_task: int | None = None
    ) -> None:
        """context: the longest sequence, in tokens, that the model takes."""
        self.task, self.tokenizer, self.context = task, tokenizer, context
        self.examples = select_examples(task, max_per_task)
        self._solved = [self._option(example, example.gold) for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def cost(self, index: int) -> int:
        """About what scoring an example takes, in characters: its shots once, each option."""
        shots = sum(len(self._solved[i]) for i in self._shots(index))
        return shots + sum(len(c) + len(a) for c, a in self.examples[index].options)

    def prompts(self, index: int) -> list[str]:
        """The prompt with each option; in language modelling without and with the answer."""
        example = self.examples[index]
        shown = "".join(self._solved[i] + "\n\n" for i in self._shots(index))
        prompts = [shown + self._option(example, i) for i in range(len(example.options))]
        if self.task.kind == LANGUAGE_MODELING:
            # Stripped, because the space before the answer is part of the answer's first token.
            context, _ = example.options[0]
            prompts.insert(0, (shown + context + self.task.delimiter).strip())
        return prompts

    def items(self, indices: Sequence[int], threads: int = 4) -> list[Item]:
        """Tokenised together. UserError if an answer alone is longer than the context."""
        prompts = [self.prompts(index) for index in indices]
        flat = [prompt for each in prompts for prompt in each]
        ids = self.tokenizer.encode_documents(flat, threads=threads)
        # Text never becomes <|bos|>, so it stands at the beginning of each prompt and only there.
        sequences = iter(np.split(ids, np.flatnonzero(ids == self.tokenizer.bos_id)[1:]))
        return [
            self._item(index, [next(sequences) for _ in each])
            for index, each in zip(indices, prompts)
        ]

    def _shots(self, index: int) -> list[int]:
        return draw_shots(index, len(self.examples), self.task.shots)

    def _option(self, example: Example, option: int) -> str:
        context, continuation = example.options[option]
        return context + self.task.delimiter + continuation

    def _item(self, index: int, sequences: list[np.ndarray]) -> Item:
        if self.task.kind == LANGUAGE_MODELING:
            starts = [common_prefix(sequences)]
            sequences = sequences[1:]
        elif self.task.kind == MULTIPLE_CHOICE:
            starts = [common_prefix(sequences)] * len(sequences)
        else:
            suffix = common_prefix([sequence[::-1] for sequence in sequences])
            # Options may be equal: then all but <|bos|> is scored.
            starts = [max(1, len(sequence) - suffix) for sequence in sequences]
        excess = [max(0, len(sequence) - self.context) for sequence in sequences]
        starts = [start - cut for start, cut in zip(starts, excess)]
        if min(starts) < 1:
            raise UserError(
                f"example {index} of {self.task.label} has an answer that does not fit the "
                f"model's context of {self.context} tokens"
            )
        return Item(
            index=index,
            sequences=[sequence[cut:] for sequence, cut in zip(sequences, excess)],
            starts=starts,
            gold=self.examples[index].gold,
            cropped=any(excess),
        )


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """How many ids all of the sequences begin with."""
    shortest = min(map(len, sequences))
    first = sequences[0][:shortest]
    differs = np.zeros(shortest, dtype=bool)
    for sequence in sequences[1:]:
        differs |= sequence[:shortest] != first
    return int(differs.argmax()) if differs.any() else shortest
