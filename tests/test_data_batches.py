"""Batches against a naive reading of the same files: order, resume, ranks, threads."""

import gc
import json
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfast.data import BatchLoader, RowGroup, reshard_states
from gptfast.data.batches import share
from gptfast.data.parquet import row_groups, write_documents
from gptfast.errors import UserError

BOS = 256
B, T = 3, 7


class ByteTokenizer:
    """The bytes of a text, with 256 before each of them."""

    def encode_documents(self, texts: list[str], threads: int) -> np.ndarray:
        ids = [id_ for text in texts for id_ in (BOS, *text.encode())]
        return np.array(ids, dtype=np.int32)


class BrokenTokenizer:
    def encode_documents(self, texts: list[str], threads: int) -> np.ndarray:
        raise ZeroDivisionError("the tokenizer's own error")


def write_corpus(
    folder: Path, documents: int = 40, files: int = 2, rows_per_group: int = 4
) -> list[RowGroup]:
    """`files` files of `documents` short documents each."""
    groups = []
    for f in range(files):
        texts = [f"{f}:{i} " + "x" * (i % 11) for i in range(documents)]
        write_documents(folder / f"part_{f}.parquet", texts, rows_per_group=rows_per_group)
        groups += row_groups(folder / f"part_{f}.parquet")
    return groups


@pytest.fixture
def groups(tmp_path: Path) -> list[RowGroup]:
    """20 row groups: several ranks share their rows."""
    return write_corpus(tmp_path)


@pytest.fixture
def many_groups(tmp_path: Path) -> list[RowGroup]:
    """80 row groups: up to five ranks share whole ones."""
    return write_corpus(tmp_path, rows_per_group=1)


def loader_of(groups: list[RowGroup], **options) -> BatchLoader:
    options = {"batch_size": B, "sequence_len": T} | options
    return BatchLoader(groups, ByteTokenizer(), **options)


def stream_of(groups: list[RowGroup], rank: int = 0, world_size: int = 1) -> list[int]:
    """One epoch of a rank's tokens, read without any of our readers."""
    import pyarrow.parquet as pq

    texts = []
    for group in groups[rank::world_size]:
        texts += pq.ParquetFile(group.path).read_row_group(group.index)["text"].to_pylist()
    return ByteTokenizer().encode_documents(texts, 1).tolist()


def flat(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[int], list[int]]:
    return (
        [id_ for inputs, _ in batches for id_ in inputs.flatten().tolist()],
        [id_ for _, targets in batches for id_ in targets.flatten().tolist()],
    )


def documents_of(stream: list[int]) -> list[bytes]:
    return [bytes(part) for part in _split(stream) if part]


def _split(stream: list[int]) -> list[list[int]]:
    parts = [[]]
    for id_ in stream:
        if id_ == BOS:
            parts.append([])
        else:
            parts[-1].append(id_)
    return parts


