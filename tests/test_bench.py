"""The rules and reports of `pytest bench/`; tests/test_bench_sessions.py runs whole sessions.

What needs a GPU is one class, bench.timing.Gpu; all else runs here.
"""

from dataclasses import replace
from itertools import count

import pytest
import torch

from bench import test_cross_entropy, test_newton_schulz, test_qk_norm, test_rms_norm
from bench.case import BACKWARD, BOTH, FORWARD, Buffers, Case, sizes, stages
from bench.check import Check, error_ratio
from bench.conftest import refuse_other_gpu
from bench.marks import marks
from bench.report import Row, chart, compare, read_json, table, timed, write_json
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
    assert logits == Cost(bytes=4 * 8192 * 65536, special_functions=4.5 * 8192 * 65536)
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


def test_interleave_turns_and_drops_the_warm_up():
    order = []
    ticks = count()

    def contender(name):
        return lambda: order.append(name) or float(len(order))

    samples = interleave(
        {name: contender(name) for name in "abc"},
        seconds=0.0,
        least=2,
        warm_up=1,
        clock=lambda: float(next(ticks)),
    )
    assert "".join(order) == "abc" + "bca" + "cab"
    assert samples["a"].ms == (6.0, 8.0)


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
    """Its host is done queueing once the head start is long enough."""

    def __init__(self, enough):
        self.enough = enough
        self.head_starts = []

    def stretch(self, stages, sets, head_start):
        self.head_starts.append(head_start)
        return Stretch(1.0, head_start >= self.enough)


def test_head_start_grows_until_the_host_is_ahead():
    gpu = FakeGpu(enough=3 * HEAD_START)
    contender = Contender(gpu, Stages(None, None), [])
    assert [contender.sample(), contender.sample()] == [1.0, 1.0]
    assert gpu.head_starts == [HEAD_START, 2 * HEAD_START, 4 * HEAD_START, 4 * HEAD_START]
    assert not contender.waits_for_gpu


def test_call_that_waits_for_the_gpu_is_timed_as_it_is():
    gpu = FakeGpu(enough=float("inf"))
    contender = Contender(gpu, Stages(None, None), [])
    assert contender.sample() == 1.0
    assert gpu.head_starts[-2:] == [LONGEST_HEAD_START, 0]
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


