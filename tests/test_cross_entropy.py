"""Linear + soft cap + cross-entropy: accuracy of loss and gradients, what counts, behaviour."""

import math
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import logits_pass
from kernels.cross_entropy import chunk_rows, linear_cross_entropy, linear_cross_entropy_ref
from tests.operators import (
    DEVICE,
    assert_compiles,
    assert_repeats,
    dtype_id,
    host_never_waits,
    outputs_and_gradients,
    poisoned_memory,
    randn,
)

DTYPES = (torch.bfloat16, torch.float32)
# (M, C, V, chunks): one row; a last chunk cut short; more chunks than rows; V under one tile of
# 4,096, two whole tiles, over, and far over and odd.
SHAPES = [
    (1, 8, 1000, 1),
    (13, 16, 257, 3),
    (5, 24, 128, 8),
    (3, 8, 8192, 1),
    (3, 8, 9000, 2),
    (2, 8, 20001, 1),
]

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
over_softcaps = pytest.mark.parametrize("softcap", [15.0, None], ids=["cap", "no_cap"])


def make_targets(m: int, v: int) -> torch.Tensor:
    """Random columns with the last and the first among them, and -1 for every fourth row."""
    targets = torch.randint(v, (m,), device=DEVICE)
    targets[3::4] = -1
    targets[:1], targets[1:2] = v - 1, 0
    return targets


def of_x_and_weight(op, targets, **options):
    return lambda x, weight: op(x, weight, targets, **options)


def assert_right(inputs, targets, *, chunks=1, **options):
    """Loss and gradients err at most twice as much as PyTorch's in the same dtype, plus a little.

    A little is, of the largest element, a quarter of bf16's spacing, and 1e-5 in fp32: tanh is
    right to fp32's spacing at 1, and the cap multiplies that. Where tanh is flat the gradient of
    the logits may be smaller than that spacing throughout: hence 1e-6 of it, too. Errors are
    against fp64.
    """
    ref = of_x_and_weight(linear_cross_entropy_ref, targets, **options)
    with poisoned_memory():
        op = of_x_and_weight(linear_cross_entropy, targets, chunks=chunks, **options)
        ours = outputs_and_gradients(op, inputs)
    torchs = outputs_and_gradients(ref, inputs)
    exact = outputs_and_gradients(ref, [x.double() for x in inputs])
    x, weight = inputs
    factors = {"loss": 1.0, "dx": weight.abs().max(), "dweight": x.abs().max()}
    for (name, factor), mine, theirs, true in zip(factors.items(), ours, torchs, exact):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
        if true.numel():
            little = torch.finfo(torch.bfloat16).eps / 4 if mine.dtype == torch.bfloat16 else 1e-5
            error, allowed = (mine - true).abs().max(), 2 * (theirs - true).abs().max()
            allowed += little * true.abs().max() + 1e-6 * factor
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@over_dtypes
@over_softcaps
@pytest.mark.parametrize(("m", "c", "v", "chunks"), SHAPES, ids=str)
def test_accurate(m, c, v, chunks, softcap, dtype):
    inputs = [randn(m, c, dtype=dtype), randn(v, c, dtype=dtype)]
    assert_right(inputs, make_targets(m, v), chunks=chunks, softcap=softcap)


@over_dtypes
@pytest.mark.parametrize("v", [257, 258])
@pytest.mark.parametrize("softcap", [5.0, 64.0, 100.0])
def test_softcaps_with_and_without_a_running_maximum(softcap, v, dtype):
    inputs = [randn(9, 16, dtype=dtype), randn(v, 16, dtype=dtype)]
    assert_right(inputs, make_targets(9, v), softcap=softcap)


@over_dtypes
@over_softcaps
@pytest.mark.parametrize("v", [257, 258])
def test_weights_of_rows(v, softcap, dtype):
    """Positive, negative and zero; the mean is still over the rows that count."""
    inputs = [randn(13, 16, dtype=dtype), randn(v, 16, dtype=dtype)]
    weights = randn(13)
    weights[4] = 0.0
    options = {"weights": weights, "softcap": softcap, "chunks": 3}
    for reduction in ("sum", "mean"):
        assert_right(inputs, make_targets(13, v), reduction=reduction, **options)


