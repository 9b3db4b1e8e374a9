"""Questions that are answered with a letter: one forward pass, and which letter is the likeliest.

What counts is the logit behind the prompt's last token, of each letter that the question has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptfast.conversation import Conversation, render_for_completion
from gptfast.errors import UserError
from gptfast.evaluate.forward import BATCH_TOKENS, attention, groups, logits, trunk
from gptfast.evaluate.outcomes import COLUMNS
from gptfast.model import GPT
from gptfast.tasks import Task
from gptfast.tokenizer import Tokenizer
from gptfast.transfer import upload

# Questions rendered at a time, while the device answers those before; enough that there are
# several of about one length.
_CHUNK = 2048


@dataclass(frozen=True)
class _Question:
    """ids: the prompt. letters: the token of each. cropped: whether the prompt lost its beginning
    to fit the context."""

    ids: list[int]
    letters: list[int]
    cropped: bool


@torch.no_grad()
def answer_with_letters(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    indices: Sequence[int],
    *,
    batch_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Outcomes (len(indices), 4) of these problems of a categorical task.

    The margin is by how much the right letter's logit leads all others; of equal ones the first
    letter is the answer.

    Args:
        model: plain; each rank has its own.
        batch_size: the most questions in one pass; however many, a pass has limited tokens.
        progress: called with numbers of questions that were answered.

    Raises:
        UserError: naming a letter that is not one token.
    """
    conversations = [task[index] for index in indices]
    questions: list[_Question] = []
    answers: list[tuple[list[int], dict[int, int], Tensor]] = []
    for start in range(0, len(conversations), _CHUNK):
        chunk = [
            _ask(tokenizer, conversation, context=len(model.cos))
            for conversation in conversations[start : start + _CHUNK]
        ]
        letters = sorted({letter for question in chunk for letter in question.letters})
        columns = {letter: column for column, letter in enumerate(letters)}
        head = model.lm_head.weight[upload(letters, model.cos.device)].float()
        sizes = [(len(question.ids),) for question in chunk]
        for group in groups(sizes, batch_tokens=BATCH_TOKENS, most=batch_size):
            behind = _behind_prompts(model, [chunk[i].ids for i in group], head)
            answers.append(([start + i for i in group], columns, behind))
        questions += chunk
    # Nothing before this waits for the device.
    outcomes = np.zeros((len(questions), COLUMNS))
    for numbers, columns, behind in answers:
        for number, found in zip(numbers, behind.tolist()):
            question, conversation = questions[number], conversations[number]
            scores = np.array([found[columns[letter]] for letter in question.letters])
            outcomes[number] = (1, *_judge(task, conversation, scores), question.cropped)
        if progress:
            progress(len(numbers))
    return outcomes


def _ask(tokenizer: Tokenizer, conversation: Conversation, *, context: int) -> _Question:
    letters = [_one_token(tokenizer, letter) for letter in conversation["letters"]]
    ids = render_for_completion(tokenizer, conversation)
    return _Question(ids[-context:], letters, len(ids) > context)


def _one_token(tokenizer: Tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise UserError(
            f"the letter {letter!r} is {len(ids)} tokens of this tokenizer; a question's letters "
            "must be one token each"
        )
    return ids[0]


def _behind_prompts(model: GPT, prompts: Sequence[list[int]], head: Tensor) -> Tensor:
    """fp32 logits (B, U) behind each of B prompts, for the head's rows (U, C)."""
    T = max(map(len, prompts))
    # Padding on the right changes nothing before it.
    ids = np.zeros((len(prompts), T), dtype=np.int64)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    last = [b * T + len(prompt) - 1 for b, prompt in enumerate(prompts)]
    device = model.cos.device
    ends = trunk(model, upload(ids, device), model.cos[:T], model.sin[:T], attention)
    at = upload(last, device)
    residual, branch = (x.flatten(0, 1)[at] for x in ends)
    return logits(model, residual, branch, head)


def _judge(task: Task, conversation: Conversation, scores: np.ndarray) -> tuple[bool, float]:
    """(correct, margin) from a score for each letter."""
    letters = conversation["letters"]
    correct = task.evaluate(conversation, letters[int(scores.argmax())])
    right = letters.index(conversation["messages"][-1]["content"])
    return correct, float(scores[right] - np.delete(scores, right).max(initial=-np.inf))
