"""HumanEval: functions to write from their signature and docstring; 164 problems with tests.

Source: openai/openai_humaneval, split test. Answers are programs, so they run in the sandbox.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from gptfast.conversation import Conversation
from gptfast.sandbox import run_many, run_program
from gptfast.tasks.common import HubTask, read_split

_COLUMNS = ["prompt", "canonical_solution", "test", "entry_point"]
_CODE_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


class HumanEval(HubTask):
    """`folder` holds the split's files."""

    eval_type = "generative"

    def __init__(self, folder: Path, *, split: str = "test") -> None:
        super().__init__(read_split(folder, split, _COLUMNS))

    def conversation(self, index: int) -> Conversation:
        row = self.row(index)
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": f"{row['prompt']}\n{row['canonical_solution']}"},
        ]
        return {"messages": messages, "test": row["test"], "entry_point": row["entry_point"]}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """Whether the answer's program passes the problem's tests."""
        return run_program(program(conversation, answer)).success

    def evaluate_many(
        self, conversations: Sequence[Conversation], answers: Sequence[str]
    ) -> list[bool]:
        """`evaluate` for each pair, several programs at a time."""
        programs = [program(*pair) for pair in zip(conversations, answers, strict=True)]
        return [result.success for result in run_many(programs)]


def program(conversation: Conversation, answer: str) -> str:
    """The prompt's imports, the answer's code, the tests, and the call that runs them."""
    imports = leading_imports(conversation["messages"][0]["content"])
    call = f"check({conversation['entry_point']})"
    return f"{imports}\n\n{code_of(answer)}\n\n{conversation['test']}\n{call}"


def leading_imports(prompt: str) -> str:
    """The import lines before the first line of other code."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def code_of(answer: str) -> str:
    """The first fenced code block, or else the whole answer."""
    block = _CODE_BLOCK.search(answer)
    return (block[1] if block else answer).strip()
