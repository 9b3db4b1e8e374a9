"""Which files of the Hub the tasks are made of, and where they lie in a task's folder."""

from dataclasses import dataclass
from pathlib import Path

from gptfast.errors import UserError
from gptfast.fetch import FetchPolicy, HubFile, fetch_files
from gptfast.tasks.common import split_names


@dataclass(frozen=True)
class _Dataset:
    repo: str
    # (folder in the repository, split, files), all named FOLDER/SPLIT-00000-of-00001.parquet.
    splits: tuple[tuple[str, str, int], ...]
    # Whether the folders are subsets, which the task tells apart.
    subsets: bool = True

    def files(self) -> dict[str, HubFile]:
        """Where in the task's folder -> where on the Hub."""
        return {
            f"{folder}/{name}" if self.subsets else name: HubFile(self.repo, f"{folder}/{name}")
            for folder, split, count in self.splits
            for name in split_names(split, count)
        }


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


def fetch(
    task: str, cache: Path, *, policy: FetchPolicy | None = None, progress: bool = False
) -> Path:
    """The folder with the task's parquet files, fetched and verified where still missing.

    Call it in one process a node, then in all.

    Args:
        task: arc, mmlu, gsm8k, humaneval or smoltalk (0.9 GB; the others have 60 MB together).
        progress: show a bar of files on stderr.

    Raises:
        UserError: for another task, or naming the file, the cause and what to do.
    """
    if task not in _DATASETS:
        raise UserError(f"no task {task!r} to fetch; there are {', '.join(_DATASETS)}")
    folder = cache.expanduser() / "tasks" / task
    fetch_files(folder, _DATASETS[task].files(), policy=policy, progress=progress)
    return folder
