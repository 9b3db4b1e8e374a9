"""Many people at once before an OpenAI-compatible server: what it writes, and how soon it begins.

    python -m bench.serve_load http://127.0.0.1:8000 --streams 64 --seconds 20

Each of them asks, reads the answer as it streams, and asks again. Prompts differ; the length of an
answer is drawn from half to one and a half times --tokens, so that they do not end together. Tokens
are the server's own count (`usage`), spread evenly from an answer's first event to its last; those
inside the seconds that are measured count. The time to the first token is that from before
connecting to the first event, of every request that begins in those seconds.

Plain sockets and the standard library: the client must not be what is measured. The last line is
JSON.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import string
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Answer:
    """Times are seconds of the monotonic clock."""

    asked: float
    first: float = 0.0
    last: float = 0.0
    events: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    # What went wrong; empty once the server has told its count.
    error: str = "the answer broke off"

    def tokens_between(self, begin: float, end: float) -> float:
        overlap = min(end, self.last) - max(begin, self.first)
        return self.tokens * max(0.0, overlap) / max(1e-9, self.last - self.first)


def some_text(rng: random.Random, characters: int) -> str:
    """Letters and spaces."""
    return "".join(rng.choices(string.ascii_lowercase + "   ", k=characters))


@dataclass
class Load:
    url: str
    streams: int
    seconds: float
    prompt_characters: int
    tokens: int
    temperature: float
    top_k: int
    answers: list[Answer] = field(default_factory=list)

    async def person(self, number: int, end: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            self.answers.append(await self.ask(rng))
            if self.answers[-1].error:
                return

    async def ask(self, rng: random.Random) -> Answer:
        tokens = rng.randint(self.tokens // 2, self.tokens * 3 // 2)
        text = some_text(rng, self.prompt_characters)
        body = {
            "model": "any",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max(1, tokens),
            "temperature": self.temperature,
            "top_k": self.top_k,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = Answer(time.monotonic())
        host, port = urlsplit(self.url).hostname or "", urlsplit(self.url).port or 80
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(_post(host, json.dumps(body).encode()))
            await self._read(reader, answer)
        finally:
            writer.close()
        return answer

    async def _read(self, reader: asyncio.StreamReader, answer: Answer) -> None:
        status = (await reader.readline()).split()[1]
        async for line in reader:
            if status != b"200" and line.startswith(b"{"):
                answer.error = f"{status.decode()}: {line.decode()}"
            if not line.startswith(b"data: {"):
                continue
            answer.last = time.monotonic()
            answer.first = answer.first or answer.last
            answer.events += 1
            # Only the last event has it; the others are not worth the time.
            if b'"usage": {' in line or b'"usage":{' in line:
                usage = json.loads(line[6:])["usage"]
                answer.tokens = usage["completion_tokens"]
                answer.prompt_tokens = usage["prompt_tokens"]
                answer.error = ""


def _post(host: str, body: bytes) -> bytes:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def run(load: Load) -> dict:
    begin = time.monotonic()
    end = begin + load.seconds
    await asyncio.gather(*(load.person(number, end) for number in range(load.streams)))
    done = [answer for answer in load.answers if not answer.error]
    waits = [(answer.first - answer.asked) * 1e3 for answer in done if answer.asked < end]
    tokens = sum(answer.tokens_between(begin, end) for answer in done)
    return {
        "streams": load.streams,
        "seconds": load.seconds,
        "answers": len(done),
        "errors": [answer.error for answer in load.answers if answer.error],
        "tokens_per_s": tokens / load.seconds,
        "events_per_s": sum(answer.events for answer in done) / load.seconds,
        "prompt_tokens": statistics.fmean(answer.prompt_tokens for answer in done) if done else 0,
        "answer_tokens": statistics.fmean(answer.tokens for answer in done) if done else 0,
        "first_ms": {
            "p50": quantile(waits, 0.5),
            "p95": quantile(waits, 0.95),
            "most": max(waits, default=0.0),
        },
    }


def quantile(values: list[float], q: float) -> float:
    """The smallest value that at least this share do not exceed; 0 of none."""
    return sorted(values)[math.ceil(q * len(values)) - 1] if values else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    for name, default in (("streams", 64), ("seconds", 20.0), ("prompt-characters", 512)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    for name, default in (("tokens", 256), ("temperature", 0.8), ("top-k", 50)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    print(json.dumps(asyncio.run(run(Load(**vars(parser.parse_args()))))))


if __name__ == "__main__":
    main()
