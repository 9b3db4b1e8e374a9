"""How fast, how exact and how large is linear + softcap + cross-entropy?

    pytest bench/test_cross_entropy.py

linear_cross_entropy             loss and both gradients, beside its three products alone
linear_cross_entropy_no_softcap  without a cap, as QuACK and F.linear_cross_entropy have none
linear_cross_entropy_loss        the loss alone, as for evaluation
cross_entropy_logits             the pass over one chunk of logits: losses, gradient in place

M tokens, V words, C columns: 2 M V C FLOPs a product, three with gradients; bytes at least 2 M V
elements of 2, the logits written and read once. Whoever takes the gradients in the forward pass has
no backward pass to speak of, so only both together are timed. The logits pass has its own roofline,
the larger of bytes (one read, one write) and special functions (kernels/logits_pass.py).
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench.case import BOTH, FORWARD, Case, Size, device, rand
from bench.providers import EIGHT_CHUNKS, compiled
from bench.timing import Cost, Stages
from kernels.cross_entropy import (
    CHUNKS,
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_ref,
)
from kernels.logits_pass import logits_pass
from kernels.logits_tiles import SPECIAL_FUNCTIONS_A_LOGIT

IGNORE = -1
# Standard deviation of the logits. With targets drawn from the model itself this is how a trained
# one looks. With small logits and random targets, as before training, the gradient at nearly every
# target is just under 1, which bf16 rounds up, while tensor cores, over all tokens in one product,
# round sums down: errors that cancel by chance in the reference's favour (dweight 1.9360e-3, ours
# 1.9389e-3, though sums over chunks err eight times less; here 2.3316e-3, ours 2.3296e-3; H200,
# 2026-11-22).
SPREAD = 3.0


def liger(softcap: float | None):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(x, weight, targets):
        # Bias, class weights, ignored, z-loss, smoothing, reduction, cap, z-loss out, accumulation:
        # in fp32, as ours.
        options = (None, None, IGNORE, 0.0, 0.0, "sum", softcap, False, torch.float32)
        return LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets, *options)[0]

    return call


def quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return partial(chunked_linear_cross_entropy, ignore_index=IGNORE, reduction="sum")


def torch_fused():
    options = torch.nn.LinearCrossEntropyOptions()
    return partial(F.linear_cross_entropy, ignore_index=IGNORE, reduction="sum", options=options)


def with_softcap(softcap: float | None):
    eager = partial(linear_cross_entropy_ref, softcap=softcap, chunks=1)
    return {
        "ours": lambda: partial(linear_cross_entropy, softcap=softcap),
        "eager": lambda: eager,
        "compile": lambda: compiled(eager),
        "liger": lambda: liger(softcap),
    }


def with_gradients(softcap: float):
    eight = partial(linear_cross_entropy, softcap=softcap, chunks=8)
    return {**with_softcap(softcap), EIGHT_CHUNKS: lambda: eight}


def without_softcap():
    return {**with_softcap(None), "quack": quack, "torch": torch_fused}


def three_products(softcap: float) -> Stages:
    """The products alone, whole, on the operands that the operator has."""

    def prepare(arguments):
        x, weight, targets = (t.detach() for t in arguments)
        du = x @ weight.T
        logits_pass(du, targets, du.new_empty(len(du), dtype=torch.float32), softcap, IGNORE, True)
        return x, weight, du

    def run(state):
        x, weight, du = state
        return x @ weight.T, du @ weight, du.T @ x

    return Stages(prepare, run)


@torch.no_grad()
def likely_targets(x, weight, softcap: float) -> torch.Tensor:
    """(M,) targets, each drawn from softmax(softcap tanh(x weight^T / softcap))."""
    rows = 4096  # of which all probabilities fit
    drawn = []
    for part in x.split(rows):
        z = softcap * torch.tanh((part @ weight.T).float() / softcap)
        drawn.append(torch.multinomial(torch.softmax(z, dim=-1), 1)[:, 0])
    return torch.cat(drawn)


def case(name: str, size: Size, softcap: float | None, grad: bool = True) -> Case:
    m, v, c = size.tokens, size.config.vocab_size, size.config.n_embd

    def inputs():
        x = rand(m, c, grad=grad)
        weight = rand(v, c, grad=grad, scale=SPREAD * c**-0.5)
        return x, weight, likely_targets(x, weight, size.config.softcap)

    if softcap is None:
        providers = without_softcap()
    else:
        providers = with_gradients(softcap) if grad else with_softcap(softcap)
    products = 3 if grad else 1
    return Case(
        name,
        inputs,
        partial(linear_cross_entropy_ref, softcap=softcap, chunks=16),
        providers,
        {BOTH if grad else FORWARD: Cost(flops=2 * products * m * v * c, bytes=2 * 2 * m * v)},
        floors={"products": three_products(softcap)} if grad and softcap is not None else {},
    )


def logits_pass_ref(logits, targets, softcap: float):
    """Each row's loss, and the gradient of their sum in the logits' dtype."""
    t = torch.tanh(logits.float() / softcap)
    log_p = torch.log_softmax(t * softcap, dim=-1)
    losses = F.nll_loss(log_p, targets, reduction="none")
    onehot = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return losses, ((log_p.exp() - onehot.float()) * (1 - t * t)).to(logits.dtype)


def our_logits_pass(softcap: float) -> Stages:
    """In place, so the clock begins behind a copy."""

    def prepare(arguments):
        logits, targets = arguments
        return logits.clone(), targets, logits.new_empty(len(logits), dtype=torch.float32)

    def run(state):
        logits, targets, losses = state
        logits_pass(logits, targets, losses, softcap, IGNORE, True)
        return losses, logits

    return Stages(prepare, run)


def logits_case(size: Size) -> Case:
    m, v = chunk_rows(size.tokens, CHUNKS), size.config.vocab_size
    eager = partial(logits_pass_ref, softcap=size.config.softcap)
    cost = Cost(bytes=2 * 2 * m * v, special_functions=SPECIAL_FUNCTIONS_A_LOGIT * m * v)
    return Case(
        "cross_entropy_logits",
        lambda: (rand(m, v, scale=SPREAD), torch.randint(v, (m,), device=device())),
        eager,
        {
            "ours": lambda: our_logits_pass(size.config.softcap),
            "eager": lambda: eager,
            "compile": lambda: compiled(eager),
        },
        {FORWARD: cost},
    )


@pytest.mark.parametrize("provider", [*with_gradients(1.0), "products"])
@pytest.mark.parametrize("direction", [BOTH])
def test_linear_cross_entropy(bench, size, direction, provider):
    bench(case("linear_cross_entropy", size, size.config.softcap), size, direction, provider)


@pytest.mark.parametrize("provider", without_softcap())
@pytest.mark.parametrize("direction", [BOTH])
def test_no_softcap(bench, size, direction, provider):
    bench(case("linear_cross_entropy_no_softcap", size, None), size, direction, provider)


@pytest.mark.parametrize("provider", with_softcap(1.0))
@pytest.mark.parametrize("direction", [FORWARD])
def test_loss(bench, size, direction, provider):
    loss = case("linear_cross_entropy_loss", size, size.config.softcap, grad=False)
    bench(loss, size, direction, provider)


@pytest.mark.parametrize("provider", ["ours", "eager", "compile"])
@pytest.mark.parametrize("direction", [FORWARD])
def test_logits_pass(bench, size, direction, provider):
    bench(logits_case(size), size, direction, provider)
