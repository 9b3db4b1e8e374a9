"""Where the time of a training step goes, down to the kernel, and what each part costs in MFU.

    python -m bench.mfu                                            d20 on one GPU
    torchrun --nproc_per_node=4 -m bench.mfu --sharding-cost       on four, and unsharded
    python -m bench.mfu --depth 26 --device-batch-size 16 --kernels reference --no-compile
    python -m bench.mfu --data my_texts/ --tokenizer my_tokenizer  real text, by the real loader
    python -m bench.mfu compare before.json after.json             which rows a change comes from
    python -m bench.mfu predict                                    8 to 1,024 GPUs, on paper

Trains for 20 steps, times 20, profiles 3, on tokens made up unless --data names text. Writes the
ledger (--out mfu.json), its table and its waterfall beside it; the table and some lines of figures
go to the console.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from bench import mfu_predict
from bench.mfu_step import MfuSettings, Session, memory_need, preset
from gptfast import hardware, parallel
from gptfast.config import not_negative
from gptfast.ledger import compare, read_json, write
from gptfast.run import exit_code, prepare_to_write


@dataclass(frozen=True)
class CompareSettings:
    """Which rows the change of a step's time comes from."""

    before: tyro.conf.Positional[Path]
    """A ledger that `python -m bench.mfu` wrote."""
    after: tyro.conf.Positional[Path]
    """Another of the same step on the same kind of GPU."""
    max_loss: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.02
    """Exit with code 1 if the step got slower by more than this share."""

    def __post_init__(self) -> None:
        not_negative(self, "max_loss")


def main() -> int:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "compare":
        slower = False

        def run() -> None:
            nonlocal slower
            asked = tyro.cli(CompareSettings, args=sys.argv[2:], prog="bench.mfu compare")
            lines, slower = compare(read_json(asked.before), read_json(asked.after), asked.max_loss)
            print("\n".join(lines))

        return exit_code(run) or int(slower)
    if command == "predict":
        return exit_code(predict)
    return exit_code(measure_here)


def predict() -> None:
    settings = tyro.cli(mfu_predict.PredictSettings, args=sys.argv[2:], prog="bench.mfu predict")
    print("\n".join(mfu_predict.lines(settings)))


def measure_here() -> None:
    settings = tyro.cli(
        MfuSettings,
        description=__doc__,
        default=preset(on_gpu=parallel.will_use_gpus()),
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=parallel.is_main(),
    )
    system = settings.system
    with parallel.start(cpu=system.device == "cpu", deterministic=system.deterministic) as world:
        say = print if world.is_main else lambda line: None
        with memory_need(settings, world).told():
            measure(settings, world, say)


def measure(settings: MfuSettings, world: parallel.World, say: Callable[[str], None]) -> None:
    """Train, time and profile; say and write what was found, as far as it was found."""
    say(hardware.describe(world.device))
    chosen = settings.measure
    with world.node_leader_first():
        if world.is_main:
            prepare_to_write(chosen.out)
    session = Session(settings, world, say)
    try:
        ledger, figures = session.train()
        stages = [session.parts] * chosen.parts + [session.sharding_cost] * chosen.sharding_cost
        for stage in (lambda: figures, *stages):
            found = stage()
            for name, value in found.items():
                say(f"{name}: {value:,.2f}")
            if ledger is not None:
                # The table was said when the profile was done; what is known more goes beside it.
                ledger = replace(ledger, parts={**ledger.parts, **found})
                write(ledger, chosen.out, say=lambda line: None)
    finally:
        session.loader.close()


if __name__ == "__main__":
    sys.exit(main())
