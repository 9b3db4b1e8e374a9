"""The pass over logits in whole tiles: losses, gradients in place, where it runs.

Without a GPU tanh is exact here, not the hardware's: all else is the same.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import logits_pass as module
from kernels.launch import upcast
from kernels.logits_pass import logits_pass
from tests.operators import DEVICE, poisoned_memory, randn

CAP = 15.0
TILE = 8192
IGNORED = -1


def ours(logits, targets, weights=None, cap=CAP):
    """(losses, gradients); the logits stay as they are."""
    du = logits.new_empty(len(logits), logits.shape[1] + 2)[:, :-2].copy_(logits)
    with poisoned_memory():
        losses = torch.empty(len(logits), device=DEVICE)
    logits_pass(du, targets, losses, cap, IGNORED, True, weights)
    return losses, du


def plain(logits, targets, weights=None, cap=CAP):
    """The same in PyTorch, in fp32 or, for fp64 logits, in that."""
    leaf = logits.detach().requires_grad_()
    z = cap * torch.tanh(upcast(leaf) / cap)
    losses = F.cross_entropy(z, targets, ignore_index=IGNORED, reduction="none")
    losses = losses if weights is None else losses * weights
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels that were chosen."""
    names, launch = [], module._launch

    def recorded(*arguments):
        kernel, constants = launch(*arguments)
        names.append(kernel.fn.__name__)
        return kernel, constants

    monkeypatch.setattr(module, "_launch", recorded)
    return names


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("v", "cap"), [(TILE, 5.0), (TILE, 15.0), (2 * TILE, 32.0)])
def test_accurate(v, cap, weighted, launched):
    """Losses to 2e-4 of themselves; gradients err at most twice as much as PyTorch's in bf16, plus
    a quarter of bf16's spacing; each by itself at most by its rounding and 1e-3."""
    columns = [0, 1, v // 2 - 1, v // 2, IGNORED, v - 2, v - 1, 1234, 4321]
    targets = torch.tensor(columns, device=DEVICE)
    weights = torch.linspace(-2, 2, 9, device=DEVICE)[torch.randperm(9)] if weighted else None
    logits = randn(9, v, dtype=torch.bfloat16, scale=3 * cap / 15)
    losses, du = ours(logits, targets, weights, cap)
    _, bf16_du = plain(logits, targets, weights, cap)
    true_losses, true_du = plain(logits.double(), targets, weights, cap)
    assert launched == ["_cross_entropy_tiles_kernel"]
    assert ((losses - true_losses).abs() <= 2e-4 * true_losses.abs()).all()
    error, spacing = (du - true_du).abs(), torch.finfo(torch.bfloat16).eps
    allowed = 2 * (bf16_du - true_du).abs().max() + spacing / 4 * true_du.abs().max()
    assert error.max() <= allowed
    assert (error <= (spacing / 2 + 1e-3) * true_du.abs()).all()
    assert (losses[4], du[4].count_nonzero()) == (0, 0)


@pytest.mark.parametrize("target", [0, 1, 5000, TILE - 1])
def test_sure_and_right(target):
    """The target's logit far above all others, in even and odd columns: the loss is small, right
    to 2e-4 of itself but for the sum's rounding, and never below 0."""
    logits = randn(6, TILE, dtype=torch.bfloat16)
    logits[:, target] = torch.tensor([20.0, 30.0, 40.0, 60.0, 200.0, math.inf])
    logits[4] -= 20.0
    logits[4, target] = 200.0
    targets = torch.full((6,), target, device=DEVICE)
    losses, du = ours(logits, targets)
    true_losses, true_du = plain(logits[:5].double(), targets[:5])
    assert true_losses.max() < 0.1
    assert ((losses[:5] - true_losses).abs() <= 2e-4 * true_losses + 3e-7).all()
    assert (losses >= 0).all()
    assert du.isfinite().all()
    errors = (du[:5] - true_du).abs().amax(dim=1)
    assert (errors <= 1e-2 * true_du.abs().amax(dim=1) + 3e-7).all()


def test_what_is_not_finite_shows():
    """A target that is no column, or a NaN in any column, makes that row's loss NaN; logits that
    are infinite are at the cap."""
    logits = randn(8, TILE, dtype=torch.bfloat16)
    logits[0, 6] = logits[1, 7] = math.nan
    logits[5, 10:14] = torch.tensor([math.inf, -math.inf, -math.inf, math.inf])
    targets = torch.tensor([5, 5, TILE, -2, 2**32, 10, 11, IGNORED], device=DEVICE)
    losses, du = ours(logits, targets)
    assert losses.isnan().tolist() == [True] * 5 + [False] * 3
    true_losses, true_du = plain(logits[5:7].double().clamp(-1e4, 1e4), targets[5:7])
    torch.testing.assert_close(losses[5:7].double(), true_losses, rtol=2e-4, atol=0)
    assert (du[5:7] - true_du).abs().max() <= 4e-3
    assert (losses[7], du[7].count_nonzero()) == (0, 0)


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "tiles"),
        ({"v": 3 * TILE}, "tiles"),
        ({"step": TILE + 2}, "tiles"),
        ({"softcap": 32.0}, "tiles"),
        ({"softcap": 33.0}, "pairs"),
        ({"grad": False}, "pairs"),
        ({"v": TILE + 64, "step": TILE + 64}, "pairs"),
        ({"v": TILE // 2}, "pairs"),
        ({"step": TILE + 1}, ""),
        ({"dtype": torch.float32}, ""),
        ({"softcap": None}, ""),
        ({"softcap": 100.0}, ""),
    ],
    ids=str,
)
def test_runs_where_it_should(change, kernel):
    rows = {"dtype": torch.bfloat16, "v": TILE, "step": TILE, "softcap": CAP, "grad": True}
    chosen, _ = module._launch(**(rows | change))
    assert chosen.fn.__name__ == "_".join(filter(None, ["_cross_entropy", kernel, "kernel"]))


def test_repeats_bit_for_bit():
    logits = randn(5, 2 * TILE, dtype=torch.bfloat16, scale=3.0)
    targets = torch.tensor([0, 1, 9000, IGNORED, 2 * TILE - 1], device=DEVICE)
    first, second = (ours(logits, targets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("cap", "kernel"), [(CAP, "tiles"), (33.0, "pairs"), (None, "")])
def test_offsets_beyond_32_bits(cap, kernel, launched):
    """The last row begins 2^31 elements into the buffer, whose 4 GiB nobody touches between rows;
    the step from row to row alone has 32 bits."""
    step = 2**30
    logits = randn(3, TILE, dtype=torch.bfloat16, scale=3.0)
    targets = torch.tensor([0, 4321, TILE - 1], device=DEVICE)
    expected_losses, expected_du = ours(logits, targets, cap=cap)
    buffer = torch.empty(2 * step + TILE, dtype=torch.bfloat16, device=DEVICE)
    du = buffer.as_strided((3, TILE), (step, 1)).copy_(logits)
    losses = torch.empty(3, device=DEVICE)
    logits_pass(du, targets, losses, cap, IGNORED, True)
    assert launched == ["_".join(filter(None, ["_cross_entropy", kernel, "kernel"]))] * 2
    assert torch.equal(losses, expected_losses)
    assert torch.equal(du, expected_du)
