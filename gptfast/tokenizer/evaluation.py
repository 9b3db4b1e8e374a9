"""What the report tells of a tokenizer: its tokens, and its compression beside GPT-2 and GPT-4."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import tiktoken

from gptfast.errors import UserError
from gptfast.tokenizer.texts import TEXTS
from gptfast.tokenizer.tokenizer import Tokenizer

# The reports' names of tiktoken's encodings.
REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}


@dataclass(frozen=True)
class Row:
    """One text under two tokenizers: its size in bytes, and in tokens of each; theirs is None where
    the other tokenizer is not to be had."""

    text: str
    bytes: int
    theirs: int | None
    ours: int

    @property
    def their_ratio(self) -> float | None:
        return self.bytes / self.theirs if self.theirs else None

    @property
    def our_ratio(self) -> float:
        return self.bytes / self.ours

    @property
    def relative_diff(self) -> float | None:
        """How many per cent fewer tokens are ours; negative if they are more."""
        return (self.theirs - self.ours) / self.theirs * 100 if self.theirs else None

    def as_dict(self) -> dict[str, object]:
        ratios = ("their_ratio", "our_ratio", "relative_diff")
        return asdict(self) | {name: getattr(self, name) for name in ratios}


def training_summary(tokenizer: Tokenizer) -> dict[str, object]:
    """What the report tells of a trained tokenizer: its settings, and bytes a token."""
    lengths = tokenizer.token_bytes()
    lengths = lengths[lengths > 0]
    return {
        **tokenizer.training,
        "num_special_tokens": len(tokenizer.specials),
        "token_bytes_min": int(lengths.min()),
        "token_bytes_max": int(lengths.max()),
        "token_bytes_mean": float(lengths.mean()),
        "token_bytes_std": float(lengths.std(ddof=1)),
        "fingerprint": tokenizer.fingerprint,
    }


def render_summary(summary: Mapping[str, object]) -> str:
    """`- name: value` lines: 4 decimals for floats, thousands separated in large integers."""

    def spell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.4f}"
        return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)

    return "".join(f"- {name}: {spell(value)}\n" for name, value in summary.items())


def load_references() -> tuple[dict[str, tiktoken.Encoding | None], dict[str, str]]:
    """GPT-2's and GPT-4's encodings, None where one is not to be had; and of those, why."""
    found: dict[str, tiktoken.Encoding | None] = {}
    missing: dict[str, str] = {}
    for label, name in REFERENCES.items():
        try:
            found[label] = load_encoding(name)
        except UserError as error:
            found[label], missing[label] = None, str(error)
    return found, missing


def load_encoding(name: str) -> tiktoken.Encoding:
    """One of tiktoken's encodings, from its cache or the network. UserError if there is none of
    this name, or neither has it."""
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(f"tiktoken has no encoding {name!r}: choose one of {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    # OSError: no network (requests' errors are among them); ValueError: a damaged download.
    except (OSError, ValueError) as error:
        raise UserError(
            f"tiktoken's {name} cannot be loaded ({type(error).__name__}); without a network, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's files"
        ) from error


def compare(
    tokenizer: Tokenizer, train: str, val: str, references: Mapping[str, tiktoken.Encoding | None]
) -> dict[str, list[Row]]:
    """Rows for each reference: the five texts kept here, and samples of train and val text. With
    None for a reference, they tell of ours alone.

    Raises ValueError if any of the tokenizers does not give a text back byte for byte.
    """
    texts = {**TEXTS, "train": train, "val": val}
    ours = {name: _count(tokenizer.encoding, text) for name, text in texts.items()}
    return {
        label: [
            Row(name, len(text.encode()), _count(encoding, text) if encoding else None, ours[name])
            for name, text in texts.items()
        ]
        for label, encoding in references.items()
    }


def render_tables(tables: Mapping[str, list[Row]], missing: Mapping[str, str] | None = None) -> str:
    """The comparisons as Markdown tables. missing: which reference is not there, and why."""
    parts = []
    for label, rows in tables.items():
        why = (missing or {}).get(label)
        parts.append(
            f"### Comparison with {label}\n\n"
            + (f"{label} is missing: {why}\n\n" if why else "")
            + f"| Text Type | Bytes | {label} Tokens | {label} Ratio | Ours Tokens | Ours Ratio "
            f"| Relative Diff % |\n|---|---|---|---|---|---|---|\n"
        )
        parts += [
            f"| {row.text} | {row.bytes} | {_spell(row.theirs)} | {_spell(row.their_ratio, '.2f')} "
            f"| {row.ours} | {row.our_ratio:.2f} | {_spell(row.relative_diff, '+.1f', '%')} |\n"
            for row in rows
        ]
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def _spell(value: float | None, form: str = "", unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _count(encoding: tiktoken.Encoding, text: str) -> int:
    ids = encoding.encode_to_numpy(text, disallowed_special=())
    if encoding.decode_bytes(ids.tolist()) != text.encode():
        raise ValueError(f"{encoding.name} changed a text that begins with {text[:40]!r}")
    return len(ids)