def test_only_rivals_that_are_right_are_timed():
    rivals = {
        "compile": lambda x: x * 2.0 + 1.0,
        "liger": double,
        "quack": run_out_of_memory,
        "torch": lambda x: x.shapes,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.check.missing", lambda provider: None)
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


def row(case, direction, provider, ms, size="d20", **more):
    figures = {"p20": ms, "p80": ms, "of_ceiling": 0.9, "gb_per_s": 1000.0, "peak_gib": 1.0}
    return Row(case, size, direction, provider, ms=ms, **{**figures, **more})


def verdicts(rows, gpu="NVIDIA H200"):
    return {mark.what.split(":")[0]: mark for mark in marks(rows, gpu)}


def test_every_mark_is_open_before_it_is_measured():
    found = marks([], "NVIDIA H200")
    assert len(found) == 15
    assert {(mark.met, mark.measured) for mark in found} == {(None, "not measured")}


@pytest.mark.parametrize(
    ("share", "ours", "rival_share", "rival", "met"),
    [
        (0.90, 1.00, 0.89, 1.01, True),
        (0.90, 1.00, 0.91, 0.99, True),  # within 2 %
        (0.90, 1.00, 0.93, 0.97, False),  # a rival 3 % faster
        (0.87, 1.00, 0.80, 1.09, False),  # below 88 %
        (0.88, 1.00, 0.84, 1.04, True),  # ahead where the best is below 85 %
    ],
)
def test_mark_of_memory_bound_kernels(share, ours, rival_share, rival, met):
    rows = [
        row("rms_norm", FORWARD, "ours", ours, of_ceiling=share),
        row("rms_norm", FORWARD, "eager", 3.0, of_ceiling=0.3),
        row("rms_norm", FORWARD, "compile", rival, of_ceiling=rival_share),
        Row("rms_norm", "d20", FORWARD, "quack", note="quack-kernels is not installed"),
    ]
    mark = next(mark for mark in marks(rows, "NVIDIA H200") if mark.what.startswith("rms_norm f"))
    assert mark.met is met
    assert "best rival compile" in mark.measured


def test_marks_of_the_other_kernels():
    rows = [
        row("cross_entropy_logits", FORWARD, "ours", 0.7, of_ceiling=0.81),
        row("rotary_qk_norm", BACKWARD, "ours", 0.37),
        row("linear_cross_entropy", BOTH, "ours", 55.0, peak_gib=2.1, errors={"dweight": 0.004}),
        row("linear_cross_entropy", BOTH, "eager", 99.0, errors={"dweight": 0.003}),
        row("linear_cross_entropy", BOTH, "products", 50.0),
        row("newton_schulz", FORWARD, "ours", 20.0, do_bench_ms=20.4),
        row("newton_schulz", FORWARD, "eager", 26.0),
    ]
    lines = [str(mark) for mark in marks(rows, "NVIDIA H200") if mark.measured != "not measured"]
    assert lines == [
        "met     cross_entropy_logits: at least 80% of its own roofline -> 81.0%",
        "NOT MET rotary_qk_norm backward, packed gradient and all: at most 0.36 ms -> 0.370 ms",
        "met     linear_cross_entropy both: at most 1.12 x its three products' time -> "
        "1.100 x (55.00 ms, products 50.00 ms)",
        "met     linear_cross_entropy both: peak memory at most 3 GiB -> 2.10 GiB",
        "met     newton_schulz: at least 1.2 x as fast as batched torch.bmm -> "
        "1.300 x (20.00 ms, bmm 26.00 ms)",
        "NOT MET linear_cross_entropy, 8 chunks: dweight no further from fp32 than unchunked "
        "PyTorch -> 4.000e-03, PyTorch 3.000e-03",
        "met     medians of long calls within 5% of triton.testing.do_bench -> "
        "2.0% at most in 1 passes",
    ]
    elsewhere = marks(rows, "NVIDIA H100 80GB HBM3")
    assert next(m for m in elsewhere if "packed" in m.what).met is None


def kept_rows(ours=1.0, compiled=1.5):
    return [
        row("rms_norm", FORWARD, "ours", ours, error_ratio=1.01, errors={"y0": 0.002}),
        row("rms_norm", FORWARD, "eager", 3.0, error_ratio=1.0),
        row("rms_norm", FORWARD, "compile", compiled),
        Row("rms_norm", "d20", FORWARD, "liger", note="liger-kernel is not installed"),
    ]


@pytest.mark.parametrize(
    ("ours", "compiled", "failed"),
    [
        (1.0, 1.5, False),
        (2.0, 3.0, False),  # a slower card: milliseconds do not count
        (1.0, 1.44, False),  # 4 % lost
        (1.1, 1.5, True),  # 9 % lost
    ],
)
def test_compare_by_the_ratio_to_compile(ours, compiled, failed):
    lines, lost = compare(kept_rows(ours, compiled), kept_rows(), max_loss=0.05)
    assert lost is failed
    assert lines[-1].startswith("1 passes compared")
    assert ("rms_norm d20 forward: 1.500 x torch.compile before" in lines[0]) is failed


def test_compare_with_nothing_in_common_fails():
    lines, lost = compare(kept_rows(), [], max_loss=0.05)
    assert lost
    assert "nothing to compare" in lines[0]


def test_json_comes_back(tmp_path):
    file = tmp_path / "kept.json"
    write_json(file, kept_rows(), gpu="NVIDIA H200")
    assert read_json(file) == ("NVIDIA H200", kept_rows())
    file.write_text("{}")
    with pytest.raises(ValueError, match="no JSON of `pytest bench/ --json`"):
        read_json(file)


def test_table_has_a_line_for_every_provider():
    lines = table(
        [
            *kept_rows(),
            row("newton_schulz", FORWARD, "ours", 20.0, gb_per_s=None, tflop_per_s=630.0),
        ]
    )
    assert lines[1] == "rms_norm d20 forward"
    assert lines[3].split() == [
        *("ours", "1.0000", "1.0000", "1.0000", "1000", "GB/s"),
        *("90.0%", "1.00", "1.01", "1.00"),
    ]
    assert lines[5].split()[-1] == "1.50"
    assert lines[6].split(maxsplit=1) == ["liger", "liger-kernel is not installed"]
    assert "630 TFLOP/s" in lines[-1]


def test_timed_rows_of_a_group():
    assert set(timed(kept_rows(), "rms_norm", "d20", FORWARD)) == {"ours", "eager", "compile"}
    assert timed(kept_rows(), "rms_norm", "d12", FORWARD) == {}


def test_chart_is_a_png(tmp_path):
    chart(kept_rows(), tmp_path / "chart.png", "NVIDIA H200")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"gpu": "NVIDIA B200", "rows": []}', "measured on NVIDIA B200, here is Fake H200"),
        ('{"rows": []}', "is no JSON of `pytest bench/ --json`"),
    ],
)
def test_compare_refuses_before_anything_is_measured(tmp_path, content, problem):
    (tmp_path / "kept.json").write_text(content)
    with pytest.raises(pytest.UsageError, match=problem):
        refuse_other_gpu(tmp_path / "kept.json", "Fake H200")
