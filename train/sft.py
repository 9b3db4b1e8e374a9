"""Supervised fine-tuning: the model learns to answer, from what assistants said.

    torchrun --nproc_per_node=8 train/sft.py                       from the largest mid run
    python train/sft.py --source runs/mid-d20 --train my.jsonl arc-easy gsm8k
    torchrun --nproc_per_node=2 train/sft.py --device cpu          on CPU

The loss is a mean over all tokens of the assistant in a step. Conversations are packed into rows
without padding, and each attends to itself alone. On CPU they are those that Python itself
carries.
"""

import math
import sys
from collections.abc import Callable
from functools import partial

import tyro

from gptfast import hardware, parallel
from gptfast.chat_data import SFT_TRAIN, SFT_VAL, PackedRows, RowLoader
from gptfast.config_chat import SFTSettings, sft_preset
from gptfast.evaluate.tuning import TuningEvaluation
from gptfast.model import flops_per_token
from gptfast.plan import Plan
from gptfast.preflight import prepare_conversations, prepare_questions
from gptfast.run import exit_code
from gptfast.schedule import muon_momentum
from gptfast.stage import Source, Stage, learning_rate


def main() -> None:
    settings = tyro.cli(
        SFTSettings,
        description=__doc__,
        default=sft_preset(on_gpu=parallel.will_use_gpus()),
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=parallel.is_main(),
    )
    system = settings.system
    with parallel.start(cpu=system.device == "cpu", deterministic=system.deterministic) as world:
        train(settings, world, say=print if world.is_main else lambda line: None)


def train(settings: SFTSettings, world: parallel.World, say: Callable[[str], None]) -> None:
    optim, run = settings.optim, settings.run
    say(hardware.describe(world.device))

    # 1. The model to go on with.
    source = Source.find(settings.start)
    say(f"from {source}")
    config = source.config

    # 2. Everything that can be wrong is found, and everything needed fetched, before step 0.
    stage = Stage("sft", settings, config, world, say, documents=True)
    tasks = prepare_questions(settings.accuracy, settings.mixture, world)
    train_tokens, val_tokens = prepare_conversations(
        settings.mixture,
        source.tokenizer,
        train=SFT_TRAIN,
        val=SFT_VAL,
        val_tokens=run.eval_tokens,
        max_tokens=config.sequence_len,
        world=world,
        say=say,
    )
    make_rows = partial(PackedRows, sequence_len=config.sequence_len, pack=optim.pack)
    rows = make_rows(train_tokens, epochs=settings.num_epochs)
    rows_per_step = rows.holding(optim.target_examples_per_step)
    device_batch_size = optim.device_batch_size or min(32, math.ceil(rows_per_step / world.size))
    make_loader = partial(
        RowLoader,
        rows_per_step=rows_per_step,
        batch_size=device_batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    loader = make_loader(rows)
    stage.check(device_batch_size=device_batch_size, accumulation=loader.accumulation)
    plan = make_plan(settings, stage, rows, loader)
    say(describe(rows, rows_per_step, plan))

    # 3. Model, optimizer, and what evaluates.
    stage.build(source)
    evaluation = TuningEvaluation(
        world=world,
        model=stage.model,
        make_replica=stage.make_gpt,
        make_loader=partial(make_loader, make_rows(val_tokens)),
        tokenizer=source.tokenizer,
        dtype=stage.dtype,
        tasks=tasks,
        tasks_due=partial(plan.due, plan.score_every),
        max_problems=settings.accuracy.accuracy_problems,
    )

    # 4. Train.
    stage.train(
        plan,
        loader,
        source.tokenizer,
        evaluate=evaluation.validate,
        sample=evaluation.sample,
        title=f"supervised fine-tuning of d{config.n_layer}",
        # As the reference counts: conversations, not the rows that they are packed into.
        data_figures={"training_rows": len(train_tokens)},
    )


def describe(rows: PackedRows, rows_per_step: int, plan: Plan) -> str:
    lines = []
    if rows.left_out:
        lines.append(f"{rows.left_out} conversation(s) left out: cut before the assistant speaks")
    lines.append(
        f"{rows.conversations:,} conversations in {len(rows):,} rows, "
        f"{100 * rows.fill_ratio:.1f} % full; {plan.total_steps:,} steps of {rows_per_step} rows, "
        f"{plan.accumulation} pass(es) each"
    )
    return "\n".join(lines)


def make_plan(settings: SFTSettings, stage: Stage, rows: PackedRows, loader: RowLoader) -> Plan:
    """Steps, schedules, and what is due when. Tokens are those of conversations: what is left free
    of rows counts neither in tokens a second nor in MFU."""
    optim, run = settings.optim, settings.run
    total_steps = min(loader.steps, settings.num_iterations or loader.steps)
    return Plan(
        total_steps=total_steps,
        accumulation=loader.accumulation,
        tokens_per_step=round(rows.useful_tokens / loader.steps),
        flops_per_token=flops_per_token(stage.config, context=rows.mean_context),
        learning_rate_multiplier=learning_rate(optim, total_steps),
        momentum=partial(muon_momentum, ramp_steps=0),
        eval_every=run.eval_every,
        score_every=settings.accuracy.accuracy_every if settings.accuracy.accuracy_of else 0,
        sample_every=run.sample_every,
        save_every=run.save_every,
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
