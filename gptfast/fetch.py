"""Files from the Hub or the web: several at a time, tried again, verified before they get a name.

A file is fetched into a scratch folder, compared with the size and sha256 that it should have,
moved to its name and recorded in NAME.json beside it. A later call finds it by that record and
its size; a command that wants it while another one fetches it waits for that (cache.py). Each try
is a process of its own (fetch_child.py), because a download that hangs ends only with its process.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Event
from typing import ClassVar

from tqdm import tqdm

from gptfast.cache import sole_maker
from gptfast.errors import UserError

_CHILD = Path(__file__).with_name("fetch_child.py")
# What asking again cannot change: no right to read it, or no such file.
_FINAL_STATUS = (401, 403, 404)


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset on the Hub, in large-file storage as parquet is: of those the Hub states
    the sha256."""

    kind: ClassVar[str] = "hub"
    to_check: ClassVar[str] = "HF_ENDPOINT and HF_TOKEN"

    repo: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} of {self.repo}"


@dataclass(frozen=True)
class WebFile:
    """What an address gives, with the sha256 it must have (hexadecimal)."""

    kind: ClassVar[str] = "web"
    to_check: ClassVar[str] = "the address"

    url: str
    sha256: str

    def __str__(self) -> str:
        return self.url


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


def fetch_files(
    folder: Path,
    files: Mapping[str, HubFile | WebFile],
    *,
    policy: FetchPolicy | None = None,
    progress: bool = False,
) -> list[Path]:
    """The paths of the files in `folder`, in order; fetched and verified where still missing.

    Call it in one process a node, then in all: the others find everything there.

    Args:
        files: {path in the folder: where the file comes from}.
        progress: show a bar of files on stderr.

    Raises:
        UserError: naming the file, the cause and what to do; what was fetched until then is kept.
    """
    sources = {folder / path: source for path, source in files.items()}
    missing = {target: source for target, source in sources.items() if not _is_verified(target)}
    if missing:
        with tqdm(total=len(missing), desc=folder.name, unit="file", disable=not progress) as bar:
            _fetch_all(missing, policy or FetchPolicy(), bar)
    return list(sources)


def _record_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _is_verified(target: Path) -> bool:
    try:
        return target.stat().st_size == json.loads(_record_of(target).read_text())["size"]
    except (OSError, ValueError):
        return False


def _fetch_all(sources: dict[Path, HubFile | WebFile], policy: FetchPolicy, bar: tqdm) -> None:
    stop = Event()
    with ThreadPoolExecutor(policy.workers) as pool:
        fetches = [pool.submit(_fetch, *item, policy, stop) for item in sources.items()]
        try:
            for fetch in as_completed(fetches):
                fetch.result()
                bar.update()
        finally:
            # After the first failure nothing new is begun; what is on its way is let finish.
            stop.set()


def _fetch(target: Path, source: HubFile | WebFile, policy: FetchPolicy, stop: Event) -> None:
    """Fetch one file, trying again while there is hope and `stop` is not set.

    UserError if it cannot be had.
    """
    cause = ""
    for attempt in range(policy.tries):
        # No wait before the first try, but a look whether another file has failed.
        if stop.wait(policy.wait_seconds * 2 ** (attempt - 1) if attempt else 0.0):
            return
        try:
            return _try_fetch(target, source, policy.try_seconds)
        except _FailedTry as error:
            cause = str(error)
        except OSError as error:
            raise UserError(f"{source} cannot be fetched to {target}: {error}") from error
    raise UserError(
        f"{source} could not be fetched in {policy.tries} tries: {cause}; run the same command "
        f"again: finished files are kept in {target.parent}; or name a folder that holds the files"
    )


def _try_fetch(target: Path, source: HubFile | WebFile, seconds: float) -> None:
    """One try: fetch, verify, move, record. UserError or _FailedTry with the cause."""
    with sole_maker(target) as scratch:
        if _is_verified(target):
            # Another command has fetched it meanwhile.
            return
        fetched, expected = _run_child(source, scratch, seconds)
        found = {"size": fetched.stat().st_size, "sha256": _sha256(fetched)}
        if found != expected:
            raise _FailedTry(f"expected {expected}, what came has {found}")
        record = scratch / "record.json"
        record.write_text(json.dumps(found) + "\n")
        fetched.replace(target)
        record.replace(_record_of(target))


def _run_child(
    source: HubFile | WebFile, scratch: Path, seconds: float
) -> tuple[Path, dict[str, object]]:
    """(path in `scratch` of what came, {"size", "sha256"} that it should have)."""
    command = [sys.executable, str(_CHILD), source.kind, str(scratch), *astuple(source)]
    environment = {
        **os.environ,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # The modules beside the child are not for its imports to find (from Python 3.11 on).
        "PYTHONSAFEPATH": "1",
    }
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise _FailedTry(f"not complete after {seconds:g} s") from error
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines()
        raise _FailedTry(lines[-1] if lines else f"the download ended with code {run.returncode}")
    answer = json.loads(run.stdout)
    if "status" not in answer:
        return Path(answer.pop("path")), answer
    cause = f"HTTP {answer['status']} from {answer['url']}"
    if answer["status"] in _FINAL_STATUS:
        raise UserError(
            f"{source} cannot be fetched: {cause}; check {source.to_check}, or name a folder that "
            "holds the files"
        )
    raise _FailedTry(cause)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
