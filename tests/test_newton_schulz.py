"""Newton-Schulz: its symmetric products, accuracy of the whole, what it takes, how it behaves."""

import pytest
import torch

from kernels import newton_schulz as module
from kernels.newton_schulz import COEFFICIENTS, newton_schulz, newton_schulz_ref
from tests.operators import DEVICE, DTYPES, dtype_id, poisoned_memory, randn

BF16 = torch.bfloat16
SPACING = torch.finfo(BF16).eps
# (N, R, C): square, wide and tall; under, over and between blocks of 32 and 64.
SHAPES = [(2, 1, 1), (3, 16, 16), (2, 40, 72), (2, 72, 40), (1, 33, 257), (1, 130, 100)]


def assert_accurate(x: torch.Tensor) -> None:
    """Each matrix errs at most twice as much as PyTorch's in bf16, plus half bf16's spacing."""
    with poisoned_memory():
        ours = newton_schulz(x)
    assert (ours.shape, ours.dtype, ours.device) == (x.shape, BF16, x.device)
    exact = newton_schulz_ref(x, dtype=torch.float64)

    def error(y):
        return torch.linalg.vector_norm(y - exact, dim=(1, 2))

    allowed = 2 * error(newton_schulz_ref(x))
    allowed += SPACING / 2 * torch.linalg.vector_norm(exact, dim=(1, 2))
    assert (error(ours) <= allowed).all(), f"errors {error(ours)}, allowed {allowed}"


@pytest.mark.parametrize(("r", "k"), [(1, 1), (20, 64), (64, 100), (100, 1), (190, 70), (257, 64)])
def test_symmetric_products(r, k):
    """One to three blocks a side, of each size: all is written, right to bf16, and symmetric."""
    x = randn(2, r, k, dtype=BF16, scale=k**-0.5)
    a, b, c = COEFFICIENTS
    with poisoned_memory():
        gram = module._symmetric_product(x)
        polynomial = module._symmetric_product(gram, gram)
    wide, identity = gram.double(), torch.eye(r, device=DEVICE)
    for ours, exact in (
        (gram, x.double() @ x.double().mT),
        (polynomial, a * identity + b * wide + c * wide @ wide),
    ):
        # Bit for bit on a GPU. NumPy, which interprets the kernel, may add up the products of row i
        # and row j in another order than those of j and i.
        tolerance = (
            {"rtol": 0.0, "atol": 0.0} if DEVICE == "cuda" else {"rtol": SPACING, "atol": 1e-6}
        )
        torch.testing.assert_close(ours, ours.mT, **tolerance)
        error = (ours.double() - exact).abs()
        # Half a spacing for the rounding, and what fp32 sums of terms of either sign may lose.
        assert (error <= SPACING / 2 * exact.abs() + 1e-4).all(), error.max()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_first_polynomial_divides_by_the_norm(scale):
    """What it gives for x is what the others give for x / |x|, and 1 / |x| of that."""
    x = randn(2, 40, 72, dtype=BF16, scale=scale)
    gram = module._symmetric_product(x)
    norm = module._norm(gram)
    exact_norm = torch.linalg.vector_norm(x.double(), dim=(1, 2))
    torch.testing.assert_close(norm.double(), exact_norm, rtol=SPACING / 4, atol=0.0)
    with poisoned_memory():
        ours = module._symmetric_product(gram, gram, norm).double() * norm[:, None, None]
    a, b, c = COEFFICIENTS
    wide = gram.double() / norm[:, None, None].double() ** 2
    exact = a * torch.eye(40, device=DEVICE) + b * wide + c * wide @ wide
    assert ((ours - exact).abs() <= SPACING / 2 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e7])
def test_far_from_one(scale):
    """Down to where the norm's 1e-7 tells, and up."""
    assert_accurate(randn(1, 20, 30, dtype=BF16, scale=scale))


