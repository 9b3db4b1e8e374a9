"""How fast are the chat tasks evaluated, with d20 in bf16?

    pytest bench/test_chat_evaluation.py

As many questions as ARC-Easy's test has, of about its lengths, answered with letters; and as many
answers as GSM8K's has, greedily, none of which ends before its 512 tokens, as a model with random
weights does not stop: a model that was taught to stop takes less. Everything counts, from reading a
question to judging its answer, but what happens once: the first round compiles.
"""

import random
import time
from collections.abc import Callable
from itertools import product

import pytest
import torch

from gptfast.conversation import Conversation, render_for_completion
from gptfast.engine import Engine
from gptfast.evaluate.categorical import answer_with_letters
from gptfast.evaluate.chat import ANSWER_ROWS
from gptfast.evaluate.generative import Answering, answer_in_words
from gptfast.evaluate.loading import Placement, random_model
from gptfast.model import GPT, GPTConfig
from gptfast.tasks import Task, render_mc
from gptfast.tokenizer import SPECIAL_TOKENS, Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CONFIG = GPTConfig.from_depth(20, vocab_size=65536)
ROUNDS = 3
# Seconds on one H200.
LETTERS_MARK, WORDS_MARK = 3.0, 25.0
WORDS = ("river", "stone", "cloud", "seven", "lantern", "green", "under", "house", "maple", "song")


class Questions(Task):
    eval_type = "categorical"

    def conversation(self, index: int) -> Conversation:
        rng = random.Random(index)
        question = " ".join(rng.choices(WORDS, k=rng.randint(5, 50)))
        choices = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(4)]
        messages = [
            {"role": "user", "content": render_mc(question, list("ABCD"), choices)},
            {"role": "assistant", "content": rng.choice("ABCD")},
        ]
        return {"messages": messages, "letters": list("ABCD")}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]


class Problems(Questions):
    eval_type = "generative"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Knows the questions' words; the rest of its tokens are there for their number."""
    text = "\n".join(each["messages"][0]["content"] for each in Questions(200))
    tokens = Tokenizer.train([text], 320).tokens
    known = set(tokens)
    others = (bytes(each) for n in (2, 3) for each in product(range(256), repeat=n))
    while len(tokens) < CONFIG.vocab_size - len(SPECIAL_TOKENS):
        if (token := next(others)) not in known:
            tokens.append(token)
    return Tokenizer({token: rank for rank, token in enumerate(tokens)})


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG, Placement(torch.device("cuda")))


def report(
    request, capsys, name: str, mark: float, tokens: int, evaluate: Callable[[], object]
) -> None:
    evaluate()
    seconds: list[float] = []

    def timed() -> None:
        begin = time.perf_counter()
        evaluate()
        seconds.append(time.perf_counter() - begin)

    benchmark = request.getfixturevalue("benchmark")
    benchmark.pedantic(timed, rounds=ROUNDS, iterations=1)
    median = sorted(seconds)[ROUNDS // 2]
    benchmark.extra_info.update(seconds=median, tokens_per_s=tokens / median)
    verdict = "met" if median <= mark else "NOT MET"
    line = f"{name}: {median:.2f} s, {tokens / median:,.0f} tokens/s; {mark:g} s is {verdict}"
    with capsys.disabled():
        print(f"\n{line}")


def test_letters(request, capsys, model, tokenizer):
    task = Questions(2376)
    tokens = sum(len(render_for_completion(tokenizer, each)) for each in task)
    report(
        request,
        capsys,
        f"{len(task)} questions of {tokens / len(task):.0f} tokens",
        LETTERS_MARK,
        tokens,
        lambda: answer_with_letters(model, tokenizer, task, range(len(task))),
    )


def test_words(request, capsys, model, tokenizer):
    task, answering = Problems(1319), Answering()
    engine = Engine(model, tokenizer, max_rows=ANSWER_ROWS)
    report(
        request,
        capsys,
        f"{len(task)} answers of up to {answering.max_new_tokens} tokens",
        WORDS_MARK,
        len(task) * answering.max_new_tokens,
        lambda: answer_in_words(engine, task, range(len(task)), answering),
    )
