"""Reinforcement learning: the objective against plain mathematics, rollouts, pass@k."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from gptfast import parallel
from gptfast.config import RunSettings
from gptfast.conversation import render_for_completion
from gptfast.engine import Engine
from gptfast.errors import UserError
from gptfast.evaluate.generative import Answering
from gptfast.model import GPT, GPTConfig
from gptfast.rl.config import (
    AnswerSettings,
    QuestionSettings,
    RLSettings,
    passes_of_step,
    scratch_model,
)
from gptfast.rl.evaluation import RLEvaluation, pass_at_k
from gptfast.rl.grpo import Rollout, advantages, make_batches, rewards_and_tokens, token_weights
from gptfast.rl.loader import length_multiple
from gptfast.rl.rollouts import Actor, generator_bytes, longest_rollout, roll_out
from gptfast.tasks.toy import Toy
from tests.scripted import scripted_model
from tests.tuning_cases import BYTES, CONFIG


def test_advantages_and_weights_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    tokens = np.array([[2, 4, 1, 3], [5, 5, 0, 0]])
    gains = [[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75]]
    assert advantages(rewards).tolist() == gains
    # Four examples on two processes, groups of two: eight groups, of 6, 4, 10 and 0 tokens here.
    weights = token_weights(rewards, tokens, together=2, examples=4)
    want = [0.5 / 48, -0.5 / 48, -0.5 / 32, 0.5 / 32, -0.25 / 80, -0.25 / 80, -0.25 / 8, 0.75 / 8]
    assert weights.ravel().tolist() == pytest.approx(want)


def filled_model(seed: int = 0) -> GPT:
    """A plain model with no zero-initialised weight left."""
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model


def random_rollouts(examples: int, samples: int) -> list[Rollout]:
    """Of odd lengths; one token in five was not chosen by the model, nor was any of the prompt."""
    draw = np.random.default_rng(0)
    rollouts = []
    for example, sample in itertools.product(range(examples), range(samples)):
        prompt, answer = draw.integers(1, 9), draw.integers(1, 12)
        ids = draw.integers(0, 256, prompt + answer).tolist()
        chosen = [False] * prompt + [True, *(draw.random(answer - 1) < 0.8).tolist()]
        rollouts.append(Rollout(example, sample, ids, chosen, "", float(draw.random())))
    return rollouts


def plain_objective(model: GPT, rollouts: list[Rollout], samples: int, batch: int) -> torch.Tensor:
    """The reference's loop as PIPELINE 1.13 describes it: example by example, pass by pass."""
    examples = [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]
    passes = samples // batch
    loss = torch.zeros(())
    for example in examples:
        mean = sum(rollout.reward for rollout in example) / samples
        for first in range(0, samples, batch):
            objective, valid = torch.zeros(()), 0
            for rollout in example[first : first + batch]:
                logp = model(torch.tensor([rollout.ids]))[0].log_softmax(-1)
                for position in range(1, len(rollout.ids)):
                    if rollout.chosen[position]:
                        token = rollout.ids[position]
                        objective = objective + logp[position - 1, token] * (rollout.reward - mean)
                        valid += 1
            loss = loss - objective / (valid * passes * len(examples))
    return loss