def test_weights_multiply_what_each_row_gives():
    x, weight, targets = randn(13, 16), randn(257, 16), make_targets(13, 257)
    weights = randn(13)
    plain = linear_cross_entropy(x, weight, targets, reduction="none", chunks=2)
    weighted = linear_cross_entropy(x, weight, targets, weights=weights, reduction="none", chunks=2)
    torch.testing.assert_close(weighted, weights * plain, rtol=1e-6, atol=0)
    _, dx, _ = outputs_and_gradients(
        of_x_and_weight(linear_cross_entropy, targets, weights=weights), [x, weight]
    )
    _, plain_dx, _ = outputs_and_gradients(
        of_x_and_weight(linear_cross_entropy, targets), [x, weight]
    )
    torch.testing.assert_close(dx, weights[:, None] * plain_dx, rtol=1e-4, atol=1e-6)


@over_softcaps
@pytest.mark.parametrize("x_scale", [0.0, 1e-3, 100.0, 1e4])
def test_extreme_logits(x_scale, softcap):
    """All equal; nearly so; far past the cap, so that softmax is one-hot and tanh is flat."""
    x = randn(6, 16, dtype=torch.bfloat16, scale=x_scale)
    inputs = [x, randn(300, 16, dtype=torch.bfloat16)]
    assert_right(inputs, make_targets(6, 300), softcap=softcap)


@over_dtypes
@over_softcaps
def test_sure_and_right(softcap, dtype):
    """The target's logit far above all others: loss and gradient are small, and not just 0."""
    weight = torch.eye(16, device=DEVICE).repeat(20, 1)
    weight[16:] *= -1
    targets = torch.arange(16, device=DEVICE)
    x = 8 * torch.eye(16, device=DEVICE) + randn(16, 16) / 4
    assert_right([x.to(dtype), weight.to(dtype)], targets, softcap=softcap)


@over_softcaps
def test_losses_of_each_row(softcap):
    x, weight, targets = randn(13, 16), randn(257, 16), make_targets(13, 257)
    options = {"softcap": softcap, "reduction": "none"}
    with poisoned_memory():
        losses = linear_cross_entropy(x.requires_grad_(), weight, targets, chunks=3, **options)
    assert (losses.shape, losses.dtype) == ((13,), torch.float32)
    assert not losses.requires_grad
    assert (losses[targets == -1] == 0).all()
    exact = linear_cross_entropy_ref(x.double(), weight.double(), targets, **options)
    assert (losses - exact).abs().max() <= 1e-5 * exact.abs().max()
    total = linear_cross_entropy(x, weight, targets, chunks=3, softcap=softcap)
    assert total == losses.sum()


@pytest.mark.parametrize("ignore_index", [-1, -100, 7])
def test_rows_that_do_not_count(ignore_index):
    inputs, targets = [randn(8, 16), randn(50, 16)], torch.tensor([3, 7, 7, 9, 7, 1, 2, 7])
    targets = torch.where(targets == 7, ignore_index, targets).to(DEVICE)
    assert_right(inputs, targets, ignore_index=ignore_index, reduction="mean", chunks=2)
    op = of_x_and_weight(linear_cross_entropy, targets, ignore_index=ignore_index)
    _, dx, _ = outputs_and_gradients(op, inputs)
    assert (dx[targets == ignore_index] == 0).all()
    assert (dx[targets != ignore_index] != 0).any(dim=1).all()


@over_dtypes
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("m", [0, 5])
def test_no_row_counts(m, reduction, dtype):
    """An empty batch, or all targets ignored: 0 with zero gradients, not NaN."""
    targets = torch.full((m,), -1, device=DEVICE)
    op = of_x_and_weight(linear_cross_entropy, targets, reduction=reduction, chunks=2)
    with poisoned_memory():
        results = outputs_and_gradients(op, [randn(m, 8, dtype=dtype), randn(33, 8, dtype=dtype)])
    assert [tuple(t.shape) for t in results] == [(), (m, 8), (33, 8)]
    assert all((t == 0).all() for t in results)


@over_softcaps
def test_what_is_not_finite_shows(softcap):
    """A target that is no column, or a NaN among the logits, makes that row's loss NaN."""
    x, weight = randn(6, 16), randn(300, 16)
    targets = torch.tensor([0, 299, 300, -2, 2**32, 5], device=DEVICE)
    x[5, 3] = math.nan
    options = {"softcap": softcap, "reduction": "none"}
    losses = linear_cross_entropy(x, weight, targets, **options)
    assert losses.isnan().tolist() == [False, False, True, True, True, True]


def test_a_target_that_is_no_column_is_refused_where_no_kernel_runs(monkeypatch):
    monkeypatch.setattr(logits_pass, "runs_kernel", lambda x: False)
    for target in (300, -2):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            linear_cross_entropy(torch.randn(1, 16), torch.randn(300, 16), torch.tensor([target]))


