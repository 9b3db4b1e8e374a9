"""Files of conversations, in both formats; a bad one is named with its place."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptfast.errors import UserError
from gptfast.tasks import (
    GSM8K,
    Conversations,
    smoltalk,
)
from gptfast.tasks.common import hub_shuffle
from tests.test_tasks import write_split


def messages(*roles: str) -> list[dict]:
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


GOOD = [
    messages("user", "assistant"),
    messages("system", "user", "assistant", "user"),
    messages("user", "assistant", "user", "assistant"),
]
PARTS = [{"type": "text", "text": "a"}, {"type": "python", "text": "1"}]


def write_jsonl(path: Path, conversations: list) -> Path:
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))
    return path


def write_parquet(path: Path, conversations: list) -> Path:
    pq.write_table(pa.table({"messages": conversations}), path, row_group_size=2)
    return path


def test_conversations_of_both_formats(tmp_path):
    called = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": PARTS}]
    jsonl = write_jsonl(tmp_path / "a.jsonl", [*GOOD, called])
    jsonl.write_text(jsonl.read_text().replace("\n", "\n\n", 1))
    parquet = write_parquet(tmp_path / "b.parquet", GOOD)
    task = Conversations([jsonl, parquet])
    assert [conversation["messages"] for conversation in task] == [*GOOD, called, *GOOD]
    assert task.eval_type is None
    with pytest.raises(NotImplementedError, match="Conversations"):
        task.evaluate(task[0], "")
    shuffled = Conversations([jsonl, parquet], shuffle=True)
    assert list(shuffled) == [task[i] for i in hub_shuffle(7).tolist()]


def test_smoltalk_reads_all_files_of_a_split(tmp_path):
    rows = [{"messages": GOOD[0], "source": str(i)} for i in range(5)]
    write_split(tmp_path, "train", rows, parts=2)
    write_split(tmp_path, "test", rows[:1])
    assert len(smoltalk(tmp_path, split="train")) == 5
    assert len(smoltalk(tmp_path, split="test")[:10]) == 1


BAD = [
    (messages("user"), "1 turn"),
    (messages("system", "user"), "1 turn"),
    ([], "0 turn"),
    (messages("user", "user"), "message 2 has the role 'user', not 'assistant'"),
    (messages("assistant", "user"), "message 1 has the role 'assistant', not 'user'"),
    (messages("system", "assistant", "user"), "message 2 has the role 'assistant', not 'user'"),
    (messages("user", "tool"), "message 2 has the role 'tool'"),
    (messages("user", "assistant", "system"), "message 3 has the role 'system'"),
    ([{"role": "user", "content": None}, *messages("assistant")], "content of message 1"),
    ([{"role": None, "content": "x"}, *messages("assistant")], "message 1 has the role None"),
    (None, 'no "messages"'),
]


@pytest.mark.parametrize(("bad", "problem"), BAD, ids=[problem for _, problem in BAD])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_bad_conversation_is_named(tmp_path, write, bad, problem):
    path = write(tmp_path / f"x.{write.__name__[6:]}", [GOOD[0], GOOD[1], GOOD[2], bad, GOOD[0]])
    place = "line 4: " if write is write_jsonl else r"row 3 \(from 0\): "
    with pytest.raises(UserError, match=f"{path}, {place}.*{problem}"):
        Conversations([path])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "line 2 is not JSON"),
        (b"\xff", "line 2 is not JSON"),
        (b"[]", "line 2: there are no"),
        (b'{"text": "x"}', "line 2: there are no"),
        (b'{"messages": ["x"]}', "line 2: there are no"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}',
            "line 2: the content of message 1",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": [{"type": "image", "text": ""}]}]}',
            "line 2: the content of message 1 .* text, python, python_output",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = write_jsonl(tmp_path / "x.jsonl", GOOD[:1])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=f"x.jsonl, {problem}"):
        Conversations([path])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"x.txt is neither .jsonl nor .parquet"):
        Conversations([tmp_path / "x.txt"])
    with pytest.raises(UserError, match=r"x.jsonl cannot be read: .*No such file"):
        Conversations([tmp_path / "x.jsonl"])
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"x.parquet is no readable parquet"):
        Conversations([tmp_path / "x.parquet"])
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet lacks messages; its columns: text"):
        Conversations([tmp_path / "x.parquet"])
    pq.write_table(pa.table({"messages": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet: messages is string; a list of role"):
        Conversations([tmp_path / "x.parquet"])
    with pytest.raises(UserError, match=r"has no test-\*.parquet; it has x.parquet"):
        GSM8K(tmp_path, subset=".", split="test")
    for name in ("test-00000-of-00003.parquet", "test-00002-of-00003.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"not hold one whole test split: .*00000-of-00003.*, .*00002-of"
    ):
        GSM8K(tmp_path, subset=".", split="test")


def test_large_lists_and_slices_of_parquet(tmp_path):
    kind = pa.large_list(pa.struct({"role": pa.large_string(), "content": pa.large_string()}))
    table = pa.table({"messages": pa.array([None, *GOOD], kind)}).slice(1)
    pq.write_table(table, tmp_path / "x.parquet")
    assert [each["messages"] for each in Conversations([tmp_path / "x.parquet"])] == GOOD
