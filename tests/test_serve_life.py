"""The server's life: its beginning, crowds and their queue, failures, and its end."""

import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch

from gptfast.conversation import render_messages
from gptfast.engine import Engine
from gptfast.engine.speech import Speech, text_of
from gptfast.errors import UserError
from gptfast.evaluate.loading import Placement
from gptfast.serve.app import Defaults, create_app
from gptfast.serve.pool import Pool
from gptfast.serve.server import listen, serve
from gptfast.serve.worker import load_engine
from tests.engine_cases import tool_model
from tests.serve_cases import (
    HELLO,
    TOKENIZER,
    ScriptedEngine,
    engine_alone,
    post,
    running,
    save_run,
    wait_until,
)


class WatchedEngine(Engine):
    """Remembers its last generation, so that a test can look at the slots."""

    def open(self, slots: int, length: int):
        self.generation = super().open(slots, length)
        return self.generation


async def one_of_many(server, http: httpx.AsyncClient, number: int) -> tuple[str, str]:
    """(what happened, the text); every third goes away early, every eighth sends nonsense."""
    body = json.dumps({"messages": HELLO, "seed": number, "max_tokens": 30, "stream": True})
    content = body[: number % len(body)] if number % 8 == 0 else body
    patience = random.Random(number).randint(0, 3) if number % 3 == 0 else 1000
    headers, text = {"Content-Type": "application/json"}, ""
    url = f"{server.url}/v1/chat/completions"
    async with http.stream("POST", url, content=content, headers=headers) as response:
        if response.status_code != 200:
            return str(response.status_code), ""
        async for line in response.aiter_lines():
            if patience == 0:
                return "left", text
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                patience -= 1
    return "done", text


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_crowd_with_people_leaving_and_nonsense():
    """Sixty-four at a time, for eight slots: whoever stays gets the answer that is theirs."""
    engine = WatchedEngine(tool_model(), TOKENIZER)
    with running(lambda: engine) as it:
        before = open_files()
        assert_a_crowd_is_served(it)
        # Nothing of them is left: no slot, no task, no connection, no file.
        it.wait_until_idle()
        wait_until(lambda: not engine.generation.busy)
        assert all(row is None or row.done for row in engine.generation.slots)
        state = it.server.server_state
        wait_until(lambda: len(state.tasks) == len(state.connections) == 0)
        wait_until(lambda: open_files() <= before)
        assert it.pool.refused == 0


def assert_a_crowd_is_served(server) -> None:
    numbers = range(1, 65)

    async def crowd() -> list[tuple[str, str]]:
        limits = httpx.Limits(max_connections=len(numbers))
        async with httpx.AsyncClient(timeout=60, limits=limits) as http:
            return await asyncio.gather(*(one_of_many(server, http, n) for n in numbers))

    results = asyncio.run(crowd())
    prompt = render_messages(TOKENIZER, HELLO)
    options = {"temperature": 0.8, "top_k": 50, "max_tokens": 30, "seeds": list(numbers)}
    sequences, _ = engine_alone().generate_batch([prompt] * len(numbers), **options)
    for number, (outcome, text), ids in zip(numbers, results, sequences):
        speech = Speech(TOKENIZER)
        want = text_of(speech.feed(ids[len(prompt) :]) + speech.close())
        if number % 8 == 0:
            assert outcome in ("400", "422")
        elif outcome == "left":
            assert want.startswith(text)
        else:
            assert (outcome, text) == ("done", want)
    assert {"done", "left", "400"} <= {outcome for outcome, _ in results}


class Asking:
    """A request for a stream of which a test reads what it likes, or which it breaks off."""

    def __init__(self, server, **options) -> None:
        body = json.dumps({"messages": HELLO, "max_tokens": 4000, "stream": True, **options})
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        address = httpx.URL(server.url)
        self.socket = socket.create_connection((address.host, address.port), timeout=20)
        self.socket.sendall((head + body).encode())
        self.received = ""

    def read(self, until: str | None = None) -> str:
        """All that came, until it holds this; otherwise to its end."""
        while until is None or until not in self.received:
            more = self.socket.recv(65536).decode()
            if not more:
                assert until is None, self.received
                self.leave()
                break
            self.received += more
        return self.received

    def leave(self) -> None:
        self.socket.close()


def test_the_queue_and_those_who_leave_it():
    engine = ScriptedEngine(lambda _: "word " * 2000, pause=0.002)
    with running(lambda: engine, slots=1, queue=1, context=None) as it:
        first, second = Asking(it), None
        first.read("word")
        second = Asking(it)
        it.wait_until(lambda: it.pool.waiting == 1)
        refused = post(it, {"messages": HELLO})
        assert refused.status_code == 429
        message = "all slots are taken and 1 requests wait for one already: try again later"
        assert refused.json()["error"] == {
            "message": message,
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
        assert int(refused.headers["retry-after"]) >= 1
        second.leave()
        it.wait_until(lambda: it.pool.waiting == 0)
        third = Asking(it)
        it.wait_until(lambda: it.pool.waiting == 1)
        assert "data" not in third.received
        first.leave()
        third.read("word")
        third.leave()
        it.wait_until_idle()
        # So does one that waits for the whole answer.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{it.url}/v1/chat/completions",
                json={"messages": HELLO, "max_tokens": 4000},
                timeout=0.3,
            )
        it.wait_until_idle()
        it.wait_until(lambda: not engine.busy)
        assert it.pool.cancelled == 4
        assert it.pool.refused == 1


