"""The toy task: what answers are worth, and that a model learns it from nothing but that."""

from dataclasses import replace

import pytest
import torch

from gptfast.conversation import render
from gptfast.rl.config import rl_preset
from gptfast.tasks.toy import Toy
from tests.tuning_cases import BYTES, plain_newton_schulz, rows, run_stage
from train import rl

__all__ = ["plain_newton_schulz"]


def test_questions():
    train, test = Toy(split="train"), Toy(split="test")
    assert (len(train), len(test)) == (1000, 200)
    assert train[7]["messages"] == [
        {"role": "user", "content": "Say 7"},
        {"role": "assistant", "content": "7"},
    ]
    # Every digit in every wording, the answer in the question.
    asked = {tuple(message["content"] for message in each["messages"]) for each in test}
    assert len(asked) == 50
    assert all(question.endswith(f" {digit}") for question, digit in asked)
    assert {digit for _, digit in asked} == set("0123456789")
    assert sum(render(BYTES, train[0]).mask) == 2


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("7", 1.0),
        ("7 ", 0.6),
        ("77", 0.6),
        ("3", 0.2),
        ("37", 0.2),
        ("", 0.0),
        ("x7", 0.0),
        ("٧", 0.0),
    ],
)
def test_what_answers_are_worth(answer, reward):
    task = Toy(split="train")
    assert task.reward(task[7], answer) == reward
    assert task.evaluate(task[7], answer) == (reward == 1.0)


@pytest.mark.usefixtures("plain_newton_schulz")
def test_the_reward_rises(tmp_path):
    """From a model that knows nothing, in 50 steps of the preset, a little smaller: above 0.28, the
    most that an answer which does not heed the question gets on average."""
    preset = rl_preset(on_gpu=False)
    settings = replace(
        preset,
        questions=replace(
            preset.questions, num_iterations=50, examples_per_step=10, eval_examples=10
        ),
        answers=replace(preset.answers, max_new_tokens=2),
        optim=replace(preset.optim, init_lr_frac=1.5, device_batch_size=160),
        run=replace(preset.run, out=tmp_path / "run", eval_every=0, save_every=0),
    )

    def train(settings, world, say) -> None:
        torch.set_num_threads(1)
        rl.train(settings, world, say)

    run_stage(train, settings)
    rewards = [row["reward"] for row in rows(tmp_path / "run", "step")]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-5:]) / 5
    assert first < 0.05
    assert last > 0.28
