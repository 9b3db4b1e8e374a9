"""Evaluate a trained model.

    torchrun --nproc_per_node=8 train/evaluate.py base base           all of a base model's
    python train/evaluate.py base runs/base-d20 --only core --max-per-task 500
    python train/evaluate.py base --random-weights --depth 2 --tokenizer tiny --only core
    torchrun --nproc_per_node=8 train/evaluate.py chat -i sft         all of the chat tasks
    python train/evaluate.py chat -i runs/rl-d20 -a GSM8K

A base model's evaluation is bits per byte on training and validation text, seven prompts continued
greedily, and CORE. A chat model's is ARC, MMLU, GSM8K and HumanEval. What was scored of CORE and of
the chat tasks is kept: run again, a stopped evaluation goes on. The results are those of the newest
evaluation; after one of the first examples only, asking for all again scores nothing twice. A chat
task evaluated alone joins the others, if all but the task is as it was.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptfast import parallel
from gptfast.config import DEFAULT_CACHE, DataSettings
from gptfast.data import Corpus, prepare_corpus
from gptfast.evaluate.bits_per_byte import corpus_bits_per_byte
from gptfast.evaluate.chat import evaluate_chat
from gptfast.evaluate.core import evaluate_core
from gptfast.evaluate.core_bundle import Bundle, load_bundle
from gptfast.evaluate.core_compare import comparison
from gptfast.evaluate.core_fetch import fetch_bundle
from gptfast.evaluate.core_results import CoreResult
from gptfast.evaluate.core_scoring import Scorer
from gptfast.evaluate.generative import Answering
from gptfast.evaluate.loading import (
    Placement,
    Subject,
    cache_of_run,
    data_of_run,
    load_subject,
    random_subject,
)
from gptfast.evaluate.outcomes import ResultStore
from gptfast.evaluate.samples import samples
from gptfast.evaluate.settings import EvaluateBaseSettings, EvaluateChatSettings, ModelSettings
from gptfast.run import exit_code, find_run, write_json, write_section
from gptfast.sandbox import isolation
from gptfast.tasks import chat_task

# Of the chat evaluation's settings, what the report states.
REPORTED = (
    *("source", "task", "dtype", "temperature", "max_new_tokens", "num_samples", "top_k"),
    *("batch_size", "model_tag", "step", "max_problems"),
)


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"base": base, "chat": chat}, description=__doc__, console_outputs=parallel.is_main()
    )


def base(settings: Annotated[EvaluateBaseSettings, tyro.conf.arg(name="")]) -> None:
    """A base model: bits per byte, samples, CORE."""
    with parallel.start(cpu=settings.device == "cpu") as world:
        evaluate_base(settings, world, say=print if world.is_main else lambda line: None)


def chat(settings: Annotated[EvaluateChatSettings, tyro.conf.arg(name="")]) -> None:
    """A chat model: ARC-Easy, ARC-Challenge, MMLU, GSM8K, HumanEval, ChatCORE."""
    with parallel.start(cpu=settings.device == "cpu") as world:
        evaluate_conversation(settings, world, say=print if world.is_main else lambda line: None)


def evaluate_base(
    settings: EvaluateBaseSettings, world: parallel.World, say: Callable[[str], None]
) -> None:
    # 1. Everything that is needed is there before anything is computed.
    run = find_run(settings.run) if settings.run else None
    corpus = bundle = None
    with world.node_leader_first() as first:
        cache = settings.cache or (cache_of_run(run) if run else DEFAULT_CACHE)
        if "bpb" in settings.only:
            corpus = load_corpus(settings, run, cache, progress=first)
        if "core" in settings.only:
            bundle = load_bundle(settings.core_bundle or fetch_bundle(cache, progress=first))
    placement = Placement(world.device, settings.dtype, settings.kernels, settings.attention)
    if run:
        subject = load_subject(run, placement, step=settings.step, tokenizer=settings.tokenizer)
    else:
        assert settings.tokenizer, "asked for where the settings are checked"
        subject = random_subject(
            settings.depth, settings.sequence_len, placement, tokenizer=settings.tokenizer
        )
    subject = begin(subject, settings, world, say)

    # 2. Each rank evaluates its share with its own copy of the model.
    loss: dict[str, Any] = {}
    if corpus:
        loss |= corpus_bits_per_byte(
            subject.model,
            subject.tokenizer,
            corpus,
            split_tokens=settings.split_tokens,
            batch_size=settings.device_batch_size,
            world=world,
        )
    if "samples" in settings.only and world.is_main:
        loss["samples"] = samples(subject.model, subject.tokenizer)
    if loss and world.is_main:
        write_json(subject.out / "loss.json", loss)
        write_section(subject.out, "Base model loss", loss_section(loss))
        say(loss_section(loss))
    if bundle:
        result = score_core(settings, subject, bundle, world, say)
        if world.is_main:
            write_json(subject.out / "core.json", result.as_dict())
            result.write_csv(subject.out / "core.csv")
            write_section(subject.out, "Base model evaluation", result.section(subject.name))
        say(result.table())
        if settings.compare_one_at_a_time:
            alone = score_core(settings, subject, bundle, world, say, one_at_a_time=True)
            compared = comparison(result, alone, names=("batched", "one at a time"))
            if world.is_main:
                (subject.out / "core-compared.md").write_text(compared, encoding="utf-8")
            say(compared)
    say(f"results: {subject.out}")


def evaluate_conversation(
    settings: EvaluateChatSettings, world: parallel.World, say: Callable[[str], None]
) -> None:
    # 1. Everything that is needed is there before anything is computed.
    tag = settings.model_tag
    run = find_run(f"runs/{settings.source}-{tag}" if tag else settings.source)
    with world.node_leader_first() as first:
        cache = settings.cache or cache_of_run(run)
        tasks = {
            name: chat_task(name, data=settings.chat_data, cache=cache, progress=first)
            for name in settings.tasks
        }
        if "HumanEval" in tasks:
            isolation()
    placement = Placement(world.device, settings.dtype, settings.kernels, settings.attention)
    subject = load_subject(run, placement, step=settings.step, tokenizer=settings.tokenizer)
    subject = begin(subject, settings, world, say)

    # 2. Each rank answers its share with its own copy of the model.
    started = time.perf_counter()
    answering = Answering(
        max_new_tokens=settings.max_new_tokens,
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
    )
    result = evaluate_chat(
        subject.model,
        subject.tokenizer,
        tasks,
        answering=answering,
        batch_size=settings.batch_size,
        max_problems=settings.max_problems,
        group=world.host_group,
        store=ResultStore(subject.out / "chat", subject.identity),
        progress=world.is_main,
    )
    say(f"chat tasks: {time.perf_counter() - started:.1f} s")
    if world.is_main:
        path, same = subject.out / "chat.json", circumstances(settings, subject, answering)
        result = result.with_earlier(path, same)
        arguments = {name: getattr(settings, name) for name in REPORTED}
        arguments["task"] = list(result.figures)
        saved = {**result.as_dict(), "arguments": arguments, "circumstances": same}
        write_json(path, saved)
        write_section(subject.out, f"Chat evaluation {subject.stage}", result.section(arguments))
    say(f"{result.table()}\nresults: {subject.out}")


def circumstances(settings: EvaluateChatSettings, subject: Subject, answering: Answering) -> str:
    """The same for evaluations whose tasks belong in one result."""
    questions = [settings.max_problems, str(settings.chat_data)]
    parts = [subject.identity, asdict(answering), *questions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def begin(
    subject: Subject, settings: ModelSettings, world: parallel.World, say: Callable[[str], None]
) -> Subject:
    """The subject, with the folder that its results go to, made."""
    subject = replace(subject, out=settings.out or subject.out)
    subject.out.mkdir(parents=True, exist_ok=True)
    say(f"{subject.name}, {subject.identity['dtype']} on {world.size} process(es)")
    return subject


def load_corpus(
    settings: EvaluateBaseSettings, run: Path | None, cache: Path, *, progress: bool
) -> Corpus:
    """The text that is given, or else that of the run."""
    text = data_of_run(run) if run and settings.data is None else DataSettings()
    return prepare_corpus(
        settings.data or text.data,
        cache=cache / "data",
        train_shards=1,
        validation=settings.validation or text.validation,
        progress=progress,
    )


def score_core(
    settings: EvaluateBaseSettings,
    subject: Subject,
    bundle: Bundle,
    world: parallel.World,
    say: Callable[[str], None],
    *,
    one_at_a_time: bool = False,
) -> CoreResult:
    name = "core-one-at-a-time" if one_at_a_time else "core"
    scorer = Scorer(subject.model, batch_tokens=settings.batch_tokens, one_at_a_time=one_at_a_time)
    started = time.perf_counter()
    result = evaluate_core(
        scorer,
        subject.tokenizer,
        bundle,
        max_per_task=settings.max_per_task,
        group=world.host_group,
        store=ResultStore(subject.out / name, subject.identity),
        progress=world.is_main,
    )
    seconds = time.perf_counter() - started
    say(f"{name}: {seconds:.1f} s, {scorer.tokens:,} tokens computed by this process")
    return result


def loss_section(loss: dict[str, Any]) -> str:
    lines = [
        f"- {split} bpb: {loss[f'{split}_bpb']:.4f}"
        for split in ("train", "val")
        if f"{split}_bpb" in loss
    ]
    lines += [f"- sample {i}: {text}" for i, text in enumerate(loss.get("samples", ()))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(exit_code(main))
