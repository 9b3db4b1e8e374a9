"""GSM8K: grade school mathematics in words.

Source: openai/gsm8k. Subset main, splits train (7,473) and test (1,319). An answer calls the
calculator as it goes, `<<12/60=0.2>>`, and ends with `#### 10`.
"""

import re
from pathlib import Path

from gptfast.conversation import PYTHON, PYTHON_OUTPUT, TEXT, Conversation
from gptfast.tasks.common import HubTask, read_split

_CALL = re.compile(r"<<([^>]+)>>")
_RESULT = re.compile(r"#### (-?[0-9.,]+)")


class GSM8K(HubTask):
    """`folder` holds a folder for each subset."""

    eval_type = "generative"

    def __init__(self, folder: Path, *, subset: str = "main", split: str) -> None:
        super().__init__(read_split(folder / subset, split, ["question", "answer"]))

    def conversation(self, index: int) -> Conversation:
        row = self.row(index)
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": answer_parts(row["answer"])},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """Whether the answer states the right result, written the same but for commas."""
        right = conversation["messages"][-1]["content"][-1]["text"]
        stated = stated_result(answer)
        return stated is not None and stated == stated_result(right)

    def reward(self, conversation: Conversation, answer: str) -> float:
        """1.0 for a right answer, otherwise 0.0."""
        return float(self.evaluate(conversation, answer))


def answer_parts(answer: str) -> list[dict[str, str]]:
    """Text, calls of the calculator and their results, in order."""
    parts = []
    # Split at a group, texts and calls alternate.
    for position, piece in enumerate(_CALL.split(answer)):
        if position % 2:
            # A call without a result is all expression.
            expression, _, result = piece.rpartition("=") if "=" in piece else (piece, "", "")
            parts.append({"type": PYTHON, "text": expression})
            parts.append({"type": PYTHON_OUTPUT, "text": result})
        elif piece:
            parts.append({"type": TEXT, "text": piece})
    return parts


def stated_result(answer: str) -> str | None:
    """The number after the first `#### `, without commas; None if there is none."""
    found = _RESULT.search(answer)
    return found[1].replace(",", "") if found else None
