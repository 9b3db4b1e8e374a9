"""Checkpoints of the reference (nanochat, commit d6d86cb), both ways.

    model_NNNNNN.pt              state dict by torch.save: the names are ours, wte in bf16
    meta_NNNNNN.json             model_config among other things
    tokenizer/tokenizer.pkl      a pickled tiktoken Encoding
    tokenizer/token_bytes.pt     (V,) int32, bytes of each token; recomputed, never read

What that model does and does not state: rotary base 10000, softcap 15, RMSNorm with the machine
epsilon of fp32 (PyTorch's F.rms_norm without eps, for bf16 too), rotation by -theta as here. Its
rotary tables are bf16, ours fp32.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from gptfast.convert.pickles import load_state_dict, read_encoding
from gptfast.convert.trained import (
    TrainedModel,
    checked_config,
    checked_state,
    checked_tokenizer,
    new_folder,
    read_json,
)
from gptfast.errors import UserError
from gptfast.model import GPTConfig
from gptfast.report.runs import read_run, stage_of
from gptfast.run import write_json
from gptfast.tokenizer import Tokenizer

ROPE_BASE, SOFTCAP, NORM_EPS = 10000.0, 15.0, torch.finfo(torch.float32).eps
_MODEL_FILE = re.compile(r"model_(\d+)\.pt")
_COMPILED = "_orig_mod."
_WTE = "transformer.wte.weight"
_SETTINGS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


def read_reference(model_file: Path, tokenizer: Path) -> TrainedModel:
    """The model of model_NNNNNN.pt with the meta_NNNNNN.json beside it.

    tokenizer: its tokenizer.pkl, or a folder with a tokenizer of ours.
    UserError with the reason if anything is not as that version writes it.
    """
    if not (number := _MODEL_FILE.fullmatch(model_file.name)):
        raise UserError(f"{model_file} is not called model_NNNNNN.pt")
    config = _read_config(model_file.with_name(f"meta_{number[1]}.json"))
    # removeprefix, whole or not at all; the reference itself strips single letters.
    tensors = {
        name.removeprefix(_COMPILED): tensor for name, tensor in load_state_dict(model_file).items()
    }
    state = checked_state(config, tensors, model_file)
    return TrainedModel(config, state, read_tokenizer(tokenizer), int(number[1]))


def _read_config(path: Path) -> GPTConfig:
    found = read_json(path).get("model_config")
    if not isinstance(found, dict) or found.keys() != set(_SETTINGS):
        names = sorted(found) if isinstance(found, dict) else found
        raise UserError(
            f"{path}: model_config has {names}, expected {', '.join(_SETTINGS)}: this is not a "
            "model of the version that is read here (d6d86cb)"
        )
    return checked_config(path, **found, norm_eps=NORM_EPS, rope_base=ROPE_BASE, softcap=SOFTCAP)


def read_tokenizer(path: Path) -> Tokenizer:
    """From tokenizer.pkl, or a folder of ours. UserError with the reason if it is neither."""
    if path.is_dir():
        return Tokenizer.load(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: name the reference's tokenizer.pkl")
    state = read_encoding(path)
    ranks, specials = state["mergeable_ranks"], state["special_tokens"]
    names = sorted(specials, key=specials.__getitem__)
    tokenizer = checked_tokenizer(path, ranks, pattern=state["pat_str"], specials=names)
    if tokenizer.specials != specials:
        raise UserError(f"{path}: special tokens {specials} do not follow the {len(ranks)} others")
    return tokenizer


def write_reference(out: Path, model: TrainedModel, meta: dict[str, Any]) -> None:
    """A folder that the reference's scripts can load from; the optimizer's state is not in it.

    meta: what its meta_NNNNNN.json tells beside step and model_config. UserError if the model has
    another rotary base or softcap than the reference. The norms' eps becomes NORM_EPS there: in
    place of 1e-6 it changes the logits of a random model of 4 layers by 6.6e-7.
    """
    config = model.config
    for name, fixed in (("rope_base", ROPE_BASE), ("softcap", SOFTCAP)):
        if getattr(config, name) != fixed:
            raise UserError(f"{name} is {getattr(config, name)}; the reference has {fixed} only")
    state = {
        name: tensor.bfloat16() if name == _WTE else tensor for name, tensor in model.state.items()
    }
    settings = {name: getattr(config, name) for name in _SETTINGS}
    with new_folder(out, need=4 * model.parameters) as folder:
        torch.save(state, folder / f"model_{model.step:06d}.pt")
        description = {**meta, "step": model.step, "model_config": settings}
        write_json(folder / f"meta_{model.step:06d}.json", description)
        (folder / "tokenizer").mkdir()
        encoding = pickle.dumps(model.tokenizer.encoding, protocol=4)
        (folder / "tokenizer" / "tokenizer.pkl").write_bytes(encoding)
        token_bytes = torch.from_numpy(model.tokenizer.token_bytes())
        torch.save(token_bytes, folder / "tokenizer" / "token_bytes.pt")


def reference_meta(run: Path, step: int) -> dict[str, Any]:
    """What the reference's metadata tells beside step and model_config, as far as the run knew it
    at that step."""
    found = read_run(run, stage_of(run) or "model").at(step)
    return {
        "val_bpb": found.last_validation.get("val_bpb"),
        "user_config": {},
        "device_batch_size": found.setting("device_batch_size"),
        "max_seq_len": found.setting("sequence_len"),
    }
