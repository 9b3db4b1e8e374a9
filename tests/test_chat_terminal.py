"""The terminal chat: streaming, history, commands, Ctrl-C."""

import os
import signal

import pytest

from gptfast.chat_terminal import AnswerParts, Chat, ChatOptions, Terminal, answer_lines, printable
from gptfast.conversation import render_messages
from gptfast.engine import Engine
from gptfast.errors import UserError
from gptfast.tasks import Conversations
from tests.scripted import (
    BOS,
    CONFIG,
    END,
    ENDLESS,
    OUT,
    OUT_END,
    PY,
    PY_END,
    START,
    TOKENIZER,
    USER,
    USER_END,
    scripted_model,
)

GREEDY = ChatOptions(temperature=0, max_tokens=24)


def scripted_chat(*path: int, options: ChatOptions = GREEDY) -> Chat:
    return Chat(Engine(scripted_model(CONFIG, path), TOKENIZER), options)


FRIENDLY = (START, *"Hi é😀!".encode(), END)


class Session:
    """A terminal whose lines are given; what it shows is kept. Ctrl-C comes where a line is ^C, and
    after so many pieces of answers as `interrupt_at` lists."""

    def __init__(self, chat: Chat, *lines: str, interrupt_at: tuple[int, ...] = ()) -> None:
        self.lines, self.interrupt_at = iter(lines), interrupt_at
        self.shown: list[str] = []
        self.said: list[str] = []
        Terminal(chat, read=self.read, write=self.write, say=self.said.append).run()

    def read(self, _prompt: str) -> str:
        for line in self.lines:
            if line == "^C":
                raise KeyboardInterrupt
            return line
        raise EOFError

    def write(self, piece: str) -> None:
        self.shown.append(piece)
        if len(self.shown) in self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_answer_streams_whole_characters_and_is_remembered():
    chat = scripted_chat(*FRIENDLY)
    session = Session(chat, "hello", "", "again")
    assert session.shown == [*"Hi é😀!", "\n"] * 2
    assert session.said == [
        "(the conversation has 20 tokens; the model was trained on 16 and may lose its thread: "
        "/clear starts a new one)"
    ]
    said = {"role": "assistant", "content": "Hi é😀!"}
    user = [{"role": "user", "content": text} for text in ("hello", "again")]
    assert chat.messages == [user[0], said, user[1], said]


def test_the_model_reads_the_whole_history(monkeypatch):
    chat = scripted_chat(*FRIENDLY)
    prompts, generate = [], chat.engine.generate
    monkeypatch.setattr(
        chat.engine, "generate", lambda p, **o: prompts.extend(p) or generate(p, **o)
    )
    Session(chat, "one", "two", "/clear", "three")
    text = "Hi é😀!".encode()
    first = [BOS, USER, *b"one", USER_END, START]
    assert prompts == [
        first,
        [*first, *text, END, USER, *b"two", USER_END, START],
        [BOS, USER, *b"three", USER_END, START],
    ]


def test_calls_of_the_calculator_are_shown_and_kept_as_parts():
    # The calculator's tokens are forced; the model goes on behind them.
    model = scripted_model(
        CONFIG, (START, *b"Say:", PY, *b"6*7", PY_END, END), (OUT_END, *b".", END)
    )
    chat = Chat(Engine(model, TOKENIZER), GREEDY)
    session = Session(chat, "6 times 7?")
    assert "".join(session.shown) == "Say:<<6*7=42>>.\n"
    assert chat.messages[1]["content"] == [
        {"type": "text", "text": "Say:"},
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "."},
    ]
    ids = render_messages(TOKENIZER, [*chat.messages, {"role": "user", "content": "?"}])
    assert ids[-15:-4] == [PY, *b"6*7", PY_END, OUT, *b"42", OUT_END, *b".", END]