@over_dtypes
def test_operands_apart(dtype):
    """Columns of a wider x, a transposed weight, every second target."""
    x, weight = randn(12, 40, dtype=dtype)[:, :16], randn(16, 100, dtype=dtype).t()
    assert_right([x, weight], make_targets(24, 100)[::2], chunks=2)


@pytest.mark.parametrize("weighted", [False, True])
@over_softcaps
def test_reference_maths_where_no_kernel_runs(softcap, weighted, monkeypatch):
    monkeypatch.setattr(logits_pass, "runs_kernel", lambda x: x.is_cuda)
    inputs = [randn(13, 16, dtype=torch.bfloat16), randn(257, 16, dtype=torch.bfloat16)]
    weights = randn(13) if weighted else None
    assert_right(inputs, make_targets(13, 257), chunks=3, softcap=softcap, weights=weights)


def test_chunks_change_nothing_but_memory():
    """Eight give the loss and dx of one, and dW errs no more than PyTorch's of whole logits."""
    inputs = [randn(40, 16, dtype=torch.bfloat16), randn(200, 16, dtype=torch.bfloat16)]
    targets = make_targets(40, 200)
    one, eight = (
        outputs_and_gradients(of_x_and_weight(linear_cross_entropy, targets, chunks=n), inputs)
        for n in (1, 8)
    )
    assert torch.equal(one[0], eight[0])
    assert torch.equal(one[1], eight[1])

    def weight_error(op, inputs=inputs, **options):
        results = outputs_and_gradients(of_x_and_weight(op, targets, **options), inputs)
        return (results[2].double() - exact).norm()

    ref = of_x_and_weight(linear_cross_entropy_ref, targets)
    exact = outputs_and_gradients(ref, [x.double() for x in inputs])[2]
    ours = weight_error(linear_cross_entropy, chunks=8)
    # Both round the logits and their gradient once: equal but for the order of sums.
    assert ours <= 1.01 * weight_error(linear_cross_entropy_ref)
    assert ours <= 0.95 * weight_error(linear_cross_entropy_ref, chunks=8)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_reference_in_chunks(reduction):
    targets, inputs = make_targets(11, 60), [randn(11, 8), randn(60, 8)]
    whole, parts = (
        outputs_and_gradients(
            of_x_and_weight(linear_cross_entropy_ref, targets, reduction=reduction, chunks=n),
            inputs,
        )
        for n in (1, 4)
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trained", ["x", "weight", "neither"])
def test_only_the_gradients_asked_for(trained):
    x, weight, targets = randn(6, 16), randn(50, 16), make_targets(6, 50)
    leaf = {"x": x, "weight": weight}.get(trained)
    with FlopCounterMode(display=False) as counter:
        if leaf is not None:
            leaf.requires_grad_()
        loss = linear_cross_entropy(x, weight, targets)
    assert counter.get_total_flops() == 2 * 6 * 16 * 50 * (1 if leaf is None else 2)
    assert loss.requires_grad == (leaf is not None)
    if leaf is not None:
        (ours,) = torch.autograd.grad(loss, leaf)
        (theirs,) = torch.autograd.grad(linear_cross_entropy_ref(x, weight, targets), leaf)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_gradient_is_made_under_no_grad():
    x, weight, targets = randn(6, 16).requires_grad_(), randn(50, 16), make_targets(6, 50)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, weight, targets)
    assert not loss.requires_grad
    assert counter.get_total_flops() == 2 * 6 * 16 * 50


def test_backward_scales_in_fp32():
    """By a factor that bf16 cannot hold, rounded once; and a graph that is kept gives it again."""
    x = randn(6, 16, dtype=torch.bfloat16).requires_grad_()
    weight = randn(50, 16, dtype=torch.bfloat16).requires_grad_()
    loss = linear_cross_entropy(x, weight, make_targets(6, 50))
    dx, _ = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    scaled = [torch.autograd.grad(loss * 1.00390625, (x, weight), retain_graph=True)] * 2
    assert torch.equal(scaled[0][0], (dx.float() * 1.00390625).bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(*scaled))


@over_softcaps
def test_repeats_bit_for_bit(softcap):
    op = of_x_and_weight(linear_cross_entropy, make_targets(13, 257), chunks=3, softcap=softcap)
    inputs = [randn(13, 16, dtype=torch.bfloat16), randn(257, 16, dtype=torch.bfloat16)]
    assert_repeats(op, inputs)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_compiles(reduction):
    op = of_x_and_weight(linear_cross_entropy, make_targets(9, 60), chunks=2, reduction=reduction)
    assert_compiles(op, [randn(9, 16, dtype=torch.bfloat16), randn(60, 16, dtype=torch.bfloat16)])


