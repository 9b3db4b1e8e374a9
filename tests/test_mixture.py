"""What is mixed: parts, weights, what is held out, and the conversations that Python carries."""

import pytest

from gptfast.chat_data import open_mixtures
from gptfast.chat_data.mixture import Part
from gptfast.config_chat import MixtureSettings
from gptfast.conversation import render
from gptfast.errors import UserError
from gptfast.tasks.embedded import ChosenSums, Docstrings, Sums, embedded
from gptfast.tokenizer import Tokenizer
from tests.mixture_cases import write_conversations

BYTES = Tokenizer({bytes([i]): i for i in range(256)})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("gsm8k", Part("gsm8k", None, 1.0)),
        ("smoltalk[:10000]", Part("smoltalk", 10_000, 1.0)),
        ("my.jsonl:2", Part("my.jsonl", None, 2.0)),
        ("/a b/my.jsonl[:7]:0.5", Part("/a b/my.jsonl", 7, 0.5)),
    ],
)
def test_a_part_of_a_mixture_is_parsed(text, part):
    assert Part.parse(text) == part


@pytest.mark.parametrize("text", ["gsm8k:0", "gsm8k[:0]", ""])
def test_a_part_that_is_nothing_is_refused(text):
    with pytest.raises(UserError, match=r"NAME\[:N\]:W"):
        Part.parse(text)


def test_weights_take_parts_several_times_and_in_fractions(tmp_path):
    parts = [
        f"{write_conversations(tmp_path / 'a.jsonl', 10, word='a')}:2.5",
        f"{write_conversations(tmp_path / 'b.jsonl', 10, word='b')}[:4]",
    ]
    mixtures = [
        open_mixtures(MixtureSettings(train=tuple(parts), val=("embedded",)), train=(), val=())
        for _ in range(2)
    ]
    said = [c["messages"][1]["content"][0] for c in mixtures[0].train.task]
    assert (said.count("a"), said.count("b")) == (25, 4)
    # Mixed, and the same at every call.
    assert said[:25] != ["a"] * 25
    assert list(mixtures[0].train.task) == list(mixtures[1].train.task)
    assert mixtures[0].train.identity == mixtures[1].train.identity


def held_out(*parts: str) -> list[list[str]]:
    """The questions of both sides, of a mixture without --val."""
    found = open_mixtures(MixtureSettings(train=parts), train=("smoltalk",), val=("mmlu",))
    assert found.train.identity != found.val.identity
    return [[c["messages"][0]["content"] for c in side.task] for side in (found.train, found.val)]


@pytest.mark.parametrize(
    ("part", "trained", "distinct", "validated"),
    [
        ("", 196, 196, 4),
        (":2", 392, 196, 4),
        # After the limit; a fraction is of what is left.
        ("[:100]:2.5", 245, 98, 2),
        (":0.5", 98, 98, 4),
        ("[:2]:3", 3, 1, 1),
    ],
)
def test_without_a_validation_of_its_own_a_mixture_holds_some_out(
    tmp_path, part, trained, distinct, validated
):
    path = write_conversations(tmp_path / "mine.jsonl", 200)
    training, validation = held_out(f"{path}{part}")
    assert (len(training), len(set(training))) == (trained, distinct)
    assert len(validation) == len(set(validation)) == validated
    assert not set(training) & set(validation)


def test_every_part_holds_out_its_share_before_its_weight(tmp_path):
    for name, count, first in (("a", 150, 0), ("b", 2, 1000), ("c", 1, 2000)):
        write_conversations(tmp_path / f"{name}.jsonl", count, first=first)
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    training, validation = held_out(f"{a}:2", b, c)
    assert sorted(int(number) // 1000 for number in validation) == [0, 0, 0, 1]
    assert sorted(int(number) // 1000 for number in training) == [0] * 294 + [1, 2]
    assert not set(training) & set(validation)
    with pytest.raises(UserError, match=r"a.jsonl is named twice, .*: give .*a.jsonl:2, or --val"):
        held_out(a, b, f"{a}[:10]")
    with pytest.raises(UserError, match="a single conversation cannot both train and validate"):
        held_out(c)


def test_named_parts_come_from_a_folder_laid_out_as_on_the_hub(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    for split, count in (("train", 5), ("test", 3)):
        rows = [
            {"question": f"{i}?", "answer": f"<<1+{i}={1 + i}>>#### {1 + i}"} for i in range(count)
        ]
        file = tmp_path / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    settings = MixtureSettings(chat_data=tmp_path)
    found = open_mixtures(settings, train=("gsm8k",), val=("gsm8k[:2]",))
    assert (len(found.train.task), len(found.val.task)) == (5, 2)


@pytest.mark.parametrize(
    ("part", "words"),
    [("nothing.jsonl", "none of smoltalk, mmlu, gsm8k"), ("gsm8k", "gsm8k/main has no train")],
)
def test_a_part_that_is_not_there_is_named(tmp_path, part, words):
    with pytest.raises(UserError, match=words):
        open_mixtures(MixtureSettings(train=(part,), chat_data=tmp_path), train=(), val=())


def test_embedded_conversations_are_the_same_at_every_call_and_apart():
    train, val = embedded(split="train"), embedded(split="val")
    assert list(val) == list(embedded(split="val"))
    asked = {c["messages"][0]["content"] for c in train}
    documented = [c["messages"][0]["content"] for c in Docstrings(split="val")]
    assert len(documented) > 50
    assert not asked & set(documented)
    assert all(render(BYTES, conversation, max_tokens=None).ids for conversation in val)


def test_embedded_sums_are_right_and_scored():
    for conversation in Sums(split="val"):
        parts = {part["type"]: part["text"] for part in conversation["messages"][1]["content"][:3]}
        assert str(eval(parts["python"])) == parts["python_output"]
        assert Sums(split="val").evaluate(conversation, f"It is {parts['python_output']}.")
    for conversation in ChosenSums(split="val"):
        question, answer = (message["content"] for message in conversation["messages"])
        a, b = (int(word) for word in question.partition(": ")[2].split("?")[0].split(" plus "))
        assert f"- {a + b}={answer}" in question