@pytest.mark.parametrize("shape", [(1, 20, 30), (1, 30, 20)], ids=str)
def test_accurate_at_the_largest_norm(shape):
    x = randn(*shape)
    assert_accurate((x * (1e8 / x.norm())).bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accurate(shape):
    assert_accurate(randn(*shape, dtype=BF16))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_accurate_of_any_dtype_and_scale(scale, dtype):
    assert_accurate(randn(2, 20, 30, dtype=dtype, scale=scale))


@pytest.mark.parametrize("rank", [1, 5])
def test_accurate_at_low_rank(rank):
    assert_accurate((randn(1, 40, rank) @ randn(1, rank, 72)).bfloat16())


def test_all_elements_equal():
    assert_accurate(torch.full((1, 40, 30), 3.0, dtype=BF16, device=DEVICE))


@pytest.mark.parametrize("shape", [(1, 40, 150), (1, 150, 40)], ids=str)
def test_singular_values_are_near_one(shape):
    values = torch.linalg.svdvals(newton_schulz(randn(*shape, dtype=BF16)).double())
    assert values.min() > 0.6
    assert values.max() < 1.3


def assert_alike(a: torch.Tensor, b: torch.Tensor) -> None:
    """But for the order of sums, which a library's products may choose by shape and strides."""
    assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()


def test_zeros_stay_zero_beside_others():
    """Muon pads a batch with zeros; they disturb nothing."""
    x = randn(2, 40, 30, dtype=BF16)
    padded = torch.cat([x, torch.zeros(1, 40, 30, dtype=BF16, device=DEVICE)])
    y = newton_schulz(padded)
    assert (y[2] == 0).all()
    assert_alike(y[:2], newton_schulz(x))


def test_operands_apart():
    """A transposed view, and rows and columns of a larger tensor, give what their copies give."""
    x = randn(2, 60, 80, dtype=BF16)
    for view in (x.mT, x[:, ::2, 1:79:2], x.permute(1, 0, 2)[:2]):
        assert_alike(newton_schulz(view, steps=1), newton_schulz(view.contiguous(), steps=1))


def test_a_transpose_gives_the_transpose():
    x = randn(1, 30, 50, dtype=BF16)
    assert_alike(newton_schulz(x.mT), newton_schulz(x).mT)


def test_repeats_bit_for_bit():
    x = randn(2, 72, 40, dtype=BF16)
    assert torch.equal(newton_schulz(x, steps=2), newton_schulz(x, steps=2))


@pytest.mark.parametrize("shape", [(0, 16, 32), (2, 0, 16), (2, 16, 0)], ids=str)
def test_empty(shape):
    y = newton_schulz(randn(*shape))
    assert (y.shape, y.dtype) == (shape, BF16)


def test_takes_no_gradient():
    assert not newton_schulz(randn(2, 16, 32).requires_grad_()).requires_grad


def test_fewer_steps():
    x = randn(2, 40, 72, dtype=BF16)
    once, exact = newton_schulz(x, steps=1).double(), newton_schulz_ref(x, 1, torch.float64)
    assert (once - exact).norm() <= SPACING * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_reference_maths_where_no_kernel_runs(dtype, monkeypatch):
    """In fp32, so that what is returned is right to bf16's rounding."""
    monkeypatch.setattr(module, "runs_kernel", lambda x: False)
    x = torch.randn(2, 30, 20).to(dtype)
    ours, exact = newton_schulz(x), newton_schulz_ref(x, dtype=torch.float64)
    assert (ours.shape, ours.dtype) == (x.shape, BF16)
    error = (ours.double() - exact).abs()
    assert (error <= SPACING / 2 * exact.abs() + 1e-4).all(), error.max()


@pytest.mark.parametrize(
    ("x", "steps", "message"),
    [
        (torch.zeros(4, 4), 5, r"x is \(4, 4\), steps 5"),
        (torch.zeros(1, 4, 4), 0, r"x is \(1, 4, 4\), steps 0"),
        (torch.zeros(1, 1, 1).expand(1, 2**16, 2**15), 5, r"x is \(1, 65536, 32768\)"),
        (torch.zeros(1, 4, 4).double(), 5, "x is torch.float64"),
    ],
    ids=["2-D", "no step", "too large", "fp64"],
)
def test_refuses(x, steps, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(x, steps)


@pytest.mark.parametrize(
    ("capability", "like"),
    [((8, 9), (8, 0)), ((10, 0), (9, 0)), ((10, 3), (9, 0)), ((12, 0), (8, 0)), ((12, 1), (8, 0))],
)
def test_only_datacentre_blackwell_is_launched_like_hopper(capability, like):
    configs = [module._config(1280, each) for each in (capability, like)]
    assert configs[0] == configs[1]
    assert configs[0]["maxnreg"] == (128 if like == (9, 0) else None)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 1280, 1280), (2, 5120, 1280), (2, 1280, 5120)], ids=str)
def test_accurate_at_trained_shapes(shape):
    assert_accurate(randn(*shape, dtype=BF16))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """Matrices that begin past 2^31 elements come out as alone."""
    x = torch.randn(330, 1280, 5120, dtype=BF16, device="cuda")
    assert x[:-2].numel() > 2**31
    gram = module._symmetric_product(x)
    assert torch.equal(gram[-2:], module._symmetric_product(x[-2:].clone()))
