"""How `pytest bench/` checks and times; tests/test_bench_reports.py: what it reports.

What needs a GPU is one class, bench.timing.Gpu; all else runs here.
"""

from dataclasses import replace
from itertools import count, permutations

import pytest
import torch

from bench import (
    test_cross_entropy,
    test_embedding,
    test_newton_schulz,
    test_qk_norm,
    test_rms_norm,
)
from bench.case import BACKWARD, BOTH, FORWARD, Buffers, Case, again_and_again, sizes, stages
from bench.check import Check, error_ratio
from bench.suite import speed
from bench.timing import (
    HEAD_START,
    LONGEST_HEAD_START,
    Ceilings,
    Contender,
    Cost,
    Samples,
    Stages,
    Stretch,
    buffer_sets,
    interleave,
)
from kernels.cross_entropy import CHUNKS, chunk_rows

D20 = sizes(on_gpu=True, every=False)[0]
H200 = Ceilings(copy=4.0e12, product=7.0e14, special_functions=4.0e12)
MIB = 2**20


def test_shapes_are_those_that_we_train():
    assert (D20.name, D20.tokens, D20.config.n_embd) == ("d20", 65536, 1280)
    assert (D20.config.n_head, D20.config.head_dim, D20.config.vocab_size) == (10, 128, 65536)
    every = sizes(on_gpu=True, every=True)
    assert [(size.name, size.config.n_embd) for size in every] == [
        ("d20", 1280),
        ("d12", 768),
        ("d26", 1664),
        ("d32", 2048),
    ]
    assert sizes(on_gpu=False, every=True)[0].tokens == 64


def test_least_work_at_d20():
    # Floors of the issue and the kernels' docstrings: 0.31 ms at 4.28 TB/s; 1.26e13 FLOPs.
    assert test_qk_norm.case(D20).cost[BACKWARD].bytes == 65536 * 8 * 1280 * 2
    assert test_newton_schulz.case(D20).cost[FORWARD].flops == pytest.approx(1.258e13, rel=1e-3)
    loss = test_cross_entropy.case("linear_cross_entropy", D20, 15.0)
    assert loss.cost[BOTH].flops == 6 * 65536 * 65536 * 1280
    logits = test_cross_entropy.logits_case(D20).cost[FORWARD]
    rows = chunk_rows(65536, CHUNKS)
    assert logits == Cost(bytes=4 * rows * 65536, special_functions=3 * rows * 65536)
    embedding = test_embedding.case(D20).cost
    assert embedding[BACKWARD].bytes == 2 * 65536 * 1280 * 2
    norm = test_rms_norm.case("add_rms_norm", D20).cost
    assert norm[BOTH].bytes == norm[FORWARD].bytes + norm[BACKWARD].bytes == 8 * 65536 * 1280 * 2


@pytest.mark.parametrize(
    ("bytes_a_call", "sets"),
    [(1, 32 * 60 * MIB), (960 * MIB, 2), (336 * MIB, 6), (3839 * MIB, 2), (3840 * MIB, 1)],
)
def test_buffer_sets_outgrow_the_l2(bytes_a_call, sets):
    assert buffer_sets(bytes_a_call, 60 * MIB) == sets


def test_roofline_is_the_slowest_of_three():
    assert H200.seconds(Cost(bytes=8e9)) == pytest.approx(2e-3)
    assert H200.seconds(Cost(bytes=8e9, flops=2.1e12)) == pytest.approx(3e-3)
    assert H200.seconds(Cost(bytes=8e9, special_functions=1e10)) == pytest.approx(2.5e-3)


def test_interleave_draws_its_order_and_drops_the_warm_up():
    order = []
    ticks = count()

    def contender(name):
        return lambda: order.append(name) or float(len(order))

    samples = interleave(
        {name: contender(name) for name in "abc"},
        seconds=0.0,
        least=40,
        warm_up=1,
        clock=lambda: float(next(ticks)),
    )
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 41
    # Each once a round, and none always behind the same one.
    assert set(rounds) == set(map("".join, permutations("abc")))
    assert samples["a"].ms == tuple(3.0 * i + r.index("a") + 1 for i, r in enumerate(rounds))[1:]