def test_a_call_without_a_result_is_closed():
    for after, shown in ((b"!", ["<<", "x", "", ">>!"]), ((PY,), ["<<", "x", "", ">><<"])):
        parts = AnswerParts(TOKENIZER)
        assert [parts.feed(id_) for id_ in (PY, *b"x", PY_END, *after)] == shown
    parts = AnswerParts(TOKENIZER)
    assert [parts.feed(id_) for id_ in (PY, *b"x", PY_END, END)] == ["<<", "x", "", ""]
    assert parts.close() == ">>"
    # A character that a border cuts, and one that the end cuts.
    parts = AnswerParts(TOKENIZER)
    assert [parts.feed(id_) for id_ in (0xC3, PY, 0xC3)] == ["", "\ufffd<<", ""]
    assert parts.close() == "\ufffd"
    assert [part["text"] for part in parts.content()] == ["\ufffd", "\ufffd"]


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on():
    chat = scripted_chat(*ENDLESS)
    before = signal.getsignal(signal.SIGINT)
    session = Session(chat, "go", "^C", "on", "more", interrupt_at=(5, 9))
    assert signal.getsignal(signal.SIGINT) is before
    # Five pieces and a newline; three; then an answer that ends at max_tokens.
    assert "".join(session.shown) == "abcab\nabc\n" + "abc" * 8 + "\n"
    notices = [line for line in session.said if "trained on" not in line]
    assert notices == ["(stopped)", "(/quit or Ctrl-D ends)", "(stopped)"]
    assert [m["content"] for m in chat.messages[1::2]] == ["abcab", "abc", "abc" * 8]


def test_a_second_ctrl_c_interrupts_what_does_not_stop(monkeypatch):
    chat = scripted_chat(*ENDLESS)

    def hang(*_, **__):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        yield []

    monkeypatch.setattr(chat.engine, "generate", hang)
    assert Session(chat, "go").said == ["(/quit or Ctrl-D ends)"]
    assert chat.messages == []


def test_stopped_before_anything_was_said_nothing_is_kept():
    chat = scripted_chat(*ENDLESS)
    assert list(chat.answer("go", stopped=lambda: True)) == ["a"]
    assert [m["content"] for m in chat.messages] == ["go", "a"]
    chat = scripted_chat(START, PY, *b"1", PY)
    assert list(chat.answer("go", stopped=lambda: True)) == ["<<"]
    assert chat.messages == []


def test_commands():
    chat = scripted_chat(*FRIENDLY, options=ChatOptions(max_tokens=24))
    session = Session(
        chat,
        *("/temperature 0", "/top-k 0", "/top-k 3", "/help"),
        *("/nonsense", "/top-k", "/clear now", "/top-k x", "/top-k -1", "/temperature -1"),
        *("/save nowhere/at/all", "/quit", "never"),
    )
    assert (chat.options.temperature, chat.options.top_k) == (0, 3)
    assert chat.messages == []
    assert session.shown == []
    assert session.said[:3] == ["(temperature 0)", "(top-k off)", "(top-k 3)"]
    helped = [line.split()[0] for line in session.said[3:10]]
    assert helped == ["/clear", "/temperature", "/top-k", "/save", "/help", "/quit", "Ctrl-C"]
    assert session.said[10:] == [
        "error: no command /nonsense; /help lists them",
        "error: it is /top-k N",
        "error: it is /clear",
        "error: 'x' is no number",
        "error: top_k must be at least 1, or None for all, got -1",
        "error: temperature must be 0 (greedy) or more, got -1.0",
        "error: there is nothing to save yet",
    ]


def test_what_is_saved_is_what_training_reads(tmp_path):
    file = tmp_path / "talks.jsonl"
    chat = scripted_chat(*FRIENDLY)
    session = Session(
        chat, "é?", f"/save {file}", "/clear", "2", "3", f"/save {file}", "/save /x/y"
    )
    talks = Conversations([file])
    assert len(talks) == 2
    answer = {"role": "assistant", "content": "Hi é😀!"}
    assert talks[0] == {"messages": [{"role": "user", "content": "é?"}, answer]}
    assert [m["content"] for m in talks[1]["messages"][::2]] == ["2", "3"]
    assert talks[1]["messages"] == chat.messages
    assert session.said[-1] == "error: cannot write to /x/y: No such file or directory"


