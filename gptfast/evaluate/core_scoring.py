"""What a model makes of CORE's items, one number for each sequence; every token computed once.

An item's sequences begin alike: its shots, its question. They become one row, what they share
first and their endings after it, and an ending attends to the shared part and to itself:

    shared tokens (causal) | ending 1 | ending 2 | ...

so that four answers to a question with ten shots cost little more than one. The last token of a
sequence predicts nothing and is not computed. Rows of about one length make a batch, and the head
sees the scored positions alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gptfast.evaluate.core_bundle import LANGUAGE_MODELING
from gptfast.evaluate.core_prompts import Item, common_prefix
from gptfast.evaluate.forward import BATCH_TOKENS, attention, groups, logits, trunk
from gptfast.model import GPT
from gptfast.transfer import upload

# Logits in memory at a time: 256 MiB in fp32.
_LOGITS = 1 << 26


@dataclass(frozen=True)
class _Sequence:
    """ids, of which those from `start` on are scored."""

    ids: np.ndarray
    start: int


@dataclass(frozen=True)
class _Row:
    """Sequences computed together; the first `shared` of their tokens once."""

    sequences: list[_Sequence]
    shared: int

    @property
    def size(self) -> tuple[int, int]:
        """Tokens that are shared, and those of the endings."""
        return self.shared, sum(len(s.ids) - 1 - self.shared for s in self.sequences)


@dataclass(frozen=True)
class _Batch:
    """B rows of P shared tokens and S tokens of endings, both padded on the right.

    ids, positions: (B, P + S). shared: P. mask: (B, 1, S, P + S), what endings attend to; None
    if S is 0. predictors, targets: (M,), of each scored token the flat index of the one before
    it, and itself. cells: (M,), its cell in a table with a row of `width` for each sequence.
    counts: (sequences,), scored tokens of each.
    """

    ids: Tensor
    positions: Tensor
    shared: int
    mask: Tensor | None
    predictors: Tensor
    targets: Tensor
    cells: Tensor
    width: int
    counts: Tensor


class Scorer:
    """Scores items with a plain (unsharded) model, on the device and in the dtype of its weights.

    Attributes:
        tokens: positions computed so far, padding included.
    """

    def __init__(
        self, model: GPT, *, batch_tokens: int = BATCH_TOKENS, one_at_a_time: bool = False
    ) -> None:
        """one_at_a_time: every sequence alone and whole, causal from its first token to its last:
        the slow way, to compare with."""
        self.model, self.batch_tokens, self.one_at_a_time = model, batch_tokens, one_at_a_time
        self._head = model.lm_head.weight.detach().float()
        self.tokens = 0

    @torch.no_grad()
    def scores(self, items: Sequence[Item], kind: str) -> list[np.ndarray]:
        """For each item, a float64 for each of its sequences.

        Language modelling: by how much the logit of the scored token leads all others, at the
        token where that is least; positive where greedy decoding would say them all. Other
        kinds: the mean loss of the scored tokens in nats, infinite if there are none (the text
        is the beginning of every other option's).
        """
        rows, places = self._rows(items)
        results: list[Tensor] = []
        numbers: list[tuple[int, int]] = []
        batch_tokens = 0 if self.one_at_a_time else self.batch_tokens
        for group in groups([row.size for row in rows], batch_tokens=batch_tokens):
            batch = _pack([rows[i] for i in group], self.model.cos.device)
            results.append(self._score(batch, kind))
            numbers += [(i, j) for i in group for j in range(len(rows[i].sequences))]
        # Nothing before this waits for the device.
        values = torch.cat(results).tolist() if results else []
        found = dict(zip(numbers, values))
        return [np.array([found[place] for place in each]) for each in places]

    def _rows(self, items: Sequence[Item]) -> tuple[list[_Row], list[list[tuple[int, int]]]]:
        """The rows of all items, and for each item where its sequences are: (row, place in it)."""
        rows: list[_Row] = []
        places = []
        for item in items:
            # Equal options are scored once, so that they tie exactly.
            distinct: dict[bytes, _Sequence] = {}
            for ids, start in zip(item.sequences, item.starts):
                distinct.setdefault(ids.tobytes(), _Sequence(ids, start))
            sequences = list(distinct.values())
            which = [list(distinct).index(ids.tobytes()) for ids in item.sequences]
            shared = common_prefix([s.ids[:-1] for s in sequences])
            longest = max(len(s.ids) - 1 for s in sequences) - shared
            if shared >= longest and not self.one_at_a_time:
                places.append([(len(rows), i) for i in which])
                rows.append(_Row(sequences, shared))
            else:
                places.append([(len(rows) + i, 0) for i in which])
                rows += [_Row([s], len(s.ids) - 1) for s in sequences]
        return rows, places

    def _score(self, batch: _Batch, kind: str) -> Tensor:
        """(sequences,) float64."""
        self.tokens += batch.ids.numel()
        residual, branch = self._trunk(batch)
        residual, branch = residual.flatten(0, 1), branch.flatten(0, 1)
        positions = max(1, _LOGITS // len(self._head))
        values = [
            self._token_values(residual[at], branch[at], targets, kind)
            for at, targets in zip(
                batch.predictors.split(positions), batch.targets.split(positions)
            )
        ]
        return _reduce(torch.cat(values), batch, kind)

    def _trunk(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Residual and branch after the last block, (B, P + S, C)."""
        model, ids = self.model, batch.ids
        if self.one_at_a_time:
            T = ids.shape[1]
            return trunk(model, ids, model.cos[:T], model.sin[:T], attention)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(*ids.shape, *x.shape[2:]) for x in (q, k, v))
            y = _attend(q, k, v, batch)
            return y.reshape(1, ids.numel(), *y.shape[2:])

        # One row of all tokens, each with the angles of its own position.
        cos, sin = (table[batch.positions.flatten()] for table in (model.cos, model.sin))
        ends = trunk(model, ids.view(1, -1), cos, sin, attend)
        residual, branch = (x.view(*ids.shape, -1) for x in ends)
        return residual, branch

    def _token_values(self, residual: Tensor, branch: Tensor, targets: Tensor, kind: str) -> Tensor:
        """(M,) fp32, for (M, C) of the trunk: each target's lead over all others, or its loss."""
        all_logits = logits(self.model, residual, branch, self._head)
        target = targets[:, None]
        chosen = all_logits.gather(1, target)[:, 0]
        if kind == LANGUAGE_MODELING:
            return chosen - all_logits.scatter(1, target, -torch.inf).amax(1)
        return all_logits.logsumexp(1) - chosen


