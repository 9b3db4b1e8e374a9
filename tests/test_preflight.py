"""What is checked before step 0: memory, disk, batch sizes, the tokenizer's size."""

import math
import random
import re
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptfast import preflight
from gptfast.config import (
    DataSettings,
    LearningSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    accumulation_steps,
    preset,
)
from gptfast.config_chat import MidOptimSettings, SFTOptimSettings
from gptfast.data import Corpus, RowGroup
from gptfast.errors import UserError
from gptfast.memory import GIB, USABLE_SHARE, estimate_memory, largest_device_batch
from gptfast.model import GPTConfig
from gptfast.preflight import MemoryNeed
from gptfast.rl.config import RLOptimSettings
from gptfast.tokenizer import Tokenizer
from train.tokenizer import Settings as TokenizerSettings

D20 = GPTConfig.from_depth(20, vocab_size=65536)


@pytest.mark.parametrize(("shards", "measured_gib"), [(1, 47.1), (2, 44.8)])
def test_the_estimate_is_near_what_d20_took_on_h200s(shards, measured_gib):
    """Peak memory of 90 real steps, 32 x 2048, on one and two H200s (2026-11-22)."""
    estimate = estimate_memory(
        D20, device_batch_size=32, shards=shards, accumulates=False, logits_chunks=8
    )
    assert estimate.total / GIB == pytest.approx(measured_gib, rel=0.05)


@pytest.mark.parametrize(
    ("batch", "accumulates", "gib"), [(32, False, 46.6), (32, True, 48.7), (2, False, 8.4)]
)
def test_the_estimate_is_no_less_than_what_d20_took_with_resharding(batch, accumulates, gib):
    """Peak memory of 3 steps on an H100 (2026-11-23); 0.9 GiB less than without in every case."""
    settings = {"device_batch_size": batch, "shards": 1, "accumulates": accumulates}
    without, resharded = (
        estimate_memory(D20, **settings, logits_chunks=8, reshard_after_forward=each).total / GIB
        for each in (False, True)
    )
    assert gib < resharded < 1.05 * gib + 1.5
    assert without - resharded == pytest.approx(0.89, abs=0.01)


@pytest.mark.parametrize(
    ("config", "batch", "measured_gib"),
    [
        # A step of a run; forward + backward, to which the optimizer's moments are added here.
        (GPTConfig.from_depth(8, vocab_size=16384), 64, 29.3),
        (D20, 32, 89.5 + 2.7),
    ],
    ids=["d8", "d20"],
)
def test_the_reference_kernels_take_more_and_are_estimated_to(config, batch, measured_gib):
    """H200, torch 2.11: bench/results/d8-kernels-h200.json and kernels-h200.json."""
    estimate = estimate_memory(
        config,
        device_batch_size=batch,
        shards=1,
        accumulates=False,
        logits_chunks=4,
        kernels="reference",
    )
    assert measured_gib < estimate.total / GIB < 1.1 * measured_gib


def test_the_reference_kernels_are_not_tried_where_they_do_not_fit(monkeypatch):
    world = gpus_of(monkeypatch, 80)
    assert MemoryNeed(D20, 32, 1, world).check()
    with pytest.raises(UserError, match=r"; --device-batch-size 16 should fit$"):
        MemoryNeed(D20, 32, 1, world, kernels="reference").check()


def test_the_largest_batch_fits_and_the_next_does_not():
    settings = {"shards": 8, "accumulates": True, "logits_chunks": 8}
    batch = largest_device_batch(40 * GIB, D20, **settings)
    assert estimate_memory(D20, device_batch_size=batch, **settings).total <= 40 * GIB
    assert estimate_memory(D20, device_batch_size=batch + 1, **settings).total > 40 * GIB
    assert largest_device_batch(GIB, D20, **settings) == 0
    assert 16 < batch < 32
    assert largest_device_batch(40 * GIB, D20, sequences=32, **settings) == 16


def gpus_of(monkeypatch: pytest.MonkeyPatch, gib: float) -> SimpleNamespace:
    """A world of eight GPUs with so much memory."""
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(total_memory=int(gib * GIB)),
    )
    return SimpleNamespace(device=torch.device("cuda", 0), local_size=8)


@pytest.mark.parametrize(
    ("gib", "advice"),
    [
        (40, "--device-batch-size 16 should fit$"),
        (6, "--device-batch-size 1 with --reshard-after-forward should fit$"),
        (2, "no batch size fits$"),
    ],
)
def test_too_little_gpu_memory_is_told_with_what_fits(monkeypatch, gib, advice):
    world = gpus_of(monkeypatch, gib)
    with pytest.raises(UserError, match=rf"32 sequences of 2048.*has {gib}\.0 GiB; {advice}"):
        MemoryNeed(D20, 32, 1, world).check()


