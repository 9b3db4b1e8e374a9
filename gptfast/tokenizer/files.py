"""The bytes of a saved tokenizer: tiktoken's rank file and Hugging Face's tokenizer.json."""

import base64
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any


def format_ranks(tokens: Sequence[bytes]) -> bytes:
    """One `base64 rank` a line, as tiktoken.load.load_tiktoken_bpe reads it."""
    return b"".join(b"%b %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(tokens))


def parse_ranks(text: bytes) -> dict[bytes, int]:
    """token -> rank out of `format_ranks`' lines; ValueError with the number of a bad line."""
    ranks = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"line {number} is not `base64 rank`") from error
    return ranks


def merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token beyond the single bytes was merged from, in rank order.

    A merge never crosses the borders of a later token, so encoding the token's own bytes with the
    merges before it ends in the two halves that it was made of.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            # The token itself never stands for a pair of its parts, so its rank is the limit.
            candidates = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            first = min(candidates)
            if first >= rank:
                raise ValueError(f"token {rank} ({token!r}) is not a merge of two earlier tokens")
            at = candidates.index(first)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def hugging_face_json(
    tokens: Sequence[bytes], specials: Mapping[str, int], pattern: str
) -> dict[str, Any]:
    """The content of tokenizer.json (format of the `tokenizers` package, version 1.0).

    The same ids as tiktoken's, but special tokens found in a text are parsed, as everywhere in
    that package (its `encode_special_tokens = True` turns that off); no token is added to a text.
    """
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": name, **flags, "special": True} for name, id_ in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spell(token): rank for rank, token in enumerate(tokens)},
            "merges": [f"{spell(a)} {spell(b)}" for a, b in merges(tokens)],
        },
    }


def _byte_letters() -> list[str]:
    """The printable character for each byte in byte-level BPE files (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other 68 bytes take U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
