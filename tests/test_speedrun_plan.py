"""The plan of a speedrun and what it is estimated to take, with its figures."""

import importlib
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro

from gptfast.config import preset
from gptfast.config_chat import mid_preset, sft_preset
from gptfast.errors import UserError
from gptfast.memory import checkpoint_bytes
from gptfast.report.spelling import duration
from gptfast.speedrun import (
    Here,
    Plan,
    SpeedrunSettings,
    State,
    describe_plan,
    disk_needs,
    launch_command,
    make_plan,
)
from gptfast.speedrun.estimate import DiskNeed, config_of, estimate, steps_of
from gptfast.speedrun.settings import FlagSettings, NodeSettings
from gptfast.speedrun.state import DONE
from tests.fake_runs import write
from train import speedrun as recipe
from train.speedrun import check_stages, main, read_flags

ROOT = Path(__file__).parent.parent


def test_the_plan_on_eight_gpus_is_the_references_pipeline():
    plan = make_plan(SpeedrunSettings(cache=Path("/c")), gpus=8)
    assert [step.name for step in plan.steps] == [
        "tokenizer", "base", "loss", "core", "mid", "chat-mid", "sft", "chat-sft", "report",
    ]  # fmt: skip
    assert plan.missing == ()
    assert plan.step("tokenizer").arguments == (
        "--out=runs/speedrun-d20/tokenizer",
        "--data=fineweb-edu",
        "--vocab-size=65536",
        "--max-chars=2000000000",
        "--cache=/c",
    )
    assert plan.step("base").arguments == (
        "--out=runs/base-d20",
        "--depth=20",
        "--vocab-size=65536",
        "--data=fineweb-edu",
        "--tokenizer=runs/speedrun-d20/tokenizer",
        "--cache=/c",
        "--profile-steps=20:23",
    )
    assert plan.step("loss").arguments == ("base", "runs/base-d20", "--only", "bpb", "samples")
    sft = plan.step("sft").arguments
    assert sft == ("--source=runs/mid-d20", "--out=runs/sft-d20", "--cache=/c")
    chat = ("chat", "--source=runs/sft-d20", "--task")
    assert plan.step("chat-sft").arguments[:3] == chat
    assert plan.step("chat-sft").arguments[3:] == (
        "ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval",
    )  # fmt: skip


def test_the_toy_needs_no_network_and_names_what_it_leaves_out(tmp_path):
    plan = make_plan(SpeedrunSettings(rl=True), gpus=0)
    assert plan.depth == 2
    assert "--data=embedded" in plan.step("base").arguments
    assert [name for name, _ in plan.missing] == ["core", "chat-mid", "chat-sft", "chat-rl"]
    assert "--task=toy" in plan.step("rl").arguments
    # A GPU that is not to be used changes nothing.
    assert make_plan(SpeedrunSettings(rl=True, device="cpu"), gpus=4) == plan

    for name in ("arc", "gsm8k"):
        (tmp_path / name).mkdir()
    folders = {"data": str(tmp_path), "chat_data": tmp_path, "core_bundle": tmp_path}
    plan = make_plan(SpeedrunSettings(**folders, rl=True, offline=True), gpus=1)
    chat = plan.step("chat-mid").arguments
    assert chat == (
        "chat", "--source=runs/mid-d20", "--task", "ARC-Easy", "ARC-Challenge", "GSM8K",
        f"--chat-data={tmp_path}",
    )  # fmt: skip
    assert plan.missing[0] == ("chat-mid", "MMLU, HumanEval: not in --chat-data")
    for stage in ("mid", "sft", "rl"):
        assert f"--chat-data={tmp_path}" in plan.step(stage).arguments
    assert f"--core-bundle={tmp_path}" in plan.step("core").arguments