def test_batches_are_the_stream_shifted_by_one_over_several_epochs(groups):
    epoch = stream_of(groups)
    stream = epoch * 4
    loader = loader_of(groups)
    batches = list(islice(loader, 3 * len(epoch) // (B * T)))
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (B, T)
        assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
    inputs, targets = flat(batches)
    assert inputs == stream[: len(inputs)]
    assert targets == stream[1 : len(inputs) + 1]
    assert loader.epoch == len(inputs) // len(epoch) == 2
    loader.close()


@pytest.mark.parametrize("epochs", [1, 2])
def test_finite_epochs_end_with_a_padded_batch_and_lose_no_target(groups, epochs):
    stream = stream_of(groups) * epochs
    batches = list(loader_of(groups, epochs=epochs))
    inputs, targets = flat(batches)
    assert len(batches) == -(-(len(stream) - 1) // (B * T))
    assert targets[: len(stream) - 1] == stream[1:]
    assert set(targets[len(stream) - 1 :]) <= {-1}
    assert inputs[: len(stream) - 1] == stream[:-1]


def test_a_stream_that_fills_its_last_batch_is_not_padded(tmp_path):
    # 2 * 21 + 1 tokens: the last one is a target and the first input of no batch.
    write_documents(tmp_path / "a.parquet", ["x" * 42])
    loader = loader_of(row_groups(tmp_path / "a.parquet"), epochs=1)
    _, targets = flat(list(loader))
    assert targets == [ord("x")] * 42
    assert next(loader, None) is None


@pytest.mark.parametrize("world_size", [1, 3])
def test_resume_is_exact_at_every_batch(groups, world_size):
    loader_of_rank = partial(loader_of, groups, rank=world_size - 1, world_size=world_size)
    steps = 2 * len(stream_of(groups)) // (B * T * world_size)
    loader = loader_of_rank(epochs=3)
    states, batches = [], []
    for _ in range(steps):
        states.append(json.dumps(loader.state_dict()))
        batches.append(next(loader))
    assert loader.epoch >= 1
    resumed = loader_of_rank(epochs=3)
    for step, state in enumerate(states):
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state
        for inputs, targets in batches[step : step + 2]:
            again = next(resumed)
            assert torch.equal(inputs, again[0])
            assert torch.equal(targets, again[1])


def test_resume_inside_a_row_group_of_several_chunks(tmp_path):
    # Row groups of 3,000 documents are read 1,024 documents at a time.
    texts = [f"document {i}" for i in range(3000)]
    write_documents(tmp_path / "a.parquet", texts, rows_per_group=3000)
    groups = row_groups(tmp_path / "a.parquet")
    assert len(groups) == 1
    loader = loader_of(groups, batch_size=8, sequence_len=512)
    batches = list(islice(loader, 10))
    resumed = loader_of(groups, batch_size=8, sequence_len=512)
    loader = loader_of(groups, batch_size=8, sequence_len=512)
    rows = []
    for step in range(9):
        resumed.load_state_dict(loader.state_dict())
        rows.append(loader.state_dict()["row"])
        assert torch.equal(next(resumed)[1], batches[step][1])
        next(loader)
    assert set(rows) == {0, 1024, 2048}
    assert flat(batches)[0] == (stream_of(groups) * 2)[: 10 * 8 * 512]


def test_resume_with_another_batch_shape_continues_the_stream(groups):
    loader = loader_of(groups)
    list(islice(loader, 5))
    resumed = loader_of(groups, batch_size=2, sequence_len=5)
    resumed.load_state_dict(loader.state_dict())
    assert flat([next(resumed)])[0] == stream_of(groups)[5 * B * T :][:10]


def test_state_of_an_ended_iteration_ends_at_once(groups):
    loader = loader_of(groups, epochs=1)
    assert list(loader)
    resumed = loader_of(groups, epochs=1)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("corpus", ["groups", "many_groups"])
def test_ranks_read_every_document_once_an_epoch(request, corpus, world_size):
    groups = request.getfixturevalue(corpus)
    read = []
    for rank in range(world_size):
        loader = loader_of(groups, rank=rank, world_size=world_size, epochs=1)
        inputs, targets = flat(list(loader))
        if corpus == "many_groups":
            stream = stream_of(groups, rank, world_size)
            assert inputs[: len(stream) - 1] == stream[:-1]
        read += documents_of([inputs[0], *(id_ for id_ in targets if id_ >= 0)])
    assert sorted(read) == sorted(documents_of(stream_of(groups)))


@pytest.mark.parametrize(
    "rows", [[8], [1, 20], [3, 3, 3], [40, 1, 1], [1024] * 9 + [700], [1024] * 127]
)
def test_the_rows_of_few_row_groups_are_cut_into_equal_runs(rows):
    groups = [RowGroup(Path("a"), i, 10, 10 + n) for i, n in enumerate(rows)]
    parts = [share(groups, rank, 8) for rank in range(8)]
    read = [(g.index, row) for part in parts for g in part for row in range(g.start, g.stop)]
    assert read == [(g.index, row) for g in groups for row in range(g.start, g.stop)]
    sizes = [sum(g.rows for g in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("count", "world_size"), [(128, 8), (32, 2), (1, 1), (3, 1)])
def test_many_row_groups_are_shared_whole(count, world_size):
    groups = [RowGroup(Path("a"), i, 0, 9) for i in range(count)]
    for rank in range(world_size):
        assert share(groups, rank, world_size) == groups[rank::world_size]


def test_eight_ranks_on_one_row_group_and_too_few_documents(tmp_path):
    write_documents(tmp_path / "a.parquet", [f"document {i}" for i in range(9)])
    groups = row_groups(tmp_path / "a.parquet")
    first = [loader_of(groups, rank=r, world_size=8, epochs=1) for r in range(8)]
    read = [documents_of([id_ for id_ in flat(list(x))[1] if id_ >= 0]) for x in first]
    assert read == [[b"document %d" % i] for i in range(7)] + [[b"document 7", b"document 8"]]
    with pytest.raises(UserError, match=r"9 document\(s\) cannot be shared by 10 processes"):
        loader_of(groups, rank=0, world_size=10)


def test_empty_documents_are_skipped_and_a_rank_without_text_is_an_error(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["one", "two", "", None, "", None]})
    pq.write_table(table, path, row_group_size=4)
    groups = row_groups(path)
    inputs, _ = flat([next(loader_of(groups))])
    assert inputs == (stream := [BOS, *b"one", BOS, *b"two"]) * 2 + stream[:5]
    with pytest.raises(UserError, match=r"2 row group\(s\) has any text"):
        next(loader_of(groups, rank=1, world_size=2))


def test_a_state_of_something_else_is_refused(tmp_path):
    groups = write_corpus(tmp_path)
    state = loader_of(groups).state_dict()
    with pytest.raises(UserError, match=r"another dataset: it had 20 row groups, this one has 18"):
        loader_of(groups[:-2]).load_state_dict(state)
    with pytest.raises(UserError, match=r"rank 0 of 1, this is rank 1 of 2; reshard_states"):
        loader_of(groups, rank=1, world_size=2).load_state_dict(state)


def test_a_prolonged_dataset_is_accepted_in_its_first_epoch_only(groups):
    loader = loader_of(groups[:10])
    first = list(islice(loader, 3))
    longer = loader_of(groups)
    longer.load_state_dict(loader.state_dict())
    assert flat([*first, next(longer)])[0] == stream_of(groups)[: 4 * B * T]
    while loader.epoch == 0:
        next(loader)
    with pytest.raises(UserError, match="another dataset"):
        longer.load_state_dict(loader.state_dict())


def test_a_prolonged_dataset_is_accepted_where_its_row_groups_are_shared_whole(many_groups):
    def loader(count: int) -> BatchLoader:
        return loader_of(many_groups[:count], rank=1, world_size=2)

    loader(80).load_state_dict(loader(32).state_dict())
    with pytest.raises(UserError, match="another dataset: it had 31 row groups, this one has 80"):
        loader(80).load_state_dict(loader(31).state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_resharded_ranks_begin_after_the_last_finished_row_group(many_groups, world_size):
    # Three ranks at uneven places of the second epoch: rank 2 has finished its units 0 and 1,
    # which are row groups 2 and 5; rank 1 only unit 0, row group 1.
    units = {0: 1, 1: 1, 2: 2}
    old = [loader_of(many_groups, rank=r, world_size=3).state_dict() for r in range(3)]
    old = [state | {"epoch": 1, "unit": units[state["rank"]], "token": 5} for state in old]
    old[0] = old[0] | {"epoch": 0, "unit": 6}
    read = []
    for rank, state in enumerate(reshard_states(old[::-1], world_size)):
        assert state["epoch"] == 1
        loader = loader_of(many_groups, rank=rank, world_size=world_size, epochs=2)
        loader.load_state_dict(state)
        inputs, targets = flat(list(loader))
        read += documents_of([inputs[0], *(id_ for id_ in targets if id_ >= 0)])
    assert sorted(read) == sorted(documents_of(stream_of(many_groups[6:])))


@pytest.mark.parametrize(("old_size", "new_size"), [(2, 8), (2, 1), (1, 2), (1, 8)])
def test_resharding_for_ranks_that_share_rows_begins_the_next_epoch(groups, old_size, new_size):
    states = [loader_of(groups, rank=r, world_size=old_size).state_dict() for r in range(old_size)]
    assert {(s["epoch"], s["unit"]) for s in reshard_states(states, new_size)} == {(1, 0)}
    resumed = loader_of(groups, rank=new_size - 1, world_size=new_size)
    said = "20 row groups are too few to go on within an epoch: every rank begins the next one"
    assert resumed.load_resharded(states) == said
    assert resumed.epoch == 1


def test_resharding_needs_all_ranks(groups):
    states = [loader_of(groups, rank=r, world_size=2).state_dict() for r in range(2)]
    with pytest.raises(UserError, match=r"all ranks of one step; got ranks \[1\]"):
        reshard_states(states[1:], 8)


def test_an_error_in_a_thread_is_raised_by_next(groups):
    loader = BatchLoader(groups, BrokenTokenizer(), batch_size=B, sequence_len=T)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="the tokenizer's own error"):
            next(loader)


def wait_for_threads(count: int) -> bool:
    deadline = time.monotonic() + 10
    while threading.active_count() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return threading.active_count() <= count


def test_threads_end_with_close_and_with_the_loader(groups):
    before = threading.active_count()
    loader = loader_of(groups)
    first = next(loader)
    assert threading.active_count() == before + 2
    loader.close()
    assert wait_for_threads(before)
    # It goes on where it was.
    assert flat([first, next(loader)])[0] == stream_of(groups)[: 2 * B * T]
    del loader
    gc.collect()
    assert wait_for_threads(before)


def test_the_interpreter_ends_while_a_loader_is_half_way(tmp_path):
    write_corpus(tmp_path)
    script = f"""
from pathlib import Path
from tests.test_data_batches import loader_of, row_groups
loader = loader_of(row_groups(Path({str(tmp_path / "part_0.parquet")!r})))
print(next(loader)[0].shape)
"""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "torch.Size([3, 7])\n"


def test_wait_seconds_counts_the_time_that_next_was_blocked(groups):
    class SlowTokenizer(ByteTokenizer):
        def encode_documents(self, texts: list[str], threads: int) -> np.ndarray:
            time.sleep(0.2)
            return super().encode_documents(texts, threads)

    loader = BatchLoader(groups, SlowTokenizer(), batch_size=1, sequence_len=2)
    next(loader)
    assert 0.15 < (waited := loader.wait_seconds) < 5
    # The chunk has more batches, which are prefetched.
    time.sleep(0.2)
    next(loader)
    assert loader.wait_seconds - waited < 0.1


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_on_the_cpu(groups):
    steps = 60
    expected = list(islice(loader_of(groups), steps))
    loader = loader_of(groups, device="cuda", prefetch=4)
    for inputs, targets in expected:
        # Work that keeps the current stream behind the copying one.
        torch.cuda._sleep(2_000_000)
        ours = [tensor + 0 for tensor in next(loader)]
        assert ours[0].device == torch.device("cuda", torch.cuda.current_device())
        assert torch.equal(ours[0].cpu(), inputs)
        assert torch.equal(ours[1].cpu(), targets)
