"""The check before a speedrun: each line green where it should be, red where something is wrong."""

import importlib
import inspect
import pkgutil
import queue
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

import kernels
from gptfast.config import preset
from gptfast.config_chat import MixtureSettings, mid_preset, sft_preset
from gptfast.errors import UserError
from gptfast.selfcheck import FAILED, OK, SKIPPED, run_checks
from gptfast.selfcheck import checks as selfcheck
from gptfast.selfcheck.kernels import MANY, Case, full_gpu, kernel_cases, kernel_error
from gptfast.selfcheck.links import _reduce
from gptfast.speedrun import Here, SpeedrunSettings, make_plan
from gptfast.speedrun.settings import FlagSettings
from kernels.product import LEAST_FILL, fill, suits
from tests.core_cases import write_bundle
from tests.operators import DEVICE
from train.speedrun import read_flags

CASES = {case.name: case for case in kernel_cases(torch.device(DEVICE))}
GIB = 2**30


def here(**more) -> Here:
    known = {"gpu": None, "gpus": 0, "nodes": 1, "gpu_memory": 0, "cpu_flops": 1e10}
    return Here(**{**known, **more})


def check(settings: SpeedrunSettings, *, gpus: int = 0, only: str = "", **machine) -> dict:
    """name -> result of the checks whose name holds `only`."""
    plan = make_plan(settings, gpus=gpus)
    base = preset(on_gpu=plan.on_gpu, processes=plan.processes)
    if settings.data:
        base = replace(base, data=replace(base.data, data=settings.data))
    mid, sft = mid_preset(on_gpu=plan.on_gpu), sft_preset(on_gpu=plan.on_gpu)
    if settings.chat_data:
        mid = replace(mid, mixture=MixtureSettings(chat_data=settings.chat_data))
    stages = {"base": base, "mid": mid, "sft": sft}
    results = run_checks(plan, settings, stages, here(**machine))
    return {result.name: result for result in results if only in result.name}


