"""karpathy/fineweb-edu-100b-shuffle: 1,823 shards of about 250 million characters (100 MB) each.

Train is the first shards; validation is always the last one, so that it does not depend on how
many were fetched.
"""

import math
from pathlib import Path

from gptfast.errors import UserError
from gptfast.fetch import FetchPolicy, HubFile, fetch_files

REPO = "karpathy/fineweb-edu-100b-shuffle"
VALIDATION_SHARD = 1822
# The reference fetches 240 shards to train d20 on 11.2 billion tokens.
DEFAULT_TRAIN_SHARDS = 240
_SHARD_CHARACTERS = 250_000_000
# 4.8 to 4.9 on this text in the report's tokenizer evaluation; a little more here, so that a run
# does not start its text anew unawares.
_CHARACTERS_PER_TOKEN = 5.0


def shards_for(tokens: int, characters_per_token: float = _CHARACTERS_PER_TOKEN) -> int:
    """How many training shards hold that many tokens; all of them if they do not suffice."""
    return min(math.ceil(tokens * characters_per_token / _SHARD_CHARACTERS), VALIDATION_SHARD)


def shards_in(folder: Path) -> int:
    """How many have been fetched to this folder; their records are not looked at."""
    return len(list(folder.glob("shard_*.parquet")))


def fetch_fineweb(
    folder: Path,
    train_shards: int | None = None,
    *,
    policy: FetchPolicy | None = None,
    progress: bool = False,
) -> tuple[list[Path], Path]:
    """(training shards in order, validation shard), fetched and verified where still missing.

    Args:
        train_shards: 1 to 1,822; the reference's 240 if None.
        progress: show a bar of shards on stderr.

    Raises:
        UserError: naming the shard, the cause and what to do; what was fetched until then is kept.
    """
    count = DEFAULT_TRAIN_SHARDS if train_shards is None else train_shards
    if not 1 <= count <= VALIDATION_SHARD:
        raise UserError(
            f"train_shards is {count}; {REPO} has 1 to {VALIDATION_SHARD} shards to train on"
        )
    names = [f"shard_{i:05d}.parquet" for i in [*range(count), VALIDATION_SHARD]]
    shards = {name: HubFile(REPO, name) for name in names}
    *train, val = fetch_files(folder, shards, policy=policy, progress=progress)
    return train, val
