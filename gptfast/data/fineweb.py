"""karpathy/fineweb-edu-100b-shuffle: 1,823 shards of about 250 million characters (100 MB) each.

Train is the first shards; validation is always the last one, so that it does not depend on how
many were fetched. A file that has a shard's name in the folder has been verified: it is fetched
into a scratch folder, compared with the size and sha256 that the Hub states, recorded in
`shard_NNNNN.json` and then moved to its name.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from tqdm import tqdm

from gptfast.errors import UserError

REPO = "karpathy/fineweb-edu-100b-shuffle"
VALIDATION_SHARD = 1822
# The reference fetches 240 shards to train d20 on 11.2 billion tokens.
DEFAULT_TRAIN_SHARDS = 240
_SHARD_CHARACTERS = 250_000_000
# What asking again cannot change: no right to read it, or no such file.
_FINAL_STATUS = (401, 403, 404)


@dataclass(frozen=True)
class FetchPolicy:
    """How hard to try. The waits between tries double: 2, 4, 8, 16 seconds by default."""

    workers: int = 8
    tries: int = 5
    # A connection that gives nothing for 10 s (HF_HUB_DOWNLOAD_TIMEOUT) is taken up again by
    # huggingface_hub itself; this limit is for whatever hangs in spite of that.
    try_seconds: float = 900.0
    wait_seconds: float = 2.0


class _FailedTry(Exception):
    """Worth another try; the message is the cause."""


def shards_for(tokens: int, characters_per_token: float) -> int:
    """How many training shards hold that many tokens; all of them if they do not suffice."""
    return min(math.ceil(tokens * characters_per_token / _SHARD_CHARACTERS), VALIDATION_SHARD)


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
    folder.mkdir(parents=True, exist_ok=True)
    shards = [folder / f"shard_{i:05d}.parquet" for i in [*range(count), VALIDATION_SHARD]]
    missing = [shard for shard in shards if not _is_verified(shard)]
    if missing:
        _fetch_all(missing, policy or FetchPolicy(), progress)
    return shards[:-1], shards[-1]


def _is_verified(shard: Path) -> bool:
    record = shard.with_suffix(".json")
    if not (shard.is_file() and record.is_file()):
        return False
    return shard.stat().st_size == json.loads(record.read_text())["size"]


def _fetch_all(shards: list[Path], policy: FetchPolicy, progress: bool) -> None:
    stop = Event()
    with (
        ThreadPoolExecutor(policy.workers) as pool,
        tqdm(total=len(shards), unit="shard", desc="fineweb-edu", disable=not progress) as bar,
    ):
        fetches = [pool.submit(_fetch, shard, policy, stop) for shard in shards]
        try:
            for fetch in as_completed(fetches):
                fetch.result()
                bar.update()
        finally:
            # After the first failure nothing new is begun; what is on its way is let finish.
            stop.set()


def _fetch(shard: Path, policy: FetchPolicy, stop: Event) -> None:
    """Fetch one shard, trying again while there is hope and `stop` is not set."""
    cause = ""
    for attempt in range(policy.tries):
        # No wait before the first try, but a look whether another shard has failed.
        if stop.wait(policy.wait_seconds * 2 ** (attempt - 1) if attempt else 0.0):
            return
        try:
            return _try_fetch(shard, policy)
        except _FailedTry as error:
            cause = str(error)
    raise UserError(
        f"{shard.name} of {REPO} could not be fetched in {policy.tries} tries: {cause}; "
        f"run the same command again: finished shards are kept in {shard.parent}"
    )


def _try_fetch(shard: Path, policy: FetchPolicy) -> None:
    """One try: fetch, verify, record, move. UserError or _FailedTry with the cause."""
    # Named after machine and shard, so that the next run clears what a killed one left.
    scratch = shard.with_name(f".fetch-{platform.node()}-{shard.stem}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        stated = _run_download(shard.name, scratch, policy)
        fetched = scratch / shard.name
        found = {"size": fetched.stat().st_size, "sha256": _sha256(fetched)}
        if found != stated:
            raise _FailedTry(f"the Hub states {stated}, what came has {found}")
        record = fetched.with_suffix(".json")
        record.write_text(json.dumps(found) + "\n")
        record.replace(shard.with_suffix(".json"))
        fetched.replace(shard)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_download(name: str, folder: Path, policy: FetchPolicy) -> dict[str, object]:
    """{"size", "sha256"} that the Hub states for the file, which is then in `folder`."""
    script = Path(__file__).with_name("hub_download.py")
    command = [sys.executable, str(script), REPO, name, str(folder)]
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=policy.try_seconds,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise _FailedTry(f"not complete after {policy.try_seconds:g} s") from error
    if run.returncode == 0:
        return json.loads(run.stdout)
    lines = run.stderr.strip().splitlines()
    if not run.stdout:
        raise _FailedTry(lines[-1] if lines else f"the download ended with code {run.returncode}")
    answer = json.loads(run.stdout)
    cause = f"HTTP {answer['status']} from {answer['url']}"
    if answer["status"] in _FINAL_STATUS:
        raise UserError(
            f"{name} of {REPO} cannot be fetched: {cause}; "
            "check HF_ENDPOINT and HF_TOKEN, or name a folder that holds the shards"
        )
    raise _FailedTry(cause)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
