"""The ledger of a run: taken on CPU through the same code, kept as JSON, compared with another."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from gptfast.config import OptimSettings
from gptfast.errors import UserError
from gptfast.ledger import (
    Job,
    StepProfiler,
    build,
    compare,
    parse_steps,
    read_json,
    table,
    to_json,
    write,
)
from gptfast.ledger import profiler as profiler_module
from gptfast.ledger.book import Row
from gptfast.ledger.kinds import ELSE, PRODUCTS
from gptfast.ledger.trace import STEP, load_trace, stretch
from gptfast.model import GPT, GPTConfig, flops_per_token
from gptfast.optim import build_optimizer
from tests.fake_trace import D20, JOB, d20_ledger
from tests.tuning_cases import leave_out_newton_schulz_kernel

TINY = GPTConfig(sequence_len=32, vocab_size=320, n_layer=2, n_head=2, n_kv_head=2, n_embd=48)


@pytest.fixture(autouse=True, scope="module")
def plain_optimizer() -> Iterator[None]:
    """Without kernels: Triton's interpreter takes a second for each."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_newton_schulz_kernel(patch)
        yield


def tiny_step(model: GPT, optimizer, ids: torch.Tensor) -> None:
    loss = model(ids, ids.long())
    loss.backward()
    count = torch.tensor(float(ids.numel()))
    optimizer.step(lr_multiplier=1.0, momentum=0.9, token_count=count, loss=loss.detach())


@pytest.fixture(scope="module")
def cpu_trace(tmp_path_factory) -> tuple[Path, int]:
    """A Chrome trace of two steps, and what FlopCounter counts of products in one."""
    torch.manual_seed(0)
    model = GPT(TINY, attention_backend="math")
    model.init_weights()
    optimizer = build_optimizer(model, OptimSettings())
    ids = torch.randint(0, TINY.vocab_size, (3, TINY.sequence_len), dtype=torch.int32)
    tiny_step(model, optimizer, ids)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids.long()).backward()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as taken:
        for number in range(2):
            with record_function(f"{STEP} {number}"):
                tiny_step(model, optimizer, ids)
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    taken.export_chrome_trace(str(path))
    counts = counter.get_flop_counts()["Global"]
    return path, counts[torch.ops.aten.mm]


def test_flops_of_products_equal_torchs_flop_counter(cpu_trace):
    path, counted = cpu_trace
    measured = stretch(load_trace(path))
    assert not measured.on_gpu
    found = build(measured, Job(TINY, 3, 1, 1, 1), "cpu", None)
    products = [row for row in found.rows if row.group == PRODUCTS]
    assert sum(row.flops for row in products) == counted
    # The head's logits are made again in backward: with them the formula's 6 N is exceeded.
    parameters = 6 * TINY.n_layer * 12 * TINY.n_embd**2 + 8 * TINY.vocab_size * TINY.n_embd
    assert counted == parameters * 3 * TINY.sequence_len
    assert len(products) == 15
    assert sum(row.ms for row in found.rows) == pytest.approx(found.step_ms, rel=0.02)
    assert found.mfu() is None


def test_a_trace_that_is_none_is_told_in_one_line(tmp_path, cpu_trace):
    path, _ = cpu_trace
    cut = tmp_path / "cut.json"
    cut.write_text(path.read_text()[:5000])
    with pytest.raises(UserError, match="cut off"):
        load_trace(cut)
    with pytest.raises(UserError, match="cannot read"):
        load_trace(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="holds no step"):
        stretch({"traceEvents": []})


@pytest.fixture(scope="module")
def ledger():
    return d20_ledger()


def test_json_survives_and_foreign_files_are_refused(ledger, tmp_path):
    path = tmp_path / "ledger.json"
    write(replace(ledger, parts={"optimizer_ms": 9.5}), path, say=lambda line: None)
    again = read_json(path)
    assert again == replace(ledger, parts={"optimizer_ms": 9.5})
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "step" in path.with_suffix(".txt").read_text()

    for name, text in {
        "cut": path.read_text()[:2000],
        "foreign": json.dumps({"rows": []}),
        "list": "[1, 2]",
        "kernels": json.dumps({"gpu": "NVIDIA H200", "rows": []}),
    }.items():
        bad = tmp_path / f"{name}.json"
        bad.write_text(text)
        with pytest.raises(UserError, match="is no ledger"):
            read_json(bad)
    other = {**json.loads(path.read_text()), "formula": "6 N"}
    bad.write_text(json.dumps(other))
    with pytest.raises(UserError, match="'6 N'"):
        read_json(bad)
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path / "nowhere.json")


