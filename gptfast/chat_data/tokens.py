"""Conversations as tokens: rendered once, kept in the cache, read where they lie.

ids.bin     int32: the id of a token that the assistant learns to say, ~id of any other
ends.npy    int64: where each conversation ends in it
sha256      of both; what a run that is resumed knows its conversations by, wherever they lie
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gptfast.cache import build_once
from gptfast.chat_data.mixture import Mixture
from gptfast.conversation import Conversation, render
from gptfast.tokenizer import Tokenizer

# Part of the cache's name: raise it when what is written, or how conversations are rendered,
# changes.
_FORMAT = 2
# Conversations rendered at a time.
_CHUNK = 256
# One core renders 5,000 conversations a second (Python 3.11, tiktoken 0.14, 2026-11-22), and other
# processes, which have PyTorch to import, take several seconds to start.
_ALONE = 50_000


class Tokens(NamedTuple):
    """codes (N,) int32, id or ~id; ends (n,) int64: where each of n conversations ends.

    identity: tells these tokens from all others; the same wherever their conversations come from.
    """

    codes: np.ndarray
    ends: np.ndarray
    identity: str

    def __len__(self) -> int:
        """Conversations."""
        return len(self.ends)

    def conversation(self, index: int) -> np.ndarray:
        """(its tokens,) codes."""
        begin = self.ends[index - 1] if index else 0
        return self.codes[begin : self.ends[index]]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each conversation."""
        return np.diff(self.ends, prepend=0)


def ids_of(codes: np.ndarray) -> np.ndarray:
    return np.where(codes < 0, ~codes, codes)


def tokenise(
    mixture: Mixture,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    cache: Path,
    most: int | None = None,
    progress: bool = False,
) -> Tokens:
    """The mixture's conversations in order, each cut after max_tokens.

    Call it in one process a node, then in all: the others find it done.

    Args:
        most: stop after the conversation that reaches so many tokens.
        progress: show a bar on stderr.
    """
    parts = [_FORMAT, mixture.identity, tokenizer.fingerprint, max_tokens, most]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        _write(folder, mixture, tokenizer, max_tokens, most, progress)

    folder = build_once(cache.expanduser() / "chat_tokens" / key, build)
    codes = np.memmap(folder / "ids.bin", dtype=np.int32, mode="r")
    return Tokens(codes, np.load(folder / "ends.npy"), (folder / "sha256").read_text())


def _write(
    folder: Path,
    mixture: Mixture,
    tokenizer: Tokenizer,
    max_tokens: int,
    most: int | None,
    progress: bool,
) -> None:
    count, lengths, written = len(mixture.task), [], 0
    digest = hashlib.sha256()
    # None: where it would not be drawn over itself, there is none.
    bar = tqdm(total=count, desc="tokens", unit="conversation", disable=None if progress else True)
    chunks = (mixture.task[at : at + _CHUNK] for at in range(0, count, _CHUNK))
    with bar, (folder / "ids.bin").open("wb") as file:
        for codes, ends in _rendered(chunks, count, tokenizer, max_tokens):
            kept = len(ends)
            if most is not None:
                # Up to and including the conversation that reaches it.
                kept = min(kept, int(np.searchsorted(ends, most - written)) + 1)
            content = codes[: ends[kept - 1]].tobytes()
            file.write(content)
            digest.update(content)
            lengths.append(np.diff(ends[:kept], prepend=0))
            written += int(ends[kept - 1])
            bar.update(kept)
            if most is not None and written >= most:
                break
    all_ends = np.concatenate(lengths).cumsum()
    np.save(folder / "ends.npy", all_ends)
    digest.update(all_ends.tobytes())
    (folder / "sha256").write_text(digest.hexdigest())


def _rendered(
    chunks: Iterable[Iterable[Conversation]], count: int, tokenizer: Tokenizer, max_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(codes, ends) of each chunk in order; many of them on all cores."""
    if count < _ALONE:
        for chunk in chunks:
            yield _render_chunk(tokenizer, max_tokens, list(chunk))
        return
    workers = min(32, os.cpu_count() or 1)
    # Not forked from this process, which has threads and may have a GPU, but from one that imports
    # this module, and PyTorch with it, once: eight workers on two cores answered after 7.5 s rather
    # than 32.5, when each imports it (Python 3.11, 2026-11-23).
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, max_tokens)) as pool:
        waiting = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_render_in_worker, list(chunk)))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _render_chunk(
    tokenizer: Tokenizer, max_tokens: int, conversations: list[Conversation]
) -> tuple[np.ndarray, np.ndarray]:
    codes, lengths = [], []
    for conversation in conversations:
        ids, mask = render(tokenizer, conversation, max_tokens=max_tokens)
        codes.append(np.where(mask, ids, np.invert(ids)).astype(np.int32))
        lengths.append(len(ids))
    return np.concatenate(codes), np.cumsum(lengths)


# Set in worker processes, once: a tokenizer is too large to come with every chunk.
_worker: dict = {}


def _start_worker(tokenizer: Tokenizer, max_tokens: int) -> None:
    _worker.update(tokenizer=tokenizer, max_tokens=max_tokens)


def _render_in_worker(conversations: list[Conversation]) -> tuple[np.ndarray, np.ndarray]:
    return _render_chunk(_worker["tokenizer"], _worker["max_tokens"], conversations)
