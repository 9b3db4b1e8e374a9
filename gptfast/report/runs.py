"""What lies in the folders of a speedrun, read as far as it is there.

A run that was killed has no summary, its last line of metrics may be cut off, and a stage may be
missing altogether: none of that is an error here.
"""

import fcntl
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from gptfast.checkpoint.files import MANIFEST
from gptfast.errors import UserError
from gptfast.run import STAGES
from gptfast.run import stage_of as stage_by_name

# Files of a folder that tell what it is.
_TOKENIZER_FILE = "tokenizer_config.json"
_RUN_FILE = "settings.json"
SPEEDRUN_FILE = "speedrun.json"
# Of an evaluation, the section that is written beside it: see gptfast.run.write_section.
_SECTIONS = {
    "loss": "base-model-loss",
    "core": "base-model-evaluation",
    "chat": "chat-evaluation-*",
}
_TIMESTAMP = re.compile(r"^timestamp: (.+)$", re.MULTILINE)
# Steps that say nothing about the speed of the rest, as the training loop has it.
_WARMUP_STEPS = 20


@dataclass(frozen=True)
class Run:
    """One stage's run folder. Dictionaries are empty where a file is not there."""

    stage: str
    folder: Path
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Sequence[Mapping]
    meta: Mapping[str, Any]
    """What the newest checkpoint belongs to: model_config, tokenizer, step."""
    evaluations: Mapping[str, Mapping]
    """loss, core, chat -> the JSON of the newest evaluation that has it."""
    evaluation_times: Mapping[str, str]
    evaluation_steps: Mapping[str, int]
    """At which step of the training each of them was made."""

    @property
    def finished(self) -> bool:
        return bool(self.summary) and not self.summary.get("stopped", False)

    @property
    def steps(self) -> list[Mapping]:
        return [row for row in self.rows if row.get("kind") == "step"]

    @property
    def validations(self) -> list[Mapping]:
        return [row for row in self.rows if row.get("kind") == "eval"]

    @property
    def steps_done(self) -> int:
        return int(self.steps[-1]["step"]) + 1 if self.steps else int(self.summary.get("step", 0))

    @property
    def processes(self) -> int:
        return int(self.environment.get("processes") or 1)

    @property
    def gpu(self) -> str | None:
        """Name of its GPUs; None on CPU and where it is not told."""
        device = self.environment.get("device")
        return None if device in (None, "cpu") else str(device)

    @cached_property
    def training_seconds(self) -> float | None:
        """Of all steps so far: a run that has not ended has no summary."""
        seconds = [row["seconds"] for row in self.steps if "seconds" in row]
        return math.fsum(seconds) if seconds else self.summary.get("training_seconds")

    @property
    def tokens(self) -> int | None:
        return self.steps[-1].get("tokens") if self.steps else None

    @property
    def last_validation(self) -> Mapping:
        """The newest figures with bits per byte, and their step; empty if there are none."""
        rows = self.validations or self.summary.get("evaluations", [])
        return next((row for row in reversed(rows) if row.get("val_bpb") is not None), {})

    def at(self, step: int) -> "Run":
        """What its metrics and summary told after so many steps: rows of those, validations up to
        their end, and the summary if it was written then."""
        rows = [row for row in self.rows if row["step"] < step + (row["kind"] == "eval")]
        summary = self.summary if self.summary.get("step") == step else {}
        return replace(self, rows=rows, summary=summary)

    def steady(self, name: str) -> float | None:
        """Median of a figure over the steps after the warm-up; None if no step has it."""
        values = [row[name] for row in self.steps if row.get(name) is not None]
        values = values[_WARMUP_STEPS:] or values[1:] or values
        return statistics.median(values) if values else None

    def setting(self, name: str) -> Any:
        """The leaf of this name, wherever in settings.json it is; None if nowhere."""
        return dict(leaves(self.settings)).get(name)

    def ended(self) -> str:
        """When its summary was written, or its last metrics; "" if neither is there."""
        told = self.summary.get("ended")
        return str(told) if told else _time_of(self.folder, "summary.json", "metrics.jsonl")

    def started(self) -> str:
        told = self.environment.get("started")
        return str(told) if told else _time_of(self.folder, "environment.json")


@dataclass(frozen=True)
class Folders:
    """Everything that a report is made from."""

    runs: Mapping[str, Run]
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """The tokenizer folder's report.json, and "timestamp"; empty if there is none."""
    speedrun: Mapping[str, Any] = field(default_factory=dict)
    """speedrun.json: the steps with their times, energy and machine."""

    @property
    def first(self) -> Run | None:
        """The run whose machine and code stand in the header."""
        return next((self.runs[stage] for stage in STAGES if stage in self.runs), None)