def test_the_limit_of_the_context():
    chat = scripted_chat(*ENDLESS)
    session = Session(chat, "x" * 140, "y", "/clear", "z" * 157)
    # 160 positions: 144 of the prompt leave 16 for the answer.
    assert session.shown == [*"abc" * 5, "a", "\n"]
    assert session.said[1] == (
        "error: with this message the conversation has 165 tokens; the model's limit is 160, its "
        "answer included: /clear starts a new one"
    )
    assert session.said[3] == (
        "error: the message has 161 tokens; the model's limit is 160, its answer included: "
        "shorten it"
    )
    assert chat.messages == []


def in_lines(chat: Chat, *lines: str) -> tuple[str, list[str], str]:
    """(what was written, what was said, the error at the end)."""
    written, said = [], []
    try:
        answer_lines(chat, lines, write=written.append, say=said.append)
    except UserError as error:
        return "".join(written), said, str(error)
    return "".join(written), said, ""


def test_lines_are_conversations_of_their_own_and_stay_beside_their_answers(monkeypatch):
    chat = scripted_chat(START, *b"a\nb\\", END)
    prompts, generate = [], chat.engine.generate
    monkeypatch.setattr(
        chat.engine, "generate", lambda p, **o: prompts.extend(p) or generate(p, **o)
    )
    lines = ["one\n", "\n", "/quit\n", "x" * 157 + "\n", "five"]
    written, said, error = in_lines(chat, *lines)
    assert written == "a\\nb\\\n\na\\nb\\\n\na\\nb\\\n"
    assert len(written.splitlines()) == len(lines)
    assert said == [
        "line 4: the message has 161 tokens; the model's limit is 160, its answer included: "
        "shorten it"
    ]
    assert error == "1 of 5 lines have no answer"
    asked = [[BOS, USER, *text, USER_END, START] for text in (b"one", b"/quit", b"five")]
    assert prompts == asked
    # As many as there are: the context never fills up.
    assert in_lines(chat, *["one"] * 40) == ("a\\nb\\\n" * 40, [], "")


def test_ctrl_c_ends_lines():
    chat = scripted_chat(*ENDLESS)
    before = signal.getsignal(signal.SIGINT)

    written = []

    def interrupted():
        yield "one"
        raise KeyboardInterrupt

    def write(piece: str) -> None:
        written.append(piece)
        if len(written) == 30:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(UserError, match="stopped at line 2"):
        answer_lines(chat, ["one", "two", "three"], write=write, say=written.append)
    assert "".join(written) == "abc" * 8 + "\nabcab\n"
    assert signal.getsignal(signal.SIGINT) is before
    # While it waits for a line.
    with pytest.raises(UserError, match="stopped at line 1"):
        answer_lines(chat, interrupted(), write=written.append, say=written.append)


def test_a_base_model_continues_each_text_by_itself():
    chat = Chat(
        Engine(scripted_model(CONFIG, (*b"once", *b" upn")), TOKENIZER), GREEDY, takes_turns=False
    )
    assert "".join(chat.answer("on")).startswith("ce up")
    assert "".join(chat.answer("on")).startswith("ce up")


def test_the_model_does_not_rule_the_terminal():
    assert printable("a\x1b[2J\x07\r\x9b é😀\n\t") == "a\ufffd[2J\ufffd\ufffd\ufffd é😀\n\t"
    chat = scripted_chat(START, 27, *b"[2J", END)
    assert "".join(Session(chat, "?").shown) == "\ufffd[2J\n"
    assert chat.messages[1]["content"] == "\x1b[2J"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(UserError, match=words):
        ChatOptions(**options)
