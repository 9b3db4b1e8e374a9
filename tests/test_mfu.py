"""`python -m bench.mfu` on CPU: one call gives table, JSON and parts; its answers to mistakes."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import mfu, mfu_step
from bench.mfu_step import MeasureSettings, MfuSettings, preset
from gptfast import parallel
from gptfast.config import ModelSettings, SystemSettings
from gptfast.errors import UserError
from gptfast.ledger import StepProfiler, read_json
from gptfast.ledger.book import checks, unnamed_kernels
from gptfast.ledger.kinds import PRODUCTS
from gptfast.model import GPTConfig, flops_per_token
from tests.tuning_cases import leave_out_newton_schulz_kernel


def tiny(out: Path, **more) -> MfuSettings:
    settings = preset(on_gpu=False)
    measure = MeasureSettings(
        device_batch_size=2, accumulation=2, warmup=4, timed=2, out=out, **more
    )
    model = ModelSettings(depth=2, sequence_len=32, vocab_size=320)
    return replace(settings, model=model, measure=measure)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, list[str], StepProfiler]:
    out, said = tmp_path_factory.mktemp("mfu") / "mfu.json", []
    profilers: list[StepProfiler] = []

    def profiler(*args, **options) -> StepProfiler:
        profilers.append(StepProfiler(*args, **options))
        return profilers[-1]

    with pytest.MonkeyPatch.context() as patch:
        leave_out_newton_schulz_kernel(patch)
        # One thread: on a busy machine two that wait for each other take minutes.
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(mfu_step, "StepProfiler", profiler)
        with parallel.start(cpu=True) as world:
            mfu.measure(tiny(out, sharding_cost=True), world, said.append)
    return out, said, *profilers


def test_one_call_gives_everything(measured):
    out, said, profiler = measured
    ledger = read_json(out)
    assert ledger.device == "cpu"
    assert ledger.job.accumulation == 2
    assert ledger.settings["kernels"] == "reference"
    assert ledger.steps == 3
    # A stamp before each of the 2 timed steps, and one behind them.
    assert len(profiler._stamps) == 3
    assert sum(row.ms for row in ledger.rows) == pytest.approx(ledger.step_ms, rel=0.02)
    # A micro-step has 12 products in its blocks; each is called in both.
    qkv = next(row for row in ledger.rows if row.name == "qkv, weight gradient")
    width, tokens = ledger.job.config.n_embd, 2 * 2 * 32
    assert qkv.flops == 2 * 2 * tokens * width * 3 * width
    for part in ("forward_backward_ms", "optimizer_ms", "sharded_ms", "unsharded_ms"):
        assert ledger.parts[part] > 0
    assert ledger.parts["loop_tokens_per_second_per_gpu"] > 0
    assert any("no MFU" in line for line in said)
    assert any(line.startswith("step ") for line in said)
    assert json.loads(out.read_text())["mfu_own_peak"] is None


# The compiler's and the profiler's warnings are their own affair.
@pytest.mark.filterwarnings("default")
@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_every_kernel_of_a_small_step_on_a_gpu_has_a_name(tmp_path, kernels):
    settings = MfuSettings(
        model=ModelSettings(depth=4, sequence_len=256, vocab_size=4096),
        system=SystemSettings(kernels=kernels),
        measure=MeasureSettings(
            device_batch_size=8, warmup=4, timed=4, out=tmp_path / "mfu.json", sharding_cost=True
        ),
    )
    with parallel.start() as world:
        mfu.measure(settings, world, lambda line: None)
    ledger = read_json(tmp_path / "mfu.json")
    assert ledger.device == torch.cuda.get_device_name()
    assert ledger.ceilings.product > 1e13
    assert sum(row.ms for row in ledger.rows) == pytest.approx(ledger.step_ms, rel=0.02)
    assert unnamed_kernels(ledger) == []
    assert checks(ledger)["everything_else"] <= 0.03
    products = [row for row in ledger.rows if row.group == PRODUCTS]
    assert len(products) == 15
    assert all(row.flops for row in products)


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.mfu", *map(str, arguments)])
    return mfu.main()


def test_compare_exits_1_beyond_the_threshold(measured, tmp_path, monkeypatch, capsys):
    out, _, _ = measured
    assert run(monkeypatch, "compare", out, out) == 0
    slow = json.loads(out.read_text())
    slow["unprofiled_step_ms"] *= 1.5
    slow["step_ms"] += 10
    slow["rows"][0]["ms"] += 10
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(slow))
    assert run(monkeypatch, "compare", out, slower) == 1
    assert f"{slow['rows'][0]['name']}" in capsys.readouterr().out
    assert run(monkeypatch, "compare", out, slower, "--max-loss", "0.6") == 0
    for wrong in ("nan", "-0.1"):
        assert run(monkeypatch, "compare", out, slower, "--max-loss", wrong) == 2
        assert f"max_loss must be at least 0, got {wrong}" in capsys.readouterr().err

    slow["job"]["batch"] = 3
    slower.write_text(json.dumps(slow))
    assert run(monkeypatch, "compare", out, slower) == 2
    assert "batch is 2 and 3" in capsys.readouterr().err
    slower.write_text(out.read_text()[:500])
    assert run(monkeypatch, "compare", out, slower) == 2
    assert "no ledger" in capsys.readouterr().err


def test_a_batch_that_cannot_be_predicted_is_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "predict", "--total-batch-size", 1_000_000) == 2
    assert capsys.readouterr().err.startswith("error: total_batch_size 1,000,000 is no multiple")


def test_out_of_memory_says_what_would_fit(monkeypatch, capsys):
    def measure(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Card:
        total_memory = 80 * 2**30

    monkeypatch.setattr(mfu, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, Card.total_memory))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: Card.total_memory)
    flags = ("--depth", 20, "--sequence-len", 2048, "--vocab-size", 65536)
    assert run(monkeypatch, *flags, "--device-batch-size", 60) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "out of GPU memory: 60 sequences of 2048" in line
    assert "the GPU has 80.0 GiB" in line
    assert "--device-batch-size 12 should fit" in line
    assert "--reshard-after-forward" in line


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"warmup": 0}, "warmup must be at least 3, got 0"),
        ({"device_batch_size": 0}, "device_batch_size must be at least 1"),
        ({"out": Path("table.txt")}, "must end in .json"),
    ],
    ids=["warmup", "batch", "out"],
)
def test_settings_are_checked_where_they_are_made(wrong, words):
    with pytest.raises(UserError, match=words):
        MeasureSettings(**wrong)


def test_attentions_formula_is_12_of_the_14_that_torch_counts():
    """FlopCounter also counts the scores that backward makes anew: 2 of 14 products' halves."""
    B, T, H, D = 2, 64, 3, 32
    q, k, v, grad = torch.empty(4, B, H, T, D, device="meta", dtype=torch.bfloat16)
    aten = torch.ops.aten
    with FlopCounterMode(display=False) as counter:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        state = torch.empty(2, dtype=torch.uint64, device="meta")
        offset = torch.empty((), dtype=torch.uint64, device="meta")
        aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, T, T, 0.0, True, state, offset
        )
    assert counter.get_total_flops() == 14 * H * D * T * (B * T)
    config = replace(GPTConfig(), n_head=H, n_kv_head=H, n_embd=H * D, sequence_len=T)
    attention = 2 * (flops_per_token(config) - flops_per_token(config, causal=True))
    assert attention == 12 * config.n_layer * H * D * T
    assert counter.get_total_flops() * 12 * config.n_layer == 14 * attention * B * T
