"""The steps of a speedrun: the command of each, what it makes, and what it is made from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptfast.config import BaseSettings, preset
from gptfast.errors import UserError
from gptfast.machine import ROOT
from gptfast.speedrun.settings import NodeSettings, SpeedrunSettings
from gptfast.tasks import CHAT_TASKS

# The toy's depth: half of that of train/base.py on CPU, whose one stage may take minutes.
CPU_DEPTH = 2
# Folder in --chat-data of each task.
_TASK_FOLDERS = {
    "ARC-Easy": "arc",
    "ARC-Challenge": "arc",
    "MMLU": "mmlu",
    "GSM8K": "gsm8k",
    "HumanEval": "humaneval",
}
# Of the toy: on a CPU, the reference's ten million tokens would take an hour.
_CPU_LOSS_FLAGS = ("--split-tokens=16384", "--device-batch-size=8")


@dataclass(frozen=True)
class Step:
    """One command. Paths are relative to where the speedrun was started."""

    name: str
    script: str
    arguments: tuple[str, ...]
    outputs: tuple[tuple[Path, str], ...]
    """(folder, pattern); the step is done when each has a match."""
    after: tuple[str, ...] = ()
    """Steps whose results it is made from."""
    inputs: tuple[Path, ...] = ()
    """The user's own files and folders that it is made from."""
    owns: Path | None = None
    """Folder that it alone writes, and that must not hold anything else's."""
    resumable: bool = False
    """Whether --resume continues what lies in `owns`."""
    distributed: bool = True
    """Whether it runs on all GPUs, or alone."""
    always: bool = False
    """Whether it is so cheap that it is made anew each time."""


@dataclass(frozen=True)
class Plan:
    """steps in order; missing: (step, why it is left out)."""

    steps: tuple[Step, ...]
    missing: tuple[tuple[str, str], ...]
    folder: Path
    """Of the speedrun itself: state, logs, report."""
    depth: int
    processes: int
    """On each node."""
    on_gpu: bool
    folders: dict[str, Path] = field(default_factory=dict)
    """tokenizer, base, mid, sft, rl -> where its results go."""

    @property
    def gpus(self) -> int:
        """Of each node, how many are used."""
        return self.processes if self.on_gpu else 0

    def step(self, name: str) -> "Step | None":
        return next((step for step in self.steps if step.name == name), None)


def make_plan(settings: SpeedrunSettings, *, gpus: int) -> Plan:
    """UserError for what cannot work, before anything is run. gpus: of this node."""
    on_gpu = gpus > 0 and settings.device == "auto"
    processes = settings.processes or (gpus if on_gpu else 1)
    if on_gpu and processes > gpus:
        raise UserError(f"--processes {processes}, but this node has {gpus} GPU(s)")
    defaults = preset(on_gpu=on_gpu, processes=processes * settings.node.nodes)
    offline = not on_gpu if settings.offline is None else settings.offline
    depth = settings.depth or (defaults.model.depth if on_gpu else CPU_DEPTH)
    builder = _Builder(settings, defaults, depth, on_gpu=on_gpu, offline=offline)
    steps, missing = builder.build()
    return Plan(
        steps=tuple(steps),
        missing=tuple(missing),
        folder=builder.folder,
        depth=depth,
        processes=processes,
        on_gpu=on_gpu,
        folders={"tokenizer": builder.tokenizer, **builder.runs},
    )


