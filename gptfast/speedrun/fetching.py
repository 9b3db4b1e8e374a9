"""What the steps behind base training would fetch, and a step that does so before all others.

Hours into a speedrun is no time to find that there is no network.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from gptfast.chat_data import MID_TRAIN, MID_VAL, SFT_TRAIN, SFT_VAL, folders_to_fetch
from gptfast.config_chat import MidSettings, SFTSettings
from gptfast.errors import UserError
from gptfast.evaluate.core_bundle import CONFIG_FILE
from gptfast.evaluate.core_fetch import FOLDER, fetch_bundle
from gptfast.evaluate.settings import EvaluateBaseSettings, EvaluateChatSettings
from gptfast.rl.config import RLSettings
from gptfast.speedrun.plan import Plan, Step
from gptfast.tasks import CHAT_TASKS, fetch

CORE = "core"
What = Literal["core", "smoltalk", "mmlu", "gsm8k", "arc", "humaneval"]
# In bytes.
SIZES: dict[What, float] = {
    CORE: 162e6,
    "smoltalk": 0.9e9,
    "mmlu": 51e6,
    "gsm8k": 3e6,
    "arc": 1e6,
    "humaneval": 0.1e6,
}


def with_fetching(plan: Plan, settings: Mapping[str, Any], cache: Path, *, nodes: int) -> Plan:
    """The plan, with the step before all others, unless nothing would be fetched.

    settings: of each step, what its recipe will understand.
    """
    wanted = {name for each in settings.values() for name in _fetched_by(each)}
    names = [name for name in SIZES if name in wanted]
    if not names:
        return plan
    step = Step(
        "fetch",
        "train/fetch.py",
        (f"--cache={cache}", "--what", *names),
        outputs=tuple(_place(name, cache) for name in names),
        # On every node: the cache need not be one that all see.
        distributed=nodes > 1,
    )
    return replace(plan, steps=(step, *plan.steps))


def fetch_all(names: Sequence[str], cache: Path, *, progress: bool = False) -> None:
    """Fetch and verify what is not there yet. Call it in one process a node, then in all.

    UserError with the cause, all that is not there, and the flags that do without fetching.
    """
    for name in names:
        try:
            if name == CORE:
                fetch_bundle(cache, progress=progress)
            else:
                fetch(name, cache, progress=progress)
        except UserError as error:
            lacking = [each for each in names if each == name or not _is_there(each, cache)]
            raise UserError(
                f"not there: {', '.join(lacking)}. {error}. Local copies do as well: "
                f"{' and '.join(_flags(lacking))} of train/speedrun.py"
            ) from error


def missing_bytes(step: Step) -> float:
    """Of what the step would fetch, those that are not there."""
    places = zip((name for name in SIZES if name in step.arguments), step.outputs, strict=True)
    return sum(SIZES[name] for name, (folder, like) in places if not any(folder.glob(like)))


def _fetched_by(settings: object) -> Iterator[str]:
    """What a step with these settings fetches."""
    if isinstance(settings, MidSettings):
        yield from folders_to_fetch(settings.mixture, train=MID_TRAIN, val=MID_VAL)
    elif isinstance(settings, SFTSettings):
        yield from folders_to_fetch(settings.mixture, train=SFT_TRAIN, val=SFT_VAL)
        asked = settings.accuracy.accuracy_of
        yield from _folders(asked if settings.mixture.chat_data is None else [])
    elif isinstance(settings, RLSettings):
        asks = settings.questions
        yield from ["gsm8k"] if asks.task == "gsm8k" and asks.chat_data is None else []
    elif isinstance(settings, EvaluateChatSettings):
        yield from _folders(settings.tasks if settings.chat_data is None else [])
    elif isinstance(settings, EvaluateBaseSettings):
        yield from [CORE] if "core" in settings.only and settings.core_bundle is None else []


def _folders(tasks: Iterable[str]) -> Iterator[str]:
    return (CHAT_TASKS[task][0] for task in tasks if task in CHAT_TASKS)


def _place(name: str, cache: Path) -> tuple[Path, str]:
    """(folder, pattern) of what is there once it is fetched."""
    cache = cache.expanduser()
    if name == CORE:
        return cache / FOLDER, CONFIG_FILE
    return cache / "tasks" / name, "**/*.parquet"


def _is_there(name: str, cache: Path) -> bool:
    folder, pattern = _place(name, cache)
    return any(folder.glob(pattern))


def _flags(names: Sequence[str]) -> Iterator[str]:
    tasks = [name for name in names if name != CORE]
    if tasks:
        yield f"--chat-data FOLDER (with {', '.join(tasks)} as on the Hub)"
    if CORE in names:
        yield "--core-bundle FOLDER (what eval_bundle.zip unpacks to)"
