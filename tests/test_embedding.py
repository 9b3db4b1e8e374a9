"""The embedding and its gradient: accuracy over kinds of text, behaviour, refusals."""

from functools import partial

import pytest
import torch

from bench.test_embedding import text_like_ids
from kernels.embedding import SPLIT, embedding, embedding_ref
from tests.operators import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_compiles,
    assert_repeats,
    dtype_id,
    host_never_waits,
    outputs_and_gradients,
    randn,
)

# Tokens are more than three parts, and the last part is cut short.
V, M = 40, 3 * SPLIT + 7
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def runs(*lengths: int) -> torch.Tensor:
    """Ids 0, 1, ... so many times each, scattered: sorted, the runs begin where one says."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids[torch.randperm(len(ids))]


TEXTS = {
    "like text": lambda: text_like_ids(M, vocab_size=V),
    "uniform": lambda: torch.randint(V, (M,)),
    "one word": lambda: torch.full((M,), 3),
    "no token": lambda: torch.zeros(0, dtype=torch.int64),
    "one token": lambda: torch.tensor([V // 2]),
    "both ends": lambda: torch.tensor([0, V - 1, V - 1, 0, V - 1]),
    "every word once": lambda: torch.randperm(V),
    # Of sorted tokens: rows that fill parts, that are a token shorter or longer, that begin with a
    # part's last token, two long ones in one part.
    "whole parts": lambda: runs(SPLIT, SPLIT, 2 * SPLIT),
    "a token less": lambda: runs(SPLIT - 1, SPLIT - 1, SPLIT - 1, SPLIT - 1),
    "a token more": lambda: runs(SPLIT + 1, SPLIT + 1, SPLIT + 1),
    "from a last token": lambda: runs(SPLIT - 1, 2 * SPLIT, 1, SPLIT),
    "long after long": lambda: runs(5, SPLIT + 3, SPLIT + 5, 2 * SPLIT + 1, 3),
}


def make_op(function, ids: torch.Tensor):
    return partial(function, ids.to(DEVICE))


@over_dtypes
@pytest.mark.parametrize("text", TEXTS)
def test_accurate(text, dtype):
    ids = TEXTS[text]()
    weight, dy = randn(V, 33, dtype=dtype), randn(len(ids), 33, dtype=dtype)
    assert_accurate(make_op(embedding, ids), make_op(embedding_ref, ids), [weight], [dy])


@pytest.mark.parametrize("columns", [1, 8, 130, 1280, 2056])
def test_accurate_at_widths(columns):
    """Rows that share a warp, that are one's, and that are more than one's; under a tile of long
    rows and over."""
    ids = runs(SPLIT + 9, 3, 0, 1)
    # Of a dtype whose rounding hides the order of so long a sum.
    weight, dy = (randn(n, columns, dtype=torch.bfloat16) for n in (5, len(ids)))
    assert_accurate(make_op(embedding, ids), make_op(embedding_ref, ids), [weight], [dy])


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_id)
def test_ids_of_any_shape(shape, dtype):
    ids = torch.randint(7, shape, dtype=dtype)
    dy = randn(*shape, 12)
    assert_accurate(make_op(embedding, ids), make_op(embedding_ref, ids), [randn(7, 12)], [dy])


def test_ids_and_gradients_that_are_apart():
    """Columns of wider ids; gradients come back broadcast, transposed, as columns of wider ones."""
    ids = torch.randint(3, (4, 2 * SPLIT))[:, ::2]
    shape = (*ids.shape, 24)
    for grad in (
        randn(24).expand(shape),
        torch.ones((), device=DEVICE).expand(shape),
        randn(SPLIT, 4, 24).transpose(0, 1),
        randn(4, 24, SPLIT).mT,
        randn(4, SPLIT, 48)[..., ::2],
    ):
        assert_accurate(
            make_op(embedding, ids), make_op(embedding_ref, ids), [randn(3, 24)], [grad]
        )


@over_dtypes
def test_a_long_sum_is_rounded_once(dtype):
    """Ones add up to their number, which bf16 additions one by one leave at 256."""
    tokens = 1024
    ids = torch.zeros(tokens, dtype=torch.int32)
    y, dweight = outputs_and_gradients(make_op(embedding, ids), [randn(2, 8, dtype=dtype)])
    assert y.shape == (tokens, 8)
    assert dweight.tolist() == [[tokens] * 8, [0] * 8]


@pytest.mark.parametrize(
    ("grads", "total"), [((1.0, 1.0, 2.0**24), 2.0**24 + 2), ((2.0**24, 1.0, 1.0), 2.0**24)]
)
def test_tokens_are_added_in_their_order(grads, total):
    """fp32's 2^24 swallows each 1 that comes behind it, but not the two that came before."""
    ids, weight = torch.zeros(3, dtype=torch.int64, device=DEVICE), randn(1, 1).requires_grad_()
    dy = torch.tensor(grads, device=DEVICE)[:, None]
    (dweight,) = torch.autograd.grad(embedding(ids, weight), weight, dy)
    assert dweight.item() == total


