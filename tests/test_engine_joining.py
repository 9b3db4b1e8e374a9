"""Requests that join and leave a generation while it runs, each sampled in a way of its own."""

import random
from collections import defaultdict
from functools import partial

import pytest
import torch

from gptfast.engine import PATIENCE, Engine
from gptfast.engine.generation import Generation, Request, Workspace
from gptfast.engine.graphs import Captured, GraphedPrefill
from gptfast.engine.sampling import Sampling, sample
from tests.engine_cases import (
    BOS,
    CALL,
    OUT,
    OUT_END,
    PROMPTS,
    STOP,
    TOKENIZER,
    length_if_even,
    plain,
    random_model,
    scripted_model,
    tool_model,
)

SAMPLINGS = [
    Sampling(0),
    Sampling(1.3),
    Sampling(0.8, top_k=50),
    Sampling(1.5, top_p=0.9),
    Sampling(2.0, top_k=3, top_p=0.7),
]


def request(prompt=(BOS,), max_tokens=20, sampling=SAMPLINGS[0], seed=0, stop=(), tool=None):
    return Request(prompt, max_tokens, sampling, seed, frozenset(stop), tool)


def opened(model=None, *, slots=4, length=80, as_on_gpu=False) -> Generation:
    """as_on_gpu: steps of all rows over a round length, read while the next is on its way, and
    prefills of shapes that were captured."""
    engine = Engine(model or random_model(), TOKENIZER)
    if as_on_gpu:
        cached = engine.model
        cache = cached.new_cache(slots, length)
        engine.lag, engine.patience = 1, PATIENCE
        prefill = GraphedPrefill(cached, cache, capture=repeated)
        step = partial(cached.step, cache)
        engine._idle = Workspace(
            cached, cache, prefill, step, prefill.capture, read_chunk=16, all_rows=True
        )
    return engine.open(slots, length)


def repeated(step, pool) -> Captured:
    """As a graph does it: the same call on the same tensors, into the same results."""
    results = step()

    def replay() -> None:
        for kept, new in zip(results, step(), strict=True):
            kept.copy_(new)

    return Captured(replay, results)


def finish(generation: Generation, tokens: dict[int, list[int]]) -> None:
    while generation.busy:
        for token in generation.step():
            tokens[token.sequence].append(token.id)


def test_a_row_is_drawn_as_if_it_were_alone():
    """Whatever the other rows want: the same token, and so the same whole sequence."""
    # Many are equal, as a trained model's are in bf16.
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).mul(8).round() / 8
    chosen = [SAMPLINGS[i % len(SAMPLINGS)] for i in range(64)]
    uniforms = [random.Random(i).random() for i in range(64)]
    together = sample(logits, chosen, uniforms).tolist()
    alone = [
        int(sample(logits[i : i + 1], chosen[i : i + 1], uniforms[i : i + 1])) for i in range(64)
    ]
    assert together == alone


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_whoever_joins_or_leaves_changes_nothing_for_the_others(as_on_gpu):
    """Forty requests come at random times into four slots, a third are cancelled on the way; each
    of the others gets what the plain sampler draws, and nobody gets more than was asked for."""
    model, rng = tool_model(), random.Random(int(as_on_gpu))
    wanted = [
        request(
            PROMPTS[i % len(PROMPTS)],
            rng.randint(1, 30),
            SAMPLINGS[i % len(SAMPLINGS)],
            seed=i,
            stop=(BOS, STOP),
            tool=length_if_even if i % 2 else None,
        )
        for i in range(40)
    ]
    generation, tokens, rows = opened(model, as_on_gpu=as_on_gpu), defaultdict(list), {}
    cancelled = {i: rng.randint(0, 12) for i in range(40) if i % 3 == 0}
    coming = list(range(40))
    while coming or generation.busy:
        while coming and rng.random() < 0.3:
            i = coming.pop(0)
            rows[i] = generation.add(i, wanted[i])
        for i, row in rows.items():
            if len(tokens[i]) >= cancelled.get(i, 99):
                generation.cancel(row)
                del cancelled[i]
        for token in generation.step():
            tokens[token.sequence].append(token.id)
    for i, one in enumerate(wanted):
        options = {"sampling": one.sampling, "seed": i, "tool": one.tool, "stop": one.stop}
        ids, _ = plain(model, one.prompt, one.max_tokens, **options)
        want = ids[len(one.prompt) :]
        if i % 3 == 0:
            assert tokens[i][: len(want)] == want[: len(tokens[i])]
        else:
            assert tokens[i][: len(want)] == want
            assert rows[i].stopped == (tokens[i][-1] in one.stop)
    assert all(row.done for row in rows.values())


