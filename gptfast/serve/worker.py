"""An engine that answers requests as they come: what the server runs once for each GPU.

A worker speaks over a connection and knows nothing else of the server. It is a process of its own,
so that Python's lock is never in the way: launching kernels does not wait for the event loop, nor
the event loop for them. It ends when it is told to, or the other end of the connection is gone,
however that came.
"""

import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from gptfast.engine import Engine
from gptfast.engine.generation import Generation, Request, Row
from gptfast.errors import UserError
from gptfast.evaluate.loading import Placement, load_model, load_tokenizer

# What the whole process group gets is the server's to obey.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# <|bos|>, a token of the user's between two special ones, the special one before the answer, and a
# token of that.
SHORTEST_CONTEXT = 6
# Why an answer ends, in OpenAI's words.
STOP, LENGTH = "stop", "length"


class Add(NamedTuple):
    """To the worker. At most as many as it has slots may be unfinished."""

    number: int
    request: Request


class Cancel(NamedTuple):
    """To the worker: nobody wants the rest. Nothing happens if that is finished by now."""

    number: int


class End(NamedTuple):
    """To the worker, last of all."""


class Ready(NamedTuple):
    """From the worker, once. context: the most tokens of prompt and answer."""

    device: str
    context: int


class Progress(NamedTuple):
    """From the worker, in lists: new tokens of one request; `finish` with the last of them."""

    number: int
    ids: list[int]
    finish: str | None


class Failed(NamedTuple):
    """From the worker, last of all. `by_user`: the message says how to mend it."""

    message: str
    by_user: bool


def work_in_process(connection: Connection, *arguments) -> None:
    """`work`, deaf to SIGNALS, which were held back from the process's first moment."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    work(connection, *arguments)


def work(
    connection: Connection, make_engine: Callable[[], Engine], slots: int, context: int | None
) -> None:
    """Serve the connection until it closes.

    context: the most tokens of prompt and answer; None: as many as the model was trained with.
    """
    with connection:
        try:
            engine = make_engine()
            context = choose_context(context, engine.model.config.sequence_len, engine.context)
            generation = engine.open(slots, context)
            generation.warm_up()
            connection.send(Ready(str(engine.device), context))
            _answer(connection, generation)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            # The server is gone: there is nobody to tell.
            return
        except UserError as error:
            connection.send(Failed(str(error), by_user=True))
        except Exception as error:
            connection.send(Failed(f"{type(error).__name__}: {error}", by_user=False))
            raise


def choose_context(wanted: int | None, trained: int, positions: int) -> int:
    """The most tokens of prompt and answer: as many as the model was `trained` with, unless others
    are wanted. UserError if it has not so many `positions`, or no conversation is so short."""
    context = trained if wanted is None else wanted
    if context < SHORTEST_CONTEXT:
        raise UserError(
            f"context {context}, but a conversation has {SHORTEST_CONTEXT} tokens or more"
        )
    if context > positions:
        raise UserError(f"context {context}, but the model has {positions} positions")
    return context


def _answer(connection: Connection, generation: Generation) -> None:
    rows: dict[int, Row] = {}
    while True:
        # Waits for a message only where there is nothing to do.
        while not generation.busy or connection.poll():
            match connection.recv():
                case Add(number, request):
                    rows[number] = generation.add(number, request)
                case Cancel(number) if number in rows:
                    generation.cancel(rows.pop(number))
                case End():
                    return
        new: dict[int, list[int]] = {}
        for token in generation.step():
            ids = new.setdefault(token.sequence, [])
            if not (token.sampled and token.id in rows[token.sequence].stop):
                ids.append(token.id)
        news = []
        for number, ids in new.items():
            row = rows[number]
            finish = (STOP if row.stopped else LENGTH) if row.done else None
            news.append(Progress(number, ids, finish))
            if row.done:
                del rows[number]
        if news:
            connection.send(news)


def load_engine(checkpoint: Path, tokenizer: Path | None, placement: Placement) -> Engine:
    """Of a checkpoint; tokenizer: its folder, where it is not the run's own."""
    if placement.device.type == "cuda":
        # Triton launches on the current device.
        torch.cuda.set_device(placement.device)
    return Engine(load_model(checkpoint, placement), load_tokenizer(checkpoint, tokenizer))
