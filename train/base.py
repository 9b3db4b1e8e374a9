"""Train the base model: from raw text to a checkpoint, with FSDP2 on any number of GPUs.

    torchrun --nproc_per_node=8 train/base.py                  the report's d20 on eight GPUs
    python train/base.py --depth 12 --data my_texts/           one GPU, one's own text
    torchrun --nproc_per_node=2 train/base.py --device cpu     on CPU

On CPU the defaults are a small model on text that Python itself carries.
"""

import sys
from collections.abc import Callable
from functools import partial

import tyro

from gptfast import hardware, parallel
from gptfast.config import BaseSettings, accumulation_steps, preset
from gptfast.data import BatchLoader
from gptfast.evaluate.base import BaseEvaluation, first_documents
from gptfast.model import GPTConfig, flops_per_token, parameter_counts
from gptfast.plan import Plan
from gptfast.preflight import prepare_text
from gptfast.run import exit_code
from gptfast.schedule import horizon, muon_momentum
from gptfast.stage import Stage, learning_rate


def main() -> None:
    settings = tyro.cli(
        BaseSettings,
        description=__doc__,
        default=preset(on_gpu=parallel.will_use_gpus(), processes=parallel.process_count()),
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=parallel.is_main(),
    )
    system = settings.system
    with parallel.start(cpu=system.device == "cpu", deterministic=system.deterministic) as world:
        train(settings, world, say=print if world.is_main else lambda line: None)


def train(settings: BaseSettings, world: parallel.World, say: Callable[[str], None]) -> None:
    optim, run = settings.optim, settings.run
    say(hardware.describe(world.device))

    # 1. What to train, and for how long.
    config = GPTConfig.from_depth(
        settings.model.depth,
        vocab_size=settings.model.vocab_size,
        sequence_len=settings.model.sequence_len,
    )
    plan = make_plan(settings, config, world)
    say(
        f"d{settings.model.depth}: {sum(parameter_counts(config).values()):,} parameters, "
        f"{plan.flops_per_token:,} FLOPs a token; {plan.total_steps:,} steps of "
        f"{plan.tokens_per_step:,} tokens, {plan.accumulation} pass(es) each, "
        f"on {world.size} process(es) of {world.nodes} node(s)"
    )

    # 2. Everything that can be wrong is found, and everything needed fetched, before step 0.
    stage = Stage("base", settings, config, world, say)
    stage.check(device_batch_size=optim.device_batch_size, accumulation=plan.accumulation)
    corpus, tokenizer = prepare_text(
        settings.data,
        vocab_size=config.vocab_size,
        tokens=plan.total_steps * optim.total_batch_size,
        world=world,
        say=say,
        kept=stage.tokenizer_folder if run.resume else None,
    )

    # 3. Model, optimizer, batches, and what evaluates.
    stage.build()
    make_loader = partial(
        BatchLoader,
        tokenizer=tokenizer,
        batch_size=optim.device_batch_size,
        sequence_len=config.sequence_len,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    val_text = first_documents(corpus.val, tokenizer, tokens=run.eval_tokens, at_least=world.size)
    evaluation = BaseEvaluation(
        world=world,
        model=stage.model,
        make_replica=stage.make_gpt,
        make_loader=partial(make_loader, val_text, epochs=1),
        tokenizer=tokenizer,
        dtype=stage.dtype,
    )

    # 4. Train.
    stage.train(
        plan,
        make_loader(corpus.train),
        tokenizer,
        evaluate=evaluation.validate,
        sample=evaluation.sample,
        title=f"d{settings.model.depth} on {corpus.name}",
    )


def make_plan(settings: BaseSettings, config: GPTConfig, world: parallel.World) -> Plan:
    """Steps, schedules, and what is due when."""
    optim, run, length = settings.optim, settings.run, settings.horizon
    total_steps = horizon(
        n_params=sum(parameter_counts(config).values()),
        flops_per_token=flops_per_token(config),
        total_batch_size=optim.total_batch_size,
        iterations=length.iterations(settings.system.device),
        tokens=length.target_tokens,
        target_flops=length.target_flops,
        tokens_per_param=length.target_param_data_ratio,
    )
    return Plan(
        total_steps=total_steps,
        accumulation=accumulation_steps(optim, config.sequence_len, world.size),
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
