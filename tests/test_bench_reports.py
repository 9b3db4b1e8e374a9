"""What `pytest bench/` reports: marks, table, JSON, comparison, chart."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.case import BACKWARD, BOTH, FORWARD
from bench.conftest import (
    LINES,
    SUITE,
    pytest_sessionfinish,
    refuse_missing_folder,
    refuse_other_gpu,
)
from bench.marks import marks
from bench.report import Row, agreement, chart, compare, read_json, table, timed, write_json
from bench.suite import Suite


def row(case, direction, provider, ms, size="d20", **more):
    figures = {"p20": ms, "p80": ms, "of_ceiling": 0.9, "gb_per_s": 1000.0, "peak_gib": 1.0}
    figures["sm_ghz"] = 1.5
    return Row(case, size, direction, provider, ms=ms, **{**figures, **more})


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
        row("linear_cross_entropy", BOTH, "ours", 54.0, peak_gib=2.1, errors={"dweight": 0.002}),
        row("linear_cross_entropy", BOTH, "8_chunks", 56.0, errors={"dweight": 0.004}),
        row("linear_cross_entropy", BOTH, "eager", 99.0, errors={"dweight": 0.003}),
        row("linear_cross_entropy", BOTH, "products", 50.0, ours_ms=55.0),
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
        "NOT MET linear_cross_entropy, 8 chunks: dweight no further from fp32 than "
        "unchunked PyTorch -> 4.000e-03, PyTorch 3.000e-03",
        "met     medians of long calls within 5% of triton.testing.do_bench -> "
        "-2.0% at most in 1 passes, of newton_schulz d20 forward",
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
        *("90.0%", "1.50", "1.00", "1.01", "1.00"),
    ]
    assert lines[5].split()[-1] == "1.50"
    assert lines[6].split(maxsplit=1) == ["liger", "liger-kernel is not installed"]
    assert "630 TFLOP/s" in lines[-1]


def test_agreement_takes_the_clock_out_where_there_is_a_product():
    asked = {"do_bench_ms": 1.2, "do_bench_ghz": 1.25}
    lines = agreement(
        [
            row("rms_norm", FORWARD, "ours", 1.0),
            row("squared_relu", BACKWARD, "ours", 1.0, **asked),
            row("newton_schulz", FORWARD, "ours", 1.0, gb_per_s=None, **asked),
        ]
    )
    assert [line.split()[2:] for line in lines[4:]] == [
        ["backward", "1.0000", "1.50", "1.2000", "1.25", "-16.7%", "-"],
        ["forward", "1.0000", "1.50", "1.2000", "1.25", "-16.7%", "+0.0%"],
    ]
    assert agreement([row("rms_norm", FORWARD, "ours", 1.0)]) == []


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


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fine in (None, Path("now.json"), tmp_path / "now.json"):
        refuse_missing_folder("--json", fine)
    with pytest.raises(pytest.UsageError, match=r"--chart no/c.png: there is no folder no$"):
        refuse_missing_folder("--chart", Path("no/c.png"))


@pytest.mark.parametrize(
    ("options", "before", "after", "lines"),
    [
        ({}, 0, 0, []),
        (
            {"--json": Path("now.json"), "--compare": Path("kept.json")},
            0,
            1,
            ["--json, --compare: nothing was measured in this session"],
        ),
        ({"--chart": Path("c.png")}, 2, 2, ["--chart: nothing was measured in this session"]),
    ],
    ids=["nothing asked", "asked", "failed before"],
)
def test_a_session_that_measured_nothing_fails_if_it_was_to_write_or_compare(
    options, before, after, lines
):
    stash = pytest.Stash()
    stash[SUITE] = Suite(None, 0.0, do_bench=False)
    config = SimpleNamespace(stash=stash, option=None, getoption=options.get)
    session = SimpleNamespace(config=config, exitstatus=before)
    pytest_sessionfinish(session)
    assert (session.exitstatus, stash[LINES]) == (after, lines)
