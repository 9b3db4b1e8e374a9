"""Fetching the tasks' datasets from the Hub, before a run begins."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gptfast.errors import UserError

_HUB_DOWNLOAD = Path(__file__).parents[1] / "data" / "hub_download.py"
_TRIES = 3
_TRY_SECONDS = 900.0
_FILES_AT_A_TIME = 4


@dataclass(frozen=True)
class _Dataset:
    repo: str
    # (folder in the repository, split, files), all named FOLDER/SPLIT-00000-of-00001.parquet.
    splits: tuple[tuple[str, str, int], ...]
    # Whether the folders are subsets, which the task tells apart.
    subsets: bool = True

    def files(self) -> dict[str, PurePosixPath]:
        """Where in the repository -> where in the task's folder."""
        names = [
            PurePosixPath(folder, f"{split}-{i:05d}-of-{count:05d}.parquet")
            for folder, split, count in self.splits
            for i in range(count)
        ]
        return {str(name): name if self.subsets else PurePosixPath(name.name) for name in names}


_ARC_SPLITS = ("train", "validation", "test")
_DATASETS = {
    "arc": _Dataset(
        "allenai/ai2_arc",
        tuple((s, split, 1) for s in ("ARC-Easy", "ARC-Challenge") for split in _ARC_SPLITS),
    ),
    "mmlu": _Dataset(
        "cais/mmlu",
        (
            ("all", "test", 1),
            ("all", "validation", 1),
            ("all", "dev", 1),
            ("auxiliary_train", "train", 1),
        ),
    ),
    "gsm8k": _Dataset("openai/gsm8k", (("main", "train", 1), ("main", "test", 1))),
    "humaneval": _Dataset(
        "openai/openai_humaneval", (("openai_humaneval", "test", 1),), subsets=False
    ),
    "smoltalk": _Dataset(
        "HuggingFaceTB/smol-smoltalk", (("data", "train", 4), ("data", "test", 1)), subsets=False
    ),
}


def fetch(task: str, cache: Path) -> Path:
    """The folder with the task's parquet files, fetched where they are missing.

    What has its name there has the size and sha256 that the Hub states. Call it in one process a
    node, then in all.

    Args:
        task: arc, mmlu, gsm8k, humaneval or smoltalk (0.9 GB; the others have 60 MB together).

    Raises:
        UserError: for another task, or naming the file, the cause and what to do.
    """
    if task not in _DATASETS:
        raise UserError(f"no task {task!r} to fetch; there are {', '.join(_DATASETS)}")
    dataset, folder = _DATASETS[task], cache.expanduser() / "tasks" / task
    missing = {
        name: folder / place
        for name, place in dataset.files().items()
        if not (folder / place).is_file()
    }
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        list(pool.map(lambda item: _fetch_file(dataset.repo, *item), missing.items()))
    return folder


def _fetch_file(repo: str, name: str, target: Path) -> None:
    # Named after machine and file, so that the next run clears what a killed one left.
    scratch = target.with_name(f".fetch-{platform.node()}-{target.stem}")
    cause = ""
    for _ in range(_TRIES):
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            cause = _download(repo, name, scratch)
            if not cause:
                (scratch / name).replace(target)
                return
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise UserError(
        f"{name} of {repo} could not be fetched in {_TRIES} tries: {cause}; check HF_ENDPOINT and "
        "HF_TOKEN, or name a folder that holds the datasets"
    )


def _download(repo: str, name: str, folder: Path) -> str:
    """Fetch the file into `folder` and compare it with what the Hub states: "" or what failed."""
    folder.mkdir(parents=True)
    try:
        run = subprocess.run(
            [sys.executable, str(_HUB_DOWNLOAD), repo, name, str(folder)],
            capture_output=True,
            text=True,
            timeout=_TRY_SECONDS,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
    except subprocess.TimeoutExpired:
        return f"not complete after {_TRY_SECONDS:g} s"
    if run.returncode != 0:
        said = (run.stdout or run.stderr).strip().split("\n")[-1]
        return said or f"the download ended with code {run.returncode}"
    stated = json.loads(run.stdout)
    with (folder / name).open("rb") as file:
        content = file.read()
    found = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return "" if found == stated else f"the Hub states {stated}, what came has {found}"
