"""README's figures of d20's step, kernels and loader are the kept runs', digit for digit."""

import json
import re
from pathlib import Path

import pytest

from bench.mfu_predict import measured_points
from bench.providers import RIVALS
from gptfast import hardware
from gptfast.model import GPTConfig, flops_per_token

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results"
KEPT = json.loads((RESULTS / "kernels-h200.json").read_text())
MS = {(r["case"], r["direction"], r["provider"]): r["ms"] for r in KEPT["rows"]}
SHARE = {
    (r["case"], r["direction"]): r["of_ceiling"] for r in KEPT["rows"] if r["provider"] == "ours"
}

# Row of README's table -> the benchmark, and what its cells tell of it.
TABLE = {
    "rotary + QK-norm, packed gradient included": ("rotary_qk_norm", "forward", "backward"),
    "RMSNorm": ("rms_norm", "forward", "backward"),
    "residual add + RMSNorm": ("add_rms_norm", "forward", "backward"),
    "squared ReLU alone": ("squared_relu", "forward", "backward"),
    "rotary alone": ("rotary", "forward", "backward"),
    "embedding": ("embedding", "forward", "backward"),
    "MLP, squared ReLU inside its products": ("squared_relu_mlp", "forward", "both"),
    "linear + softcap + cross-entropy, 2.8 GiB": ("linear_cross_entropy", "both"),
    "its pass over the logits": ("cross_entropy_logits", "forward"),
    "Newton-Schulz of all matrices": ("newton_schulz", "forward"),
    "a whole micro-step, forward + backward: 375 ms": ("micro_step", "both"),
}


def by_ours(case: str, direction: str, *rivals: str) -> str:
    """The fastest rival's time by ours, as README writes it."""
    times = [MS[case, direction, name] for name in rivals if MS.get((case, direction, name))]
    return f"{min(times) / MS[case, direction, 'ours']:.2f} x"


def step_row(gpu: str, run: dict, bold: str) -> str:
    each = run["tokens_per_second_per_gpu"]
    share = hardware.mfu(each * flops_per_token(GPTConfig()), hardware.REPORT_PEAK_FLOPS)
    rate, mfu = (f"{bold}{figure}{bold}" for figure in (f"{each:,}", f"{100 * share:.1f} %"))
    rest = f"{run['peak_memory_gib']} GiB | {run['step_0_seconds']} s |"
    return f"| {run['gpus']} x {gpu} | {rate} | {mfu} | {rest}\n"


@pytest.mark.parametrize("point", measured_points(), ids=lambda point: f"{point.run['gpus']}-GPUs")
def test_a_step_is_the_newest_kept_runs(point):
    assert step_row("H200", point.run, "**" if point.newest else "") in README


def test_the_h100s_step_is_the_kept_runs():
    (run,) = json.loads((RESULTS / "base-h100.json").read_text())["runs"]
    assert step_row("H100 (80 GB, 700 W)", run, "**") in README


def test_the_predictions_check_is_what_it_says():
    two, four = (f"{point.ratio():.3f}" for point in measured_points()[1:])
    assert f"its steps of two and four are {two} and {four} of" in " ".join(README.split())


@pytest.mark.parametrize("label", TABLE)
def test_a_row_is_the_kept_runs(label):
    case, *directions = TABLE[label]
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {label} |")]
    told = [cell.strip() for cell in line.strip("|").split("|")][1:]
    ratios = [by_ours(case, direction, *RIVALS) for direction in directions]
    assert re.findall(r"\d\.\d\d x", " ".join(told[:2]))[: len(ratios)] == ratios
    if shares := re.match(r"(\d+), (\d+) %|(\d+) %", told[2]):
        found = [f"{100 * SHARE[case, direction]:.0f}" for direction in directions]
        assert [share for share in shares.groups() if share] == found


def test_what_stands_beside_the_table_is_the_kept_runs_too():
    ceilings = KEPT["ceilings"]
    copy, product = ceilings["copy"] / 1e12, ceilings["product"] / 1e12
    assert f"(copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s" in README
    assert f"({by_ours('newton_schulz', 'forward', 'eager')} batched bmm)" in README
    # Ours in turns with them.
    (floor,) = [row for row in KEPT["rows"] if row["provider"] == "products"]
    assert f"| {floor['ours_ms'] / floor['ms']:.2f} x its three products |" in README
    assert f"backward: {MS['micro_step', 'both', 'ours']:.0f} ms |" in README


def test_the_loaders_rate_is_the_kept_runs():
    kept = json.loads((RESULTS / "loader-xeon.json").read_text())
    rates = {name: rate / 1e6 for name, rate in kept["tokens_per_second"]["median"].items()}
    ours, alone = rates["parquet to batch"], max(rates["tiktoken, batch"], rates["tiktoken, numpy"])
    assert (kept["settings"]["cores"], kept["environment"]["cpu"][-9:]) == (2, "@ 2.50GHz")
    assert (
        f"makes {ours:.2f} million tokens a second on two cores of a Xeon at 2.50 GHz, where "
        f"tiktoken alone makes {alone:.2f} million"
    ) in " ".join(README.split())
