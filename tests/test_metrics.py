"""The rows of a run: what a resumed one keeps, and what a full disk must not take."""

import json
import math
import resource
from pathlib import Path

import pytest

from gptfast.metrics import MetricsLog
from gptfast.plots import plot_run


def write_rows(folder: Path, steps: int) -> list[str]:
    lines = [json.dumps({"kind": "step", "step": step, "loss": 1.0}) for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return lines


def test_a_resumed_run_appends_to_the_rows_before_its_step(tmp_path):
    lines = write_rows(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    log = MetricsLog(tmp_path, active=True, start_step=3)
    log.row("step", 3, loss=0.5)
    log.close()
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert rows == [*lines[:3], '{"kind": "step", "step": 3, "loss": 0.5}']
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_outlive_a_resume_on_a_full_disk(tmp_path):
    write_rows(tmp_path, 500)
    before = (tmp_path / "metrics.jsonl").read_text()
    # The kernel's own refusal in the middle of a file; Python ignores the signal.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            MetricsLog(tmp_path, active=True, start_step=500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_what_is_no_number_is_null_and_leaves_a_gap_in_the_picture(tmp_path):
    log = MetricsLog(tmp_path, active=True)
    for step, loss in enumerate((2.0, math.nan, math.inf, 1.0)):
        log.row("step", step, loss=loss, tokens=8 * step)
    log.row("eval", 4, val_bpb=math.nan, tokens=32)
    log.row("sample", 4, samples=["NaN"])
    log.close()

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row.get("loss") for row in rows] == [2.0, None, None, 1.0, None, None]
    assert rows[4:] == [
        {"kind": "eval", "step": 4, "val_bpb": None, "tokens": 32},
        {"kind": "sample", "step": 4, "samples": ["NaN"]},
    ]
    assert plot_run(tmp_path, "with gaps").read_bytes().startswith(b"\x89PNG")
