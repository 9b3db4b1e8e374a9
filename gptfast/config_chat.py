"""The settings of the stages after base training; the parts that they share come first."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from gptfast.config import (
    DEFAULT_CACHE,
    LearningSettings,
    OptimSettings,
    RunSettings,
    SystemSettings,
    at_least_one,
)

# The settings without a GPU: plain PyTorch, as it is.
CPU_SYSTEM = SystemSettings(kernels="reference", compile=False, device="cpu")


@dataclass(frozen=True)
class SourceSettings:
    source: str = "base"
    """The run to start from: its folder, or a stage (base, mid, sft, rl), of which the run of the
    largest depth is taken."""
    source_step: int | None = None
    """Which of its checkpoints; the newest otherwise."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, if it is no longer where the source had it."""


@dataclass(frozen=True)
class MixtureSettings:
    """What to train on. Each part is a name (smoltalk, mmlu, gsm8k, arc-easy, arc-challenge,
    embedded), or a .jsonl or .parquet file of {"messages": [...]}, or a folder of such files. After
    it, [:N] takes N of its conversations, and :W takes it W times: my.jsonl:2, smoltalk[:10000]."""

    train: tuple[str, ...] = ()
    """Parts of the training mixture; the reference's otherwise."""
    val: tuple[str, ...] = ()
    """Parts of the validation mixture; otherwise the reference's or, if --train is given, the last
    2 % of each of its parts (after shuffling; 1 to 500), which are not trained on."""
    chat_data: Path | None = None
    """Folder with local copies of all that has a name (smoltalk/, mmlu/, gsm8k/, arc/), laid out as
    on the Hub; fetched otherwise."""
    cache: Path = DEFAULT_CACHE
    """Where fetched conversations, and their tokens, are kept."""


@dataclass(frozen=True)
class MidOptimSettings(OptimSettings):
    grad_clip: float = 0.0
    # pyrefly: ignore[bad-override]  (`like` fills it in)
    device_batch_size: int | None = None
    """Sequences in one forward + backward of one GPU; as the source had it otherwise."""
    # pyrefly: ignore[bad-override]  (`like` fills it in)
    total_batch_size: int | None = None
    """Tokens in one step of all GPUs together; as the source had it otherwise."""

    def like(self, source: OptimSettings) -> "MidOptimSettings":
        """These settings, with the batch sizes of the source where they say nothing."""
        return replace(
            self,
            device_batch_size=self.device_batch_size or source.device_batch_size,
            total_batch_size=self.total_batch_size or source.total_batch_size,
        )


@dataclass(frozen=True)
class MidSettings:
    """Everything that train/mid.py can be told."""

    start: SourceSettings = field(default_factory=SourceSettings)
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    num_iterations: int | None = None
    """Steps; all of the mixture once otherwise."""
    optim: MidOptimSettings = field(default_factory=MidOptimSettings)
    system: SystemSettings = field(default_factory=SystemSettings)
    run: RunSettings = field(default_factory=lambda: RunSettings(eval_every=150, sample_every=0))

    def __post_init__(self) -> None:
        at_least_one(self, "num_iterations")


@dataclass(frozen=True)
class SFTOptimSettings(LearningSettings):
    grad_clip: float = 0.0
    init_lr_frac: float = 0.02
    warmdown_ratio: float = 1.0
    target_examples_per_step: int = 32
    """Conversations in a step, on average: a step is the rows that so many fill."""
    device_batch_size: int | None = None
    """Rows in one forward + backward of one GPU; otherwise its share of a step, at most 32."""
    pack: bool = True
    """Several conversations in a row, each attending to itself alone; False: one a row, padded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "target_examples_per_step", "device_batch_size")


@dataclass(frozen=True)
class AccuracySettings:
    accuracy_of: tuple[str, ...] = ("ARC-Easy", "MMLU")
    """Tasks with letters as answers that are scored now and then."""
    accuracy_every: int = 200
    """Steps between such scorings, each with a validation; 0: only before and after."""
    accuracy_problems: int = 1024
    """Problems of each task."""

    def __post_init__(self) -> None:
        at_least_one(self, "accuracy_problems")


@dataclass(frozen=True)
class SFTSettings:
    """Everything that train/sft.py can be told."""

    start: SourceSettings = field(default_factory=lambda: SourceSettings(source="mid"))
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    num_epochs: int = 1
    num_iterations: int | None = None
    """Steps; --num-epochs times the mixture otherwise."""
    optim: SFTOptimSettings = field(default_factory=SFTOptimSettings)
    accuracy: AccuracySettings = field(default_factory=AccuracySettings)
    system: SystemSettings = field(default_factory=SystemSettings)
    run: RunSettings = field(
        default_factory=lambda: RunSettings(
            eval_every=100, eval_tokens=524_288, sample_every=0, save_every=0
        )
    )

    def __post_init__(self) -> None:
        at_least_one(self, "num_epochs", "num_iterations")


def mid_preset(*, on_gpu: bool) -> MidSettings:
    """The defaults of train/mid.py here: the reference's on GPUs; elsewhere a few hundred
    conversations that Python itself carries."""
    if on_gpu:
        return MidSettings()
    return MidSettings(
        mixture=MixtureSettings(train=("embedded[:500]",), val=("embedded",)),
        system=CPU_SYSTEM,
        run=RunSettings(eval_every=50, eval_tokens=8 * 1024, sample_every=0, save_every=50),
    )


def sft_preset(*, on_gpu: bool) -> SFTSettings:
    """The defaults of train/sft.py here, as `mid_preset`."""
    if on_gpu:
        return SFTSettings()
    return SFTSettings(
        mixture=MixtureSettings(train=("embedded[:400]",), val=("embedded",)),
        # So few steps would hardly move anything otherwise.
        optim=SFTOptimSettings(init_lr_frac=0.3),
        accuracy=AccuracySettings(accuracy_of=("embedded",), accuracy_problems=100),
        system=CPU_SYSTEM,
        run=RunSettings(eval_every=10, eval_tokens=4 * 1024, sample_every=0, save_every=10),
    )
