"""What stages share: the source of a stage, its weights, its schedule, what a run leaves behind."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptfast import parallel
from gptfast.attention import BACKENDS
from gptfast.checkpoint.files import load_full_state, read_manifest
from gptfast.config import LearningSettings, OptimSettings, RunSettings
from gptfast.config_chat import CPU_SYSTEM, MidSettings, SourceSettings
from gptfast.errors import UserError
from gptfast.evaluate.loading import Placement
from gptfast.loop import Trainer
from gptfast.model import GPT
from gptfast.plan import Plan
from gptfast.stage import Source, Stage, learning_rate
from gptfast.tokenizer import Tokenizer
from tests.tuning_cases import BYTES, CONFIG, write_source
from train import base, mid, rl, sft


@pytest.fixture(scope="module")
def source_run(tmp_path_factory: pytest.TempPathFactory):
    return write_source(tmp_path_factory.mktemp("source") / "base-d2")


def test_a_source_tells_its_model_tokenizer_and_batch_sizes(source_run):
    source = Source.find(SourceSettings(str(source_run)))
    assert (source.run, source.step, source.config) == (source_run, 7, CONFIG)
    assert source.tokenizer.fingerprint == BYTES.fingerprint
    assert (source.optim.device_batch_size, source.optim.total_batch_size) == (2, 96)
    assert "base-d2, step 7: d2" in str(source)


def test_a_source_without_settings_has_the_defaults(source_run, tmp_path):
    run = shutil.copytree(source_run, tmp_path / "converted")
    (run / "settings.json").unlink()
    assert Source.find(SourceSettings(str(run))).optim == OptimSettings()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SourceSettings("/nowhere"), "/nowhere is no run's folder"),
        (SourceSettings("{run}", source_step=3), "no checkpoint of step 3 .* there are steps 7"),
        (SourceSettings("{run}", tokenizer=Path("/nowhere")), "/nowhere, which is not there"),
    ],
)
def test_a_source_that_is_not_there_is_told(source_run, settings, words):
    settings = replace(settings, source=settings.source.format(run=source_run))
    with pytest.raises(UserError, match=words):
        Source.find(settings)


def test_another_tokenizer_is_refused(source_run, tmp_path):
    other = Tokenizer({bytes([255 - i]): i for i in range(256)})
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="but the model was trained with"):
        Source.find(SourceSettings(str(source_run), tokenizer=tmp_path / "other"))


def test_a_stage_begins_with_the_sources_weights(source_run, tmp_path, monkeypatch):
    monkeypatch.setattr("gptfast.stage.build_optimizer", lambda model, optim, *, kernels: kernels)
    source = Source.find(SourceSettings(str(source_run)))
    saved = load_full_state(source_run / "checkpoints" / "step_000007", "model")
    settings = MidSettings(system=CPU_SYSTEM, run=RunSettings(out=tmp_path / "run"))
    with parallel.start(cpu=True) as world:
        stage = Stage("mid", settings, CONFIG, world, lambda line: None)
        stage.check(device_batch_size=2, accumulation=1)
        stage.build(source)
        assert stage.optimizer == CPU_SYSTEM.kernels == "reference"
        weights = {n: p.detach().full_tensor() for n, p in stage.model.named_parameters()}
        parallel.gather_replica(stage.model, stage.make_gpt())
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    # Not those that a model is made with.
    fresh = GPT(CONFIG)
    fresh.init_weights(torch.Generator().manual_seed(settings.system.seed))
    assert not torch.equal(weights["transformer.wte.weight"], fresh.transformer["wte"].weight)


def test_a_model_of_another_shape_is_refused(source_run, tmp_path):
    source = Source.find(SourceSettings(str(source_run)))
    wider = replace(CONFIG, n_embd=64)
    settings = MidSettings(system=CPU_SYSTEM, run=RunSettings(out=tmp_path / "run"))
    with parallel.start(cpu=True) as world:
        stage = Stage("mid", settings, wider, world, lambda line: None)
        stage.check(device_batch_size=2, accumulation=1)
        with pytest.raises(UserError, match="of another architecture"):
            stage.build(source)


def train_all(stage: Stage) -> None:
    loader = SimpleNamespace(close=lambda: None)
    stage.build()
    stage.train(plan_of(9), loader, BYTES, evaluate=dict, sample=dict, title="")


@pytest.mark.parametrize("place", ["build_sharded", "run"])
def test_a_stage_that_runs_out_of_memory_says_what_should_fit(tmp_path, monkeypatch, place):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    card = SimpleNamespace(total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(parallel if place == "build_sharded" else Trainer, place, fail)
    settings = MidSettings(system=CPU_SYSTEM, run=RunSettings(out=tmp_path / "run"))
    with parallel.start(cpu=True) as world:
        stage = Stage("mid", settings, CONFIG, world, lambda line: None)
        stage.check(device_batch_size=8, accumulation=1)
        with pytest.raises(UserError, match=r"out of .* 8 sequences of 48 .*-batch-size 4 should"):
            train_all(stage)


def test_a_folder_with_a_run_is_not_overwritten(source_run):
    settings = MidSettings(system=CPU_SYSTEM, run=RunSettings(out=source_run))
    with (
        parallel.start(cpu=True) as world,
        pytest.raises(UserError, match="holds a run already"),
    ):
        Stage("mid", settings, CONFIG, world, lambda line: None)


def test_steps_to_profile_are_checked_before_anything_is_made(tmp_path):
    settings = MidSettings(
        system=CPU_SYSTEM, run=RunSettings(out=tmp_path / "run", profile_steps="5")
    )
    with (
        parallel.start(cpu=True) as world,
        pytest.raises(UserError, match="FIRST:END"),
    ):
        Stage("mid", settings, CONFIG, world, lambda line: None)
    assert not (tmp_path / "run").exists()


def test_kernels_that_would_not_run_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    system = replace(CPU_SYSTEM, kernels="triton")
    settings = MidSettings(system=system, run=RunSettings(out=tmp_path / "run"))
    told = pytest.raises(UserError, match="runs on the CPU: give --kernels reference")
    monkeypatch.setattr("gptfast.preflight.INTERPRETED", False)
    with parallel.start(cpu=True) as world, told:
        Stage("mid", settings, CONFIG, world, lambda line: None)
    assert not (tmp_path / "run").exists()
    with told:
        Placement(cpu, kernels="triton")
    assert Placement(cpu).operators == "reference"
    # Triton's interpreter runs them there.
    monkeypatch.setattr("gptfast.preflight.INTERPRETED", True)
    assert Placement(cpu, kernels="triton").operators == "triton"


def test_where_else_to_log_is_checked_on_every_rank_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = RunSettings(out=tmp_path / "run", log_to=("tensorboard", "wandb"))
    settings = MidSettings(system=CPU_SYSTEM, run=run)
    with parallel.start(cpu=True) as world:
        for rank in range(2):
            with pytest.raises(UserError, match=r"--log-to wandb: .* pip install -e '\.\[log\]'"):
                Stage("mid", settings, CONFIG, replace(world, rank=rank), lambda line: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sink", ["tensorboard", "wandb"])
def test_a_sink_that_rank_0_cannot_open_ends_all_ranks_and_leaves_no_run(
    tmp_path, monkeypatch, sink
):
    class Refusing:
        class Error(Exception):
            pass

        @classmethod
        def init(cls, **settings):
            raise cls.Error("No API key configured.\nMore of it.")

    monkeypatch.setitem(sys.modules, "wandb", Refusing)
    settings = MidSettings(system=CPU_SYSTEM, run=RunSettings(out=tmp_path / "run", log_to=(sink,)))
    words = {
        "tensorboard": "--log-to tensorboard: .*File exists",
        "wandb": r"--log-to wandb: No API key configured\. \(WANDB_MODE=offline",
    }
    told: list[bool] = []
    with parallel.start(cpu=True) as world:
        stage = Stage("mid", settings, CONFIG, world, lambda line: None)
        (stage.folder / "tensorboard").touch()
        # What one rank tells, the others hear.
        monkeypatch.setattr(
            parallel.World, "any", lambda self, flag: told.append(flag) or any(told)
        )
        with pytest.raises(UserError, match=words[sink]):
            stage._open_log(plan_of(9), 0)
        stage.world = replace(world, rank=1, local_rank=1)
        with pytest.raises(SystemExit, match="2"):
            stage._open_log(plan_of(9), 0)
    assert told == [True, False]
    assert not (stage.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("stage", [base, mid, sft, rl])
def test_asked_for_the_cpu_a_stage_has_the_defaults_of_a_machine_without_a_gpu(stage, monkeypatch):
    chosen = []
    monkeypatch.setattr(stage, "train", lambda settings, world, say: chosen.append(settings))
    for gpu, flags in ((False, []), (True, ["--device=cpu"]), (True, ["--device", "cpu"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        stage.main()
    assert chosen[0].system == CPU_SYSTEM
    assert chosen == chosen[:1] * 3


@pytest.mark.parametrize(
    ("first", "last", "says"),
    [
        (0, 9, None),
        (3, 9, None),
        (0, 8, "no profile of steps 3:9: the run does steps 0:8"),
        (4, 20, "no profile of steps 3:9: the run does steps 4:20"),
    ],
    ids=["fits", "resumed before", "too short", "resumed within"],
)
def test_a_profile_that_the_run_cannot_finish_is_told_before_step_0(tmp_path, first, last, says):
    said: list[str] = []
    run = RunSettings(out=tmp_path / "run", profile_steps="3:9")
    with parallel.start(cpu=True) as world:
        stage = Stage("mid", MidSettings(system=CPU_SYSTEM, run=run), CONFIG, world, said.append)
        stage.check(device_batch_size=2, accumulation=1)
        profiler = stage._profiler(plan_of(last), first)
    assert (profiler is None) == (says is not None)
    assert [line for line in said if "profile" in line] == [says] * (says is not None)


def test_a_runs_ledger_counts_as_its_metrics_do_and_names_the_attention_it_had(tmp_path):
    run = RunSettings(out=tmp_path / "run", profile_steps="3:9")
    settings = MidSettings(system=replace(CPU_SYSTEM, attention="auto"), run=run)
    with parallel.start(cpu=True) as world:
        stage = Stage("mid", settings, CONFIG, world, lambda line: None)
        stage.check(device_batch_size=2, accumulation=1)
        profiler = stage._profiler(plan_of(9), 0)
    job = profiler.job
    assert (job.counted_tokens, job.counted_flops) == (96, 1000)
    assert profiler.settings["system"]["attention"] == stage.make_gpt.keywords["attention_backend"]
    assert profiler.settings["system"]["attention"] in BACKENDS


def plan_of(steps: int) -> Plan:
    return Plan(
        total_steps=steps,
        accumulation=1,
        tokens_per_step=96,
        flops_per_token=1000,
        learning_rate_multiplier=lambda step: 1.0,
        momentum=lambda step: 0.9,
    )


def test_learning_rates_of_the_stages():
    mid = learning_rate(LearningSettings(), 10)
    assert [mid(step) for step in (0, 7, 8, 9)] == [1.0, 1.0, 1.0, 0.5]
    sft = learning_rate(LearningSettings(init_lr_frac=0.02, warmdown_ratio=1.0), 4)
    assert [sft(step) for step in range(4)] == pytest.approx([0.02, 0.015, 0.01, 0.005])


def test_mid_training_takes_the_batch_sizes_of_its_source_unless_told(source_run):
    source = Source.find(SourceSettings(str(source_run)))
    optim = MidSettings().optim.like(source.optim)
    assert (optim.device_batch_size, optim.total_batch_size, optim.grad_clip) == (2, 96, 0.0)
    told = replace(MidSettings().optim, total_batch_size=480).like(source.optim)
    assert (told.device_batch_size, told.total_batch_size) == (2, 480)


def test_the_sources_manifest_is_what_it_was(source_run):
    """Starting from a run changes nothing in it."""
    manifest = read_manifest(source_run / "checkpoints" / "step_000007")
    assert manifest["step"] == 7
    assert sorted(path.name for path in source_run.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "settings.json",
        "tokenizer",
    ]
    assert json.loads((source_run / "settings.json").read_text())["optim"]["total_batch_size"] == 96
