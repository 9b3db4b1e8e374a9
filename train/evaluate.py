"""Evaluate a trained model.

    torchrun --nproc_per_node=8 train/evaluate.py base runs/base-d20      all of a base model's
    python train/evaluate.py base runs/base-d20 --only core --max-per-task 500
    python train/evaluate.py base --random-weights --depth 2 --tokenizer tiny --only core

A base model's evaluation is bits per byte on training and validation text, seven prompts continued
greedily, and CORE. What was scored of CORE is kept: run again, a stopped evaluation goes on.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from gptfast import parallel
from gptfast.checkpoint_files import read_manifest
from gptfast.config import DataSettings
from gptfast.data import BatchLoader, Corpus, prepare_corpus
from gptfast.errors import UserError
from gptfast.evaluate.bits_per_byte import bits_per_byte
from gptfast.evaluate.core import evaluate_core
from gptfast.evaluate.core_bundle import load_bundle
from gptfast.evaluate.core_fetch import fetch_bundle
from gptfast.evaluate.core_results import ResultStore
from gptfast.evaluate.core_scoring import BATCH_TOKENS, Scorer
from gptfast.evaluate.loading import (
    Placement,
    data_of_run,
    find_checkpoint,
    load_model,
    load_tokenizer,
    random_model,
)
from gptfast.evaluate.samples import samples
from gptfast.model import GPT, GPTConfig
from gptfast.run import exit_code, write_json, write_section
from gptfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class BaseSettings:
    run: tyro.conf.Positional[Path | None] = None
    """Folder of the run whose model to evaluate."""
    step: int | None = None
    """Which of its checkpoints; the newest otherwise."""
    out: Path | None = None
    """Folder for results; evaluation/step_NNNNNN in the run's otherwise."""
    only: tuple[Literal["bpb", "samples", "core"], ...] = ("bpb", "samples", "core")
    """What to evaluate."""

    data: str | None = None
    """Text for bits per byte; what the run was trained on otherwise."""
    validation: str | None = None
    """File of the text's folder that validates; as in the run otherwise."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; the run's otherwise."""
    cache: Path | None = None
    """Where fetched text, tokenizers and the CORE bundle are kept; as in the run otherwise."""
    split_tokens: int = 20 * 524_288
    """Tokens of each of the two texts."""
    device_batch_size: int = 32
    """Sequences in one forward pass for bits per byte."""

    bundle: Path | None = None
    """Folder of the CORE bundle; fetched (162 MB) otherwise."""
    max_per_task: int | None = None
    """Examples of each CORE task; all otherwise."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens in one forward pass for CORE."""
    one_at_a_time: bool = False
    """Score CORE one sequence at a time: the slow way, to compare with."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 elsewhere."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """auto: triton on a GPU, reference elsewhere."""
    attention: str = "auto"
    """auto, flash4, flash3, cudnn, flash2 or math; CORE's batches have their own."""
    device: Literal["auto", "cpu"] = "auto"

    random_weights: bool = False
    """Evaluate a model that knows nothing, to see what guessing gives."""
    depth: int = 2
    """Its layers."""
    sequence_len: int = 2048
    """Its sequence length."""

    def __post_init__(self) -> None:
        if (self.run is None) != self.random_weights:
            raise UserError(
                "name a run's folder, or give --random-weights, --depth and --tokenizer"
            )
        if self.random_weights and self.tokenizer is None:
            raise UserError("--random-weights needs --tokenizer")
        for name in ("split_tokens", "device_batch_size", "max_per_task", "batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def text(self) -> DataSettings:
        """The run's own, but for what was given."""
        saved = data_of_run(self.run) if self.run else DataSettings()
        names = ("data", "validation", "tokenizer", "cache")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(saved, **given)


@dataclass(frozen=True)
class Subject:
    """What is evaluated. identity: all that tells its scores from another model's."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    corpus: Corpus | None
    identity: dict[str, object]
    out: Path


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"base": base}, description=__doc__)


def base(settings: Annotated[BaseSettings, tyro.conf.arg(name="")]) -> None:
    """A base model: bits per byte, samples, CORE."""
    with parallel.start(cpu=settings.device == "cpu") as world:
        evaluate_base(settings, world, say=print if world.is_main else lambda line: None)


def evaluate_base(
    settings: BaseSettings, world: parallel.World, say: Callable[[str], None]
) -> None:
    # 1. Everything that is needed is there before anything is computed.
    bundle = None
    if "core" in settings.only:
        with world.node_leader_first() as first:
            folder = settings.bundle or fetch_bundle(settings.text.cache, progress=first)
            bundle = load_bundle(folder)
    subject = load_subject(settings, world)
    subject.out.mkdir(parents=True, exist_ok=True)
    say(f"{subject.name}, {subject.identity['dtype']} on {world.size} process(es)")

    # 2. Each rank evaluates its share with its own copy of the model.
    loss: dict[str, object] = {}
    if "bpb" in settings.only:
        loss |= text_bits_per_byte(settings, subject, world)
    if "samples" in settings.only and world.is_main:
        loss["samples"] = samples(subject.model, subject.tokenizer)
    if loss and world.is_main:
        write_json(subject.out / "loss.json", loss)
        write_section(subject.out, "Base model loss", loss_section(loss))
        say(loss_section(loss))
    if bundle:
        result = evaluate_core(
            Scorer(
                subject.model,
                batch_tokens=settings.batch_tokens,
                one_at_a_time=settings.one_at_a_time,
            ),
            subject.tokenizer,
            bundle,
            max_per_task=settings.max_per_task,
            group=world.host_group,
            store=ResultStore(subject.out / "core", subject.identity),
            progress=world.is_main,
        )
        if world.is_main:
            write_json(subject.out / "core.json", result.as_dict())
            result.write_csv(subject.out / "core.csv")
            write_section(subject.out, "Base model evaluation", result.section(subject.name))
        say(result.table())
    say(f"results: {subject.out}")


def load_subject(settings: BaseSettings, world: parallel.World) -> Subject:
    text, corpus = settings.text, None
    if "bpb" in settings.only or text.tokenizer is None:
        with world.node_leader_first() as first:
            corpus = prepare_corpus(
                text.data,
                cache=text.cache / "data",
                train_shards=1,
                validation=text.validation,
                progress=first,
            )
    placement = Placement(world.device, settings.dtype, settings.kernels, settings.attention)
    if settings.random_weights:
        tokenizer = Tokenizer.load(text.tokenizer)
        config = GPTConfig.from_depth(
            settings.depth, vocab_size=tokenizer.vocab_size, sequence_len=settings.sequence_len
        )
        model = random_model(config, placement)
        name, weights = f"random d{settings.depth}", {"random": config.to_dict()}
        out = Path("runs") / f"random-d{settings.depth}"
    else:
        checkpoint = find_checkpoint(settings.run, settings.step)
        manifest = read_manifest(checkpoint)
        tokenizer = load_tokenizer(text, corpus.name if corpus else "", checkpoint)
        model = load_model(checkpoint, placement)
        name = f"{settings.run.name} (step {manifest['step']})"
        weights = {"step": manifest["step"], "files": manifest["files"]}
        out = settings.run / "evaluation" / checkpoint.name
    identity = {
        **weights,
        "tokenizer": tokenizer.fingerprint,
        "dtype": str(placement.torch_dtype),
        "kernels": placement.operators,
        "one_at_a_time": settings.one_at_a_time,
    }
    return Subject(name, model, tokenizer, corpus, identity, settings.out or out)


def text_bits_per_byte(
    settings: BaseSettings, subject: Subject, world: parallel.World
) -> dict[str, float]:
    """{"train_bpb", "val_bpb"}: each of the beginning of its text, `split_tokens` in all."""
    token_bytes = torch.from_numpy(subject.tokenizer.token_bytes()).to(world.device)
    length = subject.model.config.sequence_len
    batches = settings.split_tokens // (settings.device_batch_size * length * world.size)
    figures = {}
    for split, groups in (("train", subject.corpus.train), ("val", subject.corpus.val)):
        loader = BatchLoader(
            groups,
            subject.tokenizer,
            batch_size=settings.device_batch_size,
            sequence_len=length,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            epochs=1,
        )
        try:
            figures[f"{split}_bpb"] = bits_per_byte(
                subject.model, islice(loader, max(1, batches)), token_bytes, world.host_group
            )
        finally:
            loader.close()
    return figures


def loss_section(loss: dict[str, object]) -> str:
    lines = [
        f"- {split} bpb: {loss[f'{split}_bpb']:.4f}"
        for split in ("train", "val")
        if f"{split}_bpb" in loss
    ]
    lines += [f"- sample {i}: {text}" for i, text in enumerate(loss.get("samples", ()))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(exit_code(main))
