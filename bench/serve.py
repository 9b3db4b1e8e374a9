"""What does the chat server leave of the engine's rate, and how soon does an answer begin?

    python -m bench.serve                           d20 of random weights on this GPU
    python -m bench.serve --source runs/sft-d20

First the engine alone, in this process: a full batch of requests from their first tokens to their
last, with prompts as long, and sampled as those of the server are. Then the server, its engine in a
process of its own as always, and as many clients as the batch had rows (bench/serve_load.py,
another process), each with a request after the other. The last line is JSON.
"""

import gc
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from bench.marks import Mark
from bench.report import environment
from bench.serve_load import some_text
from bench.test_engine import some_tokenizer
from gptfast.engine import Engine
from gptfast.engine.generation import Request
from gptfast.engine.sampling import Sampling
from gptfast.evaluate.loading import Placement, find_checkpoint, random_model
from gptfast.model import GPTConfig
from gptfast.run import exit_code, find_run, prepare_to_write
from gptfast.serve.app import create_app
from gptfast.serve.pool import FAILED, READY, Pool
from gptfast.serve.server import Server, listen, url
from gptfast.serve.worker import load_engine
from gptfast.tokenizer import Tokenizer

RATE_SHARE = 0.60
FIRST_MS = 300
ROUNDS = 5


@dataclass(frozen=True)
class Settings:
    source: str | None = None
    """A run or a stage; random weights otherwise."""
    depth: int = 20
    """Of the model with random weights."""
    vocab_size: int = 65536
    """Of the same."""
    sequence_len: int = 2048
    """Of the same; also the longest conversation."""
    streams: int = 64
    """Requests at a time, and slots."""
    prompt_tokens: int = 128
    """Of each, about."""
    tokens: int = 256
    """Of an answer, on average."""
    temperature: float = 0.8
    top_k: int = 50
    seconds: float = 20
    """How long the server is asked."""
    device: Literal["auto", "cpu"] = "auto"
    out: Path | None = None
    """File for the JSON."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.out:
        prepare_to_write(settings.out)
    result = measure(settings)
    print("\n".join(table(result)))
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def measure(settings: Settings, *, in_process: bool = True) -> dict:
    """Everything; in_process=False: the server's engine in a thread of this process."""
    on_gpu = torch.cuda.is_available() and settings.device == "auto"
    placement = Placement(torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    if settings.source:
        checkpoint = find_checkpoint(find_run(settings.source))
        make_engine = partial(load_engine, checkpoint, None, placement)
    else:
        make_engine = partial(random_engine, settings, placement)
    engine = make_engine()
    tokenizer, slots = engine.tokenizer, settings.streams
    alone = engine_alone(engine, settings)
    # Gone before the server's own is made.
    del engine
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    pool = Pool([make_engine], slots=slots, queue=slots, in_process=in_process)
    served = under_load(pool, tokenizer, settings)
    return {
        "environment": environment(torch.cuda.get_device_name(0) if on_gpu else "cpu"),
        "settings": asdict(settings) | {"out": str(settings.out)},
        "engine_tokens_per_s": alone,
        "served": served,
        "share": served["tokens_per_s"] / alone,
    }


def random_engine(settings: Settings, placement: Placement) -> Engine:
    config = GPTConfig.from_depth(
        settings.depth, vocab_size=settings.vocab_size, sequence_len=settings.sequence_len
    )
    return Engine(random_model(config, placement), some_tokenizer(settings.vocab_size))


def engine_alone(engine: Engine, settings: Settings) -> float:
    """Tokens a second of a full batch, from the first tokens to the last; median of rounds."""
    generation = engine.open(settings.streams, engine.model.config.sequence_len)
    generation.warm_up()
    sampling = Sampling(settings.temperature, settings.top_k)
    rates = []
    for round_ in range(1 + ROUNDS):
        generator = torch.Generator().manual_seed(round_)
        shape = (settings.streams, settings.prompt_tokens)
        for number, prompt in enumerate(torch.randint(256, shape, generator=generator).tolist()):
            request = Request(prompt, settings.tokens, sampling, number, frozenset())
            generation.add(number, request)
        while not generation.step():
            pass
        begin, tokens = time.perf_counter(), 0
        while generation.busy:
            tokens += len(generation.step())
        rates.append(tokens / (time.perf_counter() - begin))
    return statistics.median(rates[1:])


def under_load(pool: Pool, tokenizer: Tokenizer, settings: Settings) -> dict:
    """What bench/serve_load.py measures of a server with this pool."""
    characters = round(settings.prompt_tokens * characters_a_token(tokenizer))
    listener = listen("127.0.0.1", 0)
    server = Server(create_app(pool, tokenizer, name="bench"), pool, shutdown_seconds=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while pool.state != READY:
            if pool.state == FAILED and pool.failure is not None:
                raise RuntimeError(pool.failure.message)
            time.sleep(0.1)
        # Once for what is new to the server too, such as its first long prefill.
        for seconds in (settings.seconds / 10, settings.seconds):
            result = _load(url(listener), settings, characters, seconds)
    finally:
        server.should_exit = True
        thread.join()
    if result["errors"]:
        raise RuntimeError(f"{len(result['errors'])} requests failed: {result['errors'][0]}")
    return result


def characters_a_token(tokenizer: Tokenizer) -> float:
    """Of the texts that the clients send."""
    text = some_text(random.Random(0), 10_000)
    return len(text) / len(tokenizer.encode(text))


def _load(address: str, settings: Settings, characters: int, seconds: float) -> dict:
    names = ("streams", "tokens", "temperature", "top_k")
    flags = [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in names]
    flags.append(f"--prompt-characters={characters}")
    command = [sys.executable, "-m", "bench.serve_load", address, f"--seconds={seconds}", *flags]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    return json.loads(done.stdout)


def table(result: dict) -> list[str]:
    served, first = result["served"], result["served"]["first_ms"]
    rate, p95 = served["tokens_per_s"], first["p95"]
    marks = (
        Mark(
            f"the server's tokens/s: at least {RATE_SHARE:.0%} of the engine's own",
            f"{result['share']:.1%}",
            result["share"] >= RATE_SHARE,
        ),
        Mark(
            f"95 % of first tokens within {FIRST_MS} ms", f"{p95:.0f} ms at 95 %", p95 <= FIRST_MS
        ),
    )
    return [
        f"{served['streams']} at a time, prompts of {served['prompt_tokens']:.0f} tokens, answers "
        f"of {served['answer_tokens']:.0f}, on {result['environment']['gpu']}",
        f"{'':12}{'tokens/s':>10}{'first token, ms: p50':>24}{'p95':>8}{'longest':>10}",
        f"{'engine':12}{result['engine_tokens_per_s']:>10,.0f}",
        f"{'server':12}{rate:>10,.0f}{first['p50']:>24.0f}{p95:>8.0f}{first['most']:>10.0f}",
        *map(str, marks),
    ]


if __name__ == "__main__":
    sys.exit(exit_code(main))
