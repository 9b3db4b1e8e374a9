"""What the model says to seven fixed prompts, greedily: the training report's samples."""

from gptfast.engine import Engine
from gptfast.model import GPT
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
    # So few tokens do not earn a compilation.
    engine = Engine(model, tokenizer, compiled=False)
    # Only a toy's context is shorter than a prompt.
    room = engine.context - max_tokens
    prompts = [tokenizer.encode(prompt, prepend=tokenizer.bos_id)[-room:] for prompt in PROMPTS]
    sequences, _ = engine.generate_batch(prompts, max_tokens=max_tokens, temperature=0)
    return [tokenizer.decode(ids) for ids in sequences]