@pytest.mark.parametrize(
    ("elsewhere", "advice"),
    [
        (1, r"has 80\.0 GiB; --device-batch-size 16 should fit; --reshard-after-forward and more"),
        (30, r"has 80\.0 GiB, 30\.0 GiB of it in use elsewhere; --device-batch-size 16 should"),
        (60, r"has 80\.0 GiB, 60\.0 GiB of it in use elsewhere; --device-batch-size 8 should"),
    ],
)
def test_memory_that_runs_out_all_the_same_is_told_with_what_fits(monkeypatch, elsewhere, advice):
    world, gib = gpus_of(monkeypatch, 80), GIB
    # Of what is left it has all but 2 GiB.
    found = (2 * gib, 80 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: found)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (78 - elsewhere) * gib)
    need = MemoryNeed(D20, 32, 1, world)
    words = rf"^out of GPU memory: 32 sequences of 2048 were estimated at 4\d\..*, the GPU {advice}"
    with pytest.raises(UserError, match=words), need.told():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_batch_that_is_advised_divides_the_step_where_it_must(monkeypatch):
    world = gpus_of(monkeypatch, 40)
    advised = r"; --device-batch-size (\d+) should fit$"
    for evenly in (True, False):
        with pytest.raises(UserError, match=advised) as told:
            MemoryNeed(D20, 48, 1, world, evenly=evenly).check()
        batch = int(re.search(advised, str(told.value))[1])
        assert (48 % batch == 0) == evenly
        again = MemoryNeed(D20, batch, 3, world).check()
        assert again.endswith("of 40.0 GiB a GPU")


def test_resharding_and_what_generates_answers_count_as_memory(monkeypatch):
    estimate = estimate_memory(
        D20, device_batch_size=8, shards=8, accumulates=True, logits_chunks=8
    )
    world = gpus_of(monkeypatch, (estimate.total / GIB - 0.5) / USABLE_SHARE)
    with pytest.raises(UserError, match="not enough GPU memory"):
        MemoryNeed(D20, 8, 8, world).check()
    assert MemoryNeed(D20, 8, 8, world, reshard_after_forward=True).check()
    with pytest.raises(UserError, match=r"generator 12\.5\), .* but fewer --max-rows may$"):
        MemoryNeed(D20, 8, 8, world, True, generator=int(12.5 * GIB)).check()


def test_a_full_disk_is_told_with_the_numbers(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, 10**10))
    # 393,216,000 matrix parameters with one moment, 167,772,160 others with two, in fp32.
    with pytest.raises(UserError, match=r"2 checkpoints of 5\.16 GB .* need 15\.48 GB; .* 10\.00"):
        preflight.check_disk(tmp_path, 2, D20)


def test_a_run_that_fitted_its_disk_can_be_resumed(monkeypatch, tmp_path):
    """Two checkpoints lie there, and half of one that a killed run was writing."""
    one = preflight.checkpoint_bytes(D20)
    for name in ("step_000010", "step_000020", "step_000030.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    half = tmp_path / "checkpoints" / "step_000030.partial" / "__0_0.distcp"
    half.write_bytes(bytes(1000))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, one - 1000))
    preflight.check_disk(tmp_path, 2, D20)
    # Keeping fewer than there are, one is still written before one goes.
    preflight.check_disk(tmp_path, 1, D20)
    half.write_bytes(bytes(999))
    with pytest.raises(UserError, match=r"2 of them there already, and one .* need 5\.16 GB"):
        preflight.check_disk(tmp_path, 2, D20)
    with pytest.raises(UserError, match=r"3 checkpoints .* need 10\.32 GB"):
        preflight.check_disk(tmp_path, 3, D20)


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
    corpus = SimpleNamespace(train=[], val=[], split="1 file(s) train, last.txt validates")
    monkeypatch.setattr(preflight, "prepare_corpus", lambda *a, **k: corpus)
    other = SimpleNamespace(vocab_size=300)
    monkeypatch.setattr(preflight, "_load_or_train", lambda *a: other)
    world = SimpleNamespace(node_leader_first=lambda: nullcontext(True), size=0)
    said = []
    with pytest.raises(UserError, match="holds 300 tokens, not --vocab-size 301"):
        preflight.prepare_text(
            DataSettings(), vocab_size=301, tokens=1, world=world, say=said.append
        )
    assert said == ["text: 1 file(s) train, last.txt validates"]


def prepare(folder: Path, chars: int, kept: Path | None = None) -> tuple[Tokenizer, list[str]]:
    said = []
    _, tokenizer = preflight.prepare_text(
        DataSettings(data=str(folder / "texts"), cache=folder / "cache", tokenizer_chars=chars),
        vocab_size=300,
        tokens=1,
        world=SimpleNamespace(node_leader_first=lambda: nullcontext(False), size=1),
        say=said.append,
        kept=kept,
    )
    return tokenizer, said


def write_texts(folder: Path, alphabet: str) -> None:
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    for number in range(2):
        words = ("".join(draw.choices(alphabet, k=5)) for _ in range(400))
        (folder / f"{number}.txt").write_text(" ".join(words))