class ParsedError(Exception):
    """The flags were understood."""


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("folders", [True, False])
def test_every_step_says_what_its_recipe_understands(folders, offline, gpus, tmp_path, monkeypatch):
    for name in ("arc", "gsm8k"):
        (tmp_path / name).mkdir()
    given: dict = {"data": str(tmp_path), "rl": True, "offline": offline}
    if folders:
        given |= {"chat_data": tmp_path, "core_bundle": tmp_path, "tokenizer": tmp_path}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    parse = tyro.cli

    def stop_behind(*arguments, **options):
        parse(*arguments, **options)
        raise ParsedError

    monkeypatch.setattr(tyro, "cli", stop_behind)
    for step in make_plan(SpeedrunSettings(**given), gpus=gpus).steps:
        monkeypatch.setattr(sys, "argv", [step.script, *step.arguments])
        recipe = importlib.import_module(step.script.removesuffix(".py").replace("/", "."))
        # evaluate.py's subcommands are parsed elsewhere, and go on until they miss something.
        with pytest.raises((ParsedError, UserError)):
            recipe.main()


def test_depth_and_a_steps_own_flags_go_where_they_belong():
    flags = FlagSettings(base_flags='--num-iterations 500 --validation "a b"', chat_flags="-x 5")
    settings = SpeedrunSettings(depth=12, out=Path("r"), tokenizer=Path("/t"), flags=flags)
    plan = make_plan(settings, gpus=2)
    assert plan.step("tokenizer") is None
    base = plan.step("base").arguments
    assert base[1] == "--depth=12"
    assert base[-4:] == ("--num-iterations", "500", "--validation", "a b")
    assert "--tokenizer=/t" in base
    assert plan.step("chat-sft").arguments[-2:] == ("-x", "5")
    assert "--source=r/base-d12" in plan.step("mid").arguments


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offline": True}, "fineweb-edu would be fetched"),
        ({"processes": 3}, "--processes 3, but this node has 2 GPU"),
        ({"chat_data": Path("/nowhere")}, "no folder /nowhere"),
        ({"flags": FlagSettings(mid_flags='"')}, "--mid-flags"),
    ],
)
def test_what_cannot_work_is_told_before_anything_runs(settings, words):
    with pytest.raises(UserError, match=words):
        make_plan(SpeedrunSettings(**settings), gpus=2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"base": "--total-batch-size 131072"}, "base: total batch of 131072 .* 4 process"),
        (
            {"base": "--device-batch-size 64", "mid": "--train gsm8k --total-batch-size 262144"},
            "mid: total batch of 262144 .*64 x 2048 each.* that work: 524288",
        ),
        ({"mid": "--train gsm8k[:0]"}, "mid: 'gsm8k.:0.' is no part of a mixture"),
        ({"sft": "--train gsm8k /no/such.jsonl"}, "sft: no conversations /no/such.jsonl"),
        ({"mid": "--train smoltalk --val gsm8k"}, "mid: no smoltalk in --chat-data"),
        ({"rl": "--examples-per-step 6"}, "rl: 6 examples a step .* by 4"),
    ],
)
def test_what_a_later_stage_would_refuse_is_told_before_anything_runs(flags, words, tmp_path):
    for name in ("arc", "gsm8k"):
        (tmp_path / name).mkdir()
    # What the reference trains on is not all there.
    both = {"mid": "--train gsm8k", "sft": "--train gsm8k arc-easy"} | flags
    both = FlagSettings(**{f"{name}_flags": value for name, value in both.items()})
    settings = SpeedrunSettings(chat_data=tmp_path, rl=True, flags=both)
    plan = make_plan(settings, gpus=4)
    with pytest.raises(UserError, match=words):
        check_stages(read_flags(plan, nodes=1), processes=plan.processes)


@pytest.mark.parametrize("flags", [{"evaluate": "--nonsense 3"}, {"chat": "--max-problems x"}])
def test_flags_of_an_evaluation_are_read_before_anything_runs(flags, capsys):
    flags = FlagSettings(**{f"{name}_flags": value for name, value in flags.items()})
    plan = make_plan(SpeedrunSettings(flags=flags), gpus=4)
    with pytest.raises(SystemExit) as end:
        read_flags(plan, nodes=1)
    assert end.value.code == 2
    assert re.search("--nonsense|--max-problems", "".join(capsys.readouterr()))


def test_settings_are_checked():
    with pytest.raises(UserError, match="depth must be at least 1"):
        SpeedrunSettings(depth=0)
    with pytest.raises(UserError, match=r"--node-rank 2 of 2 node"):
        NodeSettings(nodes=2, node_rank=2)


