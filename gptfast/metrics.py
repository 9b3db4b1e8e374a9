"""Where a run's figures go: JSON lines, the console, and on request TensorBoard or W&B."""

import importlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptfast.errors import UserError


def seconds_since_launch() -> float:
    """Seconds since the operating system started this process (Linux; elsewhere since this module
    was imported): interpreter start and imports count as part of a run's wait."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.monotonic() - _IMPORTED
    started_ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.monotonic()


class MetricsLog:
    """Only rank 0 writes; on the others every method does nothing.

    Rows go to `folder/metrics.jsonl`, one JSON object a line with a "kind": "step", "eval",
    "sample", "event"; what is no number is null (`plain`). A resumed run appends; rows of steps at
    or after the one it resumes from are dropped first, so that each step stands there once.
    UserError, and no rows yet, if one of the sinks cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        start_step: int = 0,
        total_steps: int = 0,
        sinks: tuple[str, ...] = (),
        settings: Any = None,
    ) -> None:
        self._active = active
        if not active:
            return
        self._sinks = [_SINKS[name](folder, settings) for name in sinks]
        path = folder / "metrics.jsonl"
        kept = _rows_before(path, start_step) if start_step else []
        # Beside it first: on a full disk what a run has told so far stays as it is.
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=None
        )

    def row(self, kind: str, step: int, **values: object) -> None:
        """One line of metrics.jsonl; numbers also go to the other sinks as kind/name."""
        if not self._active:
            return
        line = json.dumps(plain({"kind": kind, "step": step, **values}), allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        for sink in self._sinks:
            sink.log(step, numbers)

    def say(self, line: str) -> None:
        """One line on the console, above the progress bar if there is one."""
        if self._active:
            tqdm.write(line)

    def progress(self, step: int) -> None:
        if self._active:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._file.close()
            for sink in self._sinks:
                sink.close()


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries; what JSON has no word for, nan and infinity, as None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_sinks(names: Sequence[str]) -> None:
    """UserError, with what to install, unless everything that these sinks need is there."""
    for name in names:
        try:
            importlib.import_module(_SINKS[name].module)
        except ImportError as error:
            raise UserError(
                f"--log-to {name}: {error}; pip install -e '.[log]' brings it"
            ) from error


def read_rows(path: Path, kind: str) -> list[dict]:
    """The rows of one kind, in order."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["kind"] == kind]


def _rows_before(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # The last line of a killed run may be cut off.
            continue
        if row["step"] < step:
            kept.append(line)
    return kept


class _TensorBoard:
    module = "torch.utils.tensorboard"

    def __init__(self, folder: Path, settings: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(folder / "tensorboard")
        except OSError as error:
            raise UserError(f"--log-to tensorboard: {error}") from error
        self._writer.add_text("settings", json.dumps(asdict(settings), indent=2, default=str))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    module = "wandb"

    def __init__(self, folder: Path, settings: Any) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project="gptfast", name=folder.name, dir=folder, config=asdict(settings)
            )
        except wandb.Error as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"--log-to wandb: {reason} (WANDB_MODE=offline needs neither login nor network)"
            ) from error

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


_SINKS = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