def leaves(tree: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """(name, value) of everything in nested dictionaries that is not one."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value)
        else:
            yield name, value


def read_folders(paths: Sequence[Path]) -> Folders:
    """Run folders, tokenizer folders, a speedrun's folder, or folders that hold such.

    UserError if a path does not exist, or if two runs of one stage are found: a report is of one.
    """
    runs: dict[str, Run] = {}
    tokenizers: list[Path] = []
    speedruns: list[Path] = []
    for folder in _expand(paths):
        if (folder / SPEEDRUN_FILE).is_file():
            speedruns.append(folder)
        elif (folder / _TOKENIZER_FILE).is_file():
            tokenizers.append(folder)
        elif (folder / _RUN_FILE).is_file() and (stage := stage_of(folder)):
            if stage in runs:
                raise UserError(
                    f"two runs of the stage {stage}: {runs[stage].folder} and {folder}; "
                    "name the folders that belong together"
                )
            runs[stage] = read_run(folder, stage)
    for kind, found in (("tokenizers", tokenizers), ("speedruns", speedruns)):
        if len(found) > 1:
            raise UserError(
                f"two {kind}: {found[0]} and {found[1]}; name the folders that belong together"
            )
    return Folders(
        runs=runs,
        tokenizer=_read_tokenizer(tokenizers[0]) if tokenizers else {},
        speedrun=_read_speedrun(speedruns[0]) if speedruns else {},
    )


def stage_of(folder: Path) -> str | None:
    """base, mid, sft or rl: as its checkpoints say, by the recipe that made it, or by its name."""
    command = _read_json(folder / "environment.json").get("command") or [""]
    recipe = Path(str(command[0])).stem
    for candidate in (_newest_meta(folder).get("stage"), recipe, stage_by_name(folder)):
        if candidate in STAGES:
            return str(candidate)
    return None


def read_run(folder: Path, stage: str) -> Run:
    evaluations, times, steps = {}, {}, {}
    for name in _SECTIONS:
        for path in sorted((folder / "evaluation").glob(f"step_*/{name}.json")):
            if found := _read_json(path):
                evaluations[name], times[name] = found, _when(path, _SECTIONS[name])
                steps[name] = int(path.parent.name.removeprefix("step_"))
    return Run(
        stage=stage,
        folder=folder,
        settings=_read_json(folder / _RUN_FILE),
        environment=_read_json(folder / "environment.json"),
        summary=_read_json(folder / "summary.json"),
        rows=_read_rows(folder / "metrics.jsonl"),
        meta=_newest_meta(folder),
        evaluations=evaluations,
        evaluation_times=times,
        evaluation_steps=steps,
    )


def _newest_meta(folder: Path) -> dict:
    manifests = sorted((folder / "checkpoints").glob(f"step_*/{MANIFEST}"))
    return _read_json(manifests[-1]).get("meta", {}) if manifests else {}


def _expand(paths: Sequence[Path]) -> list[Path]:
    """The folders themselves, or where one is nothing of ours, the folders in it; and those that a
    speedrun among them names."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"no folder {path}")
        ours = any((path / n).is_file() for n in (SPEEDRUN_FILE, _TOKENIZER_FILE, _RUN_FILE))
        for folder in [path] if ours else sorted(p for p in path.iterdir() if p.is_dir()):
            found[folder.resolve()] = folder
            # A speedrun names the folders that belong to it, relative to its own.
            others = _read_json(folder / SPEEDRUN_FILE).get("folders", {}).values()
            found |= {(folder / o).resolve(): folder / o for o in others if (folder / o).is_dir()}
    return list(found.values())


def _read_tokenizer(folder: Path) -> dict[str, Any]:
    training = _read_json(folder / _TOKENIZER_FILE).get("training", {})
    report = _read_json(folder / "report.json")
    return {
        "training": training,
        **report,
        "timestamp": _when(folder / _TOKENIZER_FILE, "tokenizer-training"),
        "evaluation_timestamp": _when(folder / "report.json", "tokenizer-evaluation"),
    }


def _read_speedrun(folder: Path) -> dict[str, Any]:
    """A step that was running when all died says so for ever: unless the speedrun is alive, it was
    interrupted."""
    found = _read_json(folder / SPEEDRUN_FILE)
    if not _is_alive(folder):
        for step in found.get("steps", {}).values():
            if step.get("state") == "running":
                step["state"] = "interrupted"
    return found


def _is_alive(speedrun: Path) -> bool:
    """Whether a process of it holds its lock; see gptfast/speedrun/attempt.py."""
    try:
        with (speedrun / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # Of a copy there is no lock, or there are none on its disk.
        return False
    return False


def _read_json(path: Path) -> dict:
    """The object in the file; empty if the file is not there, cut off, or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_rows(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            # The last line of a killed run may be cut off.
            continue
    return rows


def _when(path: Path, section: str) -> str:
    """When a file's figures were made: as the section beside it tells, or when it was written,
    which of a copy is something else."""
    for beside in path.parent.glob(f"{section}.md"):
        if told := _TIMESTAMP.search(beside.read_text(encoding="utf-8")):
            return told[1]
    return _time_of(path.parent, path.name)


def _time_of(folder: Path, *names: str) -> str:
    for name in names:
        if (folder / name).is_file():
            modified = datetime.fromtimestamp((folder / name).stat().st_mtime)
            return modified.strftime("%Y-%m-%d %H:%M:%S")
    return ""
