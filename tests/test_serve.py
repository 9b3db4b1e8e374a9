"""The server over HTTP, with the engine on CPU: answers, what is refused, and who may ask."""

import contextlib
import itertools
import json
import re
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from gptfast.conversation import render_messages
from gptfast.engine import Engine
from gptfast.engine.speech import Piece, Speech, parts_of, text_of
from gptfast.errors import UserError
from gptfast.serve.app import Access, Defaults
from gptfast.serve.guard import check_address, is_loopback
from gptfast.serve.protocol import MAX_BODY_BYTES
from gptfast.serve.server import listen
from gptfast.serve.worker import SHORTEST_CONTEXT
from tests.engine_cases import tool_model
from tests.serve_cases import (
    HELLO,
    TOKENIZER,
    Running,
    ScriptedEngine,
    encode,
    expected,
    post,
    running,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    def make() -> Engine:
        return Engine(tool_model(), TOKENIZER)

    with running(make, defaults=Defaults(max_tokens=30)) as it:
        yield it


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# Answers


def test_the_openai_client_gets_what_the_engine_says(client):
    for seed in range(4):
        want = expected(HELLO, seed=seed)
        whole = client.chat.completions.create(model="x", messages=HELLO, seed=seed)
        choice, usage = whole.choices[0], whole.usage
        assert (choice.message.content, choice.message.role) == (want["content"], "assistant")
        assert getattr(choice.message, "parts", None) == want["parts"]
        assert choice.finish_reason == want["finish"]
        assert (usage.prompt_tokens, usage.completion_tokens) == (9, want["tokens"])
        assert usage.total_tokens == 9 + want["tokens"]
        assert whole.model == "tiny"
        chunks = list(
            client.chat.completions.create(
                model="x",
                messages=HELLO,
                seed=seed,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(delta.content or "" for delta in deltas) == want["content"]
        assert chunks[-2].choices[0].finish_reason == want["finish"]
        assert chunks[-1].usage == usage
        assert len({chunk.id for chunk in chunks}) == 1


def test_each_request_is_sampled_as_it_wants(client):
    for options in (
        {"temperature": 0},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.5},
        {"max_tokens": 3},
    ):
        want = expected(HELLO, seed=7, **options)
        extra = {"top_k": options.pop("top_k")} if "top_k" in options else {}
        got = client.chat.completions.create(
            model="x", messages=HELLO, seed=7, extra_body=extra, **options
        )
        assert got.choices[0].message.content == want["content"]
    drawn = {
        client.chat.completions.create(model="x", messages=HELLO).choices[0].message.content
        for _ in range(3)
    }
    assert len(drawn) > 1


def test_a_conversation_reaches_the_model_as_it_was_trained(server):
    parts = [{"type": "text", "text": "6*7="}, {"type": "python", "text": "6*7"}]
    parts += [{"type": "python_output", "text": "42"}, {"type": "text", "text": "42"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "6 times 7?"}]},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "sure?"},
    ]
    plain = [messages[0], {"role": "user", "content": "6 times 7?"}, *messages[2:]]
    got = post(server, {"messages": messages, "seed": 1}).json()
    assert got["choices"][0]["message"]["content"] == expected(plain, seed=1)["content"]
    assert got["usage"]["prompt_tokens"] == len(render_messages(TOKENIZER, plain))


def test_the_references_protocol(server):
    want = expected(HELLO, seed=3)
    response = post(server, {"messages": HELLO, "seed": 3}, "/chat/completions")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line]
    assert events[-1] == {"done": True}
    assert all(event["gpu"] == 0 for event in events[:-1])
    assert "".join(event["token"] for event in events[:-1]) == want["spelled"]


