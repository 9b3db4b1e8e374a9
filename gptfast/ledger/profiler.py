"""Takes the profile of some steps of a run, and writes the ledger of them beside it."""

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gptfast.clock import Moment, median_ms, now
from gptfast.errors import UserError
from gptfast.ledger.book import Ledger, build
from gptfast.ledger.costs import measure_ceilings
from gptfast.ledger.job import Job
from gptfast.ledger.kept import to_json
from gptfast.ledger.text import draw, table
from gptfast.ledger.trace import STEP, load_trace, stretch

# Where a run keeps its ledger, in its folder.
LEDGER_FILE = Path("profile", "ledger.json")
# The first step whose time without the profiler counts: before, compilation and a cold card are
# timed.
_FIRST_UNPROFILED = 3


def parse_steps(text: str) -> range:
    """ "20:23" -> steps 20, 21 and 22. UserError for anything else."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise UserError(f"profile steps {text!r}: give FIRST:END, such as 20:23 for 20, 21 and 22")
    return range(int(first), int(end))


class StepProfiler:
    """Call `before(step)` and `after(step)` around every step of a run, on every rank, and
    `close()` when it is over: a process that ends within a profile crashes.

    When the last of `steps` is over, `out` (a path that ends in .json) holds the ledger; beside it
    lie the table as .txt, the waterfall as .png and, with keep_trace, the Chrome trace as
    .trace.json.gz. Of several steps the first only fills the GPU's queue. Only the active process
    profiles. Whatever goes wrong is told in one line, and the run goes on. unprofiled: so many
    steps before the profile, as far as there are; their median is a step's time without it.

    `ledger` is the result, None before it is there and where it could not be had.
    """

    def __init__(
        self,
        steps: range,
        *,
        job: Job,
        device: torch.device,
        out: Path,
        say: Callable[[str], None],
        active: bool = True,
        unprofiled: int = 20,
        settings: dict | None = None,
        environment: dict | None = None,
        keep_trace: bool = False,
    ) -> None:
        self.steps, self.job, self.device, self.out, self.say = steps, job, device, out, say
        self.active, self.unprofiled, self.keep_trace = active, unprofiled, keep_trace
        self.settings, self.environment = settings or {}, environment or {}
        self.ledger: Ledger | None = None
        self._stamps: list[Moment] = []
        self._profile: profile | None = None
        self._scope: record_function | None = None

    def before(self, step: int) -> bool:
        """The step is about to begin. Whether that took time: the profile began."""
        if not self.active:
            return False
        # The stamp before the first profiled step ends the last unprofiled one.
        earliest = max(_FIRST_UNPROFILED, self.steps.start - self.unprofiled)
        if earliest <= step <= self.steps.start:
            self._stamps.append(now(self.device))
        if step == self.steps.start:
            self._guarded(self._start)
        if step in self.steps and self._profile is not None:
            self._scope = record_function(f"{STEP} {step}")
            self._scope.__enter__()
        return step == self.steps.start

    def after(self, step: int) -> bool:
        """The step has been launched; the GPU may still be at it. Whether this took time, seconds
        to minutes of it: the ledger was made."""
        if self._scope is not None:
            self._scope.__exit__(None, None, None)
            self._scope = None
        if self._profile is None or step != self.steps[-1]:
            return False
        self._guarded(partial(self._finish, self._profile))
        self._profile = None
        return True

    def close(self) -> None:
        """The run is over, be it by a signal or an error: a profile that it cut off is dropped."""
        taken, self._profile = self._profile, None
        if taken is None:
            return
        if self._scope is not None:
            self._scope.__exit__(None, None, None)
            self._scope = None
        self._guarded(taken.stop)
        self.say(f"no profile of steps {self._name}: the run ended before")

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            # The one place that catches everything: no picture of a run is worth the run.
            self._profile = None
            why = str(error).strip().splitlines()[0] if str(error).strip() else ""
            self.say(f"no profile of steps {self._name}: {type(error).__name__}: {why}")

    @property
    def _name(self) -> str:
        return f"{self.steps.start}:{self.steps.stop}"

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
        else:
            self.say("profile without CUDA: times are those of the CPU's operators, no MFU")
        taken = profile(activities=activities, record_shapes=True)
        taken.start()
        self._profile = taken

    def _finish(self, taken: profile) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        taken.stop()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            taken.export_chrome_trace(str(path))
            if self.keep_trace:
                kept = self.out.with_suffix(".trace.json.gz")
                with path.open("rb") as raw, gzip.open(kept, "wb", compresslevel=3) as packed:
                    shutil.copyfileobj(raw, packed)
                self.say(f"trace for https://ui.perfetto.dev: {kept}")
            measured = stretch(load_trace(path))
        if self._on_gpu and not measured.on_gpu:
            raise UserError(
                "the profiler recorded no GPU kernels; CUPTI may lack the permission "
                "(NVreg_RestrictProfilingToAdminUsers), or another profiler holds it"
            )
        self.ledger = build(
            measured,
            self.job,
            torch.cuda.get_device_name(self.device) if self._on_gpu else "cpu",
            measure_ceilings(self.device),
            unprofiled_step_ms=self._unprofiled_ms(),
            settings=self.settings,
            environment=self.environment,
        )
        write(self.ledger, self.out, self.say)

    def _unprofiled_ms(self) -> float | None:
        pairs = list(zip(self._stamps, self._stamps[1:]))
        return median_ms(pairs) if pairs else None


def write(ledger: Ledger, out: Path, say: Callable[[str], None]) -> None:
    """The JSON at `out`, the table and the picture beside it; the table is also said."""
    lines = table(ledger)
    for line in lines:
        say(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(to_json(ledger), indent=1, default=str) + "\n", encoding="utf-8")
    out.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    drawn = draw(ledger, out.with_suffix(".png"))
    say(f"ledger: {out}, {out.with_suffix('.txt')}" + f", {out.with_suffix('.png')}" * drawn)