def test_interleave_stops_at_its_time_or_its_most_rounds():
    def rounds(**limits):
        ticks = count()
        return len(
            interleave({"a": lambda: 1.0}, clock=lambda: float(next(ticks)), **limits)["a"].ms
        )

    assert rounds(seconds=100.0, least=2, most=5) == 5
    assert rounds(seconds=3.0, least=2, most=50) == 4
    assert rounds(seconds=0.0, least=7, most=50) == 7


class FakeGpu:
    """A call takes 3 ms; the host is done queueing once the head start is long enough."""

    def __init__(self, enough):
        self.enough = enough
        self.stretches = []

    def stretch(self, stages, sets, load, head_start):
        self.stretches.append((load, head_start))
        return Stretch(3.0, load > 0 or head_start >= self.enough, 1.5)


def test_head_start_grows_until_the_host_is_ahead():
    gpu = FakeGpu(enough=3 * HEAD_START)
    contender = Contender(gpu, Stages(None, None), [])
    assert [contender.sample(), contender.sample()] == [3.0, 3.0]
    starts = [0, HEAD_START, 2 * HEAD_START, 4 * HEAD_START, 4 * HEAD_START]
    assert gpu.stretches == [(0, start) for start in starts]
    assert not contender.waits_for_gpu
    assert contender.ghz == [1.5, 1.5]


def test_load_goes_on_for_its_time_and_is_the_head_start():
    gpu = FakeGpu(enough=HEAD_START)
    contender = Contender(gpu, Stages(None, None), [], load_ms=100.0)
    for _ in range(3):
        contender.sample()
    assert gpu.stretches == [(0, 0), (0, HEAD_START), (34, 0), (34, 0)]


def test_call_that_waits_for_the_gpu_is_timed_as_it_is():
    gpu = FakeGpu(enough=float("inf"))
    contender = Contender(gpu, Stages(None, None), [])
    assert contender.sample() == 3.0
    assert gpu.stretches[-2:] == [(0, LONGEST_HEAD_START), (0, 0)]
    assert contender.waits_for_gpu


def test_percentiles_and_rates():
    samples = Samples((4.0, 1.0, 2.0, 3.0, 5.0))
    figures = speed(samples, Cost(bytes=6e9), H200)
    assert (figures["ms"], figures["p20"], figures["p80"]) == pytest.approx((3.0, 1.8, 4.2))
    assert figures["gb_per_s"] == pytest.approx(2000.0)
    assert figures["tflop_per_s"] is None
    assert figures["of_ceiling"] == pytest.approx(0.5)
    figures = speed(samples, Cost(bytes=6e9, flops=1.05e12), H200)
    assert figures["gb_per_s"] is None
    assert figures["tflop_per_s"] == pytest.approx(350.0)


def test_error_ratio_is_of_the_worst_tensor():
    eager = {"y0": 0.002, "dx": 0.004}
    assert error_ratio({"y0": 0.003, "dx": 0.002}, eager) == pytest.approx(1.5)
    assert error_ratio({"y0": 1e-9, "dx": 0.0}, {"y0": 0.0, "dx": 1e-8}) == 1.0
    assert error_ratio({"y0": float("nan"), "dx": 0.1}, eager) != pytest.approx(25.0)


def double(x):
    return x * 2.0


def case_of(**providers):
    return Case(
        "double",
        lambda: (torch.randn(4, 8).bfloat16().requires_grad_(),),
        double,
        {name: lambda call=call: call for name, call in providers.items()},
        {FORWARD: Cost(bytes=1)},
    )


def run_out_of_memory(x):
    raise torch.OutOfMemoryError


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr("bench.check.missing", lambda provider: None)
    monkeypatch.setattr("bench.check.installed", lambda distribution: "1.2.3")


def test_only_rivals_that_are_right_are_timed(all_installed):
    rivals = {
        "compile": lambda x: x * 2.0 + 1.0,
        "liger": double,
        "quack": run_out_of_memory,
        "torch": lambda x: x.shapes,
    }
    check = Check(case_of(ours=double, eager=double, **rivals), ["ours", "eager", *rivals])
    assert set(check.calls) == {"ours", "eager", "liger"}
    assert check.ratio("liger") == 1.0
    assert check.notes["quack"] == "out of memory"
    assert check.notes["compile"].startswith("wrong: error ratio")
    assert check.notes["torch"].startswith("AttributeError")
    # Each is raised in its own provider's test; that of who did not fit is skipped.
    assert {name: type(problem) for name, problem in check.failures.items()} == {
        "compile": AssertionError,
        "torch": AttributeError,
    }


