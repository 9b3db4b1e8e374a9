"""The loop of generation: sequences enter slots, take a token a step, and leave.

A generation holds a number of slots, the rows of a KVCache. Sequences wait, are admitted into free
slots (a prefill, from which their first token is sampled), take part in one decoding step after
the other, each at a position of its own, and free their slot when they end, while others go on.

The GPU never waits for the host: a step's tokens stay on the device as the next one's input, and
are read when that one is on its way already. If they turn out to have ended the sequence, or called
the tool, then the one token sampled since is ignored; it was not fed to the model yet.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.cached_model import CachedGPT
from gptfast.kv_cache import KVCache
from gptfast.sampling import Sampling, sample
from gptfast.tool_use import ToolUse

# Waiting sequences are admitted once this share of the slots is free: while a prefill runs, nobody
# else gets a token, and it launches as many kernels for one sequence as for several.
REFILL_SHARE = 1 / 8


class Token(NamedTuple):
    """One more token of a sequence; not `sampled` if the tool forced it."""

    sequence: int
    id: int
    sampled: bool


class Row:
    """One sequence: what the host knows of it, and how much of it was fed to the model."""

    def __init__(
        self, index: int, prompt: Sequence[int], max_tokens: int, seed: int, tool: ToolUse | None
    ) -> None:
        self.index, self.prompt, self.tool = index, prompt, tool
        self.end = len(prompt) + max_tokens
        self.ids = list(prompt)
        self.fed = 0
        self.slot = -1
        self.done = False
        self._random = random.Random(seed)
        self._uniforms: list[float] = []

    @property
    def wants_step(self) -> bool:
        """Whether there is another token to find out: the last one need not be fed."""
        return not self.done and self.fed < self.end - 1

    def feed(self) -> tuple[int, int]:
        """(token, position) of the next step; the token is -1 if it is not known here yet: the one
        that was sampled last."""
        position = self.fed
        self.fed += 1
        return (self.ids[position] if position < len(self.ids) else -1), position

    def uniform(self, position: int) -> float:
        """The random number, in [0, 1), that draws the token of a position behind the prompt."""
        index = position - len(self.prompt)
        while len(self._uniforms) <= index:
            self._uniforms.append(self._random.random())
        return self._uniforms[index]

    def accept(self, position: int, token: int, stop: frozenset[int]) -> list[Token]:
        """Take the token sampled for a position; returns what became known by it: nothing, if the
        sequence has ended or that position is known already."""
        if self.done or position != len(self.ids):
            return []
        self.ids.append(token)
        forced = []
        if token in stop:
            self.done = True
        elif self.tool is not None:
            forced = self.tool.after(token)[: self.end - len(self.ids)]
        self.ids += forced
        self.done |= len(self.ids) == self.end
        return [Token(self.index, token, True), *(Token(self.index, id_, False) for id_ in forced)]


class Launch(NamedTuple):
    """Tokens on their way to the host: tokens[i] is for positions[i] of rows[i]."""

    rows: list[Row | None]
    positions: list[int]
    tokens: Tensor
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, rows: list[Row | None], positions: list[int], tokens: Tensor) -> "Launch":
        if not tokens.is_cuda:
            return cls(rows, positions, tokens, None)
        # Into pinned memory, as it is not waited for.
        on_host = tokens.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(tokens.device))
        return cls(rows, positions, on_host, ready)

    def read(self) -> list[int]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.tokens.tolist()


class Workspace(NamedTuple):
    """A cache and what decodes with it, which outlive a generation."""

    model: CachedGPT
    cache: KVCache
    # (ids, positions, length) -> logits, as CachedGPT.decode.
    decode: Callable[[Tensor, Tensor, int], Tensor]
    # `length` is a multiple of this.
    read_chunk: int


class Generation:
    """Run it once, over the first `slots` rows of the workspace.

    Args:
        lag: how many launches are on their way when the host reads the first of them: 1 for a GPU
            that is never to wait, or 0. No more, as only the last token sampled is at hand.
        prefill_tokens: the most of them at once.
    """

    def __init__(
        self,
        workspace: Workspace,
        waiting: Iterable[Row],
        *,
        slots: int,
        sampling: Sampling,
        stop: frozenset[int],
        lag: int,
        prefill_tokens: int,
    ) -> None:
        self.model, self.cache, self.decode, self.read_chunk = workspace
        self.sampling, self.stop = sampling, stop
        self.lag, self.prefill_tokens = lag, prefill_tokens
        self.waiting = deque(waiting)
        self.slots: list[Row | None] = [None] * slots
        # The last sampled token of every slot.
        self.sampled = torch.zeros(slots, dtype=torch.int64, device=self.model.device)

    def run(self) -> Iterator[list[Token]]:
        launched: deque[Launch] = deque()
        while True:
            launch = self._admit() or self._step()
            if launch is not None:
                launched.append(launch)
            elif not launched:
                return
            if launch is None or len(launched) > self.lag:
                yield self._accept(launched.popleft())

    def _admit(self) -> Launch | None:
        """Prefill waiting rows if enough slots are free for them."""
        if not self.waiting:
            return None
        free = [slot for slot, row in enumerate(self.slots) if row is None or row.done]
        if len(free) < min(len(self.waiting), max(1, int(REFILL_SHARE * len(self.slots)))):
            return None
        rows = [self.waiting.popleft() for _ in free[: len(self.waiting)]]
        by_prompt: dict[tuple[int, ...], list[Row]] = {}
        for slot, row in zip(free, rows):
            row.slot, row.fed, self.slots[slot] = slot, len(row.prompt), row
            by_prompt.setdefault(tuple(row.prompt), []).append(row)
        logits = self._prefill(by_prompt)
        positions = [row.fed for row in rows]
        sampled = self._sample(torch.stack([logits[row.slot] for row in rows]), rows, positions)
        self.sampled = self.sampled.index_copy(0, self._upload([row.slot for row in rows]), sampled)
        return Launch.of(rows, positions, sampled)

    def _prefill(self, by_prompt: dict[tuple[int, ...], list[Row]]) -> dict[int, Tensor]:
        """Every prompt once, its rows given copies; the logits behind it (V,), by row's slot."""
        logits = {}
        prompts = sorted(by_prompt, key=len, reverse=True)
        while prompts:
            group = prompts[: max(1, self.prefill_tokens // len(prompts[0]))]
            prompts = prompts[len(group) :]
            last = self._prefill_group(group, [by_prompt[prompt][0].slot for prompt in group])
            for prompt, prompt_logits in zip(group, last):
                first, *others = (row.slot for row in by_prompt[prompt])
                if others:
                    self.cache.copy(first, self._upload(others), len(prompt))
                logits.update(dict.fromkeys((first, *others), prompt_logits))
        return logits

    @torch.no_grad()
    def _prefill_group(self, prompts: list[tuple[int, ...]], slots: list[int]) -> Tensor:
        """The prompts, longest first, padded on the right; logits behind each, (B, V). A single
        one may be longer than a prefill and takes several chunks."""
        longest, chunk = len(prompts[0]), self.prefill_tokens
        ids = self._upload([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        rows = self._upload(slots)
        for start in range(0, longest, chunk):
            ends = self.model.prefill(self.cache, rows, ids[:, start : start + chunk], start=start)
        at = self._upload([len(prompt) - 1 - start for prompt in prompts])
        everyone = torch.arange(len(prompts), device=at.device)
        return self.model.head(*(x[everyone, at] for x in ends))

    def _step(self) -> Launch | None:
        """One token of every row that wants another."""
        rows = [row if row is not None and row.wants_step else None for row in self.slots]
        if not any(rows):
            return None
        # An idle slot writes over its own beginning, which nobody reads again.
        fed = [(0, 0) if row is None else row.feed() for row in rows]
        known, positions = self._upload([list(column) for column in zip(*fed)])
        ids = torch.where(known < 0, self.sampled, known)
        length = 1 + max(position for _, position in fed)
        length += -length % self.read_chunk
        behind = [position + 1 for _, position in fed]
        logits = self.decode(ids, positions, length)
        self.sampled = self._sample(logits, rows, behind)
        return Launch.of(rows, behind, self.sampled)

    def _sample(self, logits: Tensor, rows: list[Row | None], positions: list[int]) -> Tensor:
        if self.sampling.greedy:
            return sample(logits, self.sampling)
        uniforms = [
            0.0 if row is None else row.uniform(position) for row, position in zip(rows, positions)
        ]
        return sample(logits, self.sampling, self._upload(uniforms, torch.float64))

    def _accept(self, launch: Launch) -> list[Token]:
        return [
            known
            for row, position, token in zip(launch.rows, launch.positions, launch.read())
            if row is not None
            for known in row.accept(position, token, self.stop)
        ]

    def _upload(self, values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        """To the device, without waiting for it."""
        device = self.model.device
        tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
        return tensor.to(device, non_blocking=True)
