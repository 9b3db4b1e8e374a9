"""What train/speedrun.py can be told: the few things that concern more than one step."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptfast.config import DEFAULT_CACHE, at_least_one
from gptfast.errors import UserError


@dataclass(frozen=True)
class FlagSettings:
    """Further flags of a step's own recipe, as one string: --base-flags="--num-iterations 500"."""

    tokenizer_flags: str = ""
    base_flags: str = ""
    evaluate_flags: str = ""
    """Of `train/evaluate.py base`, in both of its steps."""
    mid_flags: str = ""
    sft_flags: str = ""
    rl_flags: str = ""
    chat_flags: str = ""
    """Of `train/evaluate.py chat`, after every stage."""

    def of(self, name: str) -> list[str]:
        """UserError if the string cannot be split as a shell would."""
        text = getattr(self, f"{name}_flags")
        try:
            return shlex.split(text)
        except ValueError as error:
            raise UserError(f"--{name}-flags {text!r}: {error}") from error


@dataclass(frozen=True)
class NodeSettings:
    """For several nodes: start the same command on each, with its own --node-rank."""

    nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    """The first node, as the others reach it."""
    master_port: int = 29_400
    """This port and the next are used."""

    def __post_init__(self) -> None:
        at_least_one(self, "nodes")
        if not 0 <= self.node_rank < self.nodes:
            raise UserError(f"--node-rank {self.node_rank} of {self.nodes} node(s): 0 is the first")


@dataclass(frozen=True)
class SpeedrunSettings:
    depth: int | None = None
    """Layers, the one dial; 20 on GPUs, 2 elsewhere."""
    out: Path = Path("runs")
    """Folder of all its runs; the same command there goes on where it stopped."""
    data: str | None = None
    """Text to train on: fineweb-edu, embedded, a file or a folder; fineweb-edu on GPUs, embedded
    elsewhere."""
    vocab_size: int | None = None
    """Of the tokenizer; 65,536 on GPUs, 2,048 elsewhere."""
    tokenizer: Path | None = None
    """Folder of a tokenizer of that size; trained on the text otherwise."""
    core_bundle: Path | None = None
    """Folder of the CORE bundle; fetched (162 MB) otherwise."""
    chat_data: Path | None = None
    """Folder with smoltalk, arc, mmlu, gsm8k and humaneval as on the Hub, or some of them; fetched
    (1 GB) otherwise."""
    offline: bool | None = None
    """Fetch nothing: what is in no folder given is left out and named. True without a GPU."""
    rl: bool = False
    """Reinforcement learning after SFT, too."""
    processes: int | None = None
    """On each node; one for each GPU otherwise, one without GPUs."""
    device: Literal["auto", "cpu"] = "auto"
    cache: Path = DEFAULT_CACHE
    """Where fetched and converted data are kept."""
    price_per_gpu_hour: float | None = None
    """Dollars; the list price of the GPU otherwise, if one is known."""
    dry_run: bool = False
    """Say what is done already, what would be run and what that would take, and stop."""
    check: bool = False
    """Check data, machine and kernels, and stop."""
    flags: FlagSettings = field(default_factory=FlagSettings)
    node: NodeSettings = field(default_factory=NodeSettings)

    def __post_init__(self) -> None:
        at_least_one(self, "depth", "vocab_size", "processes")