@pytest.mark.parametrize("text", ["like text", "one word", "uniform"])
def test_repeats_bit_for_bit(text):
    ids = TEXTS[text]()
    assert_repeats(make_op(embedding, ids), [randn(V, 48, dtype=torch.bfloat16)])


def test_compiles():
    ids = TEXTS["like text"]().view(1, -1).to(DEVICE)
    assert_compiles(partial(embedding, ids), [randn(V, 16)])


def test_opcheck():
    ids = TEXTS["like text"]().to(DEVICE)
    ops = torch.ops.gptfast
    torch.library.opcheck(ops.embedding.default, (ids, randn(V, 16).requires_grad_()))
    torch.library.opcheck(ops.embedding_bwd.default, (randn(M, 16), ids, V))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_weights_without_elements(shape):
    weight = randn(*shape).requires_grad_()
    embedding(torch.zeros(0, dtype=torch.int32, device=DEVICE), weight).sum().backward()
    assert weight.grad.shape == shape


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU it ends the process's use of the device")
@pytest.mark.parametrize("wrong", [-1, V])
def test_ids_outside_the_vocabulary(wrong):
    with pytest.raises(IndexError):
        embedding(torch.tensor([0, wrong]), randn(V, 4))


@pytest.mark.parametrize(
    ("ids", "weight", "message"),
    [
        (torch.zeros(2), torch.zeros(3, 4), "ids are torch.float32 on cpu"),
        (torch.zeros(2, dtype=torch.int16), torch.zeros(3, 4), "ids are torch.int16"),
        (torch.zeros(2, dtype=torch.int32, device="meta"), torch.zeros(3, 4), "on meta; .* on cpu"),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(3, 4, dtype=torch.float64), "float64"),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(4), r"shape \(4,\); it must be \(V, C\)"),
        (torch.zeros((), dtype=torch.int32).expand(2**31), torch.zeros(3, 4), "2147483648 ids"),
    ],
)
def test_refuses(ids, weight, message):
    with pytest.raises(ValueError, match=message):
        embedding(ids, weight)


@pytest.mark.gpu
@over_dtypes
@pytest.mark.parametrize("text", ["like text", "uniform", "one word"])
def test_accurate_at_d20(text, dtype):
    """As the model calls it; one word is the worst that text can do."""
    shape, words, columns = (32, 2048), 65536, 1280
    ids = {
        "like text": lambda: text_like_ids(*shape, vocab_size=words),
        "uniform": lambda: torch.randint(words, shape),
        "one word": lambda: torch.full(shape, words - 1),
    }[text]()
    weight, dy = randn(words, columns, dtype=dtype), randn(*shape, columns, dtype=dtype)
    assert_accurate(make_op(embedding, ids), make_op(embedding_ref, ids), [weight], [dy])


@pytest.mark.gpu
def test_host_never_waits():
    ids = text_like_ids(8, 1024, vocab_size=4096)
    weight, dy = randn(4096, 256).requires_grad_(), randn(8, 1024, 256)
    torch.autograd.grad(embedding(ids, weight), weight, dy)
    with host_never_waits():
        torch.autograd.grad(embedding(ids, weight), weight, dy)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """Of the gradient, and of the weight's."""
    words = 2**31 // 1280 + 64
    ids = torch.full((words,), words - 1, dtype=torch.int32, device=DEVICE)
    ids[-1] = 7
    weight = torch.zeros(words, 1280, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    dy = torch.zeros(words, 1280, dtype=torch.bfloat16, device=DEVICE)
    dy[-2:] = 1
    (dweight,) = torch.autograd.grad(embedding(ids, weight), weight, dy)
    assert dy.numel() > 2**31
    assert (dweight[[7, -1]] == 1).all()
    assert dweight.count_nonzero() == 2 * 1280
