"""A trained model between two formats, and the run folder that it comes from or becomes."""

import json
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gptfast.checkpoint import files
from gptfast.config import DataSettings
from gptfast.errors import UserError
from gptfast.evaluate.loading import load_tokenizer
from gptfast.model import GPT, GPTConfig
from gptfast.run import write_json
from gptfast.tokenizer import Tokenizer, check_free
from gptfast.tokenizer.files import merges

TOKENIZER_FOLDER = "tokenizer"
# Of what others wrote: far beyond any real file, far below what would fill the memory.
_LARGEST_JSON = 64 << 20
_LARGEST_SETTING = 1 << 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TrainedModel:
    """state: every parameter of GPT(config) by its name, fp32, on the CPU. step: of the training
    that it comes from."""

    config: GPTConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    step: int

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size != self.config.vocab_size:
            raise UserError(
                f"the tokenizer holds {self.tokenizer.vocab_size} tokens, the model "
                f"{self.config.vocab_size}: they do not belong together"
            )

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.state.values())


def read_checkpoint(checkpoint: Path, tokenizer: Path | None = None) -> TrainedModel:
    """A run's checkpoint, verified; see load_tokenizer for the tokenizer. Raises DamagedCheckpoint,
    or UserError if it is no GPT's or its tokenizer is not there."""
    manifest = files.read_manifest(checkpoint)
    config = GPTConfig(**manifest["meta"]["model_config"])
    return TrainedModel(
        config=config,
        state=checked_state(config, files.load_full_state(checkpoint, "model"), checkpoint),
        tokenizer=load_tokenizer(checkpoint, tokenizer),
        step=manifest["step"],
    )


def write_run(out: Path, model: TrainedModel, *, origin: str, stage: str | None = None) -> None:
    """A new run folder that evaluation, serving and the later stages can start from.

    origin: the format that the model comes from. stage: of its training, base, mid, sft or rl, if
    that is known. The text that it was trained on is not, so the default text is what bits per
    byte are measured on.
    """
    with new_folder(out, need=4 * model.parameters) as folder:
        model.tokenizer.save(folder / TOKENIZER_FOLDER)
        write_settings(folder, out, origin)
        meta = {
            **({"stage": stage} if stage else {}),
            "model_config": model.config.to_dict(),
            "tokenizer": model.tokenizer.fingerprint,
            "tokenizer_folder": str(out.absolute() / TOKENIZER_FOLDER),
            "step": model.step,
        }
        tensors = {f"model.{name}": tensor for name, tensor in model.state.items()}
        write_checkpoint(folder / "checkpoints", model.step, tensors, meta)


def write_settings(folder: Path, out: Path, origin: str, **text: Any) -> None:
    """settings.json in `folder`, which will be `out`. text: what DataSettings is to say of it."""
    data = DataSettings(**text, tokenizer=out.absolute() / TOKENIZER_FOLDER)
    write_json(folder / "settings.json", {"imported_from": origin, "data": asdict(data)})


def write_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    rank_states: Sequence[bytes] | None = None,
) -> None:
    """root/step_NNNNNN with whole tensors, as a run of as many ranks as there are states saves it.

    rank_states: the ranks' files; by default that of one rank with nothing to keep.
    """
    rank_states = [files.rank_state_bytes({})] if rank_states is None else rank_states
    folder = files.step_folder(root, step)
    folder.mkdir(parents=True)
    writer = files.Writer(folder)
    for rank, data in enumerate(rank_states):
        writer.write_file(files.rank_file(rank), data)
    with warnings.catch_warnings():
        files.ignore_single_process_warning()
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    manifest = {
        "format": files.FORMAT,
        "step": step,
        "world_size": len(rank_states),
        "torch": torch.__version__,
        "files": writer.written,
        "meta": dict(meta),
    }
    writer.write_file(files.MANIFEST, files.manifest_text(manifest).encode())
    files.sync_folder(folder)


def checked_state(
    config: GPTConfig, tensors: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """The tensors as fp32 in the model's order; UserError unless they are exactly its parameters:
    names, shapes, a floating dtype, finite values."""
    expected = expected_shapes(config, len(tensors), source)
    lack = [name for name in expected if name not in tensors]
    more = [name for name in tensors if name not in expected]
    for names, word in ((lack, "lacks"), (more, "has, beyond this model's,")):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{source} {word} {', '.join(map(str, names[:3]))}{rest}")
    state = {}
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype not in _DTYPES:
            raise UserError(
                f"{source}: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected "
                f"{tuple(shape)} in fp32, bf16 or fp16"
            )
        state[name] = tensor.detach().float()
        if not state[name].isfinite().all():
            raise UserError(f"{source}: {name} has values that are not finite")
    return state


def expected_shapes(config: GPTConfig, tensors: int, source: Path) -> dict[str, torch.Size]:
    """Name and shape of each parameter. tensors: how many `source` has; a model that cannot be in
    there is not even described: its settings may name any number of layers."""
    if tensors < config.n_layer:
        raise UserError(f"{source} has {tensors} tensors: too few for {config.n_layer} layers")
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def checked_config(source: Path, **values: Any) -> GPTConfig:
    """GPTConfig out of what a file says; UserError for numbers that are none, or no model's."""
    kinds = {name: GPTConfig.__annotations__[name] for name in values}
    for name, value in values.items():
        kind = kinds[name]
        most = _LARGEST_SETTING if kind is int else sys.float_info.max
        known = isinstance(value, int if kind is int else int | float)
        if not known or isinstance(value, bool) or not 0 < value <= most:
            raise UserError(
                f"{source}: {name} is {value!r}, expected a positive {kind.__name__} up to {most:g}"
            )
    try:
        return GPTConfig(**{name: kinds[name](value) for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def checked_tokenizer(source: Path, ranks: Mapping[bytes, int], **options: Any) -> Tokenizer:
    """Tokenizer(ranks, **options); UserError if that is none, or a token no merge of two others."""
    try:
        tokenizer = Tokenizer(ranks, **options)
        merges(tokenizer.tokens)
    except (UserError, IndexError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{source} holds no tokenizer: {error}") from error
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of anybody's; UserError if it is not there or none."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes: too many to be right")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object")
    return content


@contextmanager
def new_folder(out: Path, *, need: int) -> Iterator[Path]:
    """A folder to write in, which becomes `out` when all is there and is gone if anything fails.

    UserError if `out` is taken, cannot be written, or its disk has not `need` bytes free.
    """
    check_free(out)
    out = out.absolute()
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        scratch.mkdir(parents=True)
        check_room(scratch, need, out)
        yield scratch
        scratch.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def let_others_read(path: Path) -> None:
    """Give a file of weights the mode of any new file: safetensors makes it its owner's alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def check_room(folder: Path, need: int, out: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"{out} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
