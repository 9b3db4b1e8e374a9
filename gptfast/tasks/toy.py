"""A toy: say the digit that is asked for, and nothing more. Its reward is computed from the text.

Small models learn it in minutes on a CPU, from nothing but the reward: a digit, whichever, is
worth something, the right one more, and saying no more than that is worth the rest.
"""

from gptfast.conversation import Conversation
from gptfast.tasks.common import Task

_REQUESTS = ("Say {}", "Please say {}", "Answer with {}", "Write {}", "The digit {}")
# How many conversations a split has; that of a question is its digit and its wording.
SIZES = {"train": 1000, "test": 200}


class Toy(Task):
    """split: "train" or "test"; both ask the same questions."""

    eval_type = "generative"

    def __init__(self, *, split: str) -> None:
        super().__init__(SIZES[split])

    def conversation(self, index: int) -> Conversation:
        wording, digit = divmod(index, 10)
        request = _REQUESTS[wording % len(_REQUESTS)].format(digit)
        return {
            "messages": [
                {"role": "user", "content": request},
                {"role": "assistant", "content": str(digit)},
            ]
        }

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]

    def reward(self, conversation: Conversation, answer: str) -> float:
        """0.2 for any digit at the beginning, 0.6 for the right one, 1.0 for it alone."""
        if self.evaluate(conversation, answer):
            return 1.0
        if answer.startswith(conversation["messages"][-1]["content"]):
            return 0.6
        return 0.2 if answer[:1] in tuple("0123456789") else 0.0
