"""The engine against whole forwards, one a token: greedy and drawn, batched, chunked, and tools."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gptfast.engine import Engine, TextStream
from gptfast.engine.cached_model import CachedGPT, cached_attention, fused_attention
from gptfast.engine.graphs import GraphedDecode, GraphedPrefill
from gptfast.engine.kv_cache import KVCache, bytes_per_position
from gptfast.engine.sampling import Sampling, sample
from gptfast.errors import UserError
from gptfast.model import GPT, GPTConfig, generate
from tests.engine_cases import (
    BOS,
    CALL,
    CONFIG,
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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("prefill_tokens", [16384, 40, 7])
def test_greedy_equals_the_plain_sampler(kv_heads, prefill_tokens):
    model = random_model(kv_heads)
    engine = Engine(model, TOKENIZER)
    engine.prefill_tokens = prefill_tokens
    sequences, masks = engine.generate_batch(
        PROMPTS, max_tokens=20, temperature=0, stop=(), tool=None
    )
    assert sequences == [generate(model, prompt, 20) for prompt in PROMPTS]
    assert masks == [[0] * len(prompt) + [1] * 20 for prompt in PROMPTS]
    assert len({tuple(s[-20:]) for s in sequences}) == len(PROMPTS)


def test_greedy_with_the_triton_kernels():
    prompts = [[BOS, 7], [BOS]]
    sequences, _ = Engine(random_model(kernels="triton"), TOKENIZER).generate_batch(
        prompts, max_tokens=3, temperature=0, stop=(), tool=None
    )
    assert sequences == [generate(random_model(), prompt, 3) for prompt in prompts]


DRAWN = Sampling(temperature=1.2, top_k=60, top_p=0.95)
SEEDS = range(160, 175)


@pytest.fixture(scope="module")
def drawn():
    """Three samples of every prompt, by the plain sampler: [(sequence, mask)]."""
    options = {"sampling": DRAWN, "tool": length_if_even, "stop": (BOS, STOP)}
    model = tool_model()
    want = [plain(model, PROMPTS[i // 3], 30, seed=s, **options) for i, s in enumerate(SEEDS)]
    # Worth comparing with: sequences end early, and tools answer.
    assert len({len(ids) for ids, _ in want}) > 4
    assert sum(OUT_END in ids for ids, _ in want) > 3
    return want


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("max_rows", [1, 4, 64])
def test_what_is_drawn_depends_on_the_seed_alone(drawn, lag, max_rows):
    """Not on the batch, on who waits for a slot, or on when the host reads."""
    engine = Engine(tool_model(), TOKENIZER, max_rows=max_rows)
    engine.lag = lag
    sequences, masks = engine.generate_batch(
        PROMPTS,
        num_samples=3,
        max_tokens=30,
        temperature=DRAWN.temperature,
        top_k=DRAWN.top_k,
        top_p=DRAWN.top_p,
        seeds=SEEDS,
        tool=length_if_even,
    )
    assert list(zip(sequences, masks)) == drawn


def test_every_sample_draws_its_own_first_token():
    engine = Engine(random_model(), TOKENIZER)
    sequences, _ = engine.generate_batch([[BOS]], num_samples=64, max_tokens=1, temperature=2.0)
    assert len({sequence[-1] for sequence in sequences if len(sequence) > 1}) > 20


def test_no_seeds_means_torchs():
    engine = Engine(random_model(), TOKENIZER)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(engine.generate_batch(PROMPTS, max_tokens=5))
    assert runs[0] == runs[1] != runs[2]


def test_a_larger_limit_only_appends():
    engine = Engine(random_model(), TOKENIZER)
    options = {"seeds": [3], "stop": ()}
    short, _ = engine.generate_batch([[BOS]], max_tokens=5, **options)
    long, _ = engine.generate_batch([[BOS]], max_tokens=25, **options)
    assert long[0][:6] == short[0]


def test_the_cache_serves_calls_of_any_size_one_after_the_other():
    """Grown and reused, full of what others left; and two open generations do not share it."""
    model = random_model()
    engine = Engine(model, TOKENIZER)
    options = {"temperature": 0, "stop": (), "tool": None}
    for prompts, max_tokens in ((PROMPTS[1:2], 4), (PROMPTS, 20), (PROMPTS[:2], 3), (PROMPTS, 9)):
        sequences, _ = engine.generate_batch(prompts, max_tokens=max_tokens, **options)
        assert sequences == [generate(model, prompt, max_tokens) for prompt in prompts]
    first, second = (engine.generate([p], max_tokens=8, **options) for p in PROMPTS[:2])
    ids = [[token.id for step in pair for token in step] for pair in zip(first, second)]
    assert list(map(list, zip(*ids))) == [generate(model, p, 8)[len(p) :] for p in PROMPTS[:2]]


def test_up_to_the_end_of_the_rotary_table():
    """10 x sequence_len, in several chunks; the plain sampler would crop, a forward does not."""
    model = random_model()
    context = 10 * CONFIG.sequence_len
    prompt = torch.randint(256, (context - 3,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(model, TOKENIZER)
    engine.prefill_tokens = 100
    sequences, _ = engine.generate_batch([prompt], max_tokens=3, temperature=0, stop=(), tool=None)
    assert sequences[0] == plain(model, prompt, 3)[0]
    with pytest.raises(UserError, match="480 positions: it leaves room for 3"):
        engine.generate_batch([prompt], max_tokens=4)


def test_weights_changed_in_place_are_seen():
    model = random_model()
    engine = Engine(model, TOKENIZER)
    options = {"max_tokens": 12, "temperature": 0, "stop": (), "tool": None}
    before, _ = engine.generate_batch(PROMPTS, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    after, _ = engine.generate_batch(PROMPTS, **options)
    assert before != after
    assert after == [generate(model, prompt, 12) for prompt in PROMPTS]


AFTER = (OUT_END, *b"yes", STOP)


@pytest.mark.parametrize("lag", [0, 1])
def test_the_calculators_answer_is_forced(lag):
    model = scripted_model(*CALL, STOP)
    other = scripted_model(*AFTER)
    with torch.no_grad():
        # Two scripts in one model, in columns of their own.
        for parameter, more in zip(model.parameters(), other.parameters(), strict=True):
            if parameter.shape[0] == CONFIG.vocab_size:
                parameter += more.roll(16, 1)
    engine = Engine(model, TOKENIZER)
    engine.lag = lag
    options = {"max_tokens": 20, "temperature": 0}
    sequences, masks = engine.generate_batch([[BOS]], **options)
    assert sequences == [[*CALL[:-1], OUT, *b"42", OUT_END, *b"yes"]]
    assert masks == [[0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]]
    # No answer, or no tool: the model goes on by itself.
    for tool in (None, lambda _: None):
        sequences, masks = engine.generate_batch([[BOS]], tool=tool, **options)
        assert (sequences, masks) == ([list(CALL)], [[0, 1, 1, 1, 1, 1, 1]])
    # The answer counts towards max_tokens, and may be cut by it.
    for n in range(1, 12):
        sequences, masks = engine.generate_batch([[BOS]], max_tokens=n, temperature=0)
        assert sequences == [[*CALL[:-1], OUT, *b"42", OUT_END, *b"yes"][: n + 1]]
        assert len(masks[0]) == n + 1


def test_stop_tokens_end_a_sequence_and_are_yielded_but_not_kept():
    engine = Engine(scripted_model(BOS, 65, 66, STOP, 67), TOKENIZER)
    steps = list(engine.generate([[BOS], [65, 66]], max_tokens=9, temperature=0))
    assert [tuple(token) for token in steps[0]] == [(0, 65, True), (1, STOP, True)]
    assert [[token.id for token in step] for step in steps] == [[65, STOP], [66], [STOP]]
    sequences, _ = engine.generate_batch([[BOS], [65, 66]], max_tokens=9, temperature=0)
    assert sequences == [[BOS, 65, 66], [65, 66]]
    sequences, _ = engine.generate_batch([[BOS]], max_tokens=9, temperature=0, stop=[66])
    assert sequences == [[BOS, 65]]


def test_streaming_never_splits_a_character():
    stream = TextStream(TOKENIZER)
    assert [stream.feed([id_]) for id_ in "a é€😀 b".encode()] == [
        *("a", " ", "", "é", "", "", "€", "", "", "", "😀", " ", "b")
    ]
    assert stream.close() == ""
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.close() == "\ufffd"


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()[None]


@pytest.mark.parametrize(
    ("sampling", "chances"),
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=99), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_k=1), [0, 1, 0, 0]),
        (Sampling(top_p=0.39), [0, 1, 0, 0]),
        (Sampling(top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
        # Of the two that top_k leaves, the first has 4/7.
        (Sampling(top_k=2, top_p=0.56), [0, 1, 0, 0]),
        (Sampling(temperature=1e-40), [0, 1, 0, 0]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
    ],
)
def test_chances(sampling, chances):
    """Equally spaced numbers in [0, 1) draw each token in its share, to one of them."""
    n = 10_000
    uniforms = [(i + 0.5) / n for i in range(n)]
    counts = sample(LOGITS.expand(n, -1), [sampling] * n, uniforms).bincount(minlength=4)
    assert (counts - n * torch.tensor(chances)).abs().max() <= 1.01


def test_extreme_numbers_draw_allowed_tokens():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)) * 5
    logits[:, ::3] = -torch.inf
    for u in (0.0, 1 - 2**-53):
        for sampling in (Sampling(), Sampling(top_k=5), Sampling(top_p=0.3)):
            tokens = sample(logits, [sampling] * 50, [u] * 50)
            assert logits.gather(1, tokens[:, None]).isfinite().all()
            if sampling.top_k:
                assert (logits.gather(1, tokens[:, None]) >= logits.topk(5)[0][:, 4:]).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_both_attentions_equal_plain_mathematics(kv_heads):
    q, k, v = torch.randn(3, 1, 4, 8), *torch.randn(2, 3, 10, kv_heads, 8)
    visible = torch.arange(10) <= torch.tensor([0, 4, 9])[:, None, None]
    keys, values = (x.repeat_interleave(4 // kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / 8**0.5
    weight = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    want = torch.einsum("bhts,bshd->bthd", weight, values)
    for function in (cached_attention, fused_attention):
        torch.testing.assert_close(function(q, k, v, visible), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_decoding_is_the_same_and_compiles_once_for_all_lengths(rows):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile = partial(torch.compile, fullgraph=True, dynamic=False, backend=counter)
    model = random_model(2)
    eager, compiled = CachedGPT(model), CachedGPT(model, compile=compile)
    prompts = torch.arange(20 * rows).view(rows, 20)
    for capacity, lengths in ((64, (32, 48, 64)), (40, (32, 40))):
        caches = [cached.new_cache(rows, capacity) for cached in (eager, compiled)]
        for cached, cache in zip((eager, compiled), caches):
            cached.prefill(cache, torch.arange(rows), prompts)
        for i, length in enumerate(lengths):
            ids, positions = torch.arange(rows), torch.tensor([20, 3, 11])[:rows] + i
            want, got = (
                cached.decode(cache, ids, positions, length)
                for cached, cache in zip((eager, compiled), caches)
            )
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(caches[1].k, caches[0].k)
    # The block and the head.
    assert counter.frame_count == 2


def test_a_shared_prefix_is_computed_once():
    """A prefix is prefilled, copied to other rows, and continued there by several tokens."""
    model = random_model(2)
    cached = CachedGPT(model)
    prefix, tails = torch.arange(10), torch.randint(256, (3, 6))
    cache = cached.new_cache(3, 16)
    cached.prefill(cache, torch.tensor([1]), prefix[None])
    cache.copy(1, torch.tensor([0, 2]), 10)
    ends = cached.prefill(cache, torch.arange(3), tails, start=10)
    logits = cached.head(*(x.flatten(0, 1) for x in ends)).view(3, 6, -1)
    with torch.no_grad():
        want = model(torch.cat((prefix.expand(3, -1), tails), 1))[:, 10:]
    torch.testing.assert_close(logits, want, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="17 positions, but the cache holds 16"):
        cached.prefill(cache, torch.arange(3), tails, start=11)


def test_cache_size_and_no_room_for_it(monkeypatch):
    config = GPTConfig.from_depth(20, vocab_size=65536)
    assert bytes_per_position(config, torch.bfloat16) == 102_400

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "zeros", no_memory)
    with pytest.raises(UserError, match=r"64 rows of 20480 positions, 125\.0 GiB: generate fewer"):
        KVCache(config, 64, 20480, dtype=torch.bfloat16, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[265]]}, "prompt 0 has ids outside of 0 to 264"),
        ({"prompts": [[1, -1]]}, "prompt 0 has ids outside of 0 to 264"),
        ({"max_tokens": 480}, "1 tokens, which with max_tokens 480 exceeds the context of 480"),
        ({"seeds": [1, 2]}, "2 seeds for 1 sequences"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1, or None"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(options, words):
    engine = Engine(random_model(), TOKENIZER)
    with pytest.raises(UserError, match=words):
        engine.generate(**{"prompts": [[1]], "max_tokens": 4, **options})


def test_engines_that_cannot_be():
    with pytest.raises(UserError, match="tokenizer has 265 tokens, the model 264"):
        Engine(GPT(GPTConfig(**{**CONFIG.to_dict(), "vocab_size": 264})), TOKENIZER)
    with pytest.raises(UserError, match="compiled decoding needs a CUDA GPU"):
        Engine(random_model(), TOKENIZER, compiled=True)
    with pytest.raises(UserError, match="max_rows must be at least 1"):
        Engine(random_model(), TOKENIZER, max_rows=0)
    assert list(Engine(random_model(), TOKENIZER).generate([], max_tokens=1)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_on_a_gpu(compiled, kv_heads):
    """fp32 and greedy: the plain sampler's tokens; drawn: what the CPU draws."""
    cpu, model = random_model(kv_heads), random_model(kv_heads, kernels="triton").cuda()
    engine = Engine(model, TOKENIZER, compiled=compiled, max_rows=4)
    options = {"stop": (), "tool": None}
    for max_tokens in (20, 150):
        sequences, _ = engine.generate_batch(
            PROMPTS, max_tokens=max_tokens, temperature=0, **options
        )
        assert sequences == [plain(cpu, prompt, max_tokens)[0] for prompt in PROMPTS]
    options |= {"max_tokens": 20, "num_samples": 2, "seeds": list(range(10))}
    drawn, on_cpu = (e.generate_batch(PROMPTS, **options) for e in (engine, Engine(cpu, TOKENIZER)))
    assert drawn == on_cpu


