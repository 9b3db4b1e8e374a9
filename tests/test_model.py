"""The model: counts of the report, values of an independent plain GPT, bad configurations."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gptfast.attention import Documents, attention
from gptfast.errors import UserError
from gptfast.model import GPT, GPTConfig, flops_per_token, generate, parameter_counts

TINY = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def filled(config: GPTConfig = TINY, **choices: str) -> GPT:
    """A plain model with no zero-initialised weight left, the same one at every call."""
    model = GPT(config, **choices)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model


def plain_logits(weights: dict[str, torch.Tensor], config: GPTConfig, ids: torch.Tensor):
    """The architecture once more, from its description (PIPELINE 1.5), sharing no code."""

    def norm(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()

    B, T = ids.shape
    D = config.head_dim
    position = torch.arange(T, dtype=torch.float64)[:, None]
    angle = position / config.rope_base ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotate(x):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)

    x = norm(weights["transformer.wte.weight"][ids])
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(config.n_layer):
        prefix = f"transformer.h.{i}."
        w = {n.removeprefix(prefix).removesuffix(".weight"): p for n, p in weights.items()}
        h = norm(x)
        q, k, v = ((h @ w[f"attn.c_{n}"].T).view(B, T, -1, D) for n in "qkv")
        k, v = (t.repeat_interleave(config.n_head // config.n_kv_head, 2) for t in (k, v))
        q, k = norm(rotate(q)), norm(rotate(k))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D)
        weight = scores.masked_fill(future, -math.inf).softmax(-1)
        y = torch.einsum("bhqk,bkhd->bqhd", weight, v).reshape(B, T, -1)
        x = x + y @ w["attn.c_proj"].T
        x = x + (norm(x) @ w["mlp.c_fc"].T).relu().square() @ w["mlp.c_proj"].T
    logits = norm(x) @ weights["lm_head.weight"].T
    return config.softcap * (logits / config.softcap).tanh()


def test_d20_has_the_reports_size_and_flops():
    config = GPTConfig.from_depth(20, vocab_size=65536)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == 560_988_160
    assert sum(parameter_counts(config).values()) == 560_988_160
    assert flops_per_token(config) == 3_491_758_080
    assert flops_per_token(config) - flops_per_token(config, causal=True) == 629_145_600 // 2
    # Documents of half the length have half of attention's.
    assert flops_per_token(config, context=1024.0) == flops_per_token(config, causal=True)


def test_d32_counts():
    config = GPTConfig.from_depth(32, vocab_size=65536)
    assert sum(parameter_counts(config).values()) == 1_879_048_192
    assert flops_per_token(config) == pytest.approx(1.207960e10, rel=1e-6)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_logits_loss_and_gradients_equal_an_independent_plain_model(kernels, kv_heads):
    config = GPTConfig(**{**TINY.to_dict(), "n_kv_head": kv_heads})
    model = filled(config, kernels=kernels)
    ids = torch.randint(64, (2, 9))
    targets = torch.randint(64, (2, 9))
    targets[0, 3] = -1

    weights = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    want = plain_logits(weights, config, ids)
    want_loss = F.cross_entropy(
        want.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    want_loss.backward()

    torch.testing.assert_close(model(ids).double(), want, atol=2e-5, rtol=1e-4)
    loss = model(ids, targets)
    loss.backward()
    torch.testing.assert_close(loss.double(), want_loss, atol=1e-3, rtol=1e-5)
    for name, parameter in model.named_parameters():
        scale = float(weights[name].grad.abs().max())
        torch.testing.assert_close(
            parameter.grad.double(), weights[name].grad, atol=3e-5 * scale, rtol=1e-3, msg=name
        )


def test_loss_per_token_sums_to_the_loss_and_ignores():
    model = filled()
    ids, targets = torch.randint(64, (2, 9)), torch.randint(64, (2, 9))
    targets[1, 2:] = -1
    with torch.no_grad():
        each = model(ids, targets, reduction="none")
        assert each.shape == (2, 9)
        assert (each[1, 2:] == 0).all()
        torch.testing.assert_close(each.sum(), model(ids, targets), rtol=1e-5, atol=1e-4)


def test_weights_multiply_each_tokens_loss():
    model = filled()
    ids, targets = torch.randint(64, (2, 2, 9)).unbind()
    weights = torch.randn(2, 9)
    each = model(ids, targets, reduction="none")
    torch.testing.assert_close(model(ids, targets, weights=weights), (each * weights).sum())


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_packed_documents_are_computed_as_if_each_were_alone(kv_heads):
    config = GPTConfig(**{**TINY.to_dict(), "n_kv_head": kv_heads})
    model = filled(config)
    ids, targets = torch.randint(64, (2, 2, 16)).unbind()
    # Two rows of 16; one document is a row, others share one; the last two are empty.
    bounds = [0, 16, 21, 22, 32]
    starts = torch.tensor([*bounds, 32, 32], dtype=torch.int32)
    documents = Documents(starts, longest=16, rows=2)

    loss = model(ids, targets, documents=documents)
    loss.backward()
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}
    logits = model(ids, documents=documents)
    assert logits.shape == (2, 16, 64)

    model.zero_grad()
    alone = []
    for begin, end in pairwise(bounds):
        own_ids, own_targets = (x.view(1, 32)[:, begin:end] for x in (ids, targets))
        alone.append(model(own_ids, own_targets))
        own_logits = logits.view(1, 32, 64)[:, begin:end]
        torch.testing.assert_close(model(own_ids), own_logits, atol=1e-5, rtol=1e-5)
    sum(alone).backward()
    torch.testing.assert_close(loss, sum(alone), rtol=1e-6, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=2e-5, rtol=1e-4, msg=name)


def test_another_attention_can_take_the_place_of_a_blocks_own():
    model = filled()
    residual, branch = torch.randn(2, 2, 9, 32).unbind()
    block, angles = model.blocks[0], (model.cos[:9], model.sin[:9])
    own = block(residual, branch, *angles)
    given = block(residual, branch, *angles, attend=partial(attention, backend="flash2"))
    torch.testing.assert_close(given, own)
    seen = []
    block(residual, branch, *angles, attend=lambda q, k, v: seen.append(k.shape) or q)
    assert seen == [(2, 9, 2, 16)]


# torch.compile looks at .grad of every tensor, and hides the warning in a way of its own.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_all_blocks_and_batches_of_a_shape_are_one_compilation():
    from torch._dynamo.utils import counters

    model = filled(GPTConfig(**{**TINY.to_dict(), "n_layer": 3}))
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    ids, targets = torch.randint(64, (2, 2, 16)).unbind()
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        model(ids, targets).backward()
    assert counters["stats"]["unique_graphs"] == 1
    for bounds in ([0, 5, 16, 32], [0, 16, 32, 32]):
        starts = torch.tensor(bounds, dtype=torch.int32)
        model(ids, targets, documents=Documents(starts, 16, rows=2)).backward()
    assert counters["stats"]["unique_graphs"] == 2


def test_initial_values():
    model = GPT(GPTConfig.from_depth(2, vocab_size=256, sequence_len=32))
    model.init_weights(torch.Generator().manual_seed(1))
    block = model.blocks[1]
    assert not model.lm_head.weight.any()
    assert not block.attn.c_proj.weight.any()
    assert not block.mlp.c_proj.weight.any()
    assert float(model.transformer["wte"].weight.detach().std()) == pytest.approx(1.0, rel=0.02)
    assert float(block.attn.c_q.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.02)
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.02)
    assert model.cos.shape == (320, 64)
    assert model.cos.dtype == torch.float32


def test_products_equal_torchs_flop_counter():
    """FlopCounter sees the same products; of attention it counts what we do plus, in backward,
    the recomputed scores: 14 to our 12 (SDPA as plain products recomputes nothing: 12)."""
    config = GPTConfig(**{**TINY.to_dict(), "sequence_len": 8})
    model = filled(config)
    ids = torch.randint(64, (3, 8))
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert counter.get_total_flops() == 24 * flops_per_token(config)


def test_generate_is_greedy_and_extends_the_prompt():
    model = filled()
    out = generate(model, [1, 2, 3], 4)
    assert out[:3] == [1, 2, 3]
    for n in range(3, 7):
        assert out[n] == int(model(torch.tensor([out[:n]]))[0, -1].argmax())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GPTConfig.from_depth(0, vocab_size=8), "depth must be at least 1"),
        (lambda: GPTConfig.from_depth(11, vocab_size=8), "depths that work are 10 and 12"),
        (lambda: GPTConfig(n_embd=100, n_head=3, n_kv_head=3), "nearest width that does is 102"),
        (lambda: GPTConfig(n_head=10, n_kv_head=4), "n_kv_head that divides it is 2"),
        (lambda: GPTConfig(sequence_len=0), "sequence_len must be at least 1, got 0"),
    ],
)
def test_configurations_that_cannot_work_name_one_that_can(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_positions_beyond_the_rotary_table_are_refused():
    model = filled()
    with pytest.raises(ValueError, match="161 positions, but the rotary table holds 160"):
        model(torch.zeros(1, 161, dtype=torch.int64))
