"""The settings of a run: dataclasses whose fields are the flags of the recipes.

Here are those that every stage has, and base training's; those of chat stages are in
gptfast/config_chat.py.

Checked where they are made, as far as they can be alone; what depends on the machine or the data
(GPU memory, the world size, the tokenizer) is checked by the functions at the end, before step 0.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptfast.attention import BACKENDS
from gptfast.errors import UserError
from gptfast.schedule import check_ratios

DEFAULT_CACHE = Path.home() / ".cache" / "gptfast"
# A few minutes, of the model that is the default there.
CPU_STEPS = 60


@dataclass(frozen=True)
class ModelSettings:
    depth: int = 20
    """Layers; the one dial: width is 64 x depth, heads have 128 dimensions."""
    sequence_len: int = 2048
    """Tokens of context in training."""
    vocab_size: int = 65536
    """Size of the tokenizer, trained if there is none of this size."""

    def __post_init__(self) -> None:
        at_least_one(self, "depth", "sequence_len", "vocab_size")


@dataclass(frozen=True)
class DataSettings:
    data: str = "fineweb-edu"
    """fineweb-edu, embedded (the standard library's own text), or a file or folder of parquet,
    jsonl(.gz, .zst) or txt."""
    validation: str | None = None
    """File of the folder that validates; its last in sorted order otherwise."""
    tokenizer: Path | None = None
    """Folder of a trained tokenizer; otherwise the run's own with --resume, or else the cache's for
    this text, size and --tokenizer-chars."""
    tokenizer_chars: int = 2_000_000_000
    """Characters to train a tokenizer on, if there is none."""
    cache: Path = DEFAULT_CACHE
    """Where fetched text and trained tokenizers are kept."""

    def __post_init__(self) -> None:
        at_least_one(self, "tokenizer_chars")


@dataclass(frozen=True)
class HorizonSettings:
    """How long to train: one of these, or 20 tokens for each parameter; on a CPU, 60 steps."""

    num_iterations: int | None = None
    """Steps."""
    target_tokens: int | None = None
    """Tokens, rounded down to whole steps."""
    target_flops: float | None = None
    """FLOPs, by the report's formula."""
    target_param_data_ratio: float | None = None
    """Tokens for each parameter."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            told = " and ".join(f"{name} {value:g}" for name, value in given.items())
            raise UserError(f"{told}: a run has one length")

    def iterations(self, device: str) -> int | None:
        """Steps, where they do not follow from another of these. device: of SystemSettings."""
        given = any(value is not None for value in vars(self).values())
        return self.num_iterations if given or device != "cpu" else CPU_STEPS


@dataclass(frozen=True)
class LearningSettings:
    embedding_lr: float = 0.2
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    init_lr_frac: float = 1.0
    """All learning rates are multiplied by this."""
    warmup_ratio: float = 0.0
    warmdown_ratio: float = 0.2
    final_lr_frac: float = 0.0

    def __post_init__(self) -> None:
        not_negative(self, "embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay")
        not_negative(self, "grad_clip", "init_lr_frac", "final_lr_frac")
        check_ratios(self.warmup_ratio, self.warmdown_ratio)


@dataclass(frozen=True)
class OptimSettings(LearningSettings):
    device_batch_size: int = 32
    """Sequences in one forward + backward of one GPU."""
    total_batch_size: int = 524_288
    """Tokens in one step of all GPUs together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "device_batch_size", "total_batch_size")


@dataclass(frozen=True)
class SystemSettings:
    kernels: Literal["triton", "reference"] = "triton"
    """Our Triton kernels, or plain PyTorch for torch.compile to fuse."""
    attention: str = "auto"
    """auto, flash4, flash3, cudnn, flash2 or math."""
    compile: bool = True
    """torch.compile the blocks."""
    reshard_after_forward: bool = False
    """Free a block's gathered weights between its forward and backward: less memory, more
    communication."""
    deterministic: bool = False
    """Repeatable bit for bit: attention's backward and PyTorch's own operators; slower."""
    seed: int = 42
    device: Literal["auto", "cpu"] = "auto"
    """cpu: the CPU, and the defaults of a machine without a GPU, though there is one."""

    def __post_init__(self) -> None:
        if self.attention != "auto" and self.attention not in BACKENDS:
            raise UserError(
                f"attention {self.attention!r}: choose auto or one of {', '.join(BACKENDS)}"
            )


@dataclass(frozen=True)
class RunSettings:
    out: Path | None = None
    """Folder of this run: settings, metrics, checkpoints, curves. By default runs/base-d20 (20 is
    the depth), or the first of runs/base-d20-2, -3, ... that is free."""
    resume: bool = False
    """Continue from the newest complete checkpoint in the folder."""
    eval_every: int = 250
    """Steps between validations (bits per byte); 0: only before and after."""
    eval_tokens: int = 20 * 524_288
    sample_every: int = 2000
    """Steps between samples; 0: only at the end."""
    save_every: int = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints to keep."""
    profile_steps: str | None = None
    """Steps to profile, such as 20:23; the ledger of their kernels goes into the run's folder.
    Not in reinforcement learning."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log there."""

    def __post_init__(self) -> None:
        at_least_one(self, "keep")


@dataclass(frozen=True)
class BaseSettings:
    """Everything that train/base.py can be told."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    horizon: HorizonSettings = field(default_factory=HorizonSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    system: SystemSettings = field(default_factory=SystemSettings)
    run: RunSettings = field(default_factory=RunSettings)


def preset(*, on_gpu: bool, processes: int) -> BaseSettings:
    """The defaults of train/base.py here: the report's d20 on GPUs; elsewhere a small model on
    the embedded text, plain PyTorch in fp32, that any machine trains in a few minutes with any
    number of processes."""
    if on_gpu:
        return BaseSettings()
    sequences = -(-8 // processes)
    return BaseSettings(
        model=ModelSettings(depth=4, sequence_len=128, vocab_size=2048),
        data=DataSettings(data="embedded", tokenizer_chars=2_000_000),
        optim=OptimSettings(
            device_batch_size=sequences, total_batch_size=sequences * 128 * processes
        ),
        system=SystemSettings(kernels="reference", compile=False, device="cpu"),
        run=RunSettings(
            eval_every=30,
            eval_tokens=16 * 1024,
            sample_every=0,
            save_every=30,
        ),
    )


def accumulation_steps(optim: OptimSettings, sequence_len: int, world_size: int) -> int:
    """Micro-steps of one step; UserError with the nearest totals that the world divides."""
    micro = optim.device_batch_size * sequence_len * world_size
    total = optim.total_batch_size
    if total % micro:
        below, above = total // micro * micro, (total // micro + 1) * micro
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"total batch of {total} tokens is no multiple of the {micro} tokens that {world_size} "
            f"process(es) take in one pass ({optim.device_batch_size} x {sequence_len} each); "
            f"the nearest that work: {near}"
        )
    return total // micro


def at_least_one(settings: object, *names: str) -> None:
    """UserError naming the first of these fields that is a number below 1."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")


def not_negative(settings: object, *names: str) -> None:
    """UserError naming the first of these fields that is no number of at least 0."""
    for name in names:
        value = getattr(settings, name)
        if not value >= 0:
            raise UserError(f"{name} must be at least 0, got {value}")
