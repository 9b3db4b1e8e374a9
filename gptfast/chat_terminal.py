"""A conversation with a model in a terminal: answers that stream, a history, a few commands.

Answers go to `write`, everything else to `say`, so that what is piped out of it is what the model
said. Where lines come from is a function too: a keyboard, a test. A pipe holds no conversation, but
questions: see `answer_lines`.
"""

import json
import signal
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

from gptfast.conversation import PYTHON, PYTHON_OUTPUT, TEXT, Message, render_messages
from gptfast.engine import STOP_TOKENS, Engine, TextStream
from gptfast.engine.sampling import Sampling
from gptfast.errors import UserError
from gptfast.tokenizer import Tokenizer

N = TypeVar("N", int, float)

PROMPT = "you> "
# What a token between parts of an answer begins, and how that is shown.
_BORDERS = {
    "python_start": (PYTHON, "<<"),
    "python_end": (TEXT, ""),
    "output_start": (PYTHON_OUTPUT, "="),
    "output_end": (TEXT, ">>"),
}
_CLOSED = ">>"
# Reads one line, given what to ask with; EOFError at the end of the input.
Read = Callable[[str], str]
Write = Callable[[str], None]


@dataclass(frozen=True)
class ChatOptions:
    """How answers are drawn; top_k None: from all tokens. max_tokens: of one answer."""

    temperature: float = 0.6
    top_k: int | None = 50
    max_tokens: int = 256

    def __post_init__(self) -> None:
        # The engine would say the same, but only when it is asked to answer.
        Sampling(self.temperature, self.top_k)
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {self.max_tokens}")