def fails_to_build():
    raise TypeError("epilogue fn depends on a ContextVar\nof which there is no key")


def fails_when_called(x):
    raise ImportError("no cutlass")


def test_an_operator_of_a_guest_that_does_not_run_says_why_and_fails_nothing(all_installed):
    case = case_of(ours=double, eager=double, liger=fails_when_called)
    case = replace(case, providers={**case.providers, "quack": fails_to_build})
    check = Check(case, case.providers)
    assert set(check.calls) == {"ours", "eager"}
    assert check.notes == {
        "liger": "not available: liger-kernel 1.2.3: ImportError: no cutlass",
        "quack": "not available: quack-kernels 1.2.3: TypeError: epilogue fn depends on a "
        "ContextVar of which there is no key",
    }
    assert check.failures == {}


def test_a_guest_that_computes_something_else_fails(all_installed):
    check = Check(
        case_of(ours=double, eager=double, quack=lambda x: x * 3.0), ["ours", "eager", "quack"]
    )
    assert isinstance(check.failures["quack"], AssertionError)


def test_a_rival_that_is_not_installed_says_so():
    check = Check(case_of(ours=double, eager=double, liger=double), ["ours", "eager", "liger"])
    assert check.notes.get("liger") in (None, "liger-kernel is not installed")


def test_ours_and_eager_must_be_right():
    with pytest.raises(AssertionError, match=r"double, ours: .* x PyTorch's error"):
        Check(case_of(ours=lambda x: x * 2.0 + 0.1, eager=double), ["ours", "eager"])
    with pytest.raises(AssertionError, match="eager is not the reference's maths"):
        Check(case_of(ours=double, eager=lambda x: -x), ["ours", "eager"])
    with pytest.raises(torch.OutOfMemoryError):
        Check(case_of(ours=run_out_of_memory, eager=double), ["ours", "eager"])


def test_stages_time_what_they_say():
    calls = []

    def call(x):
        calls.append("forward")
        return (x * x).clone()

    buffers = Buffers((torch.tensor([3.0], requires_grad=True),), (torch.tensor([10.0]),))
    prepare, run = stages(call, FORWARD)
    assert prepare(buffers) is buffers
    assert not calls
    run(buffers)
    assert calls == ["forward"]
    prepare, run = stages(call, BACKWARD)
    # Twice: each backward pass has a forward pass of its own.
    assert [run(prepare(buffers))[0].item() for _ in range(2)] == [60.0, 60.0]
    prepare, run = stages(call, BOTH)
    assert run(prepare(buffers))[0].item() == 60.0


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
def test_passes_that_do_bench_repeats(direction):
    buffers = Buffers((torch.tensor([3.0], requires_grad=True),), (torch.tensor([10.0]),))
    run = again_and_again(torch.square, direction, buffers)
    for _ in range(2):
        result = run()
        [value] = result[0] if direction == FORWARD else result
        assert value.item() == (9.0 if direction == FORWARD else 60.0)
    assert again_and_again(Stages(None, None), direction, buffers) is None


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
def test_clobbering_calls_get_copies(direction):
    def call(x):
        with torch.no_grad():
            x.detach().zero_()
        return x * 1.0

    x = torch.ones(3, requires_grad=True)
    prepare, run = stages(call, direction, clobbers=True)
    run(prepare(Buffers((x,), (torch.ones(3),))))
    assert x.tolist() == [1.0, 1.0, 1.0]


def test_products_take_the_operators_own_operands():
    size = replace(sizes(on_gpu=False, every=False)[0], batch=1)
    case = test_cross_entropy.case("linear_cross_entropy", size, 15.0)
    buffers = Buffers.of(case, test_cross_entropy.linear_cross_entropy)
    prepare, run = stages(case.floors["products"], BOTH)
    z, dx, dw = run(prepare(buffers))
    loss = test_cross_entropy.linear_cross_entropy(*buffers.arguments, chunks=1)
    wanted = torch.autograd.grad(loss, buffers.leaves)
    assert z.shape == (size.tokens, size.config.vocab_size)
    for product, gradient in zip((dx, dw), wanted, strict=True):
        torch.testing.assert_close(product, gradient, atol=2e-2, rtol=2e-2)
