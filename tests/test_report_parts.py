"""What a report is made with: charts, spelling, the reference, the machine and the code's size."""

import json
import xml.etree.ElementTree as ET

import pytest

from gptfast import hardware
from gptfast.machine import code_size, dependencies, describe_machine
from gptfast.report.charts import Level, Line, bar_steps, line_chart, pairs, standalone, ticks
from gptfast.report.reference import gpu_peak, reference
from gptfast.report.spelling import count, duration, spell


def test_charts_leave_out_what_is_not_finite_and_thin_what_is_long():
    xs = list(range(10_000))
    ys = [float("nan") if x % 7 == 0 else 1.0 + x for x in xs]
    svg = line_chart(
        [Line(xs, ys)], title="<t>", x_label="x & y", y_label="", levels=[Level(50.0, "a<b")]
    )
    root = ET.fromstring(svg)
    points = root.find(".//{*}path[@class='curve']").get("data-points").split(";")
    assert len(points) <= 302
    assert points[-1].endswith(",10 K,10000.00")
    assert "nan" not in svg
    assert root.get("aria-label") == "<t>"
    assert ET.fromstring(standalone(svg))[0].tag.endswith("style")
    # No values, one value: still a picture.
    for line in (Line([], []), Line([5], [3.0])):
        ET.fromstring(line_chart([line], title="", x_label="", y_label="", focus=True))
    bars = ET.fromstring(bar_steps([("a", 100.0), ("b", 60.0), ("c", 60.0)], title="", unit="%"))
    widths = [float(bar.get("width")) for bar in bars.findall(".//{*}rect")]
    assert widths[2] == pytest.approx(0.6 * widths[0], rel=1e-3)
    assert widths[1] == pytest.approx(0.4 * widths[0], rel=1e-3)


def test_pairs_show_what_is_missing_as_missing():
    rows = [("copa", 0.5, 0.4), ("boolq", None, -0.1)]
    root = ET.fromstring(pairs(rows, title="CORE"))
    rings = root.findall(".//{*}circle[@class='ring']")
    dots = root.findall(".//{*}circle[@class='end']")
    assert (len(rings), len(dots)) == (2, 1)
    assert float(dots[0].get("cx")) > float(rings[0].get("cx")) > float(rings[1].get("cx"))


def test_ticks_are_round_and_enclose():
    assert ticks(0.0, 11.2e9, 5) == [0, 2.5e9, 5e9, 7.5e9, 10e9, 12.5e9]
    assert ticks(0.78, 0.93, 5) == pytest.approx([0.75, 0.8, 0.85, 0.9, 0.95])
    assert ticks(3.0, 3.0, 5)[0] < 3 < ticks(3.0, 3.0, 5)[-1]


def test_figures_are_spelled_as_the_reference_spells_them():
    assert spell(3491758080, "Number of FLOPs per token") == "3.491758e+09"
    assert [spell(v) for v in (None, "", True, 0.2, 9999, 10_000, -1, [1, 2])] == [
        "–", "–", "yes", "0.2000", "9999", "10,000", "-1", "1, 2",
    ]  # fmt: skip
    assert [duration(s) for s in (None, 59.94, 65, 3599.6, 29_640)] == [
        "–", "59.9 s", "1 m 05 s", "1 h 00 m", "8 h 14 m",
    ]  # fmt: skip
    assert [count(v) for v in (11_219_763_200, 61_440, 12)] == ["11.2 B", "61.4 K", "12"]


def test_machine_and_code_are_described(tmp_path):
    machine = describe_machine()
    assert len(machine["git_commit"]) == 40
    assert machine["memory_bytes"] > 2**30
    json.dumps(machine)
    size = code_size()
    assert size["files"] > 100
    assert size["lines"] > 10_000
    direct, all_ = dependencies()
    assert direct >= 12
    assert all_ > direct
    # Outside any repository, all that is there counts.
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    assert code_size(tmp_path) == {"characters": 12, "lines": 2, "files": 1}


def test_the_references_mfu_follows_from_its_time():
    """21.02 % of 989 TFLOP/s is the last step's; its whole run comes to 20.92."""
    base = reference()["sections"]["Base model training"]
    rate = base["Total training flops"] / (60 * base["Total training time"]) / 8
    assert 100 * rate / hardware.REPORT_PEAK_FLOPS == pytest.approx(20.92, abs=0.01)
    own = base["MFU %"] * hardware.REPORT_PEAK_FLOPS / gpu_peak()
    assert own == pytest.approx(66.63, abs=0.01)


def test_reference_json_holds_the_references_own_numbers():
    sections = reference()["sections"]
    core = sections["Base model evaluation"]
    tasks = [value for name, value in core.items() if name not in ("Model", "CORE metric")]
    assert len(tasks) == 22
    assert sum(tasks) / 22 == pytest.approx(core["CORE metric"], abs=5e-5)
    baselines = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0, "HumanEval": 0}
    for stage in ("mid", "sft"):
        chat = sections[f"Chat evaluation {stage}"]
        centred = [(chat[task] - b) / (1 - b) for task, b in baselines.items()]
        assert sum(centred) / 5 == pytest.approx(chat["ChatCORE metric"], abs=5e-5)
