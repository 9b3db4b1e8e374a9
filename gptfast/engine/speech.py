"""Tokens of an answer as what is said, asked of the calculator, and answered by it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gptfast.conversation import PYTHON, PYTHON_OUTPUT, TEXT
from gptfast.engine.engine import TextStream
from gptfast.tokenizer import Tokenizer

# What begins behind each of these tokens.
_MARKS = {
    "<|python_start|>": PYTHON,
    "<|python_end|>": TEXT,
    "<|output_start|>": PYTHON_OUTPUT,
    "<|output_end|>": TEXT,
}


class Piece(NamedTuple):
    """More text of one type; a message's parts are pieces, those of one part joined."""

    type: str
    text: str


class Speech:
    """Pieces as they become known: whole characters only, and nothing that may yet turn out to
    begin one of the `stop` strings, which end what is said and are not part of it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._marks = {tokenizer.special_id(name): type_ for name, type_ in _MARKS.items()}
        self._stream, self._type, self._stop = TextStream(tokenizer), TEXT, stop
        # Said, but not told yet.
        self._held = ""

    def feed(self, ids: Iterable[int]) -> list[Piece]:
        pieces: list[Piece] = []
        run: list[int] = []
        for id_ in ids:
            if id_ not in self._marks:
                run.append(id_)
                continue
            pieces += self._tell(self._stream.feed(run) + self._stream.close(), last=True)
            self._type, run = self._marks[id_], []
        return _joined(pieces + self._tell(self._stream.feed(run), last=False))

    def close(self) -> list[Piece]:
        """What was kept back."""
        return _joined(self._tell(self._stream.close(), last=True))

    def _tell(self, text: str, *, last: bool) -> list[Piece]:
        if self.stopped:
            return []
        if self._type == TEXT:
            text = self._until_stop(self._held + text, last=last)
        return [Piece(self._type, text)] if text else []

    def _until_stop(self, text: str, *, last: bool) -> str:
        self._held = ""
        found = [at for string in self._stop if (at := text.find(string)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if last:
            return text
        keep = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of the text are the beginning of the string."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].type == piece.type:
            joined[-1] = Piece(piece.type, joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined


def text_of(pieces: Iterable[Piece]) -> str:
    """What is said; the calculator's share left out."""
    return "".join(piece.text for piece in pieces if piece.type == TEXT)


def parts_of(pieces: Sequence[Piece]) -> list[dict[str, str]] | None:
    """A message's parts; None where text is all there is."""
    pieces = _joined(pieces)
    if all(piece.type == TEXT for piece in pieces):
        return None
    return [piece._asdict() for piece in pieces]
