"""Reinforcement learning: the model answers, answers are scored, the better ones become likelier.

    torchrun --nproc_per_node=8 train/rl.py            GSM8K, from the best SFT run in runs/
    python train/rl.py --source runs/my-sft --num-iterations 50
    python train/rl.py --task toy --source scratch     a small model learns a toy from nothing

On CPU the last one is the default. Every answer and its reward are kept in the run's folder.
"""

import sys
from collections.abc import Callable
from functools import partial

import tyro

from gptfast import hardware, parallel
from gptfast.evaluate.generative import Answering
from gptfast.model import CONTEXT_FACTOR, GPTConfig, flops_per_token
from gptfast.plan import Plan
from gptfast.rl.config import (
    SCRATCH,
    QuestionSettings,
    RLSettings,
    passes_of_step,
    rl_preset,
    scratch_model,
)
from gptfast.rl.evaluation import RLEvaluation
from gptfast.rl.loader import RolloutLoader, length_multiple
from gptfast.rl.rollouts import Actor, generator_bytes, longest_rollout
from gptfast.run import exit_code
from gptfast.schedule import muon_momentum
from gptfast.stage import Source, Stage, learning_rate
from gptfast.tasks import GSM8K, fetch
from gptfast.tasks.toy import Toy


def main() -> None:
    settings = tyro.cli(
        RLSettings,
        description=__doc__,
        default=rl_preset(on_gpu=parallel.will_use_gpus()),
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=parallel.is_main(),
    )
    system = settings.system
    with parallel.start(cpu=system.device == "cpu", deterministic=system.deterministic) as world:
        train(settings, world, say=print if world.is_main else lambda line: None)


def train(settings: RLSettings, world: parallel.World, say: Callable[[str], None]) -> None:
    questions, answers, optim = settings.questions, settings.answers, settings.optim
    say(hardware.describe(world.device))

    # 1. Who answers what. Everything that can be wrong is found before step 0.
    source = None if settings.start.source == SCRATCH else Source.find(settings.start)
    config, tokenizer = (source.config, source.tokenizer) if source else scratch_model()
    say(f"from {source or 'scratch'}")
    train_task, test_task = load_questions(questions, world)
    longest = longest_rollout(
        train_task,
        tokenizer,
        answers.max_new_tokens,
        context=CONTEXT_FACTOR * config.sequence_len,
    )
    plan = make_plan(settings, config, len(train_task), world)
    say(
        f"{questions.task}: {len(train_task):,} questions; {plan.total_steps:,} steps of "
        f"{questions.examples_per_step} x {answers.num_samples} answers, {plan.accumulation} "
        f"pass(es) each, on {world.size} process(es)"
    )
    multiple = length_multiple(longest) if settings.system.compile else 1
    stage = Stage("rl", settings, config, world, say)
    stage.check(
        device_batch_size=optim.device_batch_size,
        accumulation=plan.accumulation,
        longest=longest + -longest % multiple,
        generator=generator_bytes(config, stage.dtype, rows=answers.max_rows, longest=longest),
    )

    # 2. The model that is trained, and the same one as it answers.
    stage.build(source)
    actor = Actor(
        stage.model,
        tokenizer,
        make_gpt=stage.make_gpt,
        dtype=stage.dtype,
        device=world.device,
        max_rows=answers.max_rows,
    )
    loader = RolloutLoader(
        actor,
        train_task,
        settings,
        world=world,
        folder=stage.folder / "rollouts",
        multiple=multiple,
    )
    answering = Answering(
        max_new_tokens=answers.max_new_tokens,
        num_samples=questions.eval_samples,
        temperature=1.0,
        top_k=answers.top_k or None,
    )
    evaluation = RLEvaluation(actor, test_task[: questions.eval_examples], answering, world)

    # 3. Train.
    stage.train(
        plan,
        loader,
        tokenizer,
        evaluate=evaluation.pass_at_k,
        sample=evaluation.sample,
        step_figures=loader.figures,
        title=f"reinforcement learning of d{config.n_layer} on {questions.task}",
    )


def load_questions(
    questions: QuestionSettings, world: parallel.World
) -> tuple[GSM8K, GSM8K] | tuple[Toy, Toy]:
    """Those to learn from, and those to test with."""
    if questions.task == "toy":
        return Toy(split="train"), Toy(split="test")
    with world.node_leader_first() as first:
        folder = questions.chat_data and questions.chat_data.expanduser() / "gsm8k"
        folder = folder or fetch("gsm8k", questions.cache, progress=first)
        return GSM8K(folder, split="train"), GSM8K(folder, split="test")


def make_plan(
    settings: RLSettings, config: GPTConfig, examples: int, world: parallel.World
) -> Plan:
    """Steps, schedules, and what is due when."""
    questions, run = settings.questions, settings.run
    steps = questions.num_iterations
    if steps is None:
        steps = max(1, examples // questions.examples_per_step) * questions.num_epochs
    return Plan(
        total_steps=steps,
        accumulation=passes_of_step(settings, world.size),
        # Answers are as long as they are.
        tokens_per_step=None,
        flops_per_token=flops_per_token(config),
        learning_rate_multiplier=learning_rate(settings.optim, steps),
        momentum=partial(muon_momentum, ramp_steps=0),
        eval_every=run.eval_every,
        sample_every=run.sample_every,
        save_every=run.save_every,
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
