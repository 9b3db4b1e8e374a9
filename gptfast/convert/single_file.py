"""A whole checkpoint of ours as one safetensors file, and back, bit for bit.

    model.*, optim.*    every tensor of the checkpoint, whole
    rank.00000, ...     the ranks' own files, as bytes: positions in the data, random states
    tokenizer           its ranks file, as bytes
    header              one JSON text "gptfast": step, meta, names of the training text, and
                        of the tokenizer what is not ranks

So the copy can be resumed, on any number of processes, like the folder that it was made from.
"""

import io
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptfast.checkpoint import files
from gptfast.convert.trained import (
    TOKENIZER_FOLDER,
    check_room,
    checked_config,
    checked_state,
    checked_tokenizer,
    let_others_read,
    new_folder,
    write_checkpoint,
    write_settings,
)
from gptfast.errors import UserError
from gptfast.evaluate.loading import load_tokenizer
from gptfast.report.runs import read_run, stage_of
from gptfast.tokenizer.files import format_ranks, parse_ranks

_HEADER = "gptfast"
_RANK, _TOKENIZER = "rank.", "tokenizer"
_TEXT = ("data", "validation")
# In a checkpoint's meta.
_PATHS = ("tokenizer_folder", "source")


def write_file(out: Path, checkpoint: Path, tokenizer: Path | None = None) -> None:
    """One file of a checkpoint of ours; see load_tokenizer for the tokenizer. UserError if `out`
    exists or the disk is too full, DamagedCheckpoint if the checkpoint is not what was written."""
    if out.exists():
        raise UserError(f"{out} exists already: name a new file, or remove it first")
    tensors = files.load_full_state(checkpoint)
    manifest, loaded = files.read_manifest(checkpoint), load_tokenizer(checkpoint, tokenizer)
    stage = stage_of(checkpoint.parents[1])
    run = read_run(checkpoint.parents[1], stage or "model")
    for rank in range(manifest["world_size"]):
        name = files.rank_file(rank)
        tensors[f"{_RANK}{rank:05d}"] = _as_tensor((checkpoint / name).read_bytes())
    tensors[_TOKENIZER] = _as_tensor(format_ranks(loaded.tokens))
    header = {
        "step": manifest["step"],
        "text": {name: run.setting(name) for name in _TEXT},
        "meta": {**({"stage": stage} if stage else {}), **_portable(manifest["meta"])},
        "tokenizer": {
            "pattern": loaded.pattern,
            "specials": list(loaded.specials),
            "training": loaded.training,
        },
    }
    out = out.absolute()
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_room(out.parent, sum(tensor.nbytes for tensor in tensors.values()), out)
        save_file(tensors, scratch, metadata={_HEADER: json.dumps(header)})
        let_others_read(scratch)
        scratch.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def read_file(path: Path, out: Path) -> None:
    """A new run folder out of such a file. UserError with the reason if it is not one."""
    header, tensors = _read(path)
    try:
        step, meta = header["step"], header["meta"]
        token_ranks = parse_ranks(tensors.pop(_TOKENIZER).numpy().tobytes())
        tokenizer = checked_tokenizer(path, token_ranks, **header["tokenizer"])
        config = checked_config(path, **meta["model_config"])
        ranks = [
            tensors.pop(name).numpy().tobytes()
            for name in sorted(tensors)
            if name.startswith(_RANK)
        ]
        if type(step) is not int or step < 0 or not ranks:
            raise ValueError(f"step {step!r} of {len(ranks)} ranks")
        for data in ranks:
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        told = {name: header["text"].get(name) for name in _TEXT}
        text = {name: value for name, value in told.items() if isinstance(value, str)}
    except UserError:
        raise
    except Exception as error:
        # What a stranger's file lacks, and what torch says of a rank's file that is none.
        raise UserError(f"{path} holds no checkpoint of ours: {error!r}") from error
    if meta.get("tokenizer") != tokenizer.fingerprint:
        raise UserError(f"{path}: the tokenizer in it is not the one that the model was trained on")
    model = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    checked_state(config, model, path)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with new_folder(out, need=size) as folder:
        tokenizer.save(folder / TOKENIZER_FOLDER)
        write_settings(folder, out, "a file of gptfast", **text)
        meta = {**meta, "tokenizer_folder": str(out.absolute() / TOKENIZER_FOLDER)}
        write_checkpoint(folder / "checkpoints", step, tensors, meta, ranks)


def _portable(meta: dict[str, Any]) -> dict[str, Any]:
    """Without what is true of one disk only."""
    return {name: value for name, value in meta.items() if name not in _PATHS}


def _as_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is no checkpoint of ours: its header has no {_HEADER!r}")
    return header, tensors
