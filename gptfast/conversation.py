"""Conversations: what one looks like, and how it becomes tokens. The one renderer.

    {"messages": [{"role": "user", "content": "6 times 7?"}, {"role": "assistant", ...}, ...]}

After an optional system message, user and assistant take turns, the user first. A content is
text; the assistant's can be a list of parts {"type", "text"}: what it says, what it asks the
calculator, and what the calculator says. As tokens (nanochat, commit d6d86cb), a line each for
whose they are, and the assistant's own, which it is trained to say, underlined:

    <|bos|>
    <|user_start|> 6 times 7? <|user_end|>
    <|assistant_start|> It is <|python_start|> 6*7 <|python_end|>
                        ----- ---------------- --- --------------
                        <|output_start|> 42 <|output_end|> 42. <|assistant_end|>
                                                           --- -----------------

A system message becomes the beginning of the first user message, a blank line between them.
"""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from gptfast.errors import UserError
from gptfast.tokenizer import Tokenizer

Message = dict[str, Any]
# {"messages": [...]}; tasks add keys of their own.
Conversation = dict[str, Any]

# The types of parts.
TEXT, PYTHON, PYTHON_OUTPUT = "text", "python", "python_output"
_PARTS = (TEXT, PYTHON, PYTHON_OUTPUT)

_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"


class Rendered(NamedTuple):
    """ids, and for each of them 1 if the assistant is to learn to say it, otherwise 0."""

    ids: list[int]
    mask: list[int]


def render(
    tokenizer: Tokenizer, conversation: Conversation, *, max_tokens: int | None = 2048
) -> Rendered:
    """The whole conversation, cut after max_tokens. UserError if its messages are not valid."""
    messages = conversation["messages"]
    if problem := problem_with(messages):
        raise UserError(f"a conversation cannot be rendered: {problem}")
    ids, mask = _render(tokenizer, messages)
    return Rendered(ids[:max_tokens], mask[:max_tokens])


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """The prompt that asks for the last message, the assistant's, which is left out. Not cut."""
    messages = conversation["messages"]
    if not messages or messages[-1].get("role") != "assistant":
        raise UserError("only a conversation that ends with the assistant's message has a prompt")
    return render_messages(tokenizer, messages[:-1])


def render_messages(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The prompt that asks for an answer to messages of which the last is the user's. Not cut.

    UserError if they are not valid.
    """
    messages = list(messages)
    if problem := problem_with(messages, fewest=1):
        raise UserError(f"these messages cannot be answered: {problem}")
    if messages[-1]["role"] != "user":
        raise UserError("these messages cannot be answered: the last is not the user's")
    return [*_render(tokenizer, messages).ids, tokenizer.special_id("<|assistant_start|>")]


def coloured(tokenizer: Tokenizer, rendered: Rendered) -> str:
    """For a terminal: tokens between bars, green if the assistant learns to say them, else red."""
    return "|".join(
        f"{_GREEN if learned else _RED}{tokenizer.decode([id_])}{_PLAIN}"
        for id_, learned in zip(*rendered, strict=True)
    )


def marked(tokenizer: Tokenizer, rendered: Rendered) -> str:
    """For a file: the text, with [[ ]] around what the assistant learns to say."""
    pairs = zip(*rendered, strict=True)
    runs = [(learned, [id_ for id_, _ in run]) for learned, run in groupby(pairs, itemgetter(1))]
    return "".join(
        f"[[{tokenizer.decode(ids)}]]" if learned else tokenizer.decode(ids)
        for learned, ids in runs
    )


def problem_with(messages: object, *, fewest: int = 2) -> str | None:
    """What is wrong with messages from anywhere, or None. fewest: turns that must be there."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        return 'there are no "messages", a list of objects with role and content'
    for number, message in enumerate(messages, start=1):
        content, role = message.get("content"), message.get("role")
        if not (isinstance(content, str) or (role == "assistant" and _are_parts(content))):
            return (
                f"the content of message {number} is neither text nor, from the assistant, parts "
                f"of the types {', '.join(_PARTS)}"
            )
    return problem_with_roles([message.get("role") for message in messages], fewest=fewest)


def problem_with_roles(roles: Sequence[object], *, fewest: int = 2) -> str | None:
    """What is wrong with the order of the roles, or None."""
    begin = 1 if roles[:1] == ["system"] else 0
    turns = len(roles) - begin
    if turns < fewest:
        needed = "a user's and an assistant's are" if fewest == 2 else "a user's is"
        return f"it has {turns} turn(s); {needed} needed"
    for position, role in enumerate(roles[begin:]):
        expected = ("user", "assistant")[position % 2]
        if role != expected:
            return f"message {begin + position + 1} has the role {role!r}, not {expected!r}"
    return None


def _are_parts(content: object) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in _PARTS and isinstance(part.get("text"), str)
        for part in content
    )


def _render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    ids, mask = [tokenizer.bos_id], [0]

    def special(name: str, learned: int) -> None:
        ids.append(tokenizer.special_id(f"<|{name}|>"))
        mask.append(learned)

    def text(content: str, learned: int) -> None:
        encoded = tokenizer.encode(content)
        ids.extend(encoded)
        mask.extend([learned] * len(encoded))

    for message in _without_system(messages):
        content = message["content"]
        if message["role"] == "user":
            special("user_start", 0)
            text(content, 0)
            special("user_end", 0)
            continue
        special("assistant_start", 0)
        for part in [{"type": TEXT, "text": content}] if isinstance(content, str) else content:
            if part["type"] == TEXT:
                text(part["text"], 1)
                continue
            name, learned = {PYTHON: ("python", 1), PYTHON_OUTPUT: ("output", 0)}[part["type"]]
            special(f"{name}_start", learned)
            text(part["text"], learned)
            special(f"{name}_end", learned)
        special("assistant_end", 1)
    return Rendered(ids, mask)


def _without_system(messages: Sequence[Message]) -> list[Message]:
    if messages[0]["role"] != "system":
        return list(messages)
    system, first, *others = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
