"""What tests of GPU code share: the error rule, poisoned memory, no waiting, and inputs."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Opaque operators look alike to every backend; Inductor's C++ takes seconds a graph on a CPU.
BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    # In place: the largest are of several GB.
    return torch.randn(shape, device=DEVICE).mul_(scale).to(dtype)


def angles(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rotary's cos and sin (tokens, head_dim / 2) for frequencies from 1 to 1/10,000."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 2, device=DEVICE)
    theta = torch.outer(torch.arange(tokens, device=DEVICE), frequencies)
    return theta.cos(), theta.sin()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, so that an element that nobody wrote cannot pass for a result."""
    before = torch.are_deterministic_algorithms_enabled()
    # PyTorch fills memory in its deterministic mode, which also warns of what is not deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*[Dd]eterministic", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def host_never_waits() -> Iterator[None]:
    """RuntimeError where the host would wait for the GPU, in whatever PyTorch watches for that."""
    with warnings.catch_warnings():
        # PyTorch's, the first time: it does not watch everything yet.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def outputs_and_gradients(
    op: Callable, inputs: Sequence[Tensor], output_grads: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Outputs of op(*inputs), then the gradient of every floating input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if output_grads is None:
        output_grads = [torch.ones_like(y) for y in outputs]
    grads = [g.to(y.dtype) for g, y in zip(output_grads, outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def assert_accurate(
    op: Callable,
    ref: Callable,
    inputs: Sequence[Tensor],
    output_grads: Sequence[Tensor] | None = None,
) -> None:
    """Every output and gradient errs at most twice as much as PyTorch does in the same dtype.

    Errors are against `ref` in fp64, the largest of each tensor; PyTorch's are `ref`'s own. One
    spacing of the dtype at the largest value is allowed on top.
    """
    exact_grads = None if output_grads is None else [g.double() for g in output_grads]
    with poisoned_memory():
        ours = outputs_and_gradients(op, inputs, output_grads)
    torchs = outputs_and_gradients(ref, inputs, output_grads)
    exact = outputs_and_gradients(ref, [x.double() for x in inputs], exact_grads)
    for i, (mine, theirs, true) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), f"result {i}"
        if true.numel() == 0:
            continue
        error, allowed = (mine - true).abs().max(), 2 * (theirs - true).abs().max()
        allowed += torch.finfo(mine.dtype).eps * true.abs().max()
        # Not `error > allowed`, which NaN would pass.
        assert error <= allowed, f"result {i}: error {error:.3g}, allowed {allowed:.3g}"


def assert_repeats(op: Callable, inputs: Sequence[Tensor]) -> None:
    """Twice the same inputs, twice the same bits."""
    first, second = (outputs_and_gradients(op, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_compiles(op: Callable, inputs: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    """torch.compile takes the operator whole, forward and backward, and changes no result.

    others: of other sizes; for all of them together it compiles once.
    """
    # Imported here: it takes two seconds, and most tests compile nothing.
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(BACKEND)
    dynamic = True if others else None
    compiled = torch.compile(op, fullgraph=True, backend=counter, dynamic=dynamic)
    for given in (inputs, *others):
        expected = outputs_and_gradients(op, given)
        with warnings.catch_warnings():
            # The compiler's own: its use of what PyTorch deprecates, and its advice on products.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
            results = outputs_and_gradients(compiled, given)
        torch.testing.assert_close(results, expected)
    assert counter.frame_count == 1
