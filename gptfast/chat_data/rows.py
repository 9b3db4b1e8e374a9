"""Rows of T tokens out of conversations: as one stream, or packed so that none crosses a border.

Both are sequences of rows: `len`, and `fill`, which writes one row's inputs and targets.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np

from gptfast.chat_data.tokens import Tokens, ids_of

# Rows that are filled at a time. Best fit among them fills 99 % of the tokens of rows of 2,048 with
# conversations like SmolTalk's and GSM8K's; among all rows hardly more, but then conversations that
# are far apart in the mixture would be trained on together.
_OPEN_ROWS = 64


class StreamRows:
    """All conversations one after the other, cut every T tokens; every token but the last is a
    target. What mid-training reads."""

    documents_per_row = 0

    def __init__(self, tokens: Tokens, sequence_len: int) -> None:
        self.tokens, self.sequence_len = tokens, sequence_len
        self.identity = tokens.identity

    def __len__(self) -> int:
        return -(-(len(self.tokens.codes) - 1) // self.sequence_len)

    def fill(self, row: int, inputs: np.ndarray, targets: np.ndarray) -> list[int]:
        """inputs, targets: (T,) int32, filled with 0 and -1. Returns []: there are no documents."""
        begin = row * self.sequence_len
        ids = ids_of(self.tokens.codes[begin : begin + self.sequence_len + 1])
        inputs[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
        return []


class PackedRows:
    """Whole conversations, several in a row; only what the assistant says is a target.

    A conversation of n tokens takes n - 1: its last one predicts nothing. Those are left out that
    were cut before the assistant says anything.

    Args:
        pack: False: one conversation a row.
        epochs: how often all conversations come, in another order each time.

    Attributes:
        documents_per_row: the most of any row, what is left free of it counted as one.
        conversations, useful_tokens, supervised_tokens: of all rows; useful are those of
            conversations.
        left_out: conversations that leave nothing to learn.
        mean_context: over useful tokens, how many its conversation has.
    """

    def __init__(
        self, tokens: Tokens, sequence_len: int, *, pack: bool = True, epochs: int = 1
    ) -> None:
        self.tokens, self.sequence_len = tokens, sequence_len
        self.identity = f"{tokens.identity} {sequence_len} {pack} {epochs}"
        # A target is a token that is learned and is not the first of its conversation.
        learned = np.add.reduceat(tokens.codes >= 0, tokens.ends - tokens.lengths, dtype=np.int64)
        some = np.flatnonzero(learned > 0)
        self._lengths = lengths = tokens.lengths - 1
        self._rows: list[list[int]] = []
        for epoch in range(epochs):
            order = some if epoch == 0 else np.random.default_rng(epoch).permutation(some)
            packed = pack_rows(lengths[order], sequence_len if pack else 0)
            self._rows += [order[members].tolist() for members in packed]
        self.documents_per_row = 1 + max(map(len, self._rows), default=0)
        self.conversations = len(some) * epochs
        self.left_out = len(tokens) - len(some)
        self.useful_tokens = int(lengths[some].sum()) * epochs
        self.supervised_tokens = int(learned.sum()) * epochs
        squares = int((lengths[some].astype(np.float64) ** 2).sum()) * epochs
        self.mean_context = squares / max(1, self.useful_tokens)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fill_ratio(self) -> float:
        """Share of all places that conversations fill."""
        return self.useful_tokens / max(1, len(self) * self.sequence_len)

    def holding(self, conversations: int) -> int:
        """How many rows hold so many conversations on average; at least one."""
        return max(1, round(conversations * len(self) / max(1, self.conversations)))

    def lengths(self, row: int) -> list[int]:
        """Tokens that each of the row's conversations takes."""
        return self._lengths[self._rows[row]].tolist()

    def fill(self, row: int, inputs: np.ndarray, targets: np.ndarray) -> list[int]:
        """inputs, targets: (T,) int32, filled with 0 and -1. Returns the row's lengths."""
        at = 0
        for member in self._rows[row]:
            codes = self.tokens.conversation(member)
            end = at + len(codes) - 1
            inputs[at:end] = ids_of(codes[:-1])
            # ~id is negative, too.
            targets[at:end] = np.maximum(codes[1:], -1)
            at = end
        return self.lengths(row)


def pack_rows(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Indices of the lengths, a list for each row, of which each holds at most `capacity` in all.

    Best fit: each goes, in order, into the row that it leaves the least room in, among the last
    few that have any. A length beyond the capacity has a row of its own.
    """
    rows: list[list[int]] = []
    # (room, row), ascending.
    open_rows: list[tuple[int, int]] = []
    for index, length in enumerate(map(int, lengths)):
        at = bisect_left(open_rows, (length, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            if len(open_rows) == _OPEN_ROWS:
                del open_rows[0]
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            insort(open_rows, (room - length, row))
    return rows
