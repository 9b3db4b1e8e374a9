"""What tests of the engine and of what is built on it share: small models, and whole forwards, one
a token, to compare with."""

import random
from itertools import pairwise

import torch

from gptfast.engine.sampling import Sampling, sample
from gptfast.model import GPT, GPTConfig
from gptfast.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
BOS, _, _, _, STOP, PY, PY_END, OUT, OUT_END = (TOKENIZER.special_id(n) for n in SPECIAL_TOKENS)
CONFIG = GPTConfig(
    sequence_len=48, vocab_size=265, n_layer=3, n_head=4, n_kv_head=4, n_embd=32, rope_base=100.0
)
# A script for scripted_model: it asks the calculator.
CALL = (BOS, PY, *b"6*7", PY_END, ord("x"))
PROMPTS = [[BOS, 7], [BOS, *b"a longer prompt, of thirty"], [BOS], [BOS, *b"middle"], [9, 8, 7]]


def random_model(kv_heads: int = 4, **choices: str) -> GPT:
    """No weight is zero; attention weights are far from uniform, so positions matter."""
    model = GPT(GPTConfig(**{**CONFIG.to_dict(), "n_kv_head": kv_heads}), **choices)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model


def tool_model() -> GPT:
    """A random model that often starts and ends an expression."""
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[[PY, PY_END]] *= 8
    return model


def length_if_even(expression: str) -> str | None:
    return None if len(expression) % 2 else str(len(expression))


def scripted_model(*tokens: int) -> GPT:
    """After each token always the one that follows it here; blocks add nothing."""
    model = GPT(GPTConfig(**{**CONFIG.to_dict(), "n_head": 2, "n_kv_head": 2}))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.transformer["wte"].weight.zero_()
        for i, (token, after) in enumerate(pairwise(tokens)):
            model.transformer["wte"].weight[token, i] = 1.0
            model.lm_head.weight[after, i] = 10.0
    return model


@torch.no_grad()
def plain(model, prompt, max_tokens, *, sampling=None, seed=0, tool=None, stop=()):
    """(sequence, mask) by whole forwards, the tool's protocol spelled out once more."""
    sampling = sampling or Sampling(temperature=0)
    uniforms = random.Random(seed)
    ids, mask, forced, expression = list(prompt), [0] * len(prompt), [], None
    for _ in range(max_tokens):
        u = uniforms.random()
        if forced:
            ids.append(forced.pop(0))
            mask.append(0)
            continue
        token = int(sample(model(torch.tensor([ids]))[:, -1], [sampling], [u]))
        if token in stop:
            break
        ids.append(token)
        mask.append(1)
        if tool and token == PY:
            expression = []
        elif token == PY_END and expression is not None:
            result = tool(TOKENIZER.decode(expression))
            expression = None
            if result is not None:
                forced = [OUT, *result.encode(), OUT_END]
        elif expression is not None:
            expression.append(token)
    return ids, mask
