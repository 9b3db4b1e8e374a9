"""What the model says to seven fixed prompts, greedily: the training report's samples."""

from gptfast.model import GPT, generate
from gptfast.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def samples(model: GPT, tokenizer: Tokenizer, *, max_tokens: int = 16) -> list[str]:
    """Prompt and greedy continuation, one string a prompt."""
    return [
        tokenizer.decode(
            generate(model, tokenizer.encode(prompt, prepend=tokenizer.bos_id), max_tokens)
        )
        for prompt in PROMPTS
    ]