MISSING = object()


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ("rows", MISSING, "rows is missing"),
        ("rows", [], "0 rows and 70.0 ms are no step"),
        ("rows", {}, "rows is an object of 0, not a list"),
        ("rows 3", 7, "rows[3] is 7, not an object"),
        ("rows 3 ms", "12", "rows[3].ms is '12', not a finite number"),
        ("rows 3 ms", math.nan, "rows[3].ms is nan, not a finite number"),
        ("rows 3 ms", True, "rows[3].ms is True, not a finite number"),
        ("rows 3 name", None, "rows[3].name is None, not text"),
        ("rows 3 kernels 0", ["nvjet", 1.0], "rows[3].kernels[0] is a list of 2, not one of 3"),
        ("step_ms", "398", "step_ms is '398', not a finite number"),
        ("unprofiled_step_ms", "398", "unprofiled_step_ms is '398', not a finite number"),
        ("unprofiled_step_ms", -1.0, "-1.0 ms are no step"),
        ("job processes", 0, "job.processes is 0, not a whole number of at least 1"),
        ("job config n_embd", 1281, "job.config: n_embd 1281 over n_head 10"),
        ("job config", MISSING, "job.config is missing"),
        ("ceilings copy", [], "ceilings.copy is a list of 0, not a finite number"),
        ("parts", None, "parts is None, not an object"),
    ],
)
def test_a_damaged_ledger_is_told_by_field_and_file(ledger, tmp_path, where, value, told):
    kept = json.loads(json.dumps(to_json(ledger)))
    *path, last = (int(key) if key.isdecimal() else key for key in where.split())
    inside = kept
    for key in path:
        inside = inside[key]
    if value is MISSING:
        del inside[last]
    else:
        inside[last] = value
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(kept))
    with pytest.raises(UserError, match=re.escape(told)) as error:
        read_json(bad)
    assert str(error.value).startswith(f"{bad} is no ledger")


def test_no_label_is_cut_and_columns_stay_in_line(ledger):
    """PyTorch's kernels differ behind dozens of characters alike."""
    names = [f"void at::native::unrolled_elementwise_kernel<{x}>" for x in ("Add", "Mul")]
    more = replace(ledger, rows=(*ledger.rows, *(Row(ELSE, name, ms=9.0) for name in names)))
    for lines, column, before in (
        (table(more), " ms ", "  "),
        (compare(ledger, more, 0.02)[0], " now ", f"{ELSE}: "),
    ):
        told = [line for line in lines if "unrolled_elementwise" in line]
        assert [line[: len(before + name)] for line, name in zip(told, names, strict=True)] == [
            before + name for name in names
        ]
        end = next(line.index(column) for line in lines if column in line) + len(column) - 1
        assert {line[:end].split()[-1] for line in told} == {"9.00"}
        assert {line[end] for line in told} == {" "}


def slower(ledger, name: str, by_ms: float):
    rows = tuple(replace(r, ms=r.ms + by_ms) if r.name == name else r for r in ledger.rows)
    return replace(
        ledger,
        rows=rows,
        step_ms=ledger.step_ms + by_ms,
        unprofiled_step_ms=ledger.unprofiled_step_ms + by_ms,
    )


def test_compare_names_the_row_that_lost(ledger):
    after = slower(ledger, "squared_relu_bwd", 5.0)
    lines, failed = compare(ledger, after, max_loss=0.02)
    assert failed
    changed = next(line for line in lines if "squared_relu_bwd" in line)
    assert "+5.00" in changed
    points = float(changed.split()[-1])
    own = [replace(ledger, unprofiled_step_ms=None) for ledger in (ledger, after)]
    assert points == pytest.approx(100 * (own[1].mfu() - own[0].mfu()), abs=0.01)
    assert sum("memory-bound" in line for line in lines) == 1

    _, failed = compare(ledger, slower(ledger, "squared_relu_bwd", 0.5), max_loss=0.02)
    assert not failed
    _, failed = compare(after, ledger, max_loss=0.02)
    assert not failed
    plain = replace(ledger, settings={"system": {"kernels": "reference"}})
    lines, _ = compare(replace(ledger, settings={"kernels": "triton"}), plain, max_loss=0.02)
    assert "kernels: triton before, reference now" in lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "NVIDIA H100 80GB HBM3"}, "NVIDIA H200 and on NVIDIA H100"),
        ({"job": JOB._replace(batch=16)}, "batch is 32 and 16"),
        ({"job": JOB._replace(config=D20)}, "n_layer is 2 and 20"),
        ({"unprofiled_step_ms": None}, "without the profiler"),
        ({"job": JOB._replace(tokens_per_step=4)}, "tokens_per_step is 262144 and 4"),
    ],
    ids=["gpu", "batch", "depth", "unprofiled", "padding"],
)
def test_compare_refuses_what_is_not_the_same_work(ledger, change, words):
    with pytest.raises(UserError, match=words):
        compare(ledger, replace(ledger, **change), max_loss=0.02)


