"""ARC: science questions of American school exams, an easy and a challenging set.

Source: allenai/ai2_arc. Splits train (2,251 easy, 1,119 challenging), validation and test (2,376,
1,172). Most questions have four choices, some three or five, some with the labels 1 to 4.
"""

from pathlib import Path
from typing import Literal

from gptfast.conversation import Conversation
from gptfast.tasks.common import MultipleChoice, read_split, render_mc


class ARC(MultipleChoice):
    """`folder` holds a folder for each subset."""

    def __init__(
        self, folder: Path, *, subset: Literal["ARC-Easy", "ARC-Challenge"], split: str
    ) -> None:
        super().__init__(read_split(folder / subset, split, ["question", "choices", "answerKey"]))

    def conversation(self, index: int) -> Conversation:
        row = self.row(index)
        letters = row["choices"]["label"]
        prompt = render_mc(row["question"], letters, row["choices"]["text"])
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": row["answerKey"]},
        ]
        return {"messages": messages, "letters": letters}
