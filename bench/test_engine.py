"""How fast does the engine generate, with d20 in bf16?

    pytest bench/test_engine.py

Time to first token: from the call until the host has it, the prompt's prefill and the second
token's launch included. Tokens a second: of all rows together, from the first to the last. The
limit is memory: a step reads every weight once, but of the embedding a row a token, and the keys
and values of all positions so far, at the bandwidth that a copy reaches here. Compilation and the
capture of graphs come before the clock.
"""

import time
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from bench.timing import Gpu
from gptfast.attention import choose_attention
from gptfast.engine import Engine
from gptfast.engine.kv_cache import bytes_per_position
from gptfast.model import GPT, GPTConfig, parameter_counts
from gptfast.tokenizer import SPECIAL_TOKENS, Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CONFIG = GPTConfig.from_depth(20, vocab_size=65536)
PROMPT, TOKENS, ROUNDS = 128, 257, 5
# Rows -> the share of the limit that is to be reached.
MARKS = {1: 0.40}


@dataclass(frozen=True)
class Run:
    first_ms: float
    tokens_per_s: float


def some_tokenizer(vocab_size: int) -> Tokenizer:
    """Of the right size, and else without meaning: all bytes, and pairs of them."""
    tokens = [bytes(t) for n in (1, 2) for t in product(range(256), repeat=n)]
    return Tokenizer({t: i for i, t in enumerate(tokens[: vocab_size - len(SPECIAL_TOKENS)])})


def limit(rows: int, bytes_per_s: float) -> float:
    """Tokens a second if nothing but memory counted."""
    counts = parameter_counts(CONFIG)
    weights = torch.bfloat16.itemsize * (counts["blocks"] + counts["head"])
    positions = PROMPT + TOKENS / 2
    cache = rows * positions * bytes_per_position(CONFIG, torch.bfloat16)
    return rows * bytes_per_s / (weights + cache)


@pytest.fixture(scope="module")
def engine():
    device = torch.device("cuda")
    backend = choose_attention("auto", device, torch.bfloat16, CONFIG.head_dim).backend
    with device:
        model = GPT(CONFIG, kernels="triton", attention_backend=backend)
        model.init_weights()
    # Parameters only, and none left zero: the rotary table stays fp32.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        parameter.data = parameter.data.bfloat16()
    return Engine(model, some_tokenizer(CONFIG.vocab_size))


@pytest.fixture(scope="module")
def bytes_per_s():
    return Gpu().ceilings().copy


def run(engine: Engine, rows: int) -> Run:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(65000, (rows, PROMPT), generator=generator).tolist()
    begin = time.perf_counter()
    steps = engine.generate(prompts, max_tokens=TOKENS, temperature=0, stop=(), tool=None)
    next(steps)
    first = time.perf_counter()
    tokens = sum(len(step) for step in steps)
    end = time.perf_counter()
    assert tokens == rows * (TOKENS - 1)
    return Run((first - begin) * 1e3, tokens / (end - first))


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_generation(request, capsys, engine, bytes_per_s, rows):
    benchmark = request.getfixturevalue("benchmark")
    runs: list[Run] = []
    benchmark.pedantic(
        lambda: runs.append(run(engine, rows)), rounds=ROUNDS, warmup_rounds=1, iterations=1
    )
    measured = sorted(runs[1:], key=lambda r: r.tokens_per_s)[ROUNDS // 2]
    first_ms = sorted(r.first_ms for r in runs[1:])[ROUNDS // 2]
    share = measured.tokens_per_s / limit(rows, bytes_per_s)
    benchmark.extra_info.update(
        first_token_ms=first_ms, tokens_per_s=measured.tokens_per_s, share_of_limit=share
    )
    line = (
        f"batch {rows}: first token {first_ms:.1f} ms, {measured.tokens_per_s:,.0f} tokens/s, "
        f"{share:.1%} of {limit(rows, bytes_per_s):,.0f} at {bytes_per_s / 1e12:.2f} TB/s"
    )
    if rows in MARKS:
        line += f"; {MARKS[rows]:.0%} is {'met' if share >= MARKS[rows] else 'NOT MET'}"
    with capsys.disabled():
        print(f"\n{line}")
