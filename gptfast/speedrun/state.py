"""What a speedrun has done, in speedrun.json: written whole or not at all, at every change."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gptfast.errors import UserError
from gptfast.run import write_json
from gptfast.speedrun.plan import Plan, Step

FILE = "speedrun.json"
RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"
INTERRUPTED = "interrupted"


@dataclass
class Record:
    """One step. seconds, energy_joules: of all attempts together; None: not measured."""

    state: str = ""
    fingerprint: str = ""
    arguments: list[str] = field(default_factory=list)
    made: str = ""
    """New for every new result, so that what is made from it knows whether it is still the same."""
    log: str = ""
    started: str = ""
    ended: str = ""
    attempts: int = 0
    seconds: float = 0.0
    energy_joules: float | None = 0.0


class State:
    """Of one speedrun: a record for every step that began."""

    def __init__(self, plan: Plan, machine: Mapping[str, Any]) -> None:
        """Reads what is there. UserError if the file is damaged or of another kind."""
        self.path = plan.folder / FILE
        self.records: dict[str, Record] = {}
        self._head: dict[str, Any] = {"started": now()}
        if self.path.exists():
            self._head, self.records = _read(self.path)
        folders = {name: os.path.relpath(f, plan.folder) for name, f in plan.folders.items()}
        self._head |= {"machine": dict(machine), "folders": folders, "left_out": dict(plan.missing)}

    def save(self) -> None:
        steps = {name: asdict(record) for name, record in self.records.items()}
        write_json(self.path, {**self._head, "steps": steps})

    def fingerprint(self, step: Step) -> str:
        """Of all that the result depends on: command, the steps before, the user's files."""
        before = [self.records[name].made for name in step.after if name in self.records]
        files = [_files(path) for path in step.inputs]
        told = json.dumps([step.script, step.arguments, before, files])
        return hashlib.sha256(told.encode()).hexdigest()

    def note_interrupted(self) -> None:
        """What runs by its record was cut off: to be called while no step can be running."""
        for record in self.records.values():
            if record.state == RUNNING:
                record.state = INTERRUPTED

    def begin(self, step: Step, log: Path, *, anew: bool) -> Record:
        """Note that an attempt begins; `anew` if nothing that earlier ones made is kept. Their time
        still counts if they were for the same result."""
        fingerprint = self.fingerprint(step)
        record = self.records.get(step.name)
        if record is None or record.state == DONE or record.fingerprint != fingerprint:
            record = self.records[step.name] = Record(started=now())
        if anew:
            record.made = uuid.uuid4().hex
        record.fingerprint, record.arguments = fingerprint, list(step.arguments)
        record.state, record.log, record.ended = RUNNING, str(log), ""
        record.attempts += 1
        self.save()
        return record


def now() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Record]]:
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        return head, {name: Record(**record) for name, record in head.pop("steps").items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no speedrun's state, or it is damaged ({error}): name another --out"
        ) from error


def _files(path: Path) -> list[tuple[str, int, int]]:
    """(name, size, time of change) of a file, or of all files in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
