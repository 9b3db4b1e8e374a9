"""The model in Hugging Face's format, as transformers' own NanoChat model reads it.

    model.safetensors       weights; several model-0000i-of-0000n.safetensors and an index if large
    config.json             model_type "nanochat"
    generation_config.json  where an answer ends
    tokenizer.json, tokenizer_config.json    (hub_tokenizer.py)
    README.md               the model card (card.py)

That model (transformers/models/nanochat, 5.0 and later) is this one: parameter-free RMSNorm with a
stated eps after the embedding, before each sub-layer, on q and k after the rotation and before the
head; rotation by -theta over two halves, y1 = x1 cos + x2 sin; squared ReLU; softcap. So weights
are renamed, not changed; everything that can be set is stated, nothing left to a default.
"""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptfast.convert.hub_tokenizer import read_tokenizer, write_tokenizer
from gptfast.convert.trained import (
    TrainedModel,
    checked_config,
    checked_state,
    expected_shapes,
    let_others_read,
    new_folder,
    read_json,
)
from gptfast.errors import UserError
from gptfast.model import GPTConfig
from gptfast.run import write_json

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)
_STEP = re.compile(r"[0-9]{1,12}")
_BLOCK_NAME = re.compile(r"transformer\.h\.(\d+)\.(\w+\.\w+)\.weight")
# Our name in a block -> theirs in a layer.
_LAYER_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# What their model can be told and ours cannot: (their default, what ours does).
_FIXED = {
    "hidden_act": ("relu2", "relu2"),
    "attention_bias": (False, False),
    "tie_word_embeddings": (False, False),
}


def check_shard_size(text: str) -> None:
    """UserError if the Hub's library, which looks only when it writes, would not understand it."""
    if not _SIZE.fullmatch(text):
        raise UserError(
            f"max_shard_size {text!r} is no size: 5GB is one, or another number of KB, MB, GB or TB"
        )


def write_hub(
    out: Path,
    model: TrainedModel,
    card: ModelCard,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> None:
    """The folder of a model for Hugging Face.

    dtype: of the weights; fp32 keeps every bit, bf16 is half the size. UserError if `out` is taken
    or the disk too full.
    """
    with new_folder(out, need=dtype.itemsize * model.parameters) as folder:
        save_torch_state_dict(
            {_their_name(name): tensor.to(dtype) for name, tensor in model.state.items()},
            folder,
            max_shard_size=max_shard_size,
            metadata={"step": str(model.step)},
        )
        for path in folder.glob("*.safetensors"):
            let_others_read(path)
        write_json(folder / "config.json", _their_config(model, dtype))
        write_json(folder / "generation_config.json", _generation_config(model))
        write_tokenizer(folder, model.tokenizer, model.config.sequence_len)
        card.save(folder / "README.md")


def read_hub(folder: Path) -> TrainedModel:
    """The model of such a folder, whoever wrote it; bf16 and fp16 weights become fp32.

    UserError naming the file and the reason if it is another architecture or not whole. Only
    safetensors and JSON are read: neither can run code.
    """
    config = _read_config(folder / "config.json")
    tensors, step = _read_weights(folder)
    ours = {_their_name(name): name for name in expected_shapes(config, len(tensors), folder)}
    renamed = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    state = checked_state(config, renamed, folder)
    return TrainedModel(config, state, read_tokenizer(folder), step)


def _their_name(name: str) -> str:
    if name == "transformer.wte.weight":
        return "model.embed_tokens.weight"
    if block := _BLOCK_NAME.fullmatch(name):
        return f"model.layers.{block[1]}.{_LAYER_NAMES[block[2]]}.weight"
    return name


def _their_config(model: TrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        # What it was trained with; the rotation itself has no end.
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": config.softcap,
        **{name: ours for name, (_, ours) in _FIXED.items()},
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **_ends(model),
        # Not <|bos|>, which fills up batches: a padding token's embedding would not be trained.
        "pad_token_id": None,
    }


def _generation_config(model: TrainedModel) -> dict[str, Any]:
    return {**_ends(model), "pad_token_id": model.tokenizer.bos_id, "max_new_tokens": 256}


def _ends(model: TrainedModel) -> dict[str, Any]:
    """An answer ends where the assistant's turn does, or where a new document would begin."""
    end = model.tokenizer.specials.get("<|assistant_end|>")
    bos = model.tokenizer.bos_id
    return {"bos_token_id": bos, "eos_token_id": bos if end is None else [end, bos]}


def _read_config(path: Path) -> GPTConfig:
    """Keys that are missing have their model's default, as far as it has one that ours can be."""
    found = read_json(path)
    if found.get("model_type") != "nanochat":
        raise UserError(f"{path}: model_type is {found.get('model_type')!r}, not 'nanochat'")
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    # "rope_theta" beside the others is how transformers wrote it before version 5.
    rope = found.get("rope_parameters") or {"rope_theta": found.get("rope_theta", 10000.0)}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rope_parameters {rope} are not the plain rotation's")
    config = checked_config(
        path,
        sequence_len=found.get("max_position_embeddings"),
        vocab_size=found.get("vocab_size"),
        n_layer=found.get("num_hidden_layers"),
        n_head=heads,
        n_kv_head=found.get("num_key_value_heads") or heads,
        n_embd=width,
        norm_eps=found.get("rms_norm_eps", 1e-6),
        rope_base=rope.get("rope_theta"),
        softcap=found.get("final_logit_softcapping", found.get("logits_soft_cap", 15.0)),
    )
    fixed = _FIXED | {
        "intermediate_size": (8192, 4 * config.n_embd),
        "head_dim": (config.head_dim, config.head_dim),
        # Of early conversions, as is logits_soft_cap above.
        "qkv_bias": (False, False),
        "rope_scaling": (None, None),
    }
    for name, (default, ours) in fixed.items():
        if found.get(name, default) != ours:
            raise UserError(f"{path}: {name} is {found.get(name, default)!r}; only {ours!r} works")
    return config


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """(tensors by their names, step or 0). The library checks a file's header against its size."""
    files, notes = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                tensors |= {name: file.get_tensor(name) for name in names}
                notes = (file.metadata() or {}) | notes
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    step = str(notes.get("step"))
    return tensors, int(step) if _STEP.fullmatch(step) else 0


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """The files with weights, and the notes on all of them together."""
    if not (folder / INDEX).is_file():
        return [folder / ONE_FILE], {}
    index = read_json(folder / INDEX)
    shards, notes = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(shards, dict) or not isinstance(notes, dict):
        raise UserError(f"{folder / INDEX} has no weight_map, or metadata that is no object")
    for name in shards.values():
        # The folder's own files only: the index could name any of the disk.
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise UserError(f"{folder / INDEX} names {name!r}, which is no safetensors file here")
    return [folder / name for name in sorted(set(shards.values()))], notes
