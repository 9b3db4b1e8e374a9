"""Muon's passes over memory: numbers, agreement with plain PyTorch, matrices that lie anywhere."""

import pytest
import torch
from torch import Tensor

from kernels import muon
from kernels.muon import add_update, add_update_ref, nesterov, nesterov_ref
from tests.operators import DEVICE, host_never_waits, poisoned_memory, randn

BF16 = torch.bfloat16
# One element, none, less than a block and more; the third has matrices off multiples of 16 bytes.
SHAPES = [(1, 1, 1), (2, 0, 8), (3, 5, 7), (1, 64, 48), (3, 40, 72)]


def scalar(value: float | bool) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def room(n: int, r: int, columns: int, dtype: torch.dtype = BF16) -> Tensor:
    """(n, r, columns) among rows and matrices of a larger tensor, as in what processes exchange."""
    return torch.full((n + 1, r + 2, columns), 9.0, device=DEVICE, dtype=dtype)[:n, :r]


def scattered(stack: Tensor, offset: int = 0) -> list[Tensor]:
    """Copies of the matrices, far from each other, so many elements from where memory begins."""
    return [
        torch.cat([matrix.new_zeros(offset), matrix.flatten()])[offset:].view(matrix.shape)
        for matrix in stack
    ]


@pytest.mark.parametrize("op", [nesterov, nesterov_ref])
def test_looks_ahead_of_the_average(op):
    average = torch.tensor([[[1.0, 2.0]]], device=DEVICE)
    grads = torch.tensor([[6.0, -8.0]], device=DEVICE)
    out = room(1, 1, 2)
    op(average, [grads], scalar(0.5), 0.75, scalar(True), out=out)
    assert average.tolist() == [[[1.5, 0.5]]]
    assert out.tolist() == [[[1.875, -0.625]]]
    assert grads.tolist() == [[6.0, -8.0]]


@pytest.mark.parametrize("op", [add_update, add_update_ref])
def test_adds_the_scaled_update(op):
    weights = torch.nn.Parameter(torch.tensor([[1.0, 2.0]], device=DEVICE))
    version = weights._version
    with torch.no_grad():
        op([weights], torch.tensor([[[4.0, -8.0]]], device=DEVICE, dtype=BF16), -0.25)
    assert weights.tolist() == [[0.0, 4.0]]
    assert weights._version > version


@pytest.mark.parametrize("op", [nesterov, nesterov_ref])
def test_stands_still_unless_finite(op):
    average = torch.tensor([[[1.0, -0.0, 3.0]]], device=DEVICE)
    bits = average.view(torch.int32).tolist()
    grads = torch.tensor([[6.0, torch.nan, torch.inf]], device=DEVICE)
    out = room(1, 1, 3)
    op(average, [grads], scalar(torch.nan), 0.75, scalar(False), out=out)
    assert average.view(torch.int32).tolist() == bits
    assert out.view(torch.int16).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("op", [add_update, add_update_ref])
def test_an_update_of_zero_keeps_every_bit(op):
    weights = torch.tensor([[1.0, -0.0, 0.0, torch.inf]], device=DEVICE)
    bits = weights.view(torch.int32).tolist()
    op([weights], torch.zeros(1, 1, 4, device=DEVICE, dtype=BF16), -0.02)
    assert weights.view(torch.int32).tolist() == bits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_momentum_agrees_with_pytorch(shape, offset, momentum):
    average, grads, scale = randn(*shape), scattered(randn(*shape), offset), scalar(0.3)
    theirs, ours, exact = average.clone(), room(*shape), room(*shape)
    nesterov_ref(theirs, grads, scale, momentum, scalar(True), out=exact)
    with poisoned_memory():
        nesterov(average, grads, scale, momentum, scalar(True), out=ours)
    torch.testing.assert_close(average, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, exact, rtol=2**-7, atol=1e-6)
    assert_nothing_beside(ours)


