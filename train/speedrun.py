"""The whole pipeline with one command: tokenizer, base, mid, SFT, evaluations, report.

    python train/speedrun.py                      the report's d20 on all GPUs of this machine
    python train/speedrun.py --dry-run            what is left to do, take and cost
    python train/speedrun.py --check              whether everything that it needs works here
    python train/speedrun.py --depth 12 --data my_texts/ --rl
    python train/speedrun.py --nodes 2 --node-rank 0 --master-addr HOST     the same on each node

Conversations, tasks and the CORE bundle are fetched first, so that a missing network is told now.
The same command again goes on where it stopped: what is done and unchanged is not done again. No
torchrun: it is started for each step. Without a GPU it is a toy that needs no network.
"""

import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from gptfast.chat_data import MID_TRAIN, MID_VAL, SFT_TRAIN, SFT_VAL, check_parts
from gptfast.config import BaseSettings, accumulation_steps, preset
from gptfast.config_chat import MidSettings, SFTSettings, mid_preset, sft_preset
from gptfast.errors import UserError
from gptfast.evaluate.settings import EvaluateBaseSettings, EvaluateChatSettings
from gptfast.machine import describe_machine
from gptfast.rl.config import RLSettings, passes_of_step, rl_preset
from gptfast.run import exit_code
from gptfast.selfcheck import FAILED, OK, run_checks
from gptfast.speedrun import (
    Followers,
    Here,
    Plan,
    SpeedrunSettings,
    State,
    StepFailedError,
    StoppedError,
    check_folders,
    describe_plan,
    disk_needs,
    follow,
    launch_command,
    make_plan,
    run_plan,
    with_fetching,
)

# What a stage trains on and is validated on unless its flags say otherwise.
CONVERSATIONS = {"mid": (MID_TRAIN, MID_VAL), "sft": (SFT_TRAIN, SFT_VAL)}
EVALUATIONS = {"base": EvaluateBaseSettings, "chat": EvaluateChatSettings}


class Terminal:
    """Lines that stay, and at the bottom one that changes; in a file, that one now and then."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._shown = time.monotonic()

    def say(self, line: str) -> None:
        print(f"\r\033[K{line}" if self._live else line, flush=True)

    def status(self, line: str) -> None:
        if self._live:
            # No wrapping: a line that is too long is cut by the terminal.
            print(f"\r\033[?7l\033[K{line}\033[?7h", end="", flush=True)
        elif time.monotonic() - self._shown > 60:
            self._shown = time.monotonic()
            print(line, flush=True)


def main() -> None:
    settings = tyro.cli(SpeedrunSettings, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    plan = make_plan(settings, gpus=torch.cuda.device_count())
    nodes = settings.node.nodes
    stages = read_flags(plan, nodes=nodes)
    check_stages(stages, processes=plan.processes * nodes)
    plan = with_fetching(plan, stages, settings.cache, nodes=nodes)
    if settings.check or settings.dry_run:
        here = Here.look(plan, nodes)
        if settings.check:
            raise SystemExit(check(plan, settings, stages, here))
        disks, price = disk_needs(plan, stages, settings.cache), settings.price_per_gpu_hour
        state = State(plan, machine={})
        print("\n".join(describe_plan(plan, stages, here, disks, state, price_per_gpu_hour=price)))
        check_folders(plan.steps, state)
        return
    raise SystemExit(run(plan, settings))


def read_flags(plan: Plan, *, nodes: int) -> dict[str, Any]:
    """What the recipe of each step that trains or evaluates will understand. Mistakes in flags show
    now, not in hours."""
    on_gpu = plan.on_gpu
    kinds = {
        "base": (BaseSettings, preset(on_gpu=on_gpu, processes=plan.processes * nodes)),
        "mid": (MidSettings, mid_preset(on_gpu=on_gpu)),
        "sft": (SFTSettings, sft_preset(on_gpu=on_gpu)),
        "rl": (RLSettings, rl_preset(on_gpu=on_gpu)),
    }
    stages: dict[str, Any] = {}
    for step in plan.steps:
        if step.name in kinds:
            kind, default = kinds[step.name]
            stages[step.name] = tyro.cli(
                kind,
                prog=step.script,
                args=step.arguments,
                default=default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
        elif step.script == "train/evaluate.py":
            what, *arguments = step.arguments
            prog = f"{step.script} {what}"
            stages[step.name] = tyro.cli(EVALUATIONS[what], prog=prog, args=arguments)
    return stages


def check_stages(stages: dict[str, Any], *, processes: int) -> None:
    """UserError for batches that the processes cannot share and conversations that are not there.
    Each stage would find that by itself, hours later."""
    base = stages["base"]
    for name, stage in stages.items():
        try:
            if name in CONVERSATIONS:
                train, val = CONVERSATIONS[name]
                check_parts(stage.mixture, train=train, val=val)
            if name in ("base", "mid"):
                optim = stage.optim if name == "base" else stage.optim.like(base.optim)
                accumulation_steps(optim, base.model.sequence_len, processes)
            if name == "rl":
                passes_of_step(stage, processes)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def check(plan: Plan, settings: SpeedrunSettings, stages: dict[str, Any], here: Here) -> int:
    """A line for each thing that was tried; the exit code, 2 if one of them failed."""
    colours = {OK: "\033[32m", FAILED: "\033[31m"} if sys.stdout.isatty() else {}
    failed = 0
    for result in run_checks(plan, settings, stages, here):
        failed += result.state == FAILED
        end = "\033[0m" if colours else ""
        mark = f"{colours.get(result.state, '')}{result.state:7}{end}"
        print(f"{mark}  {result.name:27} {result.detail}", flush=True)
    print(f"{failed} failed" if failed else "all that was tried is well")
    return 2 if failed else 0


def run(plan: Plan, settings: SpeedrunSettings) -> int:
    """The exit code."""
    terminal, node = Terminal(), settings.node
    again = f"python {shlex.join(sys.argv)}"
    command = partial(launch_command, python=sys.executable, processes=plan.processes, node=node)
    others = Followers(node) if node.nodes > 1 and not node.node_rank else None
    try:
        if node.node_rank:
            follow(plan, node, command, terminal.say)
            return 0
        for name, why in plan.missing:
            terminal.say(f"left out: {name} ({why})")
        run_plan(plan, command, terminal, machine=describe_machine(), again=again, others=others)
    except StepFailedError as error:
        terminal.say(str(error))
        return error.code
    except (StoppedError, KeyboardInterrupt) as stop:
        terminal.say(str(stop) or f"stopped; go on with:\n  {again}")
        return 1
    finally:
        if others:
            others.end()
    terminal.say(f"report: {plan.folder / 'report' / 'report.html'}")
    # Beside this recipe, from wherever it was started.
    chat = str(Path(sys.argv[0]).with_name("chat.py"))
    last = str(plan.folders["rl" if settings.rl else "sft"])
    terminal.say(f"talk to it: {shlex.join(['python', chat, '--source', last])}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
