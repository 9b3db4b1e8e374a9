"""The loop of generation: sequences enter slots, take a token a step, and leave.

A generation holds a number of slots, the rows of a KVCache. Sequences wait, are admitted into free
slots (a prefill, from which their first token is sampled), take part in one decoding step after
the other, each at a position of its own, and free their slot when they end, while others go on.
They may be added and cancelled at any time between two steps.

The GPU never waits for the host: a step's tokens stay on the device as the next one's input, and
are read when that one is on its way already. If they turn out to have ended the sequence, or called
the tool, then the one token sampled since is ignored; it was not fed to the model yet.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.engine.cached_model import CachedGPT
from gptfast.engine.kv_cache import KVCache
from gptfast.engine.sampling import Sampling, sample
from gptfast.engine.tool_use import Tool, ToolUse
from gptfast.tokenizer import Tokenizer
from gptfast.transfer import Download, upload

# While a prefill runs nobody else gets a token, and it launches as many kernels for one sequence
# as for several. So, where there are others, waiting sequences are admitted once there are slots
# for all of them, or this share of the slots is free.
REFILL_SHARE = 1 / 8
# The length of a prefill is a multiple of this, so that Triton compiles no kernel for odd ones.
PREFILL_MULTIPLE = 16


@dataclass(frozen=True)
class Request:
    """What is wanted: `prompt` continued by at most max_tokens, the tool's included. A token of
    `stop` ends it. What is drawn depends on the seed, and on no other request."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: frozenset[int]
    tool: Tool | None = None


class Token(NamedTuple):
    """One more token of a sequence; not `sampled` if the tool forced it."""

    sequence: int
    id: int
    sampled: bool


class Row:
    """One sequence: what the host knows of it, and how much of it was fed to the model."""

    def __init__(self, index: int, request: Request, tool: ToolUse | None) -> None:
        self.index, self.prompt, self.tool = index, request.prompt, tool
        self.sampling, self.stop = request.sampling, request.stop
        self.end = len(request.prompt) + request.max_tokens
        self.ids = list(request.prompt)
        self.fed = 0
        self.slot = -1
        self.done = False
        self._random = random.Random(request.seed)
        self._uniforms: list[float] = []

    @property
    def wants_step(self) -> bool:
        """Whether there is another token to find out: the last one need not be fed."""
        return not self.done and self.fed < self.end - 1

    @property
    def stopped(self) -> bool:
        """Whether it ended with a stop token, and not for its length."""
        return self.done and len(self.ids) > len(self.prompt) and self.ids[-1] in self.stop

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

    def accept(self, position: int, token: int) -> list[Token]:
        """Take the token sampled for a position; returns what became known by it: nothing, if the
        sequence has ended or that position is known already."""
        if self.done or position != len(self.ids):
            return []
        self.ids.append(token)
        forced = []
        if token in self.stop:
            self.done = True
        elif self.tool is not None:
            forced = self.tool.after(token)[: self.end - len(self.ids)]
        self.ids += forced
        self.done |= len(self.ids) == self.end
        return [Token(self.index, token, True), *(Token(self.index, id_, False) for id_ in forced)]


class Launch(NamedTuple):
    """Tokens on their way to the host: the i-th is for positions[i] of rows[i]."""

    rows: Sequence[Row | None]
    positions: list[int]
    tokens: Download


class Workspace(NamedTuple):
    """A cache and what decodes with it, which outlive a generation."""

    model: CachedGPT
    cache: KVCache
    # (rows, ids) -> (residual, branch), as CachedGPT.prefill from the first position on.
    prefill: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    # (fed, sampled, length) -> (logits, likeliest tokens), as CachedGPT.step.
    decode: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    # Has prefills captured that are likely to come.
    capture: Callable[[], None]
    # `length` is a multiple of this.
    read_chunk: int
    # Whether every step is of all rows, as each number of them is a compilation.
    all_rows: bool


