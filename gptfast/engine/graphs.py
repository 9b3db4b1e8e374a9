"""Decoding steps and prefills of one cache as CUDA graphs, launched whole and not kernel by kernel.

d20's prefill launches hundreds of kernels, and of short prompts it is the host that one waits for:
the first token comes after 21 ms of one prompt of 128 tokens, after 24 of 64 such (H200,
2026-11-22). Graphs have fixed shapes, so a prefill is padded to the next that was captured; a
server's are, before it answers anybody.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast.engine.cached_model import CachedGPT
from gptfast.engine.kv_cache import KVCache

# One compilation a number of rows; torch would refuse the ninth.
_RECOMPILE_LIMIT = 64
# Prompts, and tokens of each, of the prefills that are captured; no more than so many tokens
# together. With twice as many the GPU already takes longer than the host (above).
PREFILL_ROWS = (1, 2, 4, 8)
PREFILL_LENGTHS = (*range(64, 513, 64), *range(640, 1025, 128))
MOST_PREFILL_TOKENS = 4096


class Captured(NamedTuple):
    """A call that can be repeated: `replay` overwrites `results`."""

    replay: Callable[[], None]
    results: tuple[Tensor, Tensor]


def capture(step: Callable[[], tuple[Tensor, Tensor]], pool: Any) -> Captured:
    """A CUDA graph of `step`, on the current device. What runs before the capture computes, and
    writes, the same."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with (
        torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT),
        torch.cuda.stream(side),
    ):
        for _ in range(2):
            step()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as a loader's, may go on using the GPU.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = step()
    return Captured(graph.replay, results)


class GraphedDecode:
    """`CachedGPT.step` over one cache as CUDA graphs, one for each number of rows and length.

    The result is overwritten by the next call. A graph is captured when it is first needed.
    """

    def __init__(self, model: CachedGPT, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._fed = torch.zeros(2, cache.rows, dtype=torch.int64, device=model.device)
        self._sampled = torch.zeros_like(self._fed[0])
        self._graphs: dict[tuple[int, int], Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, fed: Tensor, sampled: Tensor, length: int) -> tuple[Tensor, Tensor]:
        rows = len(sampled)
        self._fed[:, :rows], self._sampled[:rows] = fed, sampled
        if (rows, length) not in self._graphs:
            inputs = (self.cache, self._fed[:, :rows], self._sampled[:rows], length)
            with torch.cuda.device(self.model.device):
                self._graphs[rows, length] = capture(partial(self.model.step, *inputs), self._pool)
        replay, results = self._graphs[rows, length]
        replay()
        return results


class GraphedPrefill:
    """`CachedGPT.prefill` from the first position on, over one cache; by CUDA graphs for the shapes
    that `capture` has prepared, as it is for larger ones.

    The result is overwritten by the next call.
    """

    def __init__(
        self,
        model: CachedGPT,
        cache: KVCache,
        *,
        capture: Callable[[Callable[[], tuple[Tensor, Tensor]], Any], Captured] = capture,
    ) -> None:
        self.model, self.cache, self._capture = model, cache, capture
        self._rows = torch.zeros(PREFILL_ROWS[-1], dtype=torch.int64, device=model.device)
        self._ids = self._rows.new_zeros(PREFILL_ROWS[-1], PREFILL_LENGTHS[-1])
        # In order of their size.
        self._graphs: dict[tuple[int, int], Captured] = {}

    def capture(self) -> None:
        """Prepare the prefills of a few short prompts. Between sequences only, as it writes to the
        cache's first row."""
        pool = torch.cuda.graph_pool_handle() if self.model.device.type == "cuda" else None
        longest = min(self.cache.length, self.model.context)
        for rows in (n for n in PREFILL_ROWS if n <= self.cache.rows):
            for length in (n for n in PREFILL_LENGTHS if n <= longest):
                if rows * length <= MOST_PREFILL_TOKENS:
                    inputs = (self.cache, self._rows[:rows], self._ids[:rows, :length])
                    with torch.cuda.device_of(self._ids):
                        self._graphs[rows, length] = self._capture(
                            partial(self.model.prefill, *inputs), pool
                        )

    def __call__(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `CachedGPT.prefill` of ids (B, T) into the cache's `rows` (B,); what is behind T in
        those rows is overwritten."""
        B, T = ids.shape
        fitting = (size for size in self._graphs if size[0] >= B and size[1] >= T)
        size = min(fitting, key=lambda size: size[0] * size[1], default=None)
        if size is None:
            return self.model.prefill(self.cache, rows, ids)
        self._ids[:B, :T], self._rows[:B] = ids, rows
        # Missing rows are the last one again, so that all write the same to it.
        self._ids[B : size[0]], self._rows[B : size[0]] = self._ids[B - 1], rows[-1]
        replay, (residual, branch) = self._graphs[size]
        replay()
        return residual[:B], branch[:B]