def assert_nothing_beside(written: Tensor) -> None:
    """What `room` has around the matrices holds what it held."""
    around = torch.ones(
        len(written) + 1, written.shape[1] + 2, written.shape[2], dtype=bool, device=DEVICE
    )
    around[: len(written), : written.shape[1]] = False
    assert (written._base[around] == 9.0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_update_has_pytorchs_bits_where_the_product_is_exact(shape, offset):
    """A power of two times bf16: whether the multiplication is fused makes no difference."""
    weights = randn(*shape)
    ours, theirs = scattered(weights, offset), scattered(weights)
    update = room(*shape)
    update.copy_(randn(*shape))
    add_update(ours, update, -(2.0**-6))
    add_update_ref(theirs, update, -(2.0**-6))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_update_agrees_with_pytorch():
    """Half a spacing of weights up to 8, twice: of the product's rounding, and of the sum's."""
    weights, update = randn(2, 40, 72), randn(2, 40, 72, dtype=BF16)
    ours = scattered(weights)
    add_update(ours, update, -0.0123)
    exact = weights.double() + float(torch.tensor(-0.0123)) * update.double()
    torch.testing.assert_close(torch.stack(ours).double(), exact, rtol=0.0, atol=2**-21)


def test_tables_follow_matrices_that_move_and_are_kept_while_they_lie_still():
    muon._table.cache_clear()
    first, second = scattered(randn(2, 3, 8)), scattered(randn(2, 3, 8))
    average, scale, finite = torch.zeros(2, 3, 8, device=DEVICE), scalar(1.0), scalar(True)
    for grads in (first, first, second, first):
        average.zero_()
        nesterov(average, grads, scale, 0.0, finite, out=torch.empty_like(average, dtype=BF16))
        assert torch.equal(average, torch.stack(grads))
    made = muon._table.cache_info()
    assert (made.misses, made.hits) == (2, 2)


def test_aligned_only_where_every_address_is():
    matrices = [*scattered(randn(1, 4, 4)), *scattered(randn(1, 4, 4), offset=4)]
    assert muon._locate(matrices, matrices[0].device)[1]
    matrices += scattered(randn(1, 4, 4), offset=1)
    table, aligned = muon._locate(matrices, matrices[0].device)
    assert not aligned
    assert table.tolist() == [m.data_ptr() for m in matrices]


@pytest.mark.parametrize(
    ("weights", "update", "message"),
    [
        ([torch.zeros(2, 3)], torch.zeros(2, 2, 3, dtype=BF16), r"1 matrices and .* \(2, 2, 3\)"),
        ([torch.zeros(2, 3)], torch.zeros(1, 2, 3), r"1 matrices and torch.float32 \(1, 2, 3\)"),
        ([torch.zeros(2, 4)], torch.zeros(1, 2, 3, dtype=BF16), r"float32 \(2, 4\).*\(2, 3\)"),
        ([torch.zeros(2, 3).half()], torch.zeros(1, 2, 3, dtype=BF16), "matrix 0 is torch.float16"),
        ([torch.zeros(3, 2).mT], torch.zeros(1, 2, 3, dtype=BF16), r"strides \(1, 2\)"),
        ([torch.zeros(2, 3)], torch.zeros(1, 3, 2, dtype=BF16).mT, r"in bfloat16 \(1, 2\)"),
        ([torch.zeros(0, 1)] * 2**16, torch.zeros(2**16, 0, 1, dtype=BF16), r"fewer than 2\^16"),
    ],
    ids=["number", "dtype of update", "shape", "dtype", "strides", "strides of update", "many"],
)
def test_refuses(weights, update, message):
    weights, update = [w.to(DEVICE) for w in weights], update.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        add_update(weights, update, 1.0)


def test_refuses_an_average_of_another_shape():
    average, grads = torch.zeros(1, 3, 2, device=DEVICE), [torch.zeros(2, 3, device=DEVICE)]
    out = torch.zeros(1, 2, 3, device=DEVICE, dtype=BF16)
    with pytest.raises(ValueError, match=r"average is torch.float32 \(1, 3, 2\)"):
        nesterov(average, grads, scalar(1.0), 0.5, scalar(True), out=out)


@pytest.mark.gpu
def test_the_host_never_waits_while_matrices_move():
    average, scale, finite = torch.zeros(3, 5, 7, device=DEVICE), scalar(1.0), scalar(True)
    out = torch.empty_like(average, dtype=BF16)
    steps = [[torch.ones(5, 7, device=DEVICE) for _ in range(3)] for _ in range(4)]
    add_update(steps[0], torch.zeros_like(out), 1.0)
    nesterov(average, steps[0], scale, 1.0, finite, out=out)
    muon._table.cache_clear()
    # Compiled by now, so that behind this the copies of all tables wait at once.
    torch.cuda._sleep(100_000_000)
    with host_never_waits():
        for grads in steps:
            nesterov(average, grads, scale, 0.5, finite, out=out)
            add_update(grads, out, 1.0)
    assert (average == 1 - 2.0**-4).all()
    assert muon._table.cache_info().misses == 4
    for step, grads in enumerate(steps, 1):
        # 1 + g / 2 + average / 2 after so many steps.
        expected = torch.full((5, 7), 2 - 2.0 ** -(step + 1), device=DEVICE)
        assert all(torch.equal(grad, expected) for grad in grads)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1])
def test_update_has_pytorchs_bits_on_a_gpu(offset):
    weights, update = randn(2, 640, 1280), randn(2, 640, 1280, dtype=BF16)
    ours, theirs = scattered(weights, offset), scattered(weights)
    add_update(ours, update, -0.0123)
    add_update_ref(theirs, update, -0.0123)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.gpu
def test_offsets_pass_32_bits():
    average = torch.zeros(3, 2**15, 2**15 - 1, device=DEVICE)
    grads, out = torch.ones(2**15, 2**15 - 1, device=DEVICE), torch.empty_like(average, dtype=BF16)
    assert average.numel() > 2**31
    nesterov(average, [grads] * 3, scalar(1.0), 0.5, scalar(True), out=out)
    assert average[-1, -1, -1] == 0.5
    assert out[-1, -1, -1] == 0.75
    weights = list(average.unbind())
    add_update(weights, out, 2.0)
    assert weights[-1][-1, -1] == 2.0