# Beginnings and ends


def test_before_the_model_is_loaded():
    loaded = threading.Event()

    def load() -> ScriptedEngine:
        loaded.wait(20)
        return ScriptedEngine(str.upper)

    with running(load, ready=False) as it:
        health = httpx.get(f"{it.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        refused = post(it, {"messages": HELLO})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "starting")
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(it.url).status_code == 200
        loaded.set()
        it.wait_until(lambda: httpx.get(f"{it.url}/health").status_code == 200)
        answer = post(it, {"messages": HELLO}).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == ("HELLO", "stop")


def test_running_answers_finish_when_the_server_stops():
    engine = ScriptedEngine(lambda _: "word " * 50, pause=0.004)
    with running(lambda: engine, slots=1, queue=1) as it:
        running_one = Asking(it)
        running_one.read("word")
        waiting = Asking(it)
        it.wait_until(lambda: it.pool.waiting == 1)
        it.server.should_exit = True
        refused = waiting.read()
        assert refused.startswith("HTTP/1.1 503")
        assert '"code":"shutting_down"' in refused
        whole = running_one.read()
        assert re.sub(r'.*?"content": "(.*?)"|.', r"\1", whole, flags=re.DOTALL) == "word " * 50
        assert "data: [DONE]" in whole
        it.thread.join(5)
        with pytest.raises(ConnectionRefusedError):
            Asking(it)


def test_what_runs_at_the_deadline_is_told():
    engine = ScriptedEngine(lambda _: "word " * 5000, pause=0.004)
    with running(lambda: engine, context=None, shutdown_seconds=0.3) as it:
        late = Asking(it)
        late.read("word")
        begin = time.monotonic()
        it.stop()
        assert '"code": "shutting_down"' in late.read()
        assert time.monotonic() - begin < 3


def test_a_model_that_fails():
    def fail(asked: str) -> str:
        raise UserError("no room for more")

    with running(lambda: ScriptedEngine(fail)) as it:
        refused = post(it, {"messages": HELLO})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "failed")
        assert it.pool.failure.message == "no room for more"
        health = httpx.get(f"{it.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")


def test_a_model_that_cannot_be_loaded(monkeypatch):
    """The server ends and says why."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    pool = Pool([Impossible], slots=1, queue=1, context=481, in_process=False)
    app, said = create_app(pool, TOKENIZER, name="tiny"), []
    with pytest.raises(UserError, match="context 481, but the model has 480 positions"):
        serve(app, pool, listen("127.0.0.1", 0), shutdown_seconds=1, say=said.append)
    assert len(said) == 1
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+: loading the model; Ctrl-C .*", said[0])


class Impossible(ScriptedEngine):
    def __init__(self) -> None:
        super().__init__(str)
        self.context = 480


def test_a_replica_that_fails_while_another_lives(monkeypatch):
    """The log says so at once, and /stats as long as it is so."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    said, stats = [], []

    def fail_first() -> None:
        wait_until(lambda: len(said) == 2)

    def look_and_fail() -> None:
        wait_until(lambda: len(said) == 3)
        stats.append(httpx.get(f"{said[0].partition(': ')[0]}/stats").json())

    engines = [partial(FailingEngine, before) for before in (fail_first, look_and_fail)]
    pool = Pool(engines, slots=1, queue=1, context=400, in_process=False)
    app = create_app(pool, TOKENIZER, name="tiny")
    with pytest.raises(UserError, match="no room for more"):
        serve(app, pool, listen("127.0.0.1", 0), shutdown_seconds=1, say=said.append)
    assert said[1:] == [
        "ready: 2 x 1 answers at a time on cpu, cpu, 400 tokens each",
        "replica 0 is gone: no room for more; 1 left",
    ]
    assert [worker["state"] for worker in stats[0]["workers"]] == ["failed", "ready"]
    assert (stats[0]["available_workers"], stats[0]["slots"]) == (1, 1)


class FailingEngine(ScriptedEngine):
    """Ready, and then fails behind `before()`."""

    busy = True

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__(str)
        self.before = before

    def step(self):
        self.before()
        raise UserError("no room for more")


def test_a_worker_that_is_interrupted_and_one_that_is_killed(tmp_path):
    checkpoint = save_run(tmp_path / "sft-d1") / "checkpoints" / "step_000007"
    load = partial(load_engine, checkpoint, None, Placement(torch.device("cpu")))
    defaults = Defaults(max_tokens=390)
    with running(load, in_process=True, ready=False, defaults=defaults) as it:
        (worker,) = multiprocessing.active_children()
        # To the whole group, as Ctrl-C does, while the worker imports torch: for the server alone.
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
        it.wait_until(lambda: it.pool.state != "starting", seconds=60)
        assert it.pool.state == "ready"
        asking = Asking(it, max_tokens=None, stream=True, temperature=0)
        asking.read("data")
        worker.kill()
        assert '"code": "failed"' in asking.read()
        it.wait_until(lambda: it.pool.state == "failed")
        assert it.pool.failure.message == "its process has ended"
        assert post(it, {"messages": HELLO}).status_code == 503
