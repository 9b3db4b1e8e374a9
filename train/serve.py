"""Chat with a trained model in the browser, or through OpenAI's API.

    python train/serve.py                                   the best SFT run, on 127.0.0.1:8000
    python train/serve.py --source runs/rl-d20 --num-gpus 8
    GPTFAST_TOKEN=secret python train/serve.py --host 0.0.0.0

Open the address it prints. Programs use http://127.0.0.1:8000/v1 as the base URL of any OpenAI
client. Each GPU holds a copy of the model and answers many requests at a time.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from gptfast.errors import UserError
from gptfast.evaluate.loading import (
    Placement,
    config_of,
    find_checkpoint,
    load_tokenizer,
    stage_of_checkpoint,
)
from gptfast.model import CONTEXT_FACTOR
from gptfast.run import exit_code, find_run


@dataclass(frozen=True)
class ServeSettings:
    source: str = "sft"
    """A stage (base, mid, sft, rl), of which the largest run is taken, or a run's folder."""
    step: int | None = None
    """Which of its checkpoints; the newest otherwise."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, if it is not where the run had it."""

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs a token."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    token: str | None = None
    """What clients must have (Authorization: Bearer ...); the variable GPTFAST_TOKEN otherwise."""
    insecure_public: bool = False
    """Let everybody who reaches the address use the server, without a token."""
    cors_origin: tuple[str, ...] = ()
    """Origins whose pages may use the server from a browser; * is all of them."""

    temperature: float = 0.8
    """Of requests that do not say; so the next two."""
    top_k: int = 50
    """Only so many of the likeliest tokens are drawn."""
    max_tokens: int = 512
    """Tokens of an answer, at most."""

    num_gpus: int = 1
    """Copies of the model, each on a GPU of its own."""
    slots: int = 64
    """Answers that a copy writes at a time."""
    queue: int = 256
    """Requests that may wait for one; more are refused."""
    context: int | None = None
    """Tokens of a conversation, its answer included; as in training otherwise. Memory for so many
    is reserved for every slot."""
    shutdown_seconds: float = 30
    """How long running answers may take to finish when the server is stopped."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 elsewhere."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """auto: triton on a GPU, reference elsewhere."""
    attention: str = "auto"
    """auto, flash4, flash3, cudnn, flash2 or math."""
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        for name in ("num_gpus", "slots"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("queue", "shutdown_seconds"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")


def main() -> None:
    settings = tyro.cli(ServeSettings, description=__doc__)
    # An empty one would be no token, and yet open the server to every name (see Guard).
    token = (settings.token or os.environ.get("GPTFAST_TOKEN") or "").strip() or None
    run(settings, token=token, say=partial(print, flush=True))


def run(settings: ServeSettings, *, token: str | None, say: Callable[[str], None]) -> None:
    try:
        from gptfast.serve.app import Access, Defaults, create_app
        from gptfast.serve.guard import check_address, is_loopback
        from gptfast.serve.pool import Pool
        from gptfast.serve.server import listen, serve
        from gptfast.serve.worker import choose_context, load_engine
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install -e '.[serve]'") from error

    # 1. Everything that can be wrong is found before a model is loaded.
    defaults = Defaults(settings.temperature, settings.top_k, settings.max_tokens)
    check_address(settings.host, token, insecure_public=settings.insecure_public)
    placements = [
        Placement(device, settings.dtype, settings.kernels, settings.attention)
        for device in devices(settings)
    ]
    folder = find_run(settings.source)
    checkpoint = find_checkpoint(folder, settings.step)
    tokenizer = load_tokenizer(checkpoint, settings.tokenizer)
    config = config_of(checkpoint)
    positions = CONTEXT_FACTOR * config.sequence_len
    context = choose_context(settings.context, config.sequence_len, positions)
    listener = listen(settings.host, settings.port)

    # 2. A replica a GPU, in a process of its own, and the application before them.
    pool = Pool(
        [
            partial(load_engine, checkpoint, settings.tokenizer, placement)
            for placement in placements
        ],
        slots=settings.slots,
        queue=settings.queue,
        context=context,
    )
    app = create_app(
        pool,
        tokenizer,
        name=folder.resolve().name,
        defaults=defaults,
        access=Access(
            token,
            local_only=is_loopback(settings.host) and token is None,
            origins=settings.cors_origin,
        ),
    )

    # 3. Serve.
    say(f"{folder}, {checkpoint.name}")
    if stage_of_checkpoint(checkpoint) == "base":
        say("a base model knows no conversations: what it answers means little before mid and SFT")
    serve(app, pool, listener, shutdown_seconds=settings.shutdown_seconds, say=say)


def devices(settings: ServeSettings) -> list[torch.device]:
    """Where the replicas go. UserError if there are not so many GPUs."""
    found = torch.cuda.device_count()
    if settings.device == "cpu" or not found:
        if settings.num_gpus > 1:
            raise UserError(f"--num-gpus {settings.num_gpus}, but a CPU holds one copy")
        return [torch.device("cpu")]
    if settings.num_gpus > found:
        raise UserError(f"--num-gpus {settings.num_gpus}, but there are {found}")
    return [torch.device("cuda", index) for index in range(settings.num_gpus)]


if __name__ == "__main__":
    sys.exit(exit_code(main))
