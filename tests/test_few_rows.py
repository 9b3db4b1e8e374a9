"""Decoding steps of few rows: each kernel against its reference, and the whole step."""

import pytest
import torch

from gptfast.engine.cached_model import CachedGPT
from gptfast.engine.few_rows import FewRowsStep
from gptfast.model import GPT, GPTConfig
from kernels.cached_attention import (
    AttentionScratch,
    attend_to_cache,
    attend_to_cache_ref,
    check_attention,
)
from kernels.few_rows import (
    ACTIVATIONS,
    MAX_ROWS,
    check_few_rows,
    few_rows_product,
    few_rows_product_ref,
    supports_pdl,
)
from kernels.launch import INTERPRETED
from tests.engine_cases import plain

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs kernels"
)
PDL = supports_pdl(DEVICE)
CLOSE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 0.03, "rtol": 0.02},
}
# Widths that are no powers of two, keys that three heads share, a vocabulary that is odd.
CONFIG = GPTConfig(
    sequence_len=16, vocab_size=37, n_layer=2, n_head=3, n_kv_head=1, n_embd=48, rope_base=100.0
)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize(
    ("n", "k", "activation"), [(48, 80, "none"), (32, 1296, "squared_relu"), (53, 48, "softcap")]
)
def test_normed_products(n, k, activation, warps, rows, dtype):
    assert activation in ACTIVATIONS
    residual, branch = random(2, rows, k, dtype=dtype)
    weight = (random(n, k) / k**0.5 * 4).to(dtype)
    total = torch.empty_like(residual)
    out = random(rows, n, dtype=torch.float32 if activation == "softcap" else dtype)
    options = {"branch": branch, "activation": activation, "softcap": 2.0}
    config = {"BLOCK_N": 8, "num_warps": warps}
    few_rows_product(residual, weight, out, total=total, config=config, pdl=PDL, **options)
    want_total, want = few_rows_product_ref(residual, weight, norm=True, **options)
    assert torch.equal(total, want_total)
    torch.testing.assert_close(out, want, **CLOSE[dtype])


@pytest.mark.parametrize("rows", [1, 3])
def test_products_without_a_norm_and_the_first_without_a_branch(rows):
    x, weight = random(rows, 80), random(48, 80)
    out, total = random(rows, 48), torch.empty_like(x)
    config = {"BLOCK_N": 2, "num_warps": 1}
    few_rows_product(x, weight, out, config=config, pdl=PDL)
    torch.testing.assert_close(out, x @ weight.t(), **CLOSE[x.dtype])
    few_rows_product(x, weight, out, total=total, config=config, pdl=PDL, first=True)
    want = few_rows_product_ref(x, weight, norm=True)[1]
    torch.testing.assert_close(out, want, **CLOSE[x.dtype])
    assert torch.equal(total, x)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "length"),
    # One part; in fp32 several of two blocks, the last not full; several of many warps.
    [(2, 2, 16, 33), (2, 1, 256, 70), (1, 1, 16, 600)],
)
def test_attention_to_the_cache(heads, kv_heads, dim, length, dtype):
    positions = torch.tensor([length - 1, 0, length // 2], device=DEVICE)
    # As a KVCache has them: a position of all rows after the other.
    cache = random(2, length, 3, kv_heads, dim, dtype=dtype).transpose(1, 2)
    want_cache = cache.clone()
    qkv = random(3, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cos, sin = random(2, length, dim // 2)
    scratch = AttentionScratch(3, heads, dim, DEVICE)
    y = random(3, heads * dim, dtype=dtype)
    attend_to_cache(*(qkv, cos, sin, positions, *cache, y, scratch), n_head=heads, pdl=PDL)
    want = attend_to_cache_ref(qkv, cos, sin, positions, *want_cache, n_head=heads)
    torch.testing.assert_close(y, want, **CLOSE[dtype])
    torch.testing.assert_close(cache, want_cache, **CLOSE[dtype])
    assert not scratch.ended.any()


def filled(dtype: torch.dtype = torch.float32, **choices: str) -> GPT:
    model = GPT(CONFIG, **choices)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    model.cast_parameters(dtype)
    return model.to(DEVICE)


def test_greedy_decoding_equals_the_plain_forward():
    """Two rows, one behind a prompt and one from its first token on."""
    model = filled(kernels="triton")
    cached = CachedGPT(model, few_rows=True)
    assert [cached.decodes_by(rows) for rows in (1, MAX_ROWS, MAX_ROWS + 1)] == [
        *("kernels", "kernels", "operators")
    ]
    prompts, steps = [[1, 2, 3, 4, 5, 6, 7], [9]], 2
    cache = cached.new_cache(2, 16)
    cached.prefill(
        cache, torch.tensor([0], device=DEVICE), torch.tensor([prompts[0][:-1]]).to(DEVICE)
    )
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(steps):
        ids = torch.tensor([ids[-1] for ids in sequences], device=DEVICE)
        positions = torch.tensor([len(ids) - 1 for ids in sequences], device=DEVICE)
        logits = cached.decode(cache, ids, positions, 16)
        for ids, row in zip(sequences, logits):
            with torch.no_grad():
                want = model(torch.tensor([ids], device=DEVICE))[0, -1]
            torch.testing.assert_close(row, want, atol=2e-5, rtol=1e-4)
            ids.append(int(row.argmax()))
    assert sequences == [plain(model.cpu(), prompt, steps)[0] for prompt in prompts]


def test_what_has_no_kernels_is_decoded_as_before():
    config = GPTConfig(**{**CONFIG.to_dict(), "n_head": 12, "n_kv_head": 12})
    model = GPT(config, kernels="triton")
    assert CachedGPT(model, few_rows=True).decodes_by(1) == "operators"
    assert CachedGPT(filled(kernels="triton")).decodes_by(1) == "operators"
    with pytest.raises(ValueError, match="head_dim 4"):
        FewRowsStep(model, CachedGPT(model).weights, 1)


def test_a_model_of_plain_pytorch_is_decoded_without_kernels():
    for kernels, by in (("triton", "kernels"), ("reference", "operators")):
        assert CachedGPT(filled(kernels=kernels), few_rows=True).decodes_by(1) == by


def test_what_the_kernels_do_not_take():
    weight = random(48, 80)
    with pytest.raises(ValueError, match=f"{MAX_ROWS + 1} rows; it takes 1 to {MAX_ROWS}"):
        check_few_rows(MAX_ROWS + 1, weight=weight)
    with pytest.raises(ValueError, match=r"weight has shape \(80, 48\) and strides \(1, 80\)"):
        check_few_rows(1, weight=weight.t())
    with pytest.raises(ValueError, match="multiple of 16 columns"):
        check_few_rows(1, weight=random(48, 40))
    with pytest.raises(ValueError, match="3 heads do not share 2"):
        check_attention(3, 2, 64)
