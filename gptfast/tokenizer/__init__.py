"""Text to tokens and back.

tokenizer   byte-pair encoding: training, encoding, special tokens
texts       what a tokenizer is trained on
files       how it lies on disk, for us and for others
evaluation  bytes a token, beside GPT-2's and GPT-4's
"""

from gptfast.tokenizer.tokenizer import (
    BOS,
    CONFIG_FILE,
    HUGGING_FACE_FILE,
    SMALLEST_VOCAB,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    check_free,
    train_tokenizer,
)

__all__ = [
    "BOS",
    "CONFIG_FILE",
    "HUGGING_FACE_FILE",
    "SMALLEST_VOCAB",
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "Tokenizer",
    "check_free",
    "train_tokenizer",
]
