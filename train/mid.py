"""Mid-training: a base model learns the form of conversations, on a mixture of them, once.

    torchrun --nproc_per_node=8 train/mid.py                       from the largest base run
    python train/mid.py --source runs/base-d20 --train my.jsonl:2 smoltalk gsm8k
    torchrun --nproc_per_node=2 train/mid.py --device cpu          on CPU

All tokens are learned. On CPU the mixture is one that Python itself carries.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import tyro

from gptfast import hardware, parallel
from gptfast.chat_data import MID_TRAIN, MID_VAL, RowLoader, StreamRows
from gptfast.config import accumulation_steps
from gptfast.config_chat import MidSettings, mid_preset
from gptfast.evaluate.tuning import TuningEvaluation
from gptfast.model import GPTConfig, flops_per_token
from gptfast.plan import Plan
from gptfast.preflight import prepare_conversations
from gptfast.run import exit_code
from gptfast.schedule import muon_momentum
from gptfast.stage import Source, Stage, learning_rate


def main() -> None:
    settings = tyro.cli(
        MidSettings,
        description=__doc__,
        default=mid_preset(on_gpu=parallel.will_use_gpus()),
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=parallel.is_main(),
    )
    system = settings.system
    with parallel.start(cpu=system.device == "cpu", deterministic=system.deterministic) as world:
        train(settings, world, say=print if world.is_main else lambda line: None)


def train(settings: MidSettings, world: parallel.World, say: Callable[[str], None]) -> None:
    say(hardware.describe(world.device))

    # 1. The model to go on with.
    source = Source.find(settings.start)
    say(f"from {source}")
    config = source.config
    settings = replace(settings, optim=settings.optim.like(source.optim))
    optim, run = settings.optim, settings.run
    assert optim.device_batch_size, "the source's"
    assert optim.total_batch_size, "the source's"

    # 2. Everything that can be wrong is found, and everything needed fetched, before step 0.
    stage = Stage("mid", settings, config, world, say)
    accumulation = accumulation_steps(optim, config.sequence_len, world.size)
    stage.check(device_batch_size=optim.device_batch_size, accumulation=accumulation)
    train_tokens, val_tokens = prepare_conversations(
        settings.mixture,
        source.tokenizer,
        train=MID_TRAIN,
        val=MID_VAL,
        val_tokens=run.eval_tokens,
        max_tokens=config.sequence_len,
        world=world,
        say=say,
    )

    # 3. Model, optimizer, batches, and what evaluates.
    stage.build(source)
    make_loader = partial(
        RowLoader,
        rows_per_step=optim.total_batch_size // config.sequence_len,
        batch_size=optim.device_batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    loader = make_loader(StreamRows(train_tokens, config.sequence_len))
    evaluation = TuningEvaluation(
        world=world,
        model=stage.model,
        make_replica=stage.make_gpt,
        make_loader=partial(make_loader, StreamRows(val_tokens, config.sequence_len)),
        tokenizer=source.tokenizer,
        dtype=stage.dtype,
    )

    # 4. Train.
    plan = make_plan(settings, config, loader)
    say(
        f"{plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens, "
        f"{plan.accumulation} pass(es) each"
    )
    stage.train(
        plan,
        loader,
        source.tokenizer,
        evaluate=evaluation.validate,
        sample=evaluation.sample,
        title=f"mid-training of d{config.n_layer}",
    )


def make_plan(settings: MidSettings, config: GPTConfig, loader: RowLoader) -> Plan:
    """Steps, schedules, and what is due when."""
    optim, run = settings.optim, settings.run
    total_steps = min(loader.steps, settings.num_iterations or loader.steps)
    return Plan(
        total_steps=total_steps,
        accumulation=loader.accumulation,
        tokens_per_step=optim.total_batch_size,
        flops_per_token=flops_per_token(config),
        learning_rate_multiplier=learning_rate(optim, total_steps),
        momentum=muon_momentum,
        eval_every=run.eval_every,
        sample_every=run.sample_every,
        save_every=run.save_every,
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
