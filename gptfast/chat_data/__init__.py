"""Conversations to train on: what is mixed, its tokens, rows of them, batches."""

from gptfast.chat_data.loader import RowLoader
from gptfast.chat_data.mixture import (
    MID_TRAIN,
    MID_VAL,
    SFT_TRAIN,
    SFT_VAL,
    Mixture,
    Mixtures,
    check_parts,
    folders_to_fetch,
    open_mixtures,
)
from gptfast.chat_data.rows import PackedRows, StreamRows
from gptfast.chat_data.tokens import Tokens, tokenise

__all__ = [
    "MID_TRAIN",
    "MID_VAL",
    "SFT_TRAIN",
    "SFT_VAL",
    "Mixture",
    "Mixtures",
    "PackedRows",
    "RowLoader",
    "StreamRows",
    "Tokens",
    "check_parts",
    "folders_to_fetch",
    "open_mixtures",
    "tokenise",
]
