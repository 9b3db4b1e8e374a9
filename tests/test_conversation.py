"""Conversations as tokens: ids and masks written by hand, and what is not a conversation."""

import pytest

from gptfast.conversation import (
    Rendered,
    coloured,
    marked,
    render,
    render_for_completion,
    render_messages,
)
from gptfast.errors import UserError
from gptfast.tasks.gsm8k import answer_parts
from gptfast.tokenizer import SPECIAL_TOKENS, Tokenizer

# Bytes are the only tokens, so that ids can be written down: text is its bytes, then come
BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(
    256, 265
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer({bytes([byte]): byte for byte in range(256)})


def messages(*contents: object, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def conversation(*contents: object, system: str | None = None) -> dict:
    return {"messages": messages(*contents, system=system)}


PARTS = [
    {"type": "text", "text": "x"},
    {"type": "python", "text": "6*7"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": "!"},
]
PARTS_IDS = [120, PYTHON, 54, 42, 55, PYTHON_END, OUTPUT, 52, 50, OUTPUT_END, 33]
PARTS_MASK = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1]


def test_special_tokens_are_the_ids_that_this_file_writes_down(tokenizer):
    ids = (BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END)
    assert tuple(map(tokenizer.special_id, SPECIAL_TOKENS)) == ids


@pytest.mark.parametrize(
    ("given", "ids", "mask"),
    [
        pytest.param(
            conversation("hi", "ok"),
            [BOS, USER, 104, 105, USER_END, ASSISTANT, 111, 107, ASSISTANT_END],
            [0, 0, 0, 0, 0, 0, 1, 1, 1],
            id="text",
        ),
        pytest.param(
            conversation("a", PARTS),
            [BOS, USER, 97, USER_END, ASSISTANT, *PARTS_IDS, ASSISTANT_END],
            [0, 0, 0, 0, 0, *PARTS_MASK, 1],
            id="parts",
        ),
        pytest.param(
            conversation("a", "b", "c", "d"),
            [
                *[BOS, USER, 97, USER_END, ASSISTANT, 98, ASSISTANT_END],
                *[USER, 99, USER_END, ASSISTANT, 100, ASSISTANT_END],
            ],
            [0, *[0, 0, 0, 0, 1, 1] * 2],
            id="two turns each",
        ),
        pytest.param(
            conversation("a", "b", system="s"),
            [BOS, USER, 115, 10, 10, 97, USER_END, ASSISTANT, 98, ASSISTANT_END],
            [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
            id="system",
        ),
        pytest.param(
            conversation("é", ""),
            [BOS, USER, 0xC3, 0xA9, USER_END, ASSISTANT, ASSISTANT_END],
            [0, 0, 0, 0, 0, 0, 1],
            id="bytes and nothing",
        ),
        pytest.param(
            conversation("<|bos|>", []),
            [BOS, USER, *b"<|bos|>", USER_END, ASSISTANT, ASSISTANT_END],
            [0] * 11 + [1],
            id="spelled special tokens are text",
        ),
    ],
)
def test_ids_and_mask_by_hand(tokenizer, given, ids, mask):
    assert render(tokenizer, given) == Rendered(ids, mask)


def test_an_answer_of_gsm8k(tokenizer):
    parts = answer_parts("x<<6*7=42>>!")
    assert parts == PARTS
    ids, mask = render(tokenizer, conversation("a", parts))
    assert (ids[5:-1], mask[5:-1]) == (PARTS_IDS, PARTS_MASK)


def test_cut_and_whole(tokenizer):
    long = conversation("u" * 100, "a" * 3000)
    ids, mask = render(tokenizer, long)
    assert (len(ids), len(mask), sum(mask)) == (2048, 2048, 2048 - 104)
    cut = render(tokenizer, long, max_tokens=7)
    assert cut == (ids[:7], [0] * 7)
    whole = render(tokenizer, long, max_tokens=None)
    assert len(whole.ids) == 1 + 102 + 3002
    assert whole.ids[-1] == ASSISTANT_END
    # Prompts are not cut, as their end is what asks.
    assert len(render_for_completion(tokenizer, conversation("u" * 3000, "a"))) == 1 + 3002 + 1


def test_prompts_end_where_the_assistant_begins(tokenizer):
    given = conversation("a", "b", "c", PARTS, system="s")
    before = render(tokenizer, {"messages": given["messages"][:-1]}).ids
    prompt = render_for_completion(tokenizer, given)
    assert prompt == [*before, ASSISTANT]
    assert prompt == render(tokenizer, given).ids[: len(prompt)]
    assert render_messages(tokenizer, given["messages"][:-1]) == prompt
    assert render_messages(tokenizer, messages("a")) == [BOS, USER, 97, USER_END, ASSISTANT]
    # The messages are as they were.
    assert given == conversation("a", "b", "c", PARTS, system="s")


def test_coloured_for_terminals(tokenizer):
    shown = coloured(tokenizer, Rendered([BOS, 97, 98, ASSISTANT_END], [0, 0, 1, 1]))
    green, red, plain = "\x1b[32m", "\x1b[31m", "\x1b[0m"
    assert shown == "|".join(
        [
            f"{red}<|bos|>{plain}",
            f"{red}a{plain}",
            f"{green}b{plain}",
            f"{green}<|assistant_end|>{plain}",
        ]
    )


def test_marked_for_files(tokenizer):
    shown = marked(tokenizer, render(tokenizer, conversation("ü?", PARTS)))
    assert shown == (
        "<|bos|><|user_start|>ü?<|user_end|><|assistant_start|>[[x<|python_start|>6*7<|python_end|>]]"
        "<|output_start|>42<|output_end|>[[!<|assistant_end|>]]"
    )


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (None, 'no "messages"'),
        (["text"], 'no "messages"'),
        ([], r"0 turn\(s\); a user's and an assistant's are needed"),
        (messages("a"), r"1 turn\(s\)"),
        (messages("a", "b", system="s")[:2], r"1 turn\(s\)"),
        (messages("a", "b", "c")[1:], "message 1 has the role 'assistant', not 'user'"),
        ([*messages("a"), *messages("b")], "message 2 has the role 'user', not 'assistant'"),
        (messages("a", "b") + messages("c", system="s"), "message 3 has the role 'system'"),
        (messages("a", None), "content of message 2 is neither text nor"),
        (messages(PARTS, "b"), "content of message 1 is neither text nor"),
        (messages("a", [{"type": "image", "text": "x"}]), "parts of the types text, python, "),
        (messages("a", [{"type": "text"}]), "content of message 2"),
    ],
)
def test_what_is_no_conversation(tokenizer, wrong, problem):
    with pytest.raises(UserError, match=f"cannot be rendered: .*{problem}"):
        render(tokenizer, {"messages": wrong})


def test_what_cannot_be_answered(tokenizer):
    with pytest.raises(UserError, match=r"0 turn\(s\); a user's is needed"):
        render_messages(tokenizer, messages(system="s"))
    with pytest.raises(UserError, match="the last is not the user's"):
        render_messages(tokenizer, messages("a", "b"))
    with pytest.raises(UserError, match="ends with the assistant's message"):
        render_for_completion(tokenizer, conversation("a", "b", "c"))
