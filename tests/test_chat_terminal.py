"""The terminal chat: streaming, history, commands, Ctrl-C, pipes, and a pseudo-terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from gptfast.chat_terminal import AnswerParts, Chat, ChatOptions, Terminal, printable
from gptfast.checkpoint import Checkpointer
from gptfast.conversation import render_messages
from gptfast.engine import Engine
from gptfast.errors import UserError
from gptfast.model import GPTConfig
from gptfast.tasks import Conversations
from gptfast.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.scripted import scripted_model
from train import chat as recipe

ROOT = Path(__file__).parent.parent
TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
BOS, USER, USER_END, START, END, PY, PY_END, OUT, OUT_END = (
    TOKENIZER.special_id(name) for name in SPECIAL_TOKENS
)
CONFIG = GPTConfig(sequence_len=16, vocab_size=265, n_layer=1, n_head=2, n_kv_head=2, n_embd=64)
GREEDY = ChatOptions(temperature=0, max_tokens=24)


def scripted_chat(*path: int, options: ChatOptions = GREEDY) -> Chat:
    return Chat(Engine(scripted_model(CONFIG, path), TOKENIZER), options)


FRIENDLY = (START, *"Hi é😀!".encode(), END)
# It never ends by itself.
ENDLESS = (START, *b"abc", *b"a")


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
    assert "with this message the conversation has 161 tokens" in session.said[3]
    assert chat.messages == []


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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model never ends an answer, as training leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "sft-d1"
    TOKENIZER.save(folder / "tokenizer")
    checkpointer = Checkpointer(folder / "checkpoints", keep=1)
    parameters = scripted_model(CONFIG, ENDLESS).named_parameters()
    meta = {
        "model_config": CONFIG.to_dict(),
        "tokenizer": TOKENIZER.fingerprint,
        "tokenizer_folder": str(folder / "tokenizer"),
    }
    checkpointer.save(7, {f"model.{n}": p.detach() for n, p in parameters}, {}, meta)
    checkpointer.close()
    return folder


def flags(run: Path, max_tokens: int) -> list[str]:
    return [f"--source={run}", f"--max-tokens={max_tokens}", "--temperature=0", "--device=cpu"]


def test_through_pipes_only_answers_come_out(run, monkeypatch, capsys):
    # The second message is not UTF-8.
    piped = io.TextIOWrapper(io.BytesIO(b"one\n\xff\n/temperature 0\nthree\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    monkeypatch.setattr(sys, "argv", ["chat.py", *flags(run, 4)])
    recipe.main()
    out, err = capsys.readouterr()
    assert out == "abca\n" * 3
    assert "sft-d1 (step 7) on cpu" in err
    assert "you>" not in out + err


def test_a_single_prompt(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat.py", "-p", "one", *flags(run, 5)])
    recipe.main()
    assert capsys.readouterr().out == "abcab\n"
    monkeypatch.setattr(sys, "argv", ["chat.py", "-p", "x" * 200, *flags(run, 5)])
    with pytest.raises(UserError, match="has 204 tokens; the model's limit is 160"):
        recipe.main()


def test_a_tokenizer_elsewhere_is_named(run, monkeypatch, capsys, tmp_path):
    TOKENIZER.save(tmp_path / "moved")
    command = ["chat.py", "-p", "one", *flags(run, 5)]
    monkeypatch.setattr(sys, "argv", [*command, f"--tokenizer={tmp_path / 'nowhere'}"])
    with pytest.raises(UserError, match="nowhere, which is not there: give its folder"):
        recipe.main()
    monkeypatch.setattr(sys, "argv", [*command, f"--tokenizer={tmp_path / 'moved'}"])
    recipe.main()
    assert capsys.readouterr().out == "abcab\n"


class Keyboard:
    """A program in a pseudo-terminal."""

    def __init__(self, arguments: list[str]) -> None:
        self.master, self.slave = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        # The terminal that a session's first process opens is the session's: Ctrl-C is a signal.
        opened = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self.slave)]
        # Whoever runs the tests in the background has made them ignore Ctrl-C, and all they start.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(
            [*opened, *arguments], env=environment, start_new_session=True, preexec_fn=heed
        )
        self.screen = ""

    def wait_for(self, text: str) -> None:
        """Until the text is on the screen, of which it and all before it is then forgotten."""
        deadline = time.monotonic() + 100
        while text not in self.screen:
            alive = self.process.poll() is None and time.monotonic() < deadline
            if select.select([self.master], [], [], 0.2)[0]:
                self.screen += os.read(self.master, 65536).decode(errors="replace")
            else:
                assert alive, f"{text!r} did not come; the screen: {self.screen[-2000:]}"
        self.screen = self.screen.partition(text)[2]

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C, again and again: Python does not see a signal that comes between its looking for
        one and its waiting for a key, before the next."""
        deadline = time.monotonic() + 100
        while text not in self.screen and time.monotonic() < deadline:
            self.type("\x03")
            while text not in self.screen and select.select([self.master], [], [], 2.0)[0]:
                self.screen += os.read(self.master, 65536).decode(errors="replace")
        self.wait_for(text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.fixture
def keyboard(run: Path) -> Iterator[Keyboard]:
    keyboard = Keyboard([sys.executable, str(ROOT / "train" / "chat.py"), *flags(run, 140)])
    yield keyboard
    keyboard.close()


def test_at_a_keyboard_ctrl_c_stops_the_answer_and_ctrl_d_the_program(keyboard, tmp_path):
    keyboard.wait_for("you> ")
    keyboard.type("go\n")
    keyboard.wait_for("abcabc")
    keyboard.type("\x03")
    keyboard.wait_for("(stopped)")
    keyboard.wait_for("you> ")
    keyboard.type("a line taken back")
    keyboard.wait_for("taken back")
    keyboard.interrupt_until("(/quit or Ctrl-D ends)")
    keyboard.wait_for("you> ")
    keyboard.type(f"/save {tmp_path / 'talk.jsonl'}\n")
    keyboard.wait_for("(added to")
    keyboard.wait_for("you> ")
    keyboard.type("\x04")
    assert keyboard.process.wait(timeout=30) == 0
    question, answer = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert question["content"] == "go"
    assert answer["content"].startswith("abcabc")
    assert len(answer["content"]) < 140
