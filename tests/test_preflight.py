"""What is checked before step 0: memory, disk, batch sizes, the tokenizer's size."""

from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gptfast import preflight
from gptfast.config import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    accumulation_steps,
    preset,
)
from gptfast.errors import UserError
from gptfast.memory import GIB, estimate_memory, largest_device_batch
from gptfast.model import GPTConfig

D20 = GPTConfig.from_depth(20, vocab_size=65536)


@pytest.mark.parametrize(("shards", "measured_gib"), [(1, 47.1), (2, 44.8)])
def test_the_estimate_is_near_what_d20_took_on_h200s(shards, measured_gib):
    """Peak memory of 90 real steps, 32 x 2048, on one and two H200s (2026-11-22)."""
    estimate = estimate_memory(
        D20, device_batch_size=32, shards=shards, accumulates=False, logits_chunks=8
    )
    assert estimate.total / GIB == pytest.approx(measured_gib, rel=0.05)


def test_the_largest_batch_fits_and_the_next_does_not():
    settings = {"shards": 8, "accumulates": True, "logits_chunks": 8}
    batch = largest_device_batch(40 * GIB, D20, **settings)
    assert estimate_memory(D20, device_batch_size=batch, **settings).total <= 40 * GIB
    assert estimate_memory(D20, device_batch_size=batch + 1, **settings).total > 40 * GIB
    assert largest_device_batch(GIB, D20, **settings) == 0


@pytest.mark.parametrize(
    ("gib", "advice"), [(40, r"--device-batch-size 2\d should fit"), (2, "no batch size fits")]
)
def test_too_little_gpu_memory_is_told_with_what_fits(monkeypatch, gib, advice):
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(total_memory=gib * GIB),
    )
    world = SimpleNamespace(device=torch.device("cuda", 0), local_size=8)
    with pytest.raises(UserError, match=rf"32 sequences of 2048.*has {gib}\.0 GiB; {advice}"):
        preflight.check_memory(D20, 32, 1, world)


def test_a_full_disk_is_told_with_the_numbers(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, 10**10))
    # 393,216,000 matrix parameters with one moment, 167,772,160 others with two, in fp32.
    with pytest.raises(UserError, match=r"2 checkpoints of 5\.16 GB .* need 15\.48 GB; .* 10\.00"):
        preflight.check_disk(tmp_path, 2, D20)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_reports_batch_is_accumulated_over_fewer_gpus(world):
    assert accumulation_steps(OptimSettings(), 2048, world) == 8 // world


def test_a_total_batch_that_the_world_does_not_divide_names_the_nearest():
    with pytest.raises(UserError, match=r"131072 tokens that 2 process.*393216 or 524288"):
        accumulation_steps(OptimSettings(total_batch_size=500_000), 2048, 2)


@pytest.mark.parametrize("processes", range(1, 9))
def test_the_preset_without_a_gpu_fits_any_number_of_processes(processes):
    settings = preset(on_gpu=False, processes=processes)
    assert accumulation_steps(settings.optim, settings.model.sequence_len, processes) == 1
    assert settings.data.data == "embedded"


def test_a_tokenizer_of_another_size_is_refused(monkeypatch):
    corpus = SimpleNamespace(train=[], split="1 file(s) train, last.txt validates")
    monkeypatch.setattr(preflight, "prepare_corpus", lambda *a, **k: corpus)
    other = SimpleNamespace(vocab_size=300)
    monkeypatch.setattr(preflight, "_load_or_train", lambda *a: other)
    world = SimpleNamespace(node_leader_first=lambda: nullcontext(True))
    said = []
    with pytest.raises(UserError, match="holds 300 tokens, not --vocab-size 301"):
        preflight.prepare_text(
            DataSettings(), vocab_size=301, tokens=1, world=world, say=said.append
        )
    assert said == ["text: 1 file(s) train, last.txt validates"]


@pytest.mark.parametrize("name", ["depth", "sequence_len", "vocab_size"])
def test_settings_refuse_what_cannot_work(name):
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        replace(ModelSettings(), **{name: 0})


def test_tokenizers_of_texts_given_by_path_stay_in_the_cache_and_apart(tmp_path):
    folders = [
        preflight.tokenizer_folder(tmp_path, name, 300)
        for name in ("embedded", "/a/texts", "/b/texts")
    ]
    assert folders[0] == tmp_path / "tokenizers" / "embedded-300"
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path / "tokenizers" for folder in folders)
