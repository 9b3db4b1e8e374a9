"""Conversations of one's own, written for tests of what is trained on."""

import json
import random
from pathlib import Path


def write_conversations(
    path: Path, count: int, *, word: str = "x", longest: int = 12, first: int = 0
) -> Path:
    """Conversations of different lengths; the number of each, from `first` on, is its question."""
    draw = random.Random(word)
    with path.open("w", encoding="utf-8") as file:
        for number in range(first, first + count):
            answer = word * draw.randint(1, longest)
            messages = [
                {"role": "user", "content": f"{number}"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