def _pack(rows: Sequence[_Row], device: torch.device) -> _Batch:
    P, S = map(max, zip(*(row.size for row in rows)))
    ids, positions = np.zeros((2, len(rows), P + S), dtype=np.int64)
    positions[:, :P] = np.arange(P)
    # Whose the tokens of the endings are; padding belongs together, so that it sees something.
    owner = np.full((len(rows), S), -1)
    predictors, targets = [], []
    for b, row in enumerate(rows):
        ids[b, : row.shared] = row.sequences[0].ids[: row.shared]
        end = P
        for j, sequence in enumerate(row.sequences):
            ending = sequence.ids[row.shared : -1]
            begin, end = end, end + len(ending)
            ids[b, begin:end] = ending
            positions[b, begin:end] = np.arange(row.shared, row.shared + len(ending))
            owner[b, begin - P : end - P] = j
            before = np.arange(sequence.start, len(sequence.ids)) - 1
            column = np.where(before < row.shared, before, begin + before - row.shared)
            predictors.append(b * (P + S) + column)
            targets.append(sequence.ids[sequence.start :])
    mask = _mask(P, np.array([row.shared for row in rows]), owner)
    counts = [len(each) for each in targets]
    width = max(1, *counts)
    put = partial(upload, device=device)
    return _Batch(
        ids=put(ids),
        positions=put(positions),
        shared=P,
        mask=put(mask, dtype=torch.bool) if S else None,
        predictors=put(np.concatenate(predictors)),
        targets=put(np.concatenate(targets)),
        cells=put(np.concatenate([i * width + np.arange(n) for i, n in enumerate(counts)])),
        width=width,
        counts=put(np.array(counts)),
    )


def _mask(P: int, shared: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(B, 1, S, P + S) bool from shared (B,) and owner (B, S): an ending's token sees its row's
    shared tokens, and its own ending up to itself."""
    B, S = owner.shape
    seen = np.broadcast_to((np.arange(P) < shared[:, None])[:, None], (B, S, P))
    own = np.tril(owner[:, :, None] == owner[:, None, :])
    return np.concatenate((seen, own), axis=2)[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, batch: _Batch) -> Tensor:
    """q (B, P + S, H, D), k and v (B, P + S, Hkv, D) -> (B, P + S, H, D)."""
    P = batch.shared
    y = attention(q[:, :P], k[:, :P], v[:, :P])
    if batch.mask is None:
        return y
    return torch.cat((y, attention(q[:, P:], k, v, batch.mask)), dim=1)


def _reduce(values: Tensor, batch: _Batch, kind: str) -> Tensor:
    """Values of tokens (M,) -> of sequences, float64: the least, or the mean."""
    language = kind == LANGUAGE_MODELING
    # A table rather than atomic additions: the same bits every time.
    table = values.new_full(
        (len(batch.counts) * batch.width,), torch.inf if language else 0.0, dtype=torch.float64
    )
    table[batch.cells] = values.double()
    table = table.view(-1, batch.width)
    if language:
        return table.amin(1)
    return torch.where(batch.counts > 0, table.sum(1) / batch.counts, torch.inf)