@pytest.mark.parametrize(("batch_size", "multiple"), [(2, 1), (5, 4), (24, 16)])
def test_the_gradient_is_the_plain_objective_s(batch_size, multiple):
    """However answers are batched and padded; the loop's division by the tokens included."""
    rollouts = random_rollouts(3, 8)
    model = filled_model()
    want_loss = plain_objective(model, rollouts, samples=8, batch=4)
    want_loss.backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    rewards, tokens = rewards_and_tokens(rollouts, 8)
    weights = token_weights(rewards, tokens, together=4, examples=3) * tokens.sum()
    batches = make_batches(
        rollouts, weights.ravel().tolist(), batch_size=batch_size, multiple=multiple, device="cpu"
    )
    assert len(batches) == -(-24 // batch_size)
    assert all(batch.inputs.shape[1] % multiple == 0 for batch in batches)
    assert len({len(batch.inputs) for batch in batches}) == 1
    loss, supervised = 0.0, 0
    for batch in batches:
        part = model(batch.inputs, batch.targets, weights=batch.weights)
        part.backward()
        loss, supervised = loss + part.item(), supervised + int((batch.targets >= 0).sum())
    assert supervised == tokens.sum()
    assert loss / supervised == pytest.approx(want_loss.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        scale = float(want[name].abs().max())
        got = parameter.grad / supervised
        torch.testing.assert_close(got, want[name], atol=1e-5 * scale, rtol=1e-3, msg=name)


TWELVE = AnswerSettings(num_samples=3, normalise_together=3, max_new_tokens=12, top_k=0)


class Asking(Toy):
    """Worth: the length of the answer."""

    def reward(self, conversation: dict, answer: str) -> float:
        return float(len(answer))


def calling_model() -> GPT:
    """Often calls the calculator, and ends its answers."""
    model = filled_model()
    names = ("python_start", "python_end", "assistant_end")
    with torch.no_grad():
        model.lm_head.weight[[BYTES.special_id(f"<|{name}|>") for name in names]] *= 6
    return model


def test_rollouts_are_what_the_engine_says_and_the_task_thinks_of_it():
    engine, task = Engine(calling_model(), BYTES), Asking(split="train")
    rollouts = roll_out(engine, task, [4, 30], TWELVE, step=0, seed=1)
    assert [(r.example, r.sample) for r in rollouts] == list(itertools.product([4, 30], range(3)))
    stop = BYTES.special_id("<|assistant_end|>")
    assert any(r.ids[-1] == stop for r in rollouts)
    for rollout in rollouts:
        prompt = render_for_completion(BYTES, task[rollout.example])
        answer, chosen = rollout.ids[len(prompt) :], rollout.chosen[len(prompt) :]
        assert rollout.ids[: len(prompt)] == prompt
        assert not any(rollout.chosen[: len(prompt)])
        assert 1 <= len(answer) <= 12
        # The end of an answer was chosen too, but is no part of what it says.
        said = answer[:-1] if answer[-1] == stop else answer
        assert chosen[0]
        assert chosen[-1] or answer[-1] != stop
        assert rollout.text == BYTES.decode(said)
        assert rollout.reward == len(rollout.text)


def test_what_the_calculator_puts_in_is_not_learned():
    names = ("assistant_start", "python_start", "python_end", "output_start", "output_end")
    start, call, called, says, said = (BYTES.special_id(f"<|{name}|>") for name in names)
    end = BYTES.special_id("<|assistant_end|>")
    script = (start, *b"so ", call, *b"6*7", called), (said, *b".", end)
    engine = Engine(scripted_model(CONFIG, *script), BYTES)
    answers = replace(TWELVE, temperature=0.0, num_samples=1, normalise_together=1)
    answers = replace(answers, max_new_tokens=20)
    (rollout,) = roll_out(engine, Asking(split="train"), [4], answers, step=0, seed=1)
    told = [*b"so ", call, *b"6*7", called, says, *b"42", said, *b".", end]
    chosen = [True] * 8 + [False] * 4 + [True] * 2
    assert rollout.ids[-14:] == told
    assert rollout.chosen[-14:] == chosen
    (batch,) = make_batches([rollout], [0.5], batch_size=1, multiple=8, device="cpu")
    supervised = batch.targets[0] >= 0
    assert batch.targets[0][supervised].tolist() == [t for t, c in zip(told, chosen) if c]
    assert batch.weights[0].tolist() == (0.5 * supervised).tolist()


def test_a_rollout_depends_on_no_other():
    engine, task = Engine(calling_model(), BYTES), Asking(split="train")
    together = roll_out(engine, task, [3, 8, 21, 40], TWELVE, step=5, seed=1)
    few_slots = Engine(calling_model(), BYTES, max_rows=2)
    apart = [
        rollout
        for example in (3, 8, 21, 40)
        for rollout in roll_out(few_slots, task, [example], TWELVE, step=5, seed=1)
    ]
    assert together == apart
    # Each sample has a first token of its own; another step, or seed, other answers.
    first = [rollout.ids[rollout.chosen.index(True)] for rollout in together]
    assert len(set(first)) > 8
    for other in ({"step": 6, "seed": 1}, {"step": 5, "seed": 2}):
        assert roll_out(engine, task, [3], TWELVE, **other) != together[:3]


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_engine_answers_with_the_trainer_s_weights(place):
    """Through shards into the same memory, which the engine's compiled code and graphs read."""
    kernels = "reference" if place == "cpu" else "triton"
    with parallel.start(cpu=place == "cpu") as world:
        model = parallel.build_sharded(
            lambda: GPT(CONFIG),
            world,
            compute_dtype=torch.float32,
            reshard_after_forward=False,
            compile_blocks=False,
            seed=3,
        )
        actor = Actor(
            model,
            BYTES,
            make_gpt=lambda: GPT(CONFIG, kernels=kernels),
            dtype=torch.float32,
            device=world.device,
            max_rows=4,
        )
        places = []
        for seed in (1, 2):
            plain = filled_model(seed)
            with torch.no_grad():
                for theirs, ours in zip(model.parameters(), plain.parameters(), strict=True):
                    theirs.to_local().copy_(ours)
            engine = actor.engine()
            options = {"max_tokens": 20, "temperature": 0, "stop": ()}
            want = Engine(plain, BYTES).generate_batch([[1, 2, 3]], **options)
            assert engine.generate_batch([[1, 2, 3]], **options) == want
            read = [*engine.model.model.parameters(), *itertools.chain(*engine.model.weights)]
            places.append([tensor.data_ptr() for tensor in read])
        assert places[0] == places[1]


def test_what_stays_reserved_to_answer_is_known_before():
    """Of a model on CPU, and of the report's d20 with 256 rows of 512 positions."""
    config = replace(CONFIG, n_kv_head=1)
    engine = Engine(GPT(config), BYTES, max_rows=4)
    weights, cache = engine.model, engine.model.new_cache(4, 128)
    kept = [*weights.model.parameters(), *(each.qkv for each in weights.weights), cache.k, cache.v]
    taken = sum(tensor.nbytes for tensor in kept)
    assert generator_bytes(config, torch.float32, rows=4, longest=100) == taken
    d20 = GPTConfig.from_depth(20, vocab_size=65536)
    gib = generator_bytes(d20, torch.bfloat16, rows=256, longest=500) / 2**30
    assert gib == pytest.approx(1.04 + 0.18 + 12.5, abs=0.01)


def test_pass_at_k_by_counting_all_choices():
    n, right = 5, [0, 1, 3, 5]
    for k in range(1, n + 1):
        shares = []
        for c in right:
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            shares.append(sum(map(any, choices)) / len(choices))
        assert pass_at_k(right, n, k) == pytest.approx(sum(shares) / len(shares))
    assert pass_at_k([0, 0], 8, 8) == 0
    assert pass_at_k([8], 8, 1) == 1


def test_evaluation_shares_questions_and_counts_right_answers():
    class Scripted:
        def engine(self) -> Engine:
            return Engine(calling_model(), BYTES)

    class Short(Toy):
        def evaluate(self, conversation: dict, answer: str) -> bool:
            return len(answer) < 4

    answering = Answering(max_new_tokens=6, num_samples=4, temperature=1.0, top_k=None)
    with parallel.start(cpu=True) as world:
        found = RLEvaluation(Scripted(), Short(split="test")[:12], answering, world).pass_at_k(0)
        again = RLEvaluation(Scripted(), Short(split="test")[:12], answering, world).pass_at_k(9)
    assert list(found) == ["pass@1", "pass@2", "pass@3", "pass@4"]
    assert 0 < found["pass@1"] < found["pass@2"] < found["pass@3"] < found["pass@4"] <= 1
    assert found == again


def test_lengths_that_are_compiled_are_few():
    for longest in (20, 500, 4000):
        multiple = length_multiple(longest)
        assert multiple % 128 == 0
        assert -(-longest // multiple) <= 6
    assert length_multiple(500) == 128


def test_shapes_that_are_compiled_are_few_though_the_last_batch_is_not_full():
    """32 answers of a GPU, 5 in a batch; torch.compile refuses a ninth shape."""
    draw, shapes = random.Random(0), set()
    for top in range(40, 732, 20):
        lengths = [draw.randint(30, top) for _ in range(32)]
        rollouts = [Rollout(0, 0, [1] * n, [False] + [True] * (n - 1), "", 0.0) for n in lengths]
        batches = make_batches(
            rollouts, [1.0] * 32, batch_size=5, multiple=length_multiple(732), device="cpu"
        )
        shapes |= {tuple(batch.inputs.shape) for batch in batches}
        # The rows that no answer is left for change nothing.
        assert sum(int((batch.targets >= 0).sum()) for batch in batches) == sum(lengths) - 32
        assert not batches[-1].weights[-3:].any()
    assert shapes == {(5, length) for length in (128, 256, 384, 512, 640, 768)}


def test_what_cannot_be_is_refused_before_step_0(tmp_path):
    with pytest.raises(UserError, match="16 samples cannot be normalised 6 together; 2 would"):
        AnswerSettings(normalise_together=6)
    with pytest.raises(UserError, match="temperature must be 0"):
        AnswerSettings(temperature=-1)
    with pytest.raises(UserError, match="every step has another number of tokens"):
        RLSettings(run=RunSettings(profile_steps="20:23"))
    with pytest.raises(UserError, match="examples_per_step must be at least 1, got 0"):
        QuestionSettings(examples_per_step=0)
    with pytest.raises(UserError, match=r"16 examples a step cannot be shared by 3 .* is 18"):
        passes_of_step(RLSettings(), world_size=3)
    with pytest.raises(UserError, match=r"longest question has 17 tokens.* of 18; 1 fit"):
        longest_rollout(Toy(split="train"), BYTES, max_new_tokens=4, context=18)
    config, tokenizer = scratch_model()
    assert config.vocab_size == tokenizer.vocab_size == 265
    assert 0 < longest_rollout(Toy(split="train"), tokenizer, 4, context=640) < 64
