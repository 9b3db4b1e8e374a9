"""What a speedrun has yet to write, and whether the disks have room for it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptfast.checkpoint.files import list_steps
from gptfast.config import BaseSettings
from gptfast.data import shards_for, shards_in
from gptfast.memory import checkpoint_bytes
from gptfast.speedrun.decide import is_whole
from gptfast.speedrun.estimate import (
    SHARD_BYTES,
    DiskNeed,
    config_of,
    steps_of,
)
from gptfast.speedrun.plan import Plan, Step


def disk_needs(plan: Plan, stages: Mapping[str, Any], cache: Path) -> list[DiskNeed]:
    """One need for each disk: runs go where the plan says, text to the cache.

    stages: base, mid, sft, rl -> the settings that the plan's commands come to.
    """
    base = stages["base"]
    checkpoint = checkpoint_bytes(config_of(base))
    trained = [step for step in plan.steps if step.resumable]
    runs = checkpoint * sum(_checkpoints(step, stages[step.name].run.keep) for step in trained)
    wanted: dict[int, tuple[Path, float]] = {}
    for folder, needed in ((plan.folder, runs), (cache, _missing_text(base, cache))):
        folder = folder.expanduser().absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        disk = there.stat().st_dev
        first, before = wanted.get(disk, (there, 0.0))
        wanted[disk] = first, before + needed
    return [DiskNeed(f, needed, shutil.disk_usage(f).free) for f, needed in wanted.values()]


def _checkpoints(step: Step, keep: int) -> int:
    """How many a stage has yet to write: those that it keeps, and one more while it writes."""
    if step.owns is None or is_whole(step):
        return 0
    return keep + 1 - min(keep, len(list_steps(step.owns / "checkpoints")))


def _missing_text(base: BaseSettings, cache: Path) -> float:
    if base.data.data != "fineweb-edu":
        return 0.0
    wanted = shards_for(steps_of(base) * base.optim.total_batch_size)
    return max(0, wanted - shards_in(cache / "data" / base.data.data)) * SHARD_BYTES
