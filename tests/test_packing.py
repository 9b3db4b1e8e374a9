"""From conversations to batches: tokens in the cache, rows, which rank takes what."""

import json
import os
import shutil
from concurrent.futures import Future
from itertools import pairwise
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfast.attention import Documents
from gptfast.chat_data import PackedRows, RowLoader, StreamRows, open_mixtures, tokenise, tokens
from gptfast.chat_data.mixture import Mixture
from gptfast.chat_data.rows import ids_of, pack_rows
from gptfast.config_chat import MixtureSettings
from gptfast.conversation import render
from gptfast.errors import UserError
from gptfast.tasks import Conversations
from gptfast.tokenizer import Tokenizer
from tests.mixture_cases import write_conversations

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
T = 32


def mixture_of(path: Path) -> Mixture:
    return Mixture(Conversations([path]), str(path))


@pytest.fixture
def conversations(tmp_path: Path) -> Mixture:
    return mixture_of(write_conversations(tmp_path / "all.jsonl", 41))


@pytest.fixture
def found(conversations: Mixture, tmp_path: Path) -> tokens.Tokens:
    return tokenise(conversations, BYTES, max_tokens=T, cache=tmp_path)


# --- tokens ---------------------------------------------------------------------------------------


def test_tokens_are_what_the_renderer_gives(conversations, found):
    assert len(found) == 41
    for index, conversation in enumerate(conversations.task):
        ids, mask = render(BYTES, conversation, max_tokens=T)
        codes = found.conversation(index)
        assert ids_of(codes).tolist() == ids
        assert (codes >= 0).astype(int).tolist() == mask
    assert found.lengths.sum() == len(found.codes)


def test_tokens_are_rendered_once(conversations, found, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "render", lambda *a, **k: pytest.fail("rendered again"))
    again = tokenise(conversations, BYTES, max_tokens=T, cache=tmp_path)
    assert np.array_equal(again.codes, found.codes)
    assert again.identity == found.identity


def test_other_settings_make_other_tokens(conversations, found, tmp_path):
    cut = tokenise(conversations, BYTES, max_tokens=5, cache=tmp_path)
    assert cut.lengths.max() == 5
    some = tokenise(conversations, BYTES, max_tokens=T, cache=tmp_path, most=100)
    assert 100 <= len(some.codes) < 100 + T
    assert np.array_equal(some.codes, found.codes[: len(some.codes)])
    assert len({cut.identity, some.identity, found.identity}) == 3


def test_tokens_are_known_by_what_they_are_wherever_the_file_lies(tmp_path):
    def tokens_of(file: Path, cache: Path) -> tokens.Tokens:
        settings = MixtureSettings(train=(str(file),), val=("embedded",))
        mixture = open_mixtures(settings, train=(), val=()).train
        return tokenise(mixture, BYTES, max_tokens=T, cache=cache)

    file = write_conversations(tmp_path / "mine.jsonl", 9)
    first = tokens_of(file, tmp_path)
    os.utime(file, (1, 1))
    copy = Path(shutil.copy(file, tmp_path / "copy.jsonl"))
    same = [
        tokens_of(file, tmp_path),
        tokens_of(copy, tmp_path),
        tokens_of(file, tmp_path / "cache"),
    ]
    assert [each.identity for each in same] == [first.identity] * 3
    # A run goes on with the copy, and not with other conversations in the same place.
    state = RowLoader(PackedRows(first, T), rows_per_step=2, batch_size=2).state_dict()
    resumed = RowLoader(PackedRows(tokens_of(copy, tmp_path), T), rows_per_step=2, batch_size=2)
    resumed.load_state_dict(state)
    write_conversations(file, 9, word="y")
    other = RowLoader(PackedRows(tokens_of(file, tmp_path), T), rows_per_step=2, batch_size=2)
    with pytest.raises(UserError, match="belongs to other conversations"):
        other.load_state_dict(state)