class Chat:
    """Messages so far, and the model that answers the next one.

    takes_turns: False for a base model, which has seen no conversations: it continues each text by
        itself.

    An answer that was stopped or cut off stays in the history as far as it went, and is closed like
    any other: the model reads it as what it said. length: tokens that the model has read and said.
    """

    def __init__(self, engine: Engine, options: ChatOptions, *, takes_turns: bool = True) -> None:
        self.engine, self.options, self.takes_turns = engine, options, takes_turns
        self.messages: list[Message] = []
        self.length = 0

    def answer(self, text: str, *, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer in pieces to show, whole characters; then both messages are in the history.

        stopped: asked after every token. If it stops before anything was said, nothing is kept.
        UserError if the conversation has become too long.
        """
        prompt = self._prompt(text)
        answer, options = AnswerParts(self.engine.tokenizer), self.options
        tokens = self.engine.generate(
            [prompt],
            max_tokens=min(options.max_tokens, self.engine.context - len(prompt)),
            temperature=options.temperature,
            top_k=options.top_k,
        )
        self.length = len(prompt)
        with closing(tokens):
            for token in chain.from_iterable(tokens):
                self.length += 1
                if piece := answer.feed(token.id):
                    yield piece
                if stopped():
                    break
            else:
                if piece := answer.close():
                    yield piece
        if answer.parts or not stopped():
            said = {"role": "assistant", "content": answer.content()}
            self.messages += [{"role": "user", "content": text}, said]

    def clear(self) -> None:
        self.messages, self.length = [], 0

    def save(self, path: Path) -> None:
        """Add the conversation to a file as one line of JSON, as training reads it."""
        if not self.messages:
            raise UserError("there is nothing to save yet")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}") from error

    def _prompt(self, text: str) -> list[int]:
        tokenizer = self.engine.tokenizer
        if self.takes_turns:
            messages = [*self.messages, {"role": "user", "content": text}]
            prompt = render_messages(tokenizer, messages)
        else:
            prompt = tokenizer.encode(text, prepend=tokenizer.bos_id)
        if len(prompt) >= self.engine.context:
            what, remedy = "the message", "shorten it"
            if self.messages:
                what, remedy = "with this message the conversation", "/clear starts a new one"
            raise UserError(
                f"{what} has {len(prompt)} tokens; the model's limit is {self.engine.context}, its "
                f"answer included: {remedy}"
            )
        return prompt


class AnswerParts:
    """The tokens of an answer into parts of a message, and into what to show of them.

    A call of the calculator is shown as GSM8K writes it, <<6*7=42>>.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.parts: list[dict[str, str]] = []
        self._text = TextStream(tokenizer)
        self._stops = {tokenizer.special_id(name) for name in STOP_TOKENS}
        ids = {name: tokenizer.special_id(f"<|{name}|>") for name in _BORDERS}
        self._borders = {id_: _BORDERS[name] for name, id_ in ids.items()}
        self._python_end, self._output_start = ids["python_end"], ids["output_start"]
        self._kind = TEXT
        # Whether a call has ended, and what came of it is still unknown.
        self._waiting = False

    def feed(self, token: int) -> str:
        """What to show of one more token; nothing of one that ends the answer."""
        if token in self._stops:
            return ""
        unanswered = self._waiting and token != self._output_start
        self._waiting = token == self._python_end
        closed = _CLOSED if unanswered else ""
        if token not in self._borders:
            return closed + self._add(self._text.feed([token]))
        rest = self._add(self._text.close())
        self._kind, shown = self._borders[token]
        return rest + closed + shown

    def close(self) -> str:
        """What is left to show of an answer that has ended."""
        return self._add(self._text.close()) + (_CLOSED if self._waiting else "")

    def content(self) -> str | list[dict[str, str]]:
        """Of a message: text where there is nothing else, otherwise parts."""
        if all(part["type"] == TEXT for part in self.parts):
            return "".join(part["text"] for part in self.parts)
        return self.parts

    def _add(self, text: str) -> str:
        if text and self.parts and self.parts[-1]["type"] == self._kind:
            self.parts[-1]["text"] += text
        elif text:
            self.parts.append({"type": self._kind, "text": text})
        return text


class Terminal:
    """Reads lines, carries out commands, and has everything else answered."""

    def __init__(self, chat: Chat, *, read: Read, write: Write, say: Write) -> None:
        self.chat, self.read, self.write, self.say = chat, read, write, say
        # name -> (argument, what it does, how)
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "clear": ("", "start a new conversation", self._clear),
            "temperature": ("X", "0 always takes the likeliest token", self._temperature),
            "top-k": ("N", "draw from the N likeliest tokens, 0: from all", self._top_k),
            "save": ("FILE", "add the conversation to a .jsonl file", self._save),
            "help": ("", "this list", self._help),
            "quit": ("", "or Ctrl-D", self._quit),
        }
        self._over = self._long = False

    def run(self) -> None:
        """Until /quit or the end of the input. Ctrl-C stops an answer, or takes a line back."""
        while not self._over:
            try:
                self._line(self.read(PROMPT).strip())
            except EOFError:
                self._over = True
            except KeyboardInterrupt:
                self.say("(/quit or Ctrl-D ends)")
            except UserError as error:
                self.say(f"error: {error}")

    def answer(self, text: str) -> None:
        """Write the answer to one message as it comes."""
        with _asked_to_stop() as stopped:
            for piece in self.chat.answer(text, stopped=stopped):
                self.write(printable(piece))
            self.write("\n")
            if stopped():
                self.say("(stopped)")

    def _line(self, line: str) -> None:
        if not line.startswith("/"):
            if line:
                self.answer(line)
                self._tell_if_long()
            return
        name, _, argument = line[1:].partition(" ")
        if name not in self.commands:
            raise UserError(f"no command /{name}; /help lists them")
        wanted, _, carry_out = self.commands[name]
        if bool(wanted) != bool(argument.strip()):
            raise UserError(f"it is /{name} {wanted}".rstrip())
        carry_out(argument.strip())

    def _tell_if_long(self) -> None:
        """Once, when the conversation has outgrown what the model was trained on."""
        length, trained = self.chat.length, self.chat.engine.model.config.sequence_len
        if length > trained and not self._long:
            self._long = True
            self.say(
                f"(the conversation has {length} tokens; the model was trained on {trained} and "
                "may lose its thread: /clear starts a new one)"
            )

    def _clear(self, _: str) -> None:
        self.chat.clear()
        self._long = False
        self.say("(a new conversation)")

    def _temperature(self, argument: str) -> None:
        value = _number(argument, float)
        self.chat.options = replace(self.chat.options, temperature=value)
        self.say(f"(temperature {value:g})")

    def _top_k(self, argument: str) -> None:
        value = _number(argument, int)
        self.chat.options = replace(self.chat.options, top_k=value or None)
        self.say(f"(top-k {value or 'off'})")

    def _save(self, argument: str) -> None:
        self.chat.save(Path(argument).expanduser())
        self.say(f"(added to {argument})")

    def _help(self, _: str) -> None:
        for name, (argument, does, _action) in self.commands.items():
            self.say(f"  /{name} {argument}".ljust(20) + does)
        self.say("  Ctrl-C".ljust(20) + "stop the answer")

    def _quit(self, _: str) -> None:
        self._over = True


def answer_lines(chat: Chat, lines: Iterable[str], *, write: Write, say: Write) -> None:
    """Write a line for every line: the answer to it alone, a newline in it as the characters \\n.

    No line is a command. One that is blank or refused gets an empty line, so that questions and
    answers stay side by side. UserError at the end if any was refused, or if Ctrl-C comes.
    """
    number = refused = 0
    try:
        for number, line in enumerate(lines, 1):
            chat.clear()
            text = line.strip()
            with _asked_to_stop() as stopped:
                try:
                    for piece in chat.answer(text, stopped=stopped) if text else ():
                        write(printable(piece).replace("\n", "\\n"))
                except UserError as error:
                    refused += 1
                    say(f"line {number}: {error}")
                write("\n")
                if stopped():
                    raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise UserError(f"stopped at line {number}") from error
    if refused:
        raise UserError(f"{refused} of {number} lines have no answer")


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters become U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag, which is asked for between tokens: what runs on the GPU is never torn
    apart. If nobody has asked until it comes again, it interrupts."""
    asked = False

    def ask(_number: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _number(text: str, kind: Callable[[str], N]) -> N:
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"{text!r} is no number") from error
