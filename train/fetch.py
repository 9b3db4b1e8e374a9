"""Fetch what the later stages read and evaluations ask: conversations, tasks, the CORE bundle.

    python train/fetch.py                         all of it (1.1 GB), as far as it is not there yet
    python train/fetch.py --what core gsm8k

Text for base training is fetched by who reads it first.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from gptfast import parallel
from gptfast.config import DEFAULT_CACHE
from gptfast.run import exit_code
from gptfast.speedrun.fetching import SIZES, What, fetch_all


@dataclass(frozen=True)
class Settings:
    what: tuple[What, ...] = tuple(SIZES)
    """What to fetch; all of it otherwise."""
    cache: Path = DEFAULT_CACHE
    """Where it is kept."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__, console_outputs=parallel.is_main())
    # Several processes where a speedrun has several nodes: one on each fetches.
    with parallel.start(cpu=True) as world, world.node_leader_first() as first:
        fetch_all(settings.what, settings.cache, progress=first)


if __name__ == "__main__":
    sys.exit(exit_code(main))