def test_every_operator_has_a_case():
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        inside = vars(importlib.import_module(f"kernels.{module.name}"))
        own = {n for n, f in inside.items() if inspect.isfunction(f) and f"{n}_ref" in inside}
        found |= {n for n in own if inside[n].__module__ == f"kernels.{module.name}"}
    assert found == {name.partition(",")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_their_references(name):
    """Interpreted without a GPU: the very kernels that --check runs there."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    assert kernel_error(CASES[name], torch.device(DEVICE), dtype) is None


def test_on_a_gpu_our_product_is_tried_too():
    """Alone, and with the activation both ways."""
    rows, columns = MANY
    assert suits(rows, columns, 4 * columns)
    for multiprocessors in (78, 114, 132):
        rows, columns = full_gpu(multiprocessors)
        assert suits(rows, columns, columns)
        assert fill(rows, columns, multiprocessors) >= LEAST_FILL


@pytest.mark.parametrize("part", ["result", "gradient"])
def test_a_wrong_kernel_is_found(part):
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def almost(x: torch.Tensor) -> torch.Tensor:
        # Right forward, but half of the gradient is lost.
        return 2 * x + 1e-3 if part == "result" else x + x.detach()

    wrong = kernel_error(
        Case("twice", almost, twice, ((8, 8),)), torch.device("cpu"), torch.float32
    )
    assert wrong.startswith("result 0" if part == "result" else "result 1")
    nan = kernel_error(
        Case("nan", lambda x: x * float("nan"), twice, ((4,),)), torch.device("cpu"), torch.float32
    )
    assert "errs by nan" in nan


def test_a_wrong_kernel_is_done_without_in_every_step(monkeypatch):
    monkeypatch.setattr(selfcheck, "kernel_error", lambda *_: "result 0 errs by 1")
    plan = make_plan(SpeedrunSettings(rl=True), gpus=1)
    with pytest.raises(UserError, match="result 0 errs by 1: --base-flags=") as told:
        selfcheck.check_kernel(CASES["newton_schulz"], plan, torch.device("cpu"))
    steps = re.findall(r"--(\w+)-flags", str(told.value))
    assert {f"{step}_flags" for step in steps} | {"tokenizer_flags"} == set(vars(FlagSettings()))
    flags = FlagSettings(**{f"{step}_flags": "--kernels reference" for step in steps})
    stages = read_flags(make_plan(SpeedrunSettings(rl=True, flags=flags), gpus=1), nodes=1)
    assert {"base", "core", "mid", "sft", "chat-sft", "rl"} < stages.keys()
    # Of an evaluation they are not in a part of the settings.
    kernels = {getattr(stage, "system", stage).kernels for stage in stages.values()}
    assert kernels == {"reference"}


def test_the_toy_is_well_and_says_what_was_not_tried(tmp_path):
    found = check(SpeedrunSettings(cache=tmp_path, out=tmp_path / "runs"))
    assert {name: r.state for name, r in found.items() if not name.startswith("kernel")} == {
        "text": OK,
        "tokenizer": OK,
        "CORE bundle": SKIPPED,
        "mid mixture": OK,
        "sft mixture": OK,
        "chat tasks": SKIPPED,
        "disk": OK,
        "GPUs": SKIPPED,
        "memory": SKIPPED,
        "links": SKIPPED,
        "energy": SKIPPED,
        "attention": OK,
    }
    kernels_ = [r for name, r in found.items() if name.startswith("kernel")]
    assert len(kernels_) == len(kernel_cases(torch.device("cpu")))
    assert {r.detail for r in kernels_} == {"no GPU: plain PyTorch runs instead"}
    assert found["text"].detail.startswith("embedded: ")
    assert "gave its text back" in found["tokenizer"].detail
    assert found["CORE bundle"].detail == "CORE is left out: offline, and no --core-bundle given"
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_with_data_is_red_and_says_what_to_do(tmp_path, monkeypatch):
    bundle = write_bundle(tmp_path / "bundle")
    (tmp_path / "notes.doc").write_text("")
    settings = SpeedrunSettings(
        data=str(tmp_path), cache=tmp_path, tokenizer=tmp_path, core_bundle=bundle
    )
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    found = check(settings)
    assert found["text"].state == FAILED
    assert "has no .parquet, .jsonl or .txt" in found["text"].detail
    assert found["tokenizer"].state == FAILED
    assert "tokenizer_config.json is missing" in found["tokenizer"].detail
    assert found["CORE bundle"].detail.startswith("6 of 22 tasks in ")
    assert "there is no CORE, only a part of it" in found["CORE bundle"].detail
    assert found["disk"].state == FAILED
    assert re.search(r"GB of 0.0 GB free at .*: another --out", found["disk"].detail)
    (bundle / "eval_data" / "some" / "winograd.jsonl").unlink()
    assert check(settings, only="CORE")["CORE bundle"].state == FAILED


def test_a_mixture_that_is_not_all_there_is_red(tmp_path):
    settings = SpeedrunSettings(chat_data=tmp_path, data="embedded", cache=tmp_path)
    found = check(settings, only="mixture")
    assert found["mid mixture"].state == FAILED
    assert "smoltalk" in found["mid mixture"].detail
    # Without a GPU, SFT keeps what Python carries.
    assert found["sft mixture"].state == OK
    assert re.match(r"\d+ conversations to train on, \d+ to val", found["sft mixture"].detail)


def test_whatever_breaks_is_red(monkeypatch, tmp_path):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(selfcheck, "choose_attention", broken)
    result = check(SpeedrunSettings(cache=tmp_path), only="attention")["attention"]
    assert (result.state, result.detail) == (FAILED, "ZeroDivisionError: second line")


def test_a_server_that_does_not_answer_is_red(monkeypatch):
    # As HF_ENDPOINT sets it.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9/mirror")
    monkeypatch.setattr(selfcheck.core_fetch, "ARCHIVE", Nowhere)
    settings = SpeedrunSettings(offline=False, data="fineweb-edu", cache=Path("/nowhere"))
    found = check(settings)
    for name in ("text", "CORE bundle", "chat tasks"):
        assert found[name].state == FAILED
        assert found[name].detail.startswith("http://127.0.0.1:9/")
        assert "does not answer" in found[name].detail
        assert found[name].detail.endswith("or --offline")


class Nowhere:
    url = "http://127.0.0.1:9/bundle.zip"


def fake_gpus(monkeypatch, *, names=("NVIDIA H200",) * 2, free=140, capability=(9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: names[i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i=0: (free * GIB, 140 * GIB))


def gpu_plan():
    return make_plan(SpeedrunSettings(), gpus=2)


def test_gpus_that_are_busy_old_or_mixed_are_red(monkeypatch):
    fake_gpus(monkeypatch)
    assert selfcheck.check_gpus(gpu_plan()) == "2 x NVIDIA H200"
    for wrong, words in (
        ({"free": 100}, "GPU 0: 40.0 GiB in use; GPU 1: 40.0 GiB in use: end the other program"),
        ({"capability": (7, 0)}, r"capability 7\.0, and bf16 takes 8\.0"),
        ({"names": ("NVIDIA H200", "NVIDIA H100")}, "GPUs of 2 kinds, NVIDIA H100, NVIDIA H200"),
    ):
        fake_gpus(monkeypatch, **wrong)
        with pytest.raises(selfcheck.UserError, match=words):
            selfcheck.check_gpus(gpu_plan())


def test_memory_that_does_not_suffice_is_red_with_a_batch_that_fits():
    base = preset(on_gpu=True, processes=8)
    small = here(gpu="NVIDIA L40S", gpus=8, gpu_memory=24 * GIB)
    with pytest.raises(selfcheck.UserError, match=r'--base-flags="--device-batch-size 8" should'):
        selfcheck.check_memory(base, small)
    large = here(gpu="NVIDIA H200", gpus=8, gpu_memory=140 * GIB)
    assert selfcheck.check_memory(base, large).endswith("of 140.0 GiB a GPU")


def test_links_are_measured_against_what_the_driver_tells(monkeypatch):
    monkeypatch.setattr(selfcheck, "all_reduce_gb_per_second", lambda processes: 380.0)
    monkeypatch.setattr(selfcheck, "link_gb_per_second", lambda: (478.0, "18 NVLinks"))
    told = "all-reduce of 2 GPUs: 380 GB/s a GPU, 79% of the 478 GB/s that 18 NVLinks give"
    assert selfcheck.check_links(gpu_plan()) == told
    monkeypatch.setattr(selfcheck, "all_reduce_gb_per_second", lambda processes: 30.0)
    with pytest.raises(selfcheck.UserError, match="at least 50% is expected: `nvidia-smi topo -m`"):
        selfcheck.check_links(gpu_plan())
    monkeypatch.setattr(selfcheck, "link_gb_per_second", lambda: (63.0, "PCIe 5 x16"))
    assert "48% of the 63 GB/s" in selfcheck.check_links(gpu_plan())
    monkeypatch.setattr(selfcheck, "link_gb_per_second", lambda: None)
    assert "the driver does not tell" in selfcheck.check_links(gpu_plan())


def test_an_all_reduce_is_timed():
    """One process of it, in this one: starting others would take seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = queue.SimpleQueue()
    _reduce(0, 1, port, "gloo", 2**12, answer)
    assert 0 < answer.get() < 1


@pytest.mark.gpu
def test_kernels_and_attention_on_this_gpu():
    found = check(SpeedrunSettings(offline=True, data="embedded"), gpus=1)
    bad = [
        r for r in found.values() if r.state != OK and r.name.startswith(("kernel", "attention"))
    ]
    assert bad == []


@pytest.mark.multigpu
def test_links_on_this_machine():
    assert "GB/s a GPU" in selfcheck.check_links(gpu_plan())