def test_steps_start_alone_under_torchrun_or_on_several_nodes():
    plan = make_plan(SpeedrunSettings(), gpus=4)
    build = partial(launch_command, python="py", processes=4)
    alone = build(plan.step("tokenizer"), [], node=NodeSettings())
    assert alone[:2] == ["py", str(ROOT / "train" / "tokenizer.py")]
    torchrun = build(plan.step("base"), ["--resume"], node=NodeSettings())
    assert torchrun[:5] == [
        "py", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4",
    ]  # fmt: skip
    assert torchrun[-1] == "--resume"
    node = NodeSettings(nodes=2, node_rank=1, master_addr="h", master_port=500)
    several = build(plan.step("base"), [], node=node)
    assert several[3:8] == [
        "--nnodes=2", "--node_rank=1", "--master_addr=h", "--master_port=501", "--nproc_per_node=4",
    ]  # fmt: skip
    one = launch_command(plan.step("base"), [], python="py", processes=1, node=NodeSettings())
    assert one[1].endswith("train/base.py")


def here(**more) -> Here:
    known = {"gpu": "NVIDIA H100 80GB HBM3", "gpus": 8, "nodes": 1, "gpu_memory": 80 * 2**30}
    known |= {"cpu_flops": 0.0}
    return Here(**{**known, **more})


def stages_of(plan: Plan) -> dict[str, object]:
    base = preset(on_gpu=plan.on_gpu, processes=plan.processes)
    on_gpu = plan.on_gpu
    return {"base": base, "mid": mid_preset(on_gpu=on_gpu), "sft": sft_preset(on_gpu=on_gpu)}


def test_the_dry_run_knows_what_d20_takes(tmp_path):
    plan = make_plan(SpeedrunSettings(out=tmp_path), gpus=8)
    stages, state = stages_of(plan), State(plan, {})
    base = stages["base"]
    assert steps_of(base) == 21_400
    assert checkpoint_bytes(config_of(base)) == 4 * (2 * 393_216_000 + 3 * 167_772_160)
    found = estimate(plan.step("base"), stages, here())
    # 11.22 B tokens and 87 validations' forward passes at 57 % of 8 x 989 TFLOP/s, and the start.
    tokens = 11_219_763_200 + 87 * 10_485_760 / 3
    assert found.seconds == pytest.approx(40 + tokens * 3_491_758_080 / (0.57 * 8 * 989e12))
    assert found.work == "11.2 B tokens, 21,400 steps"
    # 225 shards of text and three checkpoints of 5.16 GB.
    assert found.disk == pytest.approx(225 * 100e6 + 3 * 5_158_993_920)
    core = estimate(plan.step("core"), stages, here())
    assert core.seconds == pytest.approx(445 * 312 / 989, rel=1e-6)
    lines = describe_plan(plan, stages, here(), [DiskNeed(Path("/"), 38e9, 10**12)], state)
    text = "\n".join(lines)
    assert "speedrun of d20 on 8 x NVIDIA H100 80GB HBM3" in lines[0]
    assert "at $3.00 (the reference report's table" in text
    assert "57% of its peak" in text
    assert lines[-2] == "disk    38.0 GB of 1000.0 GB free at /"
    full = describe_plan(plan, stages, here(), [DiskNeed(Path("/"), 38e9, 10**9)], state)
    assert full[-2] == "disk    38.0 GB of 1.0 GB free at /   TOO LITTLE"
    one_dollar = "\n".join(describe_plan(plan, stages, here(), [], state, price_per_gpu_hour=1.0))
    assert "at $1.00 (as given)" in one_dollar