def test_an_answer_ends_where_the_context_does(server):
    body = {"messages": [{"role": "user", "content": "x" * 391}], "max_tokens": 100, "seed": 5}
    choice = post(server, body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    body["messages"][0]["content"] += "xxxxxxx"
    refused = post(server, body)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_the_shortest_context_holds_a_conversation():
    messages = [{"role": "user", "content": "?"}]
    assert len(render_messages(TOKENIZER, messages)) + 1 == SHORTEST_CONTEXT
    with running(lambda: Engine(tool_model(), TOKENIZER), context=SHORTEST_CONTEXT) as it:
        got = post(it, {"messages": messages}).json()
        assert got["usage"]["total_tokens"] in (SHORTEST_CONTEXT - 1, SHORTEST_CONTEXT)


def scripted(text: str, pieces: list[list[int]], stop=()) -> list[Piece]:
    speech = Speech(TOKENIZER, stop)
    return [piece for ids in pieces for piece in speech.feed(ids)] + speech.close()


def test_speech():
    text = "né <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>2 😀."
    ids = encode(text)
    want = [("text", "né "), ("python", "1+1"), ("python_output", "2"), ("text", "2 😀.")]
    assert Speech(TOKENIZER).feed(ids) == want
    one_by_one = scripted(text, [[id_] for id_ in ids])
    assert parts_of(one_by_one) == [{"type": a, "text": b} for a, b in want]
    assert text_of(one_by_one) == "né 2 😀."
    assert "\ufffd" not in "".join(piece.text for piece in one_by_one)
    assert parts_of([Piece("text", "a"), Piece("text", "b")]) is None
    cut = Speech(TOKENIZER)
    assert cut.feed("é".encode()[:1]) + cut.close() == [("text", "\ufffd")]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("stop", "told"),
    [
        ((), "one, two, three"),
        (("two",), "one, "),
        (("three", "two"), "one, "),
        (("threes",), "one, two, three"),
        (("o", "e"), ""),
        ((", t",), "one"),
        (("ee",), "one, two, thr"),
    ],
)
def test_stop_strings_end_an_answer_however_it_is_cut(stop, told, size):
    ids = list(b"one, two, three")
    speech = Speech(TOKENIZER, stop)
    pieces = []
    for i in range(0, len(ids), size):
        pieces += speech.feed(ids[i : i + size])
        assert told.startswith(text_of(pieces))
    assert text_of(pieces + speech.close()) == told
    assert speech.stopped == (told != "one, two, three")


def test_stop_strings_over_http(server):
    whole = expected(HELLO, seed=2, max_tokens=60)["content"]
    stop = whole[5:8]
    body = {"messages": HELLO, "seed": 2, "max_tokens": 60, "stop": ["never said", stop]}
    choice = post(server, body).json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    lines = post(server, body | {"stream": True}).text.split("\n\n")
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == whole[: whole.index(stop)]
    server.wait_until_idle()


# What is refused


def turns(count: int, size: int) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": "x" * size} for i in range(count)]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_json", None),
        (b"\xff\xfe", 400, "invalid_json", None),
        (b"", 422, "invalid_value", None),
        (b"[]", 422, "invalid_value", None),
        ({}, 422, "invalid_value", "messages"),
        ({"messages": []}, 422, "invalid_value", "messages"),
        ({"messages": "hello"}, 422, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, 422, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 422, None, "messages[0].role"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "empty_message", "messages[0]"),
        ({"messages": turns(2, 1)}, 400, "invalid_messages", "messages"),
        ({"messages": HELLO * 2}, 400, "invalid_messages", "messages"),
        ({"messages": turns(501, 1)}, 413, "too_large", "messages"),
        ({"messages": turns(1, 8001)}, 413, "too_large", "messages[0]"),
        ({"messages": turns(5, 6401)}, 413, "too_large", "messages"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "too_large", None),
        ({"messages": HELLO, "temperature": 2.1}, 422, "invalid_value", "temperature"),
        ({"messages": HELLO, "temperature": float("nan")}, 422, "invalid_value", "temperature"),
        ({"messages": HELLO, "temperature": "hot"}, 422, "invalid_value", "temperature"),
        ({"messages": HELLO, "top_k": 0}, 422, "invalid_value", "top_k"),
        ({"messages": HELLO, "top_k": 201}, 422, "invalid_value", "top_k"),
        ({"messages": HELLO, "top_p": 0}, 422, "invalid_value", "top_p"),
        ({"messages": HELLO, "max_tokens": 0}, 422, "invalid_value", "max_tokens"),
        ({"messages": HELLO, "max_tokens": 4097}, 422, "invalid_value", "max_tokens"),
        ({"messages": HELLO, "stop": [""]}, 400, "unsupported_value", "stop"),
        ({"messages": HELLO, "stop": ["a"] * 5}, 400, "unsupported_value", "stop"),
        ({"messages": HELLO, "n": 2}, 400, "unsupported_value", "n"),
        ({"messages": HELLO, "tools": [{}]}, 400, "unsupported_value", "tools"),
        *(
            ({"messages": HELLO, name: value}, 400, "unsupported_value", name)
            for name, value in (
                ("tool_choice", "required"),
                ("tool_choice", {"type": "function", "function": {"name": "f"}}),
                ("function_call", {"name": "f"}),
                ("logit_bias", {"50256": -100}),
                ("presence_penalty", 0.5),
                ("frequency_penalty", -2),
                ("modalities", ["text", "audio"]),
                ("audio", {"voice": "alloy", "format": "wav"}),
            )
        ),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes | dict) else "",
)
def test_what_cannot_be_answered_is_told(server, body, status, code, param):
    for path in ("/v1/chat/completions", "/chat/completions"):
        response = post(server, body, path)
        error = response.json()["error"]
        assert response.status_code == status, error
        assert error["code"] == (code or "invalid_value")
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert error["message"]
    assert server.pool.running == 0