def test_another_text_or_more_of_it_has_another_tokenizer_and_the_first_stays(tmp_path):
    write_texts(tmp_path / "texts", "abcdef")
    first, said = prepare(tmp_path, 1000)
    assert said[0] == "text: 1 file(s) train, 1.txt validates"
    assert said[1] == "no tokenizer of 300 tokens for this text yet: training one"
    again, said = prepare(tmp_path, 1000)
    assert (again.fingerprint, len(said)) == (first.fingerprint, 2)
    longer, _ = prepare(tmp_path, 2000)
    assert [each.training["max_chars"] for each in (first, longer)] == [1000, 2000]
    write_texts(tmp_path / "texts", "uvwxyz")
    other, _ = prepare(tmp_path, 1000)
    assert b"uv" in b" ".join(other.tokens[256:])
    assert other.fingerprint != first.fingerprint
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 3
    # A run that is resumed has its own, whatever became of the text.
    first.save(tmp_path / "run")
    resumed, said = prepare(tmp_path, 1000, kept=tmp_path / "run")
    assert resumed.fingerprint == first.fingerprint
    assert said[-1] == f"tokenizer: 300 tokens, {tmp_path / 'run'}"
    started, _ = prepare(tmp_path, 1000, kept=tmp_path / "new run")
    assert started.fingerprint == other.fingerprint


def test_more_shards_have_another_tokenizer_only_if_they_are_read(tmp_path):
    def folder(shards: int, chars: int) -> Path:
        groups = [RowGroup(Path(f"{i}.parquet"), 0, 0, 9) for i in range(shards)]
        corpus = Corpus("fineweb-edu", groups, [], "", identity="fineweb-edu")
        return preflight._cached_tokenizer(tmp_path, corpus, 300, {"max_chars": chars})

    assert folder(8, 2_000_000_000) == folder(240, 2_000_000_000)
    assert folder(7, 2_000_000_000) != folder(8, 2_000_000_000)
    assert folder(8, 1_000_000_000) != folder(8, 2_000_000_000)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *((ModelSettings(), name) for name in ("depth", "sequence_len", "vocab_size")),
        (DataSettings(), "tokenizer_chars"),
        (RunSettings(), "keep"),
        *(
            (TokenizerSettings(out=Path("new")), name)
            for name in ("train_shards", "vocab_size", "max_chars", "doc_cap")
        ),
    ],
)
def test_settings_refuse_what_cannot_work(settings, name):
    for number in (0, -1):
        with pytest.raises(UserError, match=f"{name} must be at least 1, got {number}"):
            replace(settings, **{name: number})


@pytest.mark.parametrize(
    ("documents", "processes", "words"),
    [
        (150, 2, r"has 1 document.* to validate with, too few for 2 .* a --validation file with"),
        (3, 4, r"has 2 document.* to train on, too few for 4 .* give more text, or start fewer"),
        (200, 2, None),
    ],
)
def test_too_few_documents_are_told_before_a_tokenizer_is_trained(
    monkeypatch, tmp_path, documents, processes, words
):
    trained = []
    monkeypatch.setattr(preflight, "train_tokenizer", lambda *a, **k: trained.append(a))
    monkeypatch.setattr(preflight.Tokenizer, "load", lambda folder: SimpleNamespace(vocab_size=300))
    text = tmp_path / "mine.jsonl"
    text.write_text("".join(f'{{"text": "number {n}"}}\n' for n in range(documents)))
    world = SimpleNamespace(node_leader_first=lambda: nullcontext(True), size=processes)
    prepare = partial(
        preflight.prepare_text,
        DataSettings(data=str(text), cache=tmp_path / "cache"),
        vocab_size=300,
        tokens=1,
        world=world,
        say=lambda line: None,
    )
    if words is None:
        corpus, _ = prepare()
        assert sum(group.rows for group in corpus.val) == 2
    else:
        with pytest.raises(UserError, match=words):
            prepare()
    assert len(trained) == (words is None)


@pytest.mark.parametrize(
    "kind", [OptimSettings, MidOptimSettings, SFTOptimSettings, RLOptimSettings]
)
def test_learning_refuses_what_would_train_uphill_or_not_at_all(kind):
    assert issubclass(kind, LearningSettings)
    for field in fields(LearningSettings):
        for wrong in (-1.0, math.nan):
            with pytest.raises(UserError, match=rf"{field.name}.*{wrong}"):
                kind(**{field.name: wrong})
    with pytest.raises(UserError, match=r"ratio=0\.5 and warmdown_ratio=0\.8 must be shares"):
        kind(warmup_ratio=0.5, warmdown_ratio=0.8)
    with pytest.raises(UserError, match="device_batch_size must be at least 1, got 0"):
        kind(device_batch_size=0)
    assert kind(grad_clip=0, matrix_lr=0, warmup_ratio=0, warmdown_ratio=1).grad_clip == 0


def test_tokenizers_of_texts_given_by_path_stay_in_the_cache_and_apart(tmp_path):
    folders = [
        preflight.tokenizer_folder(tmp_path, name, 300)
        for name in ("embedded", "/a/texts", "/b/texts")
    ]
    assert folders[0] == tmp_path / "tokenizers" / "embedded-300"
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path / "tokenizers" for folder in folders)
