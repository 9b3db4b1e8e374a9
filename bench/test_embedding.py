"""How fast is the embedding lookup, and the sum of its gradient over the tokens of each word?

    pytest bench/test_embedding.py

Bytes, in elements of 2: the lookup reads and writes a row a token (the rows of common words come
from L2, so it may exceed the ceiling). Backward reads the gradient of every token and writes that
of every word, absent ones too. Ids are not counted.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import DIRECTIONS, Case, Size, device, rand, with_both
from bench.providers import compiled
from bench.timing import Cost
from kernels.embedding import embedding, embedding_ref


def text_like_ids(*shape: int, vocab_size: int) -> Tensor:
    """int32 ids as frequent as words of text are (Zipf and Mandelbrot's law: 1 / (rank + 2)).

    Of 65,536 words the first is 3.3 % of all tokens. As with merged pairs of bytes, frequent words
    have small ids.
    """
    frequency = 1 / (torch.arange(vocab_size, device=device()) + 3.0)
    ids = torch.multinomial(frequency, torch.Size(shape).numel(), replacement=True)
    return ids.int().view(shape)


PROVIDERS = {
    "ours": lambda: embedding,
    "eager": lambda: F.embedding,
    "compile": lambda: compiled(F.embedding),
}


def case(size: Size) -> Case:
    c = size.config
    token, word = size.tokens * c.n_embd, c.vocab_size * c.n_embd

    def inputs():
        ids = text_like_ids(size.batch, c.sequence_len, vocab_size=c.vocab_size)
        return ids, rand(c.vocab_size, c.n_embd, grad=True)

    cost = with_both(Cost(bytes=2 * 2 * token), Cost(bytes=2 * (token + word)))
    return Case("embedding", inputs, embedding_ref, PROVIDERS, cost)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_embedding(bench, size, direction, provider):
    bench(case(size), size, direction, provider)