@pytest.mark.gpu
def test_graphs_repeat_the_step_they_captured():
    model = random_model().cuda()
    cached = CachedGPT(model, compile=partial(torch.compile, fullgraph=True, dynamic=False))
    cache = cached.new_cache(2, 256)
    decode = GraphedDecode(cached, cache)
    ids, sampled = torch.tensor([[3, 4], [0, 4]], device="cuda")
    for length in (128, 256, 128):
        for position in range(4):
            positions = torch.tensor([position, 0], device="cuda")
            want = cached.decode(cache, ids, positions, length)
            # The second token is the one sampled last.
            fed = torch.stack((torch.tensor([3, -1], device="cuda"), positions))
            logits, likeliest = decode(fed, sampled, length)
            torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
            assert torch.equal(likeliest, logits.argmax(-1))


@pytest.mark.gpu
def test_graphs_repeat_the_prefill_they_captured():
    cached = CachedGPT(random_model().cuda())
    caches = [cached.new_cache(4, 512) for _ in range(2)]
    prefill = GraphedPrefill(cached, caches[0])
    prefill.capture()
    for count, length in ((1, 5), (3, 64), (4, 65), (3, 300), (2, 448)):
        ids = torch.randint(256, (count, length), device="cuda")
        rows = torch.tensor([3, 1, 0, 2], device="cuda")[:count]
        want = cached.prefill(caches[1], rows, ids)
        for found, wanted in zip(prefill(rows, ids), want, strict=True):
            torch.testing.assert_close(found[:, :length], wanted, atol=1e-5, rtol=1e-5)
        for a, b in ((caches[0].k, caches[1].k), (caches[0].v, caches[1].v)):
            torch.testing.assert_close(a[:, rows, :length], b[:, rows, :length])