@pytest.mark.slow
def test_many_conversations_are_rendered_by_processes_in_order(
    conversations, found, tmp_path, monkeypatch
):
    monkeypatch.setattr(tokens, "_ALONE", 1)
    monkeypatch.setattr(tokens, "_CHUNK", 4)
    monkeypatch.setattr(tokens.os, "cpu_count", lambda: 1)
    again = tokenise(conversations, BYTES, max_tokens=T, cache=tmp_path / "elsewhere")
    assert np.array_equal(again.codes, found.codes)
    assert np.array_equal(again.ends, found.ends)


class PoolHere:
    """Works in this process; tells what its workers would be forked from."""

    def __init__(self, workers, context, initializer, initargs):
        self.context = context.get_start_method(), forkserver._forkserver._preload_modules
        PoolHere.last = self
        initializer(*initargs)

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        tokens._worker.clear()

    def submit(self, work, *arguments) -> Future:
        done = Future()
        done.set_result(work(*arguments))
        return done


def test_workers_are_forked_from_a_process_that_has_imported_what_they_need(
    conversations, found, tmp_path, monkeypatch
):
    monkeypatch.setattr(forkserver._forkserver, "_preload_modules", ["__main__"])
    monkeypatch.setattr(tokens, "ProcessPoolExecutor", PoolHere)
    monkeypatch.setattr(tokens, "_ALONE", 1)
    again = tokenise(conversations, BYTES, max_tokens=T, cache=tmp_path / "elsewhere")
    assert again.identity == found.identity
    assert PoolHere.last.context == ("forkserver", [tokens.__name__])


# --- rows -----------------------------------------------------------------------------------------


def test_packed_rows_hold_everything_once_and_are_full():
    draw = np.random.default_rng(0)
    # As SmolTalk's, GSM8K's and ARC's: a mean of 471 tokens.
    lengths = np.concatenate(
        [
            draw.lognormal(6.5, 0.6, 2000).clip(60, 2047),
            draw.normal(230, 60, 1500).clip(80, 600),
            draw.normal(90, 25, 680).clip(40, 200),
        ]
    ).astype(int)
    draw.shuffle(lengths)
    rows = pack_rows(lengths, 2048)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= 2048
    assert lengths.sum() / (2048 * len(rows)) > 0.98
    # Neighbours in the mixture stay near each other.
    assert np.mean([max(row) - min(row) for row in rows]) < 250


def test_a_row_each_without_packing(found):
    rows = PackedRows(found, T, pack=False)
    assert len(rows) == 41
    assert rows.documents_per_row == 2
    assert rows.holding(32) == 32


def test_a_stream_of_rows_is_all_tokens_each_the_target_of_the_one_before(found):
    rows = StreamRows(found, T)
    inputs, targets = np.zeros((len(rows), T), np.int32), np.full((len(rows), T), -1, np.int32)
    for row in range(len(rows)):
        rows.fill(row, inputs[row], targets[row])
    stream = ids_of(found.codes)
    assert inputs.ravel()[: len(stream) - 1].tolist() == stream[:-1].tolist()
    assert targets.ravel()[: len(stream) - 1].tolist() == stream[1:].tolist()
    assert (targets.ravel()[len(stream) - 1 :] == -1).all()


def test_packed_rows_learn_what_the_assistant_says_and_nothing_else(conversations, found):
    rows = PackedRows(found, T, epochs=2)
    seen = []
    for row in range(len(rows)):
        inputs, targets = np.zeros(T, np.int32), np.full(T, -1, np.int32)
        begin = 0
        for length in rows.fill(row, inputs, targets):
            end = begin + length
            seen.append((inputs[begin:end].tolist(), targets[begin:end].tolist()))
            begin = end
        assert (targets[begin:] == -1).all()
    wanted = []
    for conversation in conversations.task:
        ids, mask = render(BYTES, conversation, max_tokens=T)
        learned = [id_ if on else -1 for id_, on in zip(ids, mask, strict=True)]
        wanted.append((ids[:-1], learned[1:]))
    # Every epoch all of them, in another order.
    assert sorted(seen[:41]) == sorted(seen[41:]) == sorted(wanted)
    assert seen[:41] != seen[41:]
    assert rows.useful_tokens == sum(len(inputs) for inputs, _ in seen)
    assert rows.supervised_tokens == sum(t >= 0 for _, targets in seen for t in targets)
    assert rows.fill_ratio == pytest.approx(rows.useful_tokens / (len(rows) * T))