def test_a_cancelled_row_frees_its_slot_at_once():
    generation, tokens = opened(slots=1), defaultdict(list)
    first = generation.add(0, request(max_tokens=60))
    for _ in range(3):
        generation.step()
    second = generation.add(1, request([7, 8, 9], 4))
    third = generation.add(2, request([5], 4))
    generation.cancel(third)
    generation.step()
    assert second.slot == -1, "the only slot is taken"
    generation.cancel(first)
    for token in generation.step():
        tokens[token.sequence].append(token.id)
    assert second.slot == 0
    finish(generation, tokens)
    assert tokens == {1: plain(random_model(), [7, 8, 9], 4)[0][3:]}


def test_those_who_come_wait_for_some_steps_and_then_go_in_together():
    """So that those who have a slot get their tokens; but a first one does not wait."""
    generation, firsts = opened(slots=8, length=200), {}
    generation.patience = 16
    generation.add(0, request(max_tokens=150))
    for step in range(1, 60):
        if step in (2, 5, 9):
            generation.add(step, request(max_tokens=150))
        for token in generation.step():
            firsts.setdefault(token.sequence, step)
    together = 2 + generation.patience
    assert firsts == {0: 1, 2: together, 5: together, 9: together}


def test_the_end_of_a_request_is_known():
    model = scripted_model(*CALL, STOP)
    generation = opened(model)
    one, other = (
        generation.add(i, request([BOS], n, stop=[STOP], tool=lambda _: "42"))
        for i, n in enumerate((30, 6))
    )
    tokens = defaultdict(list)
    finish(generation, tokens)
    assert (one.done, one.stopped) == (True, False)
    assert (other.done, other.stopped) == (True, False)
    assert tokens[1] == [*CALL[1:-1], OUT]
    assert tokens[0][:9] == [*CALL[1:-1], OUT, *b"42", OUT_END]
    scripted = opened(scripted_model(BOS, 65, STOP))
    row = scripted.add(0, request([BOS], 30, stop=[STOP]))
    finish(scripted, tokens)
    assert (row.done, row.stopped) == (True, True)


@pytest.mark.parametrize(("count", "longest"), [(1, 3), (3, 64), (3, 65), (4, 70), (2, 79)])
def test_a_prefill_of_captured_shapes_is_the_prefill_itself(count, longest):
    """Padded with rows and tokens, or too large for what was captured (64 tokens in 80)."""
    model = random_model()
    generations = [opened(model, as_on_gpu=as_on_gpu) for as_on_gpu in (True, False)]
    generations[0].warm_up()
    rng = random.Random(count)
    prompts = [[rng.randrange(256) for _ in range(longest - i)] for i in range(count)]
    found = []
    for generation in generations:
        tokens: dict[int, list[int]] = defaultdict(list)
        for number, prompt in enumerate(prompts):
            generation.add(number, request(prompt, max_tokens=1))
        finish(generation, tokens)
        found.append(tokens)
    assert found[0] == found[1]
    k, other = (generation.cache.k[:, :count] for generation in generations)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(k[:, row, : len(prompt)], other[:, row, : len(prompt)])


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_warming_up_leaves_nothing_behind(as_on_gpu):
    generation, tokens = opened(as_on_gpu=as_on_gpu), defaultdict(list)
    generation.warm_up()
    assert not generation.busy
    for i, prompt in enumerate(PROMPTS):
        generation.add(i, request(prompt))
    finish(generation, tokens)
    model = random_model()
    assert [tokens[i] for i in range(5)] == [plain(model, p, 20)[0][len(p) :] for p in PROMPTS]


def test_what_the_cache_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="81 positions, but the cache holds 80"):
        opened().add(0, request([1, 2], 79))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_joining_on_a_gpu(compiled):
    """Mixed samplings, late comers and cancelled rows: the plain sampler's tokens, in fp32."""
    cpu, model = random_model(), random_model(kernels="triton").cuda()
    generation = Engine(model, TOKENIZER, compiled=compiled).open(4, 128)
    generation.warm_up()
    tokens, rows = defaultdict(list), []
    for i in range(12):
        one = request(PROMPTS[i % 5], 40, SAMPLINGS[i % len(SAMPLINGS)], seed=i)
        rows.append(generation.add(i, one))
        for token in generation.step():
            tokens[token.sequence].append(token.id)
    generation.cancel(rows[1])
    finish(generation, tokens)
    for i in (0, *range(2, 12)):
        want, _ = plain(cpu, PROMPTS[i % 5], 40, sampling=SAMPLINGS[i % len(SAMPLINGS)], seed=i)
        assert tokens[i] == want[len(PROMPTS[i % 5]) :]
