"""What chat models are trained on: parts with weights, in one deterministic order.

A part is written NAME, NAME[:N] (N of its conversations), NAME:W (W times) or NAME[:N]:W.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

from gptfast.config_chat import MixtureSettings
from gptfast.errors import UserError
from gptfast.tasks import ARC, GSM8K, MMLU, Conversations, Task, TaskMixture, fetch, smoltalk
from gptfast.tasks import embedded as embedded_task

# The reference's (nanochat d6d86cb): 567,656 and 20,843 conversations to train on.
MID_TRAIN = ("smoltalk", "mmlu", "gsm8k")
MID_VAL = ("smoltalk", "mmlu[:5200]", "gsm8k[:420]")
SFT_TRAIN = ("arc-easy", "arc-challenge", "gsm8k", "smoltalk[:10000]")
SFT_VAL = ("smoltalk",)

EMBEDDED = "embedded"
# name -> (folder as in gptfast.tasks.fetch, training task, validation task).
_NAMED: dict[str, tuple[str, Callable[[Path], Task], Callable[[Path], Task]]] = {
    "smoltalk": (
        "smoltalk",
        partial(smoltalk, split="train"),
        partial(smoltalk, split="test"),
    ),
    "mmlu": (
        "mmlu",
        partial(MMLU, subset="auxiliary_train", split="train"),
        partial(MMLU, subset="all", split="test"),
    ),
    "gsm8k": ("gsm8k", partial(GSM8K, split="train"), partial(GSM8K, split="test")),
    **{
        name.lower(): (
            "arc",
            partial(ARC, subset=name, split="train"),
            partial(ARC, subset=name, split="test"),
        )
        for name in ("ARC-Easy", "ARC-Challenge")
    },
}
_PART = re.compile(r"(?P<name>.+?)(\[:(?P<limit>\d+)\])?(:(?P<weight>\d+(\.\d+)?))?")

# Where a mixture has no validation of its own, each of its parts holds out this share, at most so
# many.
_HELD_OUT_SHARE = 50
_HELD_OUT_MOST = 500


@dataclass(frozen=True)
class Part:
    """A part of a mixture. limit: of its conversations, the first so many after shuffling; None:
    all. weight: how often each is in the mixture; a fraction takes a share of them."""

    name: str
    limit: int | None = None
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Part":
        found = _PART.fullmatch(text)
        limit, weight = (found["limit"], found["weight"]) if found else (None, None)
        part = cls(
            found["name"] if found else text,
            None if limit is None else int(limit),
            1.0 if weight is None else float(weight),
        )
        if not found or part.limit == 0 or part.weight == 0:
            raise UserError(f"{text!r} is no part of a mixture: NAME, NAME[:N], NAME:W, NAME[:N]:W")
        return part

    def copies(self, task: Task) -> list[Task]:
        """The task as often as the weight says."""
        whole, rest = divmod(self.weight, 1.0)
        return [task] * int(whole) + [task[: round(rest * len(task))]]


@dataclass(frozen=True)
class Mixture:
    """Conversations in their order. identity: JSON of what they come from and when it was last
    changed: what their tokens are found by in the cache."""

    task: Task
    identity: str


@dataclass(frozen=True)
class Mixtures:
    train: Mixture
    val: Mixture


@dataclass(frozen=True)
class _Opened:
    """A part's conversations, after its limit and before its weight. side: what they are for;
    states: of the files that they come from."""

    part: Part
    task: Task
    side: str
    states: list[tuple[str, int, int]]


def open_mixtures(
    settings: MixtureSettings,
    *,
    train: Sequence[str],
    val: Sequence[str],
    progress: bool = False,
) -> Mixtures:
    """The mixtures that the settings name, fetched where that is needed. Call it in one process a
    node, then in all.

    train, val: the reference's, used where the settings name none.
    UserError: for a part that does not exist or cannot be read or fetched.
    """
    open_parts = partial(_open_parts, settings, progress=progress)
    training = open_parts(settings.train or train, split="train")
    if settings.val or not settings.train:
        return Mixtures(_mix(training), _mix(open_parts(settings.val or val, split="val")))
    return _hold_out(training)


def check_parts(settings: MixtureSettings, *, train: Sequence[str], val: Sequence[str]) -> None:
    """UserError for what `open_mixtures` would not find on this disk; fetches nothing."""
    for part in _parts(settings, train, val):
        if part.name not in (EMBEDDED, *_NAMED):
            _own_files(Path(part.name).expanduser())
        elif part.name in _NAMED and settings.chat_data is not None:
            folder = settings.chat_data.expanduser() / _NAMED[part.name][0]
            if not folder.is_dir():
                raise UserError(f"no {part.name} in --chat-data: no folder {folder}")


def folders_to_fetch(
    settings: MixtureSettings, *, train: Sequence[str], val: Sequence[str]
) -> set[str]:
    """What `open_mixtures` would fetch if it is not in the cache: names for gptfast.tasks.fetch."""
    if settings.chat_data is not None:
        return set()
    named = {part.name for part in _parts(settings, train, val)} & _NAMED.keys()
    return {_NAMED[name][0] for name in named}


def _parts(settings: MixtureSettings, train: Sequence[str], val: Sequence[str]) -> list[Part]:
    """Of both mixtures; where validation is held out of training, of the latter."""
    held_out = settings.train and not settings.val
    parts = (*(settings.train or train), *(() if held_out else settings.val or val))
    return [Part.parse(part) for part in parts]


def _open_parts(
    settings: MixtureSettings, parts: Sequence[str], *, split: embedded_task.Split, progress: bool
) -> list[_Opened]:
    opened = []
    for part in map(Part.parse, parts):
        task, files = _open_part(settings, part.name, split=split, progress=progress)
        states = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        opened.append(_Opened(part, task[: part.limit], split, states))
    return opened


def _mix(opened: Sequence[_Opened]) -> Mixture:
    mixture = TaskMixture([copy for each in opened for copy in each.part.copies(each.task)])
    if not len(mixture):
        raise UserError(f"no conversation in {' '.join(each.part.name for each in opened)}")
    identity = [[*astuple(each.part), each.side, len(each.task), each.states] for each in opened]
    return Mixture(mixture, json.dumps(identity))


def _open_part(
    settings: MixtureSettings, name: str, *, split: embedded_task.Split, progress: bool
) -> tuple[Task, list[Path]]:
    """The part's task, and the files that it is made of."""
    if name == EMBEDDED:
        return embedded_task.embedded(split=split), []
    if name not in _NAMED:
        files = _own_files(Path(name).expanduser())
        return Conversations(files, shuffle=True), [file.absolute() for file in files]
    folder_name, *makers = _NAMED[name]
    if settings.chat_data is None:
        folder = fetch(folder_name, settings.cache, progress=progress)
    else:
        folder = settings.chat_data.expanduser() / folder_name
    make = makers[0] if split == "train" else makers[1]
    return make(folder), sorted(file.absolute() for file in folder.rglob("*.parquet"))


def _own_files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(
            f"no conversations {path}: it is none of {', '.join([*_NAMED, EMBEDDED])}, and no such "
            "file or folder exists"
        )
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
    if not files:
        raise UserError(f"{path} has no .jsonl or .parquet at its top level")
    return files


def _hold_out(opened: Sequence[_Opened]) -> Mixtures:
    """The last conversations of each part validate, once each whatever its weight; the others
    train. None does both: they are held out before any is taken several times."""
    names = [each.part.name for each in opened]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{twice[0]} is named twice, so that what is held out of one would train in the other: "
            f"give {twice[0]}:2, or --val"
        )
    training, held_out = [], []
    for each in opened:
        size = len(each.task)
        cut = size - (min(_HELD_OUT_MOST, max(1, size // _HELD_OUT_SHARE)) if size > 1 else 0)
        training.append(replace(each, task=each.task[:cut], side="not held out"))
        once = replace(each.part, weight=1.0)
        held_out.append(replace(each, part=once, task=each.task[cut:], side="held out"))
    if not any(len(each.task) for each in held_out):
        raise UserError("a single conversation cannot both train and validate: give more, or --val")
    return Mixtures(_mix(training), _mix(held_out))
