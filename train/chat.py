"""Talk to a trained model in the terminal.

    python train/chat.py                                       the best model in runs/ that had SFT
    python train/chat.py --source rl --temperature 0.8
    python train/chat.py --source runs/my-run --step 600 -p "Why is the sky blue?"
    python train/chat.py < questions.txt > answers.txt         a line, an answer

/help lists what can be typed besides messages; Ctrl-C stops an answer.

Without a keyboard each line is a conversation of its own, and none a command. Its answer is one
line, in which \\n stands for a newline. A line that is refused gets an empty one; stderr says why,
and the exit status is 2.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from gptfast.chat_terminal import Chat, ChatOptions, Terminal, answer_lines
from gptfast.engine import Engine
from gptfast.evaluate.loading import Placement, load_subject
from gptfast.run import exit_code, find_run


@dataclass(frozen=True)
class ChatSettings:
    source: str = "sft"
    """A stage, of which the best run in runs/ is taken: sft, mid, rl, base; or a run's folder."""
    step: int | None = None
    """Which of its checkpoints; the newest otherwise."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, if it is not where the run had it."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """One message to answer, instead of a conversation."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """0 always takes the likeliest token."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Draw from so many of the likeliest tokens; 0: from all."""
    max_tokens: int = 256
    """The longest answer."""
    seed: int | None = None
    """Makes answers repeatable."""
    device: Literal["auto", "cpu"] = "auto"


def main() -> None:
    settings = tyro.cli(ChatSettings, description=__doc__)
    try:
        run(settings)
    except BrokenPipeError:
        # Who reads the answers has enough, as head does. What is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(settings: ChatSettings) -> None:
    options = ChatOptions(settings.temperature, settings.top_k or None, settings.max_tokens)
    if settings.seed is not None:
        torch.manual_seed(settings.seed)

    on_gpu = torch.cuda.is_available() and settings.device == "auto"
    placement = Placement(torch.device("cuda" if on_gpu else "cpu"))
    subject = load_subject(
        find_run(settings.source), placement, step=settings.step, tokenizer=settings.tokenizer
    )
    say(f"{subject.name} on {placement.device}, {placement.torch_dtype}")
    takes_turns = subject.stage != "base"
    if not takes_turns:
        say("a base model knows no conversations: it continues what you write")

    # Compiling would take longer than most conversations save by it.
    engine = Engine(subject.model, subject.tokenizer, max_rows=1, compiled=False)
    chat = Chat(engine, options, takes_turns=takes_turns)
    terminal = Terminal(chat, read=ask, write=write, say=say)
    # What the terminal's encoding lacks, or is no text in a pipe, ends no conversation.
    # pyrefly: ignore[missing-attribute]  (a TextIOWrapper unless it is replaced)
    sys.stdout.reconfigure(errors="replace")
    if settings.prompt is not None:
        terminal.answer(settings.prompt)
        return
    # pyrefly: ignore[missing-attribute]  (as above)
    sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        answer_lines(chat, sys.stdin, write=write, say=say)
        return
    # With it, input() lets a line be edited and recalls earlier ones.
    import readline  # noqa: F401

    say("/help lists the commands")
    terminal.run()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(text: str) -> None:
    print(text, end="", flush=True)


def ask(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        # The shell's own prompt shall not follow ours.
        write("\n")
        raise


if __name__ == "__main__":
    sys.exit(exit_code(main))