def test_what_is_usual_elsewhere_is_ignored(server):
    body = {"messages": HELLO, "model": "gpt", "user": "me", "n": 1, "presence_penalty": 0}
    body |= {"max_tokens": None, "temperature": None, "stop": None, "stream": None, "seed": 4}
    body |= {"frequency_penalty": 0.0, "logit_bias": {}, "tool_choice": "auto", "logprobs": False}
    body |= {"function_call": "none", "modalities": ["text"], "audio": None, "tools": []}
    got = post(server, body | {"response_format": {"type": "text"}, "max_completion_tokens": 5})
    assert got.status_code == 200
    assert got.json()["usage"]["completion_tokens"] <= 5


def test_paths_methods_and_media_types(server):
    for response, status in (
        (httpx.get(f"{server.url}/nothing"), 404),
        (httpx.get(f"{server.url}/chat/completions"), 405),
        (httpx.get(f"{server.url}/v1/models/other"), 404),
        (httpx.get(f"{server.url}/docs"), 404),
        (post(server, {"messages": HELLO}, headers={"Content-Type": "text/plain"}), 415),
        (httpx.post(f"{server.url}/chat/completions"), 415),
        (httpx.get(f"{server.url}/health", headers={"Host": "evil.example:80"}), 403),
        (httpx.get(f"{server.url}/health", headers={"Host": "127.0.0.1.evil.example"}), 403),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        response = httpx.get(f"{server.url}/health", headers={"Host": host})
        assert response.status_code == 200
        assert "access-control-allow-origin" not in response.headers


def test_an_endless_body_is_not_read_to_its_end(server):
    pieces = itertools.repeat(b" " * 65536, 10_000)
    headers = {"Content-Type": "application/json"}
    with contextlib.suppress(httpx.TransportError):
        answer = httpx.post(f"{server.url}/chat/completions", content=pieces, headers=headers)
        assert answer.status_code == 413
    assert next(pieces)


def test_health_stats_and_models(server, client):
    server.wait_until_idle()
    health = httpx.get(f"{server.url}/health").json()
    assert health == {
        "status": "ok",
        "ready": True,
        "num_gpus": 1,
        "available_workers": 1,
        "model": "tiny",
        "defaults": {"temperature": 0.8, "top_k": 50, "max_tokens": 30},
    }
    before = httpx.get(f"{server.url}/stats").json()
    post(server, {"messages": HELLO, "max_tokens": 4, "seed": 0})
    after = httpx.get(f"{server.url}/stats").json()
    assert after["answered"] == before["answered"] + 1
    assert after["tokens"] - before["tokens"] == expected(HELLO, max_tokens=4)["tokens"]
    assert after["workers"] == [{"gpu_id": 0, "state": "ready", "device": "cpu", "running": 0}]
    assert (after["slots"], after["running"], after["waiting"]) == (8, 0, 0)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_the_page_and_its_policy(server):
    page = httpx.get(server.url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "unsafe" not in policy
    # Nothing is loaded, and no handler or style is an attribute, as the policy would not run it.
    html, script = re.fullmatch(r"(.*?)<script>(.*)", page.text, re.DOTALL).groups()
    assert not re.search(r"\s(src|style|on\w+)=", html)
    assert re.findall(r"https?:[^'\"]*", html) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|write\(|eval\(", script)


# Who may


def test_where_a_server_may_listen():
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1", "[::1]"):
        assert is_loopback(host)
        check_address(host, None, insecure_public=False)
    for host in ("0.0.0.0", "::", "192.168.0.9", "example.com", ""):
        assert not is_loopback(host)
        with pytest.raises(UserError, match="GPTFAST_TOKEN"):
            check_address(host, None, insecure_public=False)
        check_address(host, "secret", insecure_public=False)
        check_address(host, None, insecure_public=True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_token_and_origins():
    access = Access(token="sécret", local_only=False, origins=("https://a.example",))
    with running(lambda: ScriptedEngine(str.upper), access=access) as it:
        for path in ("/", "/health"):
            assert httpx.get(it.url + path, headers={"Host": "b.example"}).status_code == 200
        for token in (None, "secre", "secret", "secrets", "sécret"):
            headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
            headers["Content-Type"] = "application/json"
            ok = token == "sécret"
            response = post(it, {"messages": HELLO}, headers=headers)
            assert response.status_code == (200 if ok else 401)
            assert httpx.get(f"{it.url}/stats", headers=headers).status_code == (200 if ok else 401)
            if not ok:
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["type"] == "authentication_error"
        asked = {"Access-Control-Request-Method": "POST", "Origin": "https://a.example"}
        # As OpenAI's client in JavaScript does.
        wanted = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
        asked["Access-Control-Request-Headers"] = wanted
        allowed = httpx.options(f"{it.url}/v1/chat/completions", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert allowed.headers["access-control-allow-headers"] == wanted
        refused = httpx.options(
            f"{it.url}/v1/chat/completions", headers=asked | {"Origin": "https://b.example"}
        )
        assert "access-control-allow-origin" not in refused.headers
