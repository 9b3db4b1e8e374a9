"""Answers from a model: batches of rows that come and go, a cache, the calculator.

engine        what to ask: prompts in, tokens out
generation    the loop: rows that join, step and leave
cached_model  the model's part of it, with keys and values kept
kv_cache      these
few_rows      a step of few rows by hand-written kernels
graphs        CUDA graphs of steps and prefills
sampling      from logits to tokens
tool_use      the calculator as the model sees it
calculator    arithmetic, and nothing else
speech        what was said, what was computed
"""

from gptfast.engine.engine import PATIENCE, STOP_TOKENS, Engine, TextStream

__all__ = ["PATIENCE", "STOP_TOKENS", "Engine", "TextStream"]