class _Builder:
    def __init__(
        self,
        settings: SpeedrunSettings,
        defaults: BaseSettings,
        depth: int,
        *,
        on_gpu: bool,
        offline: bool,
    ) -> None:
        self.settings, self.defaults, self.depth = settings, defaults, depth
        self.on_gpu, self.offline = on_gpu, offline
        self.data = settings.data or defaults.data.data
        self.vocab_size = settings.vocab_size or defaults.model.vocab_size
        self.folder = settings.out / f"speedrun-d{depth}"
        self.tokenizer = settings.tokenizer or self.folder / "tokenizer"
        self.runs = {s: settings.out / f"{s}-d{depth}" for s in ("base", "mid", "sft", "rl")}
        self.missing: list[tuple[str, str]] = []
        if offline and self.data == "fineweb-edu":
            raise UserError("--offline: --data fineweb-edu would be fetched; name a folder of text")
        if settings.chat_data and not settings.chat_data.is_dir():
            raise UserError(f"--chat-data: no folder {settings.chat_data}")

    def build(self) -> tuple[list[Step], list[tuple[str, str]]]:
        steps = [
            None if self.settings.tokenizer else self._tokenizer(),
            self._base(),
            self._loss(),
            self._core(),
            self._tuned("mid", "base"),
            self._chat("mid"),
            self._tuned("sft", "mid"),
            self._chat("sft"),
        ]
        if self.settings.rl:
            steps += [self._tuned("rl", "sft"), self._chat("rl", ["GSM8K"])]
        steps.append(self._report())
        return [step for step in steps if step], self.missing

    def _tokenizer(self) -> Step:
        arguments = [
            f"--out={self.tokenizer}",
            f"--data={self.data}",
            f"--vocab-size={self.vocab_size}",
            f"--max-chars={self.defaults.data.tokenizer_chars}",
            f"--cache={self.settings.cache}",
        ]
        return self._step(
            "tokenizer",
            "train/tokenizer.py",
            arguments,
            outputs=((self.tokenizer, "report.json"),),
            inputs=self._texts(),
            owns=self.tokenizer,
            distributed=False,
        )

    def _base(self) -> Step:
        run = self.runs["base"]
        arguments = [
            f"--out={run}",
            f"--depth={self.depth}",
            f"--vocab-size={self.vocab_size}",
            f"--data={self.data}",
            f"--tokenizer={self.tokenizer}",
            f"--cache={self.settings.cache}",
        ]
        if self.on_gpu:
            # For the report's waterfall; a run that is shorter has none.
            arguments.append("--profile-steps=20:23")
        return self._step(
            "base",
            "train/base.py",
            arguments,
            outputs=((run, "summary.json"),),
            after=("tokenizer",),
            inputs=(*self._texts(), *filter(None, (self.settings.tokenizer,))),
            owns=run,
            resumable=True,
        )

    def _loss(self) -> Step:
        run = self.runs["base"]
        arguments = ["base", str(run), "--only", "bpb", "samples"]
        if not self.on_gpu:
            arguments += _CPU_LOSS_FLAGS
        return self._step(
            "loss",
            "train/evaluate.py",
            arguments,
            flags="evaluate",
            outputs=((run, "evaluation/step_*/loss.json"),),
            after=("base",),
        )

    def _core(self) -> Step | None:
        run, bundle = self.runs["base"], self.settings.core_bundle
        if bundle is None and self.offline:
            self.missing.append(("core", "offline, and no --core-bundle given"))
            return None
        arguments = ["base", str(run), "--only", "core"]
        if bundle:
            arguments.append(f"--core-bundle={bundle}")
        return self._step(
            "core",
            "train/evaluate.py",
            arguments,
            flags="evaluate",
            outputs=((run, "evaluation/step_*/core.json"),),
            after=("base",),
            inputs=(bundle,) if bundle else (),
        )

    def _tuned(self, stage: str, source: str) -> Step:
        """mid, sft or rl, from the stage before."""
        run, chat = self.runs[stage], self.settings.chat_data
        cache = self.settings.cache
        arguments = [f"--source={self.runs[source]}", f"--out={run}", f"--cache={cache}"]
        if stage == "rl":
            if self._tasks(["GSM8K"]):
                arguments += ["--task=gsm8k", *([f"--chat-data={chat}"] if chat else [])]
            else:
                arguments.append("--task=toy")
        elif chat:
            arguments.append(f"--chat-data={chat}")
        elif self.offline and self.on_gpu:
            arguments += ["--train", "embedded", "--val", "embedded"]
            arguments += ["--accuracy-of", "embedded"] if stage == "sft" else []
        return self._step(
            stage,
            f"train/{stage}.py",
            arguments,
            outputs=((run, "summary.json"),),
            after=(source,),
            inputs=(chat,) if chat else (),
            owns=run,
            resumable=True,
        )

    def _chat(self, stage: str, asked: Sequence[str] = tuple(CHAT_TASKS)) -> Step | None:
        name = f"chat-{stage}"
        tasks = self._tasks(asked)
        if left_out := [task for task in asked if task not in tasks]:
            why = "not in --chat-data" if self.settings.chat_data else "offline, and no --chat-data"
            self.missing.append((name, f"{', '.join(left_out)}: {why}"))
        if not tasks:
            return None
        run, chat = self.runs[stage], self.settings.chat_data
        arguments = ["chat", f"--source={run}", "--task", *tasks]
        if chat:
            arguments.append(f"--chat-data={chat}")
        return self._step(
            name,
            "train/evaluate.py",
            arguments,
            flags="chat",
            outputs=((run, "evaluation/step_*/chat.json"),),
            after=(stage,),
            inputs=(chat,) if chat else (),
        )

    def _report(self) -> Step:
        out, price = self.folder / "report", self.settings.price_per_gpu_hour
        arguments = [str(self.folder), f"--out={out}"]
        arguments += [] if price is None else [f"--price-per-gpu-hour={price}"]
        return Step(
            "report",
            "train/report.py",
            tuple(arguments),
            outputs=((out, "report.html"), (out, "report.md")),
            distributed=False,
            always=True,
        )

    def _tasks(self, asked: Sequence[str]) -> list[str]:
        """Those that can be had: in the folder that is given, or by fetching."""
        chat = self.settings.chat_data
        if chat:
            return [task for task in asked if (chat / _TASK_FOLDERS[task]).is_dir()]
        return [] if self.offline else list(asked)

    def _texts(self) -> tuple[Path, ...]:
        path = Path(self.data).expanduser()
        return (path,) if path.exists() else ()

    def _step(
        self, name: str, script: str, arguments: list[str], *, flags: str = "", **more
    ) -> Step:
        arguments = [*arguments, *self.settings.flags.of(flags or name)]
        return Step(name, script, tuple(arguments), **more)


def launch_command(
    step: Step, extra: Sequence[str], *, python: str, processes: int, node: NodeSettings
) -> list[str]:
    """The command line of a step on one node: alone, or under torchrun."""
    script = [str(ROOT / step.script), *step.arguments, *extra]
    if not step.distributed or (processes == 1 and node.nodes == 1):
        return [python, *script]
    where = ["--standalone"]
    if node.nodes > 1:
        where = [
            f"--nnodes={node.nodes}",
            f"--node_rank={node.node_rank}",
            f"--master_addr={node.master_addr}",
            # The port itself is where the nodes' speedruns talk.
            f"--master_port={node.master_port + 1}",
        ]
    torchrun = ["-m", "torch.distributed.run", *where, f"--nproc_per_node={processes}"]
    return [python, *torchrun, *script]