class Generation:
    """Sequences through the first `slots` rows of the workspace.

    Args:
        lag: how many launches are on their way when the host reads the first of them: 1 for a GPU
            that is never to wait, or 0. No more, as only the last token sampled is at hand.
        patience: how many steps are made between two prefills, while there are sequences to make
            them for. More: more tokens a second for those who have a slot, and a later first one
            for those who come.
        prefill_tokens: the most of them at once.
    """

    def __init__(
        self,
        workspace: Workspace,
        tokenizer: Tokenizer,
        *,
        slots: int,
        lag: int,
        patience: int,
        prefill_tokens: int,
    ) -> None:
        self.workspace, self.tokenizer = workspace, tokenizer
        self.model, self.cache = workspace.model, workspace.cache
        self.device = self.model.device
        self.lag, self.patience, self.prefill_tokens = lag, patience, prefill_tokens
        self.waiting: deque[Row] = deque()
        self.slots: list[Row | None] = [None] * slots
        # The last sampled token of every slot.
        self.sampled = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._launched: deque[Launch] = deque()
        self._steps_since_prefill = 0

    def add(self, index: int, request: Request) -> Row:
        """Let a sequence wait for a slot. Its tokens will have `sequence` = index."""
        tool = None if request.tool is None else ToolUse(self.tokenizer, request.tool)
        row = Row(index, request, tool)
        if row.end > self.cache.length:
            raise ValueError(f"{row.end} positions, but the cache holds {self.cache.length}")
        self.waiting.append(row)
        return row

    def cancel(self, row: Row) -> None:
        """No more tokens of this sequence; its slot is free."""
        row.done = True
        if row.slot < 0:
            self.waiting.remove(row)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.waiting or self._launched or self._stepping)

    def step(self) -> list[Token]:
        """Launch what comes next, a prefill or a token of every row; returns the tokens that became
        known meanwhile, maybe none."""
        launch = self._admit() or self._step()
        if launch is not None:
            self._launched.append(launch)
        if self._launched and (launch is None or len(self._launched) > self.lag):
            return self._accept(self._launched.popleft())
        return []

    def warm_up(self) -> None:
        """Have everything compiled and captured that a step may need, so that none waits for it.
        Between sequences only, as it writes to all slots."""
        zeros = torch.zeros_like(self.sampled)
        chunk = self.workspace.read_chunk
        self.workspace.capture()
        if self.workspace.all_rows:
            for length in range(chunk, self.cache.length + 1, chunk):
                self.workspace.decode(torch.stack((zeros, zeros)), zeros, length)
        for count, sampling in ((1, Sampling(0)), (len(self.slots), Sampling(1.0, top_k=50))):
            for index in range(count):
                self.add(index, Request([index % 256], 2, sampling, seed=0, stop=frozenset()))
            while self.busy:
                self.step()

    @property
    def _stepping(self) -> bool:
        return any(row is not None and row.wants_step for row in self.slots)

    def _admit(self) -> Launch | None:
        """Prefill waiting rows, if it is time to."""
        if not self.waiting:
            return None
        free = [slot for slot, row in enumerate(self.slots) if row is None or row.done]
        enough = min(len(self.waiting), max(1, int(REFILL_SHARE * len(self.slots))))
        if self._stepping:
            if len(free) < enough or self._steps_since_prefill < self.patience:
                return None
        elif not free:
            return None
        self._steps_since_prefill = 0
        rows = [self.waiting.popleft() for _ in free[: len(self.waiting)]]
        by_prompt: dict[tuple[int, ...], list[Row]] = {}
        for slot, row in zip(free, rows):
            row.slot, row.fed, self.slots[slot] = slot, len(row.prompt), row
            by_prompt.setdefault(tuple(row.prompt), []).append(row)
        logits = self._prefill(by_prompt)
        positions = [row.fed for row in rows]
        sampled = self._sample(torch.stack([logits[row.slot] for row in rows]), rows, positions)
        self.sampled = self.sampled.index_copy(0, self._upload([row.slot for row in rows]), sampled)
        return Launch(rows, positions, Download(sampled))

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
        padded = min(longest + -longest % PREFILL_MULTIPLE, self.cache.length, self.model.context)
        ids = self._upload([[*prompt, *[0] * (padded - len(prompt))] for prompt in prompts])
        rows = self._upload(slots)
        start, ends = 0, self.workspace.prefill(rows, ids[:, :chunk])
        for start in range(chunk, longest, chunk):
            ends = self.model.prefill(self.cache, rows, ids[:, start : start + chunk], start=start)
        at = self._upload([len(prompt) - 1 - start for prompt in prompts])
        everyone = torch.arange(len(prompts), device=at.device)
        return self.model.head(*(x[everyone, at] for x in ends))

    def _step(self) -> Launch | None:
        """One token of every row that wants another."""
        rows = [row if row is not None and row.wants_step else None for row in self.slots]
        if not any(rows):
            return None
        if not self.workspace.all_rows:
            while rows[-1] is None:
                rows.pop()
        # An idle slot writes over its own beginning, which nobody reads again.
        fed = [(0, 0) if row is None else row.feed() for row in rows]
        length = 1 + max(position for _, position in fed)
        length += -length % self.workspace.read_chunk
        behind = [position + 1 for _, position in fed]
        every = len(rows) == len(self.slots)
        logits, sampled = self.workspace.decode(
            self._upload(list(zip(*fed))),
            self.sampled if every else self.sampled[: len(rows)],
            length,
        )
        if not all(row is None or row.sampling.greedy for row in rows):
            sampled = self._sample(logits, rows, behind)
        self.sampled = sampled if every else torch.cat((sampled, self.sampled[len(rows) :]))
        self._steps_since_prefill += 1
        return Launch(rows, behind, Download(sampled))

    def _sample(self, logits: Tensor, rows: Sequence[Row | None], positions: list[int]) -> Tensor:
        samplings = [_NOTHING if row is None else row.sampling for row in rows]
        uniforms = [
            0.0 if row is None or row.sampling.greedy else row.uniform(position)
            for row, position in zip(rows, positions)
        ]
        return sample(logits, samplings, uniforms)

    def _accept(self, launch: Launch) -> list[Token]:
        return [
            known
            for row, position, token in zip(launch.rows, launch.positions, launch.tokens.read())
            if row is not None
            for known in row.accept(position, token)
        ]

    def _upload(self, values: list) -> Tensor:
        return upload(values, self.device)


# For a slot without a row: what costs the least.
_NOTHING = Sampling(temperature=0)