def test_compiles_without_gradient():
    x, weight, targets = randn(9, 16), randn(60, 16), make_targets(9, 60)
    evaluate = partial(linear_cross_entropy, reduction="none")
    compiled = torch.compile(evaluate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, targets), evaluate(x, weight, targets))


def test_opcheck():
    x, weight, targets = randn(6, 16), randn(50, 16), make_targets(6, 50)
    ops = torch.ops.gptfast
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    for op, arguments in (
        (ops.linear_cross_entropy_fwd, (*leaves, targets, None, 15.0, -1, 2, True, True)),
        (
            ops.linear_cross_entropy_fwd,
            (leaves[0], weight, targets, randn(6), None, -1, 1, True, False),
        ),
        (ops.linear_cross_entropy_bwd, (randn(), x, weight, torch.bfloat16)),
        (ops.linear_cross_entropy_losses, (x, weight, targets, None, 15.0, -1, 2)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_chunk_rows():
    assert chunk_rows(65536, 8) == 8192
    for m in (0, 1, 5, 65537):
        for chunks in (1, 3, 8):
            rows = chunk_rows(m, chunks)
            assert rows >= 1
            assert rows * chunks >= m
            assert -(-m // rows) <= chunks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(50, 16, dtype=torch.bfloat16)}, "float32, weight torch.bfloat16"),
        ({"x": torch.zeros(6, 16).half(), "weight": torch.zeros(50, 16).half()}, "float16"),
        ({"x": torch.zeros(6, 16).double()}, "x is torch.float64"),
        ({"x": torch.zeros(2, 3, 16)}, r"x is \(2, 3, 16\), weight \(50, 16\)"),
        ({"weight": torch.zeros(50, 15)}, r"x is \(6, 16\), weight \(50, 15\)"),
        ({"targets": torch.zeros(6)}, r"targets are \(6,\) torch.float32"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets are \(5,\) torch.int64"),
        ({"weights": torch.zeros(5)}, r"weights are \(5,\) torch.float32"),
        ({"weights": torch.zeros(6).bfloat16()}, r"weights are \(6,\) torch.bfloat16"),
        ({"weights": torch.zeros(6, requires_grad=True)}, "with requires_grad=True"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"softcap": math.inf}, "softcap is inf"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
        ({"chunks": 0}, "chunks is 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refuses(change, message):
    arguments = {
        "x": torch.zeros(6, 16),
        "weight": torch.zeros(50, 16),
        "targets": torch.zeros(6, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))


@pytest.mark.gpu
@over_dtypes
@over_softcaps
@pytest.mark.parametrize(("m", "c", "v"), [(512, 768, 50257), (256, 1280, 131072)], ids=str)
def test_accurate_at_trained_shapes(m, c, v, softcap, dtype):
    inputs = [randn(m, c, dtype=dtype), randn(v, c, dtype=dtype, scale=c**-0.5)]
    assert_right(inputs, make_targets(m, v), chunks=3, softcap=softcap)


@pytest.mark.gpu
def test_d20_memory_and_no_wait_for_the_device():
    """At most 3 GiB beside the inputs, forward and backward, and the host never waits."""
    m, c, v = 65536, 1280, 65536
    x = randn(m, c, dtype=torch.bfloat16).requires_grad_()
    weight = randn(v, c, dtype=torch.bfloat16, scale=c**-0.5).requires_grad_()
    targets = make_targets(m, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with host_never_waits():
        linear_cross_entropy(x, weight, targets, reduction="mean").backward()
    assert torch.cuda.max_memory_allocated() - before <= 3 * 2**30


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """Rows whose logits lie past 2^31 elements of the buffer."""
    m, v = 33024, 65536
    assert m * v > 2**31
    # Small integers, so that logits are exact, however cuBLAS adds in a product of so many rows.
    x, weight = (torch.randint(-2, 3, (n, 16), device=DEVICE).bfloat16() for n in (m, v))
    targets = make_targets(m, v)
    losses = linear_cross_entropy(x, weight, targets, reduction="none", chunks=1)
    expected = linear_cross_entropy(x[-64:], weight, targets[-64:], reduction="none", chunks=1)
    assert torch.equal(losses[-64:], expected)