def test_a_run_that_counts_all_its_tokens_is_compared_with_one_that_says_nothing(ledger):
    told = JOB._replace(tokens_per_step=4 * JOB.tokens, flops_per_token=flops_per_token(JOB.config))
    lines, failed = compare(ledger, replace(ledger, job=told), max_loss=0.02)
    assert not failed
    assert lines[-1].startswith("step 70.00 -> 70.00 ms")


def test_parse_steps():
    assert parse_steps("20:23") == range(20, 23)
    for bad in ("20", "23:20", "a:b", "20:", "5:5"):
        with pytest.raises(UserError, match="FIRST:END"):
            parse_steps(bad)


def profiled(tmp_path, model, steps: range, **more) -> tuple[StepProfiler, list[str]]:
    said: list[str] = []
    profiler = StepProfiler(
        steps,
        job=Job(TINY, 3, 1, 1, 1),
        device=torch.device("cpu"),
        out=tmp_path / "run" / "ledger.json",
        say=said.append,
        **more,
    )
    optimizer = build_optimizer(model, OptimSettings())
    ids = torch.randint(0, TINY.vocab_size, (3, TINY.sequence_len), dtype=torch.int32)
    for step in range(steps.stop + 1):
        profiler.before(step)
        tiny_step(model, optimizer, ids)
        profiler.after(step)
    return profiler, said


@pytest.fixture
def model() -> GPT:
    model = GPT(TINY, attention_backend="math")
    model.init_weights()
    return model


def test_step_profiler_writes_the_ledger_of_a_run(tmp_path, model):
    (tmp_path / "run").mkdir()
    profiler, said = profiled(tmp_path, model, range(6, 9), keep_trace=True)
    assert profiler.ledger.steps == 2
    assert profiler.ledger.unprofiled_step_ms > 0
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == ["ledger.json", "ledger.trace.json.gz", "ledger.txt"]
    assert read_json(tmp_path / "run" / "ledger.json").step_ms == profiler.ledger.step_ms
    assert stretch(load_trace(tmp_path / "run" / "ledger.trace.json.gz")).steps == 2
    assert sum("without CUDA" in line for line in said) == 1


@pytest.mark.parametrize(
    ("first", "asked", "timed"),
    [(40, {}, range(20, 40)), (70, {"unprofiled": 50}, range(20, 70)), (20, {}, range(3, 20))],
    ids=["20 by default", "50", "the first 3 never count"],
)
def test_as_many_steps_as_asked_are_timed_before_the_profile(
    tmp_path, monkeypatch, first, asked, timed
):
    stamped: list[int] = []
    monkeypatch.setattr(profiler_module, "now", lambda device: stamped.append(step))
    monkeypatch.setattr(StepProfiler, "_start", lambda self: None)
    profiler = StepProfiler(
        range(first, first + 4),
        job=JOB,
        device=torch.device("cpu"),
        out=tmp_path / "ledger.json",
        say=print,
        **asked,
    )
    for step in range(first + 4):
        profiler.before(step)
    assert stamped == [*timed, first]


def test_a_profile_that_cannot_be_taken_is_one_line_and_the_run_goes_on(
    tmp_path, model, monkeypatch
):
    def refuse(self):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nand more")

    monkeypatch.setattr(profile, "start", refuse)
    profiler, said = profiled(tmp_path, model, range(1, 3))
    assert profiler.ledger is None
    assert said[-1] == (
        "no profile of steps 1:3: RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    )


def test_a_run_that_ends_within_its_profile_says_so_and_ends_well(tmp_path, model):
    said: list[str] = []
    profiler = StepProfiler(
        range(3, 9),
        job=Job(TINY, 3, 1, 1, 1),
        device=torch.device("cpu"),
        out=tmp_path / "ledger.json",
        say=said.append,
    )
    profiler.close()
    assert said == []
    profiler.before(3)
    profiler.after(3)
    profiler.before(4)
    assert torch.autograd._profiler_enabled()
    profiler.close()
    profiler.close()
    # A process that ends while the profiler is at work is killed by it (SIGSEGV).
    assert not torch.autograd._profiler_enabled()
    assert said[1:] == ["no profile of steps 3:9: the run ended before"]
    assert not list(tmp_path.iterdir())


def test_other_ranks_take_no_profile(tmp_path, model):
    profiler, said = profiled(tmp_path, model, range(1, 2), active=False)
    assert profiler.ledger is None
    assert said == []
    assert not (tmp_path / "run").exists()
