"""Byte-level BPE: rustbpe learns the merges, tiktoken encodes, three plain files keep the result.

    tokenizer.tiktoken     the mergeable tokens, one `base64 rank` a line, as tiktoken reads them
    tokenizer_config.json  split pattern, special tokens, fingerprint, how it was trained
    tokenizer.json         the same tokenizer for Hugging Face's tokenizers and transformers

The first two are what `Tokenizer.load` reads, and it verifies them by their fingerprint; the third
is written for others and never read here. Ids: 256 bytes, then the merges in the order in which
they were learned, then the special tokens. Text is never searched for special tokens: a document
that spells `<|bos|>` gets ordinary ids for it.
"""

import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from gptfast.errors import UserError
from gptfast.tokenizer.files import format_ranks, hugging_face_json, parse_ranks

# GPT-4's pattern (cl100k_base in tiktoken) but for digits, which come in runs of at most two
# rather than three: a small vocabulary has better uses for a thousand numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BOS = "<|bos|>"
SPECIAL_TOKENS = (
    BOS,
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

RANKS_FILE = "tokenizer.tiktoken"
CONFIG_FILE = "tokenizer_config.json"
HUGGING_FACE_FILE = "tokenizer.json"
_CONFIG_KEYS = ("pattern", "special_tokens", "training")

# What one thread encodes in one call, in characters: enough that it seldom asks for the
# interpreter's lock, which a busy thread gives up every 5 ms only (beside one, groups gave 1.7 to
# 4 times the throughput of a call for each document of 5,000 characters: Python 3.11, tiktoken
# 0.14, 2 cores, 2026-11); little enough that threads finish together.
_GROUP_CHARS = 65_536
# tiktoken's regex engine remembers one state for each whitespace character of a run and panics
# beyond a million, so longer runs are encoded in parts of this many characters.
_LONGEST_WHITESPACE = 500_000


class Tokenizer:
    """Text to ids and back.

    Args:
        ranks: token bytes -> rank; ranks are 0..n-1, the 256 single bytes among the tokens.
        pattern: the regular expression that cuts text before merging.
        specials: names of the special tokens; their ids follow the ranks in this order.
        training: how it was trained (JSON values), kept in the saved configuration.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        *,
        pattern: str = SPLIT_PATTERN,
        specials: Sequence[str] = SPECIAL_TOKENS,
        training: Mapping[str, object] | None = None,
    ) -> None:
        self.tokens = sorted(ranks, key=ranks.__getitem__)
        if [ranks[token] for token in self.tokens] != list(range(len(ranks))):
            raise UserError(f"the ranks of {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
        missing = sum(bytes([byte]) not in ranks for byte in range(256))
        if missing:
            raise UserError(f"{missing} of the 256 single bytes have no rank")
        if BOS not in specials:
            raise UserError(f"the special tokens {list(specials)} lack {BOS}")
        self.pattern = pattern
        self.specials = {name: len(ranks) + i for i, name in enumerate(specials)}
        self.training = dict(training or {})
        self.encoding = tiktoken.Encoding(
            "gptfast",
            pat_str=pattern,
            mergeable_ranks=dict(ranks),
            special_tokens=self.specials,
            explicit_n_vocab=len(ranks) + len(self.specials),
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn `vocab_size` tokens, special ones included; equal counts: the smaller pair first.

        Raises UserError if vocab_size has no room for bytes and special tokens, or if the texts
        run out of pairs to merge.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
                f"special tokens need {SMALLEST_VOCAB}"
            )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(
            iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN
        )
        possible = trainer.vocab_size + len(SPECIAL_TOKENS)
        if possible < vocab_size:
            raise UserError(
                f"the text is too small for a vocabulary of {vocab_size}: it allows "
                f"{possible - SMALLEST_VOCAB} of {vocab_size - SMALLEST_VOCAB} merges; give more "
                f"text or a vocab_size of at most {possible}"
            )
        return cls({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + len(self.specials)

    @property
    def bos_id(self) -> int:
        return self.specials[BOS]

    def special_id(self, name: str) -> int:
        """Id of a special token by its full name, such as `<|user_start|>`."""
        if name not in self.specials:
            raise ValueError(f"no special token {name!r}; there are {', '.join(self.specials)}")
        return self.specials[name]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of pattern, special tokens and ranks: equal if and only if all ids are."""
        return _fingerprint(self.pattern, self.specials, format_ranks(self.tokens))

    def encode(self, text: str, prepend: int | None = None) -> list[int]:
        """Ids of one text, after the id `prepend` if given. Lone surrogates become U+FFFD."""
        ids = [] if prepend is None else [prepend]
        for part in _encodable_parts(text):
            ids += self.encoding.encode_ordinary(part)
        return ids

    def encode_documents(self, texts: Sequence[str], threads: int = 4) -> np.ndarray:
        """(N,) int32: the ids of all texts in order, `<|bos|>` before each of them."""
        groups = list(_groups(texts, _GROUP_CHARS))
        # Starting threads costs far less than a group, and none are left behind to be forked.
        if threads > 1 and len(groups) > 1:
            with ThreadPoolExecutor(min(threads, len(groups))) as pool:
                parts = list(pool.map(self._encode_group, groups))
        else:
            parts = [self._encode_group(group) for group in groups]
        return np.concatenate([np.empty(0, dtype=np.int32), *parts])

    def _encode_group(self, texts: list[str]) -> np.ndarray:
        # One call for the group, with <|bos|> between the documents as the only special token
        # that is parsed: tiktoken works without the interpreter's lock and makes no Python ints.
        # <|bos|> does not overlap itself, so if no document holds it, it is found where it was
        # put and nowhere else.
        joined = BOS + BOS.join(texts)
        if len(joined) > _LONGEST_WHITESPACE or any(BOS in text for text in texts):
            ids = [id_ for text in texts for id_ in self.encode(text, prepend=self.bos_id)]
            return np.array(ids, dtype=np.int32)
        try:
            ids = self._encode_to_numpy(joined)
        except UnicodeEncodeError:
            ids = self._encode_to_numpy(_without_surrogates(joined))
        return ids.view(np.int32)

    def _encode_to_numpy(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, allowed_special={BOS}, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.encoding.decode_bytes([int(id_) for id_ in ids])

    def token_bytes(self) -> np.ndarray:
        """(V,) int32: how many bytes of text each token stands for; 0 for special tokens.

        Counted on the raw bytes: a token that is a part of a character has its true length.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        lengths[: len(self.tokens)] = [len(token) for token in self.tokens]
        return lengths

    def save(self, folder: Path | str) -> None:
        """Write the three files into a new folder, which appears whole or not at all.

        Raises UserError if the folder holds anything but this very tokenizer.
        """
        folder = Path(folder).absolute()
        scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        hugging_face = hugging_face_json(self.tokens, self.specials, self.pattern)
        try:
            scratch.mkdir(parents=True)
            (scratch / RANKS_FILE).write_bytes(format_ranks(self.tokens))
            (scratch / CONFIG_FILE).write_text(json.dumps(self._config(), indent=2) + "\n")
            (scratch / HUGGING_FACE_FILE).write_text(json.dumps(hugging_face) + "\n")
            scratch.rename(folder)
        except OSError:
            # Another process may have trained the same and been faster.
            saved = (folder / CONFIG_FILE).is_file()
            if not saved or Tokenizer.load(folder).fingerprint != self.fingerprint:
                check_free(folder)
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Read and verify what `save` wrote. Raises UserError naming the file that is wrong."""
        config_file, ranks_file = Path(folder) / CONFIG_FILE, Path(folder) / RANKS_FILE
        for file in (config_file, ranks_file):
            if not file.is_file():
                raise UserError(
                    f"no tokenizer in {folder}: {file.name} is missing; "
                    f"`python train/tokenizer.py --out {folder}` makes one"
                )
        ranks_text = ranks_file.read_bytes()
        try:
            config = json.loads(config_file.read_bytes())
            pattern, specials, training = (config[key] for key in _CONFIG_KEYS)
            expected = config["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{config_file} is not a gptfast tokenizer's: {error!r}") from error
        found = _fingerprint(pattern, specials, ranks_text)
        if found != expected:
            raise UserError(
                f"{ranks_file} does not belong to its {CONFIG_FILE}, or one of them is damaged: "
                f"fingerprint {found[:12]}, expected {str(expected)[:12]}"
            )
        try:
            ranks = parse_ranks(ranks_text)
            return cls(ranks, pattern=pattern, specials=tuple(specials), training=training)
        except ValueError as error:
            raise UserError(f"{ranks_file} holds no valid tokenizer: {error}") from error

    def _config(self) -> dict[str, object]:
        return {
            "pattern": self.pattern,
            "special_tokens": self.specials,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "training": self.training,
            # What transformers.AutoTokenizer wants to find.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "additional_special_tokens": [name for name in self.specials if name != BOS],
            "clean_up_tokenization_spaces": False,
        }


def train_tokenizer(
    texts: Iterable[str],
    folder: Path | str,
    *,
    vocab_size: int,
    settings: Mapping[str, object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tokenizer:
    """Train on all of the texts and save the result in `folder`, which must be free.

    `progress` is called with the characters of each text. The tokenizer's `training` records
    `settings` (how the texts were chosen), vocab_size, what was read (`documents`, `characters`)
    and `train_time`: seconds, reading included.
    """
    check_free(folder)
    read = {"documents": 0, "characters": 0}

    def counted() -> Iterator[str]:
        for text in texts:
            read["documents"] += 1
            read["characters"] += len(text)
            if progress is not None:
                progress(len(text))
            yield text

    start = time.perf_counter()
    tokenizer = Tokenizer.train(counted(), vocab_size)
    seconds = time.perf_counter() - start
    record = {**(settings or {}), "vocab_size": vocab_size, **read, "train_time": seconds}
    tokenizer.training = record
    tokenizer.save(folder)
    return tokenizer


def check_free(folder: Path | str) -> None:
    """UserError unless the folder is empty or does not exist: nothing is overwritten."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already: name a new folder, or remove it first")


def _fingerprint(pattern: str, specials: Mapping[str, int], ranks_text: bytes) -> str:
    head = json.dumps([pattern, specials]).encode()
    return hashlib.sha256(head + b"\n" + ranks_text).hexdigest()


def _groups(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
    """The texts in order, in groups that end once they reach `chars` characters."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= chars:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encodable_parts(text: str) -> list[str]:
    """The text, cut after every 500,000 characters of one run of whitespace."""
    if len(text) <= _LONGEST_WHITESPACE:
        return [text]
    runs = re.finditer(rf"\s{{1,{_LONGEST_WHITESPACE}}}", text)
    cuts = [run.end() for run in runs if run.end() - run.start() == _LONGEST_WHITESPACE]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


def _without_surrogates(text: str) -> str:
    """Pairs of surrogates joined, lone ones replaced: what tiktoken's encode_ordinary does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
