"""Models in and out: Hugging Face's format, the reference's checkpoints, one file of our own.

    python train/convert.py to-hf sft --out hf/                 for transformers, as it is
    python train/convert.py from-hf hf/ --out runs/imported
    python train/convert.py to-reference base --out nanochat/
    python train/convert.py from-reference model_000650.pt --tokenizer tokenizer.pkl --out runs/d20
    python train/convert.py to-file base --out d20.safetensors  with optimizer and data positions
    python train/convert.py from-file d20.safetensors --out runs/copy

A run is named by its folder or by its stage: base, mid, sft or rl. What is imported becomes a run
that can be evaluated, served, and trained on by the later stages.
"""

import sys
from pathlib import Path
from typing import Literal

import torch
import tyro

from gptfast.convert.card import model_card
from gptfast.convert.hub_model import check_shard_size, read_hub, write_hub
from gptfast.convert.reference import NORM_EPS, read_reference, reference_meta, write_reference
from gptfast.convert.single_file import read_file, write_file
from gptfast.convert.trained import TrainedModel, read_checkpoint, write_run
from gptfast.evaluate.loading import find_checkpoint
from gptfast.run import exit_code, find_run

Source = tyro.conf.Positional[Path]
Stage = Literal["base", "mid", "sft", "rl"]


def main() -> None:
    commands = (to_hf, from_hf, to_reference, from_reference, to_file, from_file)
    tyro.extras.subcommand_cli_from_dict(
        {command.__name__.replace("_", "-"): command for command in commands}, description=__doc__
    )


def to_hf(
    run: Source,
    out: Path,
    step: int | None = None,
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_size: str = "5GB",
    name: str | None = None,
    license: str | None = None,
) -> None:
    """A folder that transformers loads without any code of ours.

    Args:
        run: Folder of the run, or a stage.
        out: New folder.
        step: Which of the run's checkpoints; the newest otherwise.
        tokenizer: Folder of the tokenizer, if it is not where the run had it.
        dtype: float32 keeps every bit; bfloat16 is half the size.
        max_shard_size: Weights beyond it are spread over several files.
        name: Of the model in its card, on the Hub OWNER/NAME; the run's name otherwise.
        license: Of the model, as the Hub spells it (mit, apache-2.0); not stated otherwise.
    """
    check_shard_size(max_shard_size)
    folder = find_run(run)
    model = read_checkpoint(find_checkpoint(folder, step), tokenizer)
    name = name or folder.resolve().name
    card = model_card(folder, model, name=name, path=out.resolve().name, license=license)
    write_hub(out, model, card, dtype=getattr(torch, dtype), max_shard_size=max_shard_size)
    print(f"{describe(model)}: AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it")


def from_hf(folder: Source, out: Path, stage: Stage | None = None) -> None:
    """A run out of a folder in Hugging Face's format, of model_type nanochat.

    Args:
        folder: With safetensors, config.json and tokenizer.json.
        out: New folder of the run.
        stage: Of its training, if that is known.
    """
    imported(out, read_hub(folder), "Hugging Face's format", stage)


def to_reference(
    run: Source, out: Path, step: int | None = None, tokenizer: Path | None = None
) -> None:
    """model_NNNNNN.pt, meta_NNNNNN.json and the tokenizer, for the reference's own scripts.

    Args:
        run: Folder of the run, or a stage.
        out: New folder; its files go to chatsft_checkpoints/d20 (or another stage's) and tokenizer.
        step: Which of the run's checkpoints; the newest otherwise.
        tokenizer: Folder of the tokenizer, if it is not where the run had it.
    """
    folder = find_run(run)
    model = read_checkpoint(find_checkpoint(folder, step), tokenizer)
    write_reference(out, model, reference_meta(folder, model.step))
    eps = model.config.norm_eps
    print(
        f"{describe(model)}: {out}; the embedding is bf16 there, the optimizer's state stays here"
        + (f"; its norms' eps is {NORM_EPS:g}, ours {eps:g}" if eps != NORM_EPS else "")
    )


def from_reference(model: Source, tokenizer: Path, out: Path, stage: Stage | None = None) -> None:
    """A run out of a checkpoint of the reference.

    Args:
        model: model_NNNNNN.pt, with meta_NNNNNN.json beside it.
        tokenizer: tokenizer.pkl, or a folder of ours.
        out: New folder of the run.
        stage: Of its training, if that is known.
    """
    imported(out, read_reference(model, tokenizer), "a checkpoint of nanochat", stage)


def to_file(run: Source, out: Path, step: int | None = None, tokenizer: Path | None = None) -> None:
    """A whole checkpoint in one safetensors file: weights, optimizer, data positions, tokenizer.

    Args:
        run: Folder of the run, or a stage.
        out: New file.
        step: Which of the run's checkpoints; the newest otherwise.
        tokenizer: Folder of the tokenizer, if it is not where the run had it.
    """
    checkpoint = find_checkpoint(find_run(run), step)
    write_file(out, checkpoint, tokenizer)
    print(f"{checkpoint}: {out}, {out.stat().st_size / 1e9:.2f} GB")


def from_file(file: Source, out: Path) -> None:
    """A run out of such a file, to be continued as the one that it was made from.

    Args:
        file: Made by to-file.
        out: New folder of the run.
    """
    read_file(file, out)
    print(f"{file}: {find_checkpoint(out)}")


def imported(out: Path, model: TrainedModel, origin: str, stage: Stage | None) -> None:
    write_run(out, model, origin=origin, stage=stage)
    config = model.config
    print(
        f"{describe(model)}: {out}\n"
        f"as its format says: norm eps {config.norm_eps:g}, rotary base {config.rope_base:g}, "
        f"softcap {config.softcap:g}, {config.n_kv_head} of {config.n_head} heads for keys and "
        f"values; bits per byte will be measured on the default text"
    )


def describe(model: TrainedModel) -> str:
    return f"step {model.step:,}, {model.parameters:,} parameters"


if __name__ == "__main__":
    sys.exit(exit_code(main))
