"""A model that says what it is told to, for tests of what is done with its words."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from gptfast.model import GPT, GPTConfig
from gptfast.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
BOS, USER, USER_END, START, END, PY, PY_END, OUT, OUT_END = (
    TOKENIZER.special_id(name) for name in SPECIAL_TOKENS
)
CONFIG = GPTConfig(sequence_len=16, vocab_size=265, n_layer=1, n_head=2, n_kv_head=2, n_embd=64)
# It never ends by itself.
ENDLESS = (START, *b"abc", *b"a")


def scripted_model(config: GPTConfig, *paths: Sequence[int]) -> GPT:
    """After each token always the one that follows it in the paths (n_embd has room for so many
    pairs); blocks add nothing."""
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    pairs = [pair for path in paths for pair in pairwise(path)]
    with torch.no_grad():
        model.transformer["wte"].weight.zero_()
        for i, (token, after) in enumerate(pairs):
            model.transformer["wte"].weight[token, i] = 1.0
            model.lm_head.weight[after, i] = 10.0
    return model