def test_the_dry_run_tells_what_is_done_and_estimates_what_is_left(tmp_path):
    plan = make_plan(SpeedrunSettings(out=tmp_path), gpus=8)
    stages, state = stages_of(plan), State(plan, {})
    plan.folder.mkdir()
    before = sum(estimate(step, stages, here()).seconds for step in plan.steps)
    record = state.begin(plan.step("tokenizer"), Path("log"), anew=True)
    record.state, record.seconds = DONE, 65.0
    write(plan.folders["tokenizer"] / "report.json", {})
    # Base training was killed in the middle.
    state.begin(plan.step("base"), Path("log"), anew=True)
    write(tmp_path / "base-d20" / "checkpoints" / "step_010700" / "manifest.json", {})
    lines = describe_plan(plan, stages, here(), [], State(plan, {}))
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert re.search(r"tokenizer +done .* it took 1 m 05 s", rows["tokenizer"])
    base = estimate(plan.step("base"), stages, here()).seconds
    assert f" {duration(base / 2)} " in rows["base"]
    assert "11.2 B tokens, 21,400 steps, 10,700 done" in rows["base"]
    assert "done" not in rows["mid"]
    tokenizer = estimate(plan.step("tokenizer"), stages, here()).seconds
    assert f"time    {duration(before - base / 2 - tokenizer)}" in lines


def test_the_dry_run_tells_what_would_be_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "base-d2").mkdir()
    (tmp_path / "base-d2" / "precious").touch()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--dry-run", f"--out={tmp_path}"])
    with pytest.raises(UserError, match="base-d2 holds something that this speedrun did not make"):
        main()
    assert "speedrun of d2 on CPU" in capsys.readouterr().out
    assert not (tmp_path / "speedrun-d2").exists()


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_in_the_end_it_says_how_to_talk_to_the_last_model(stage, tmp_path, monkeypatch, capsys):
    settings = SpeedrunSettings(out=tmp_path / "my runs", rl=stage == "rl")
    monkeypatch.setattr(recipe, "run_plan", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["elsewhere/train/speedrun.py"])
    assert recipe.run(make_plan(settings, gpus=8), settings) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("talk to it: ")
    assert shlex.split(command) == [
        "python", "elsewhere/train/chat.py", "--source", f"{tmp_path}/my runs/{stage}-d20",
    ]  # fmt: skip


def test_room_is_asked_of_the_disk_that_is_written_to(tmp_path, monkeypatch):
    out, cache = tmp_path / "out", tmp_path / "cache"
    plan = make_plan(SpeedrunSettings(out=out, cache=cache), gpus=8)
    stages = stages_of(plan)
    one, shard = checkpoint_bytes(config_of(stages["base"])), 100e6
    # Of base, mid and SFT two checkpoints are kept, while a third is written.
    (need,) = disk_needs(plan, stages, cache)
    assert need.needed == 9 * one + 225 * shard
    assert need.folder == tmp_path
    # What is there already is not written again, and of a finished stage nothing is.
    (cache / "data" / "fineweb-edu").mkdir(parents=True)
    for number in range(25):
        (cache / "data" / "fineweb-edu" / f"shard_{number:05}.parquet").touch()
    (out / "base-d20").mkdir(parents=True)
    (out / "base-d20" / "summary.json").write_text("{}")
    (out / "mid-d20" / "checkpoints" / "step_000100").mkdir(parents=True)
    (need,) = disk_needs(plan, stages, cache)
    assert need.needed == (2 + 3) * one + 200 * shard
    # Two disks, two needs.
    stat = os.stat
    monkeypatch.setattr(
        "os.stat",
        lambda p, **k: (
            SimpleNamespace(st_dev=str(cache) in str(p)) if p in (out, cache) else stat(p, **k)
        ),
    )
    runs, text = disk_needs(plan, stages, cache)
    assert (runs.folder, runs.needed, text.folder, text.needed) == (out, 5 * one, cache, 2e10)


def test_of_an_unknown_gpu_no_time_and_no_price_is_invented():
    plan = make_plan(SpeedrunSettings(), gpus=8)
    text = "\n".join(
        describe_plan(plan, stages_of(plan), here(gpu="Brandnew 1"), [], State(plan, {}))
    )
    assert "unknown  11.2 B tokens" in text
    assert "at least" in text
    assert "unknown: no price of this GPU" in text


def test_the_toys_dry_run():
    plan = make_plan(SpeedrunSettings(), gpus=0)
    here_ = here(gpu=None, gpus=0, gpu_memory=0, cpu_flops=50e9)
    text = "\n".join(describe_plan(plan, stages_of(plan), here_, [], State(plan, {})))
    assert "61.4 K tokens, 60 steps" in text
    assert "core       left out: offline, and no --core-bundle given" in text
    assert "money" not in text
