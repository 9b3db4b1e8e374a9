"""A run's model and tokenizer back from its folder, to evaluate or talk to: in one piece."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from gptfast.attention import choose_attention
from gptfast.checkpoint.files import list_steps, load_full_state, read_manifest, step_folder
from gptfast.config import DEFAULT_CACHE, DataSettings
from gptfast.errors import UserError
from gptfast.model import GPT, GPTConfig, rotary_table
from gptfast.preflight import check_kernels, tokenizer_folder
from gptfast.run import stage_of
from gptfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Placement:
    """Where a model runs, and how. dtype, kernels: "auto" is what is fastest on the device;
    attention: "auto" or a name in gptfast.attention.BACKENDS. UserError for Triton's on a CPU."""

    device: torch.device
    dtype: str = "auto"
    kernels: str = "auto"
    attention: str = "auto"

    def __post_init__(self) -> None:
        check_kernels(self.kernels, self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        auto = "bfloat16" if self.device.type == "cuda" else "float32"
        return getattr(torch, auto if self.dtype == "auto" else self.dtype)

    @property
    def operators(self) -> str:
        auto = "triton" if self.device.type == "cuda" else "reference"
        return auto if self.kernels == "auto" else self.kernels


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """The run's checkpoint of this step, or its newest. UserError if there is none."""
    root = run / "checkpoints"
    steps = list_steps(root)
    if not steps or step not in (None, *steps):
        asked = "" if step is None else f" of step {step}"
        have = f"there are steps {', '.join(map(str, steps))}" if steps else "there are none"
        raise UserError(f"no checkpoint{asked} in {root}: {have}")
    return step_folder(root, steps[-1] if step is None else step)


def data_of_run(run: Path) -> DataSettings:
    """What the base run was trained on. UserError if its settings.json does not tell."""
    path = run / "settings.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["data"]
        folders = {name: Path(saved[name]) for name in ("tokenizer", "cache") if saved[name]}
        return DataSettings(**saved | folders)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not tell what the run was trained on: {error}") from error


def cache_of_run(run: Path) -> Path:
    """Where the run keeps what it fetches: the default if its settings.json does not tell."""
    path = run / "settings.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = [part for part in saved.values() if isinstance(part, dict)]
    return Path(next((part["cache"] for part in parts if "cache" in part), DEFAULT_CACHE))


def load_tokenizer(checkpoint: Path, folder: Path | None = None) -> Tokenizer:
    """The tokenizer that the checkpoint's model was trained with, whatever the stage.

    folder: where it lies; None: where the run had it. UserError if it is not there.
    """
    meta = read_manifest(checkpoint)["meta"]
    folder = folder or _tokenizer_folder(checkpoint, meta)
    if not folder.is_dir():
        raise UserError(
            f"{checkpoint} was trained with the tokenizer in {folder}, which is not there: give "
            "its folder as --tokenizer"
        )
    tokenizer = Tokenizer.load(folder)
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{folder} holds tokenizer {tokenizer.fingerprint[:12]}, but the model was trained "
            f"with {meta['tokenizer'][:12]}: give the folder of that one as --tokenizer"
        )
    return tokenizer


def _tokenizer_folder(checkpoint: Path, meta: dict) -> Path:
    run = checkpoint.parents[1]
    # In the run, which may have been moved since.
    if (run / "tokenizer").is_dir():
        return run / "tokenizer"
    if "tokenizer_folder" in meta:
        return Path(meta["tokenizer_folder"])
    # A base run that kept no tokenizer of its own.
    data = data_of_run(run)
    corpus = str(Path(data.data).expanduser())
    vocab_size = meta["model_config"]["vocab_size"]
    return data.tokenizer or tokenizer_folder(data.cache, corpus, vocab_size)


def config_of(checkpoint: Path) -> GPTConfig:
    """The architecture of its model."""
    return GPTConfig(**read_manifest(checkpoint)["meta"]["model_config"])


def stage_of_checkpoint(checkpoint: Path) -> str:
    """base, mid, sft or rl: as it says itself, or else as its run is named."""
    return read_manifest(checkpoint)["meta"].get("stage") or stage_of(checkpoint.parents[1])


def load_model(checkpoint: Path, placement: Placement) -> GPT:
    """The checkpoint's GPT, ready to evaluate. Raises DamagedCheckpoint if the folder is not what
    was written, UserError if its tensors are not this model's."""
    config = config_of(checkpoint)
    state = load_full_state(checkpoint, "model")
    model = _without_weights(config, placement)
    parameters = dict(model.named_parameters())
    if odd := sorted(state.keys() ^ parameters.keys()):
        raise UserError(f"{checkpoint} and this model differ in {', '.join(odd[:3])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    return model


def random_model(config: GPTConfig, placement: Placement, *, seed: int = 0) -> GPT:
    """A GPT that knows nothing but has preferences: unlike in a model about to be trained, no
    matrix is zero, so that its logits differ."""
    model = _without_weights(config, placement)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value * parameter.shape[1] ** -0.5)
    return model


@dataclass(frozen=True)
class Subject:
    """What is evaluated. identity: JSON values that tell its scores from another model's, or from
    the same model's elsewhere. out: where results belong."""

    name: str
    stage: str
    model: GPT
    tokenizer: Tokenizer
    identity: dict[str, object]
    out: Path


def load_subject(
    run: Path, placement: Placement, *, step: int | None = None, tokenizer: Path | None = None
) -> Subject:
    """The run's model of this step, or its newest; see load_tokenizer for the tokenizer."""
    checkpoint = find_checkpoint(run, step)
    manifest = read_manifest(checkpoint)
    # First, as it is the sooner wrong.
    loaded = load_tokenizer(checkpoint, tokenizer)
    model = load_model(checkpoint, placement)
    weights = {"step": manifest["step"], "files": manifest["files"]}
    return Subject(
        name=f"{run.name} (step {manifest['step']})",
        stage=stage_of_checkpoint(checkpoint),
        model=model,
        tokenizer=loaded,
        identity=weights | _circumstances(model, loaded, placement),
        out=run / "evaluation" / checkpoint.name,
    )


def random_subject(
    depth: int, sequence_len: int, placement: Placement, *, tokenizer: Path
) -> Subject:
    """A model that knows nothing, to see what guessing gives."""
    loaded = Tokenizer.load(tokenizer)
    config = GPTConfig.from_depth(depth, vocab_size=loaded.vocab_size, sequence_len=sequence_len)
    model = random_model(config, placement)
    return Subject(
        name=f"random d{depth}",
        stage="base",
        model=model,
        tokenizer=loaded,
        identity={"random": config.to_dict()} | _circumstances(model, loaded, placement),
        out=Path("runs") / f"random-d{depth}",
    )


def _circumstances(model: GPT, tokenizer: Tokenizer, placement: Placement) -> dict[str, object]:
    return {
        "tokenizer": tokenizer.fingerprint,
        "dtype": str(placement.torch_dtype),
        "kernels": placement.operators,
        "attention": model.blocks[0].attention_backend,
    }


def _without_weights(config: GPTConfig, placement: Placement) -> GPT:
    attention = choose_attention(
        placement.attention, placement.device, placement.torch_dtype, config.head_dim
    )
    with torch.device("meta"):
        model = GPT(config, kernels=placement.operators, attention_backend=attention.backend)
    model.cast_parameters(placement.torch_dtype)
    model.to_empty(device=placement.device)
    tables = rotary_table(config, placement.device)
    for buffer, value in zip((model.cos, model.sin), tables, strict=True):
        buffer.copy_(value)
    return model.requires_grad_(False).eval()
