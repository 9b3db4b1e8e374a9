"""What the tests of the chat tasks share: small tasks, a model, a naive evaluation."""

import random

import numpy as np
import torch

from gptfast.conversation import Conversation, render_for_completion
from gptfast.model import GPT, generate
from gptfast.tasks import Task, render_mc
from gptfast.tokenizer import Tokenizer

WORDS = ("river", "stone", "cloud", "seven", "lantern", "green", "under", "house", "maple", "song")


class Letters(Task):
    """Multiple choice, of two to five letters, some of them digits; short and long questions."""

    eval_type = "categorical"
    baseline = 0.25

    def conversation(self, index: int) -> Conversation:
        rng = random.Random(index)
        letters = list(rng.choice(["ABCD", "ABCDE", "123", "AB"]))
        question = " ".join(rng.choices(WORDS, k=rng.choice([2, 5, 9, 40])))
        prompt = render_mc(question, letters, rng.choices(WORDS, k=len(letters)))
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": rng.choice(letters)},
        ]
        return {"messages": messages, "letters": letters}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        assert answer in conversation["letters"]
        return answer == conversation["messages"][-1]["content"]


class Words(Task):
    """Answered with a text that is right where a number drawn for its problem allows."""

    eval_type = "generative"

    def conversation(self, index: int) -> Conversation:
        rng = random.Random(index)
        question = " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 12])))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}]
        return {"messages": messages, "number": index}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return sum(answer.encode()) % 3 == conversation["number"] % 3


def make_tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS) * 5 + render_mc("why", "ABCDE", WORDS[:5])], 300)


@torch.no_grad()
def naive_letters(model: GPT, tokenizer: Tokenizer, task: Task) -> np.ndarray:
    """(problems, 2): correct and margin, each prompt alone, all of its logits."""
    rows = []
    for conversation in task:
        ids = render_for_completion(tokenizer, conversation)[-len(model.cos) :]
        logits = model(torch.tensor([ids]))[0, -1]
        scores = [float(logits[tokenizer.encode(each)[0]]) for each in conversation["letters"]]
        right = conversation["letters"].index(conversation["messages"][1]["content"])
        others = [score for i, score in enumerate(scores) if i != right]
        rows.append((scores.index(max(scores)) == right, scores[right] - max(others)))
    return np.array(rows)


def naive_words(model: GPT, tokenizer: Tokenizer, task: Task, max_tokens: int) -> list[bool]:
    """Correct or not, greedily, a whole forward a token."""
    stop = {tokenizer.bos_id, tokenizer.special_id("<|assistant_end|>")}
    correct = []
    for conversation in task:
        prompt = render_for_completion(tokenizer, conversation)
        said = generate(model, prompt, max_tokens)[len(prompt) :]
        end = next((i for i, id_ in enumerate(said) if id_ in stop), len(said))
        correct.append(task.evaluate(conversation, tokenizer.decode(said[:end])))
    return correct
