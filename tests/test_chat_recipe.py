"""train/chat.py: pipes, a single prompt, and a pseudo-terminal."""

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

from gptfast.checkpoint import Checkpointer
from gptfast.errors import UserError
from gptfast.run import exit_code
from tests.scripted import CONFIG, ENDLESS, TOKENIZER, scripted_model
from train import chat as recipe

ROOT = Path(__file__).parent.parent


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
    # The second message is not UTF-8, the third is too long.
    lines = b"one\n\xff\n" + b"x" * 200 + b"\nfour\n"
    piped = io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    monkeypatch.setattr(sys, "argv", ["chat.py", *flags(run, 4)])
    assert exit_code(recipe.main) == 2
    out, err = capsys.readouterr()
    assert out == "abca\nabca\n\nabca\n"
    first, *rest = err.splitlines()
    assert first.startswith("sft-d1 (step 7) on cpu")
    assert rest[0].startswith("line 3: the message has 204 tokens")
    assert rest[1:] == ["error: 1 of 4 lines have no answer"]


def test_who_reads_the_answers_may_leave(run, monkeypatch, capsys):
    """As head does."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        monkeypatch.setattr(sys, "argv", ["chat.py", "-p", "one", *flags(run, 5)])
        assert exit_code(recipe.main) == 0
        # What Python does with it at exit does not fail either.
        broken.flush()
    assert len(capsys.readouterr().err.splitlines()) == 1


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
