"""MMLU: questions of 57 subjects, from elementary mathematics to law, with four choices.

Source: cais/mmlu. The subset "all" has the splits test (14,042), validation and dev;
"auxiliary_train" has a split train of 99,842 questions from other datasets.
"""

from pathlib import Path
from typing import Literal

import pyarrow as pa

from gptfast.conversation import Conversation
from gptfast.tasks.common import MultipleChoice, read_split, render_mc

_LETTERS = ["A", "B", "C", "D"]
_COLUMNS = ["question", "subject", "choices", "answer"]


class MMLU(MultipleChoice):
    """`folder` holds a folder for each subset."""

    def __init__(
        self, folder: Path, *, subset: Literal["all", "auxiliary_train"], split: str
    ) -> None:
        if subset == "auxiliary_train":
            # Its rows lie in a single column of structs.
            nested = read_split(folder / subset, split, ["train"])["train"]
            table = pa.Table.from_struct_array(nested).select(_COLUMNS)
        else:
            table = read_split(folder / subset, split, _COLUMNS)
        super().__init__(table)

    def conversation(self, index: int) -> Conversation:
        row = self.row(index)
        prompt = render_mc(row["question"], _LETTERS, row["choices"])
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": _LETTERS[row["answer"]]},
        ]
        return {"messages": messages, "letters": _LETTERS, "subject": row["subject"]}