def test_conversations_that_leave_nothing_to_learn_are_left_out(conversations, tmp_path):
    # Cut before the assistant speaks.
    cut = tokenise(conversations, BYTES, max_tokens=4, cache=tmp_path)
    assert PackedRows(cut, T).conversations == 0


# --- batches --------------------------------------------------------------------------------------


def step_of(rows: PackedRows, per_step: int, batch_size: int, world_size: int, step: int = 0):
    """All documents of one step as (inputs, targets), from every rank's batches."""
    documents = []
    for rank in range(world_size):
        loader = RowLoader(
            rows, rows_per_step=per_step, batch_size=batch_size, rank=rank, world_size=world_size
        )
        for number in range((step + 1) * loader.accumulation):
            batch = next(loader)
            if number >= step * loader.accumulation:
                documents += documents_of(batch)
        loader.close()
    return sorted(documents)


def documents_of(batch) -> list[tuple[list[int], list[int]]]:
    """Those in which there is something to learn."""
    inputs, targets = batch.inputs.flatten(), batch.targets.flatten()
    assert isinstance(batch.documents, Documents)
    bounds = batch.documents.starts.tolist()
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0, len(inputs))
    assert max(b - a for a, b in pairwise(bounds)) <= batch.documents.longest
    cut = [(inputs[a:b].tolist(), targets[a:b].tolist()) for a, b in pairwise(bounds)]
    return [each for each in cut if max(each[1], default=-1) >= 0]


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (2, 1), (3, 2), (2, 4)])
def test_a_step_is_the_same_rows_however_they_are_shared(found, batch_size, world_size):
    rows = PackedRows(found, T)
    for step in (0, 1):
        alone = step_of(rows, 5, 5, 1, step)
        assert step_of(rows, 5, batch_size, world_size, step) == alone
        assert len(alone) >= 5


def test_all_steps_are_all_conversations_and_the_last_is_filled_up(found):
    rows = PackedRows(found, T)
    loader = RowLoader(rows, rows_per_step=4, batch_size=2)
    batches = list(loader)
    loader.close()
    assert loader.steps == -(-len(rows) // 4)
    assert len(batches) == 2 * loader.steps
    assert len({batch.documents.starts.shape for batch in batches}) == 1
    assert sum(len(documents_of(batch)) for batch in batches) == 41


def test_a_batch_of_a_stream_has_no_documents(found):
    loader = RowLoader(StreamRows(found, T), rows_per_step=2, batch_size=2)
    batch = next(loader)
    loader.close()
    assert batch.documents is None
    assert (batch.inputs.dtype, batch.targets.dtype) == (torch.int32, torch.int64)
    assert torch.equal(batch.inputs.flatten()[1:].long(), batch.targets.flatten()[:-1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loader_goes_on_where_another_stopped(found, world_size):
    rows = PackedRows(found, T)

    def loader(batch_size: int) -> RowLoader:
        return RowLoader(rows, rows_per_step=4, batch_size=batch_size, world_size=world_size)

    first = loader(2)
    for _ in range(2 * first.accumulation):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    rest = [batch.inputs for batch in first]
    first.close()
    second = loader(2)
    second.load_state_dict(state)
    assert all(map(torch.equal, rest, [batch.inputs for batch in second]))
    second.close()
    # And on another number of ranks, at the same step.
    third = RowLoader(rows, rows_per_step=4, batch_size=4)
    assert "next step" in third.load_resharded([state] * world_size)
    assert third.state_dict()["step"] == 2


def test_a_position_in_other_conversations_is_refused(found, conversations, tmp_path):
    state = RowLoader(PackedRows(found, T), rows_per_step=4, batch_size=2).state_dict()
    others = tokenise(conversations, BYTES, max_tokens=9, cache=tmp_path)
    with pytest.raises(UserError, match="belongs to other conversations"):
        RowLoader(PackedRows(others, T), rows_per_step=4, batch_size=2).load_state_dict(state)
    with pytest.raises(UserError, match="saved steps have 4 rows, these 8"):
        RowLoader(PackedRows(found, T), rows_per_step=8, batch_size=2).load_state_dict(state)
