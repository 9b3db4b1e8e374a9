"""What tests of the server and of its page share: a running server, and a model that says what it
was told to."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import httpx

from gptfast.checkpoint import Checkpointer
from gptfast.conversation import render_messages
from gptfast.engine import Engine
from gptfast.engine.calculator import calculate
from gptfast.engine.generation import Request, Row, Token
from gptfast.engine.speech import Speech, parts_of, text_of
from gptfast.serve.app import create_app
from gptfast.serve.pool import Pool
from gptfast.serve.server import Server, listen, url
from gptfast.tokenizer import SPECIAL_TOKENS
from tests.engine_cases import CONFIG, TOKENIZER, tool_model

STOP = TOKENIZER.special_id("<|assistant_end|>")
HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Running:
    url: str
    pool: Pool
    server: Server
    thread: threading.Thread

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        wait_until(condition, seconds)

    def wait_until_idle(self) -> None:
        """Nobody is answered or waits, on either side of the connection."""
        self.wait_until(lambda: self.pool.running == self.pool.waiting == 0)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@contextmanager
def running(
    make_engine: Callable[[], Engine],
    *,
    slots: int = 8,
    queue: int = 64,
    context: int | None = 400,
    shutdown_seconds: float = 5,
    ready: bool = True,
    in_process: bool = False,
    **app_options,
) -> Iterator[Running]:
    """A server with one replica, in a thread unless told, on a free port of this machine."""
    pool = Pool([make_engine], slots=slots, queue=queue, context=context, in_process=in_process)
    app = create_app(pool, TOKENIZER, name="tiny", **app_options)
    listener = listen("127.0.0.1", 0)
    server = Server(app, pool, shutdown_seconds=shutdown_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    it = Running(url(listener), pool, server, thread)
    try:
        it.wait_until(lambda: server.started)
        if ready:
            it.wait_until(lambda: httpx.get(f"{it.url}/health").status_code == 200, seconds=60)
        yield it
    finally:
        it.stop()
        assert pool.running == pool.waiting == 0


class ScriptedEngine:
    """Looks like an Engine to a worker. Says `script(user's last message)`, `pause` seconds a
    token; special tokens in it are tokens."""

    def __init__(self, script: Callable[[str], str], *, pause: float = 0.0) -> None:
        self.script, self.pause = script, pause
        self.device, self.context = "cpu", 100_000
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=100_000))
        self.prompts: list[str] = []
        self.rows: dict[Row, Iterator[int]] = {}

    def open(self, slots: int, length: int) -> "ScriptedEngine":
        return self

    def warm_up(self) -> None:
        pass

    def add(self, number: int, request: Request) -> Row:
        row = Row(number, request, None)
        prompt = TOKENIZER.decode(request.prompt)
        self.prompts.append(prompt)
        last = prompt.rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
        self.rows[row] = iter([*encode(self.script(last)), STOP])
        return row

    def cancel(self, row: Row) -> None:
        del self.rows[row]

    @property
    def busy(self) -> bool:
        return bool(self.rows)

    def step(self) -> list[Token]:
        time.sleep(self.pause)
        tokens = []
        for row, ids in list(self.rows.items()):
            tokens += row.accept(len(row.ids), next(ids))
            if row.done:
                del self.rows[row]
        return tokens


def encode(text: str) -> list[int]:
    for name in SPECIAL_TOKENS:
        before, found, after = text.partition(name)
        if found:
            return [*encode(before), TOKENIZER.special_id(name), *encode(after)]
    return list(text.encode())


@cache
def engine_alone() -> Engine:
    return Engine(tool_model(), TOKENIZER)


def expected(messages, *, max_tokens=30, temperature=0.8, top_k=50, seed=0, **sampling) -> dict:
    """What the engine says by itself: {"content", "parts", "tokens", "finish", "spelled"}."""
    alone = engine_alone()
    prompt = render_messages(TOKENIZER, messages)
    sampling |= {"temperature": temperature, "top_k": top_k, "seeds": [seed]}
    steps = list(alone.generate([prompt], max_tokens=max_tokens, tool=calculate, **sampling))
    ids = [token.id for step in steps for token in step]
    stopped = ids[-1] in alone.stop_ids()
    ids = ids[:-1] if stopped else ids
    speech = Speech(TOKENIZER)
    pieces = speech.feed(ids) + speech.close()
    return {
        "content": text_of(pieces),
        "parts": parts_of(pieces),
        "tokens": len(ids),
        "finish": "stop" if stopped else "length",
        "spelled": TOKENIZER.decode(ids),
    }


def post(server, body: object, path: str = "/v1/chat/completions", **options) -> httpx.Response:
    options = {"headers": {"Content-Type": "application/json"}, **options}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, timeout=30, **options)


def save_run(folder: Path) -> Path:
    """A run whose checkpoint of step 7 is `tool_model`'s, as training leaves it."""
    TOKENIZER.save(folder / "tokenizer")
    meta = {
        "model_config": CONFIG.to_dict(),
        "tokenizer": TOKENIZER.fingerprint,
        "tokenizer_folder": str(folder / "tokenizer"),
    }
    parameters = tool_model().named_parameters()
    checkpointer = Checkpointer(folder / "checkpoints", keep=1)
    checkpointer.save(7, {f"model.{n}": p.detach() for n, p in parameters}, {}, meta)
    checkpointer.close()
    return folder
