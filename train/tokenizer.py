"""Train the tokenizer: byte-level BPE on the training text, then compare it with GPT-2 and GPT-4.

    python train/tokenizer.py --out runs/tokenizer                      65,536 tokens, FineWeb-Edu
    python train/tokenizer.py --out my_tokenizer --data my_texts/ --vocab-size 16384
    python train/tokenizer.py --out tiny --data embedded --vocab-size 4096       nothing fetched
    python train/tokenizer.py show runs/tokenizer my.jsonl              what is learned of it

Without a network, GPT-2 and GPT-4 are there only if TIKTOKEN_CACHE_DIR names a folder with
tiktoken's files; what is not there is told, and ours evaluated alone.
`show` prints one's own conversations as SFT trains on them: green, in a terminal, is what the
assistant learns to say.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from gptfast.config import DEFAULT_CACHE, at_least_one
from gptfast.conversation import Rendered, coloured, marked, render
from gptfast.data import Corpus, iter_texts, prepare_corpus
from gptfast.run import exit_code, write_json, write_section
from gptfast.tasks import Conversations
from gptfast.tokenizer import Tokenizer, check_free, train_tokenizer
from gptfast.tokenizer.evaluation import (
    compare,
    load_references,
    render_summary,
    render_tables,
    training_summary,
)

# Tokenizers are compared on the first row group of the training and of the validation text (five
# million characters in FineWeb-Edu's shards), up to this many characters.
SAMPLE_CHARS = 10_000_000


@dataclass(frozen=True)
class Settings:
    out: Path
    """New folder for the tokenizer and its report."""
    data: str = "fineweb-edu"
    """fineweb-edu, embedded (the standard library's own text), or a file or folder of parquet,
    jsonl(.gz, .zst) or txt."""
    validation: str | None = None
    """File of the folder that validates; its last in sorted order otherwise."""
    train_shards: int | None = 8
    """Shards of fineweb-edu to fetch: 8 hold about 2 billion characters."""
    vocab_size: int = 65_536
    max_chars: int = 2_000_000_000
    """Characters to train on, after capping."""
    doc_cap: int = 10_000
    """Characters of a document that are used."""
    cache: Path = DEFAULT_CACHE
    """Where fetched text is kept."""

    def __post_init__(self) -> None:
        at_least_one(self, "train_shards", "vocab_size", "max_chars", "doc_cap")


@dataclass(frozen=True)
class ShowSettings:
    tokenizer: tyro.conf.Positional[Path]
    """Its folder: runs/sft-d20/tokenizer, say."""
    conversations: tyro.conf.Positional[Path]
    """.jsonl or .parquet of {"messages": [...]}; all of it is checked."""
    count: int = 3
    """How many to print, from the first."""
    max_tokens: int = 2048
    """Where each is cut: the model's sequence_len."""

    def __post_init__(self) -> None:
        at_least_one(self, "count", "max_tokens")


def main() -> None:
    if sys.argv[1:2] == ["show"]:
        show(tyro.cli(ShowSettings, args=sys.argv[2:], prog="tokenizer.py show"))
        return
    settings = tyro.cli(Settings, description=__doc__)
    check_free(settings.out)
    corpus = prepare_corpus(
        settings.data,
        cache=settings.cache / "data",
        train_shards=settings.train_shards,
        validation=settings.validation,
        progress=True,
    )
    print(f"text: {corpus.split}")
    tokenizer = train(settings, corpus)
    summary = training_summary(tokenizer)
    write_section(settings.out, "Tokenizer training", render_summary(summary))
    evaluation = evaluate(tokenizer, corpus, settings.out)
    write_json(settings.out / "report.json", {"training": summary, "evaluation": evaluation})
    print(f"tokenizer: {tokenizer.vocab_size:,} tokens, {settings.out}")


def train(settings: Settings, corpus: Corpus) -> Tokenizer:
    texts = iter_texts(corpus.train, doc_cap=settings.doc_cap, max_chars=settings.max_chars)
    with tqdm(total=settings.max_chars, unit="char", unit_scale=True, desc="reading") as bar:
        return train_tokenizer(
            texts,
            settings.out,
            vocab_size=settings.vocab_size,
            settings={
                "data": corpus.name,
                "max_chars": settings.max_chars,
                "doc_cap": settings.doc_cap,
            },
            progress=bar.update,
        )


def evaluate(tokenizer: Tokenizer, corpus: Corpus, folder: Path) -> dict[str, object]:
    references, missing = load_references()
    train, val = (
        "\n".join(iter_texts(groups[:1], max_chars=SAMPLE_CHARS))
        for groups in (corpus.train, corpus.val)
    )
    tables = compare(tokenizer, train, val, references)
    text = render_tables(tables, missing)
    write_section(folder, "Tokenizer evaluation", text)
    print(text)
    rows = {label: [row.as_dict() for row in rows] for label, rows in tables.items()}
    return {**rows, "missing": missing}


def show(settings: ShowSettings) -> None:
    tokenizer = Tokenizer.load(settings.tokenizer)
    conversations = Conversations([settings.conversations])
    draw = coloured if sys.stdout.isatty() else marked
    for number, conversation in enumerate(conversations[: settings.count], start=1):
        whole = render(tokenizer, conversation, max_tokens=None)
        rendered = Rendered(*(part[: settings.max_tokens] for part in whole))
        size, learned = f"{len(whole.ids)} tokens", sum(rendered.mask)
        if rendered != whole:
            size = f"cut after {settings.max_tokens} of {size}"
        left_out = "" if learned else ": SFT leaves it out"
        print(
            f"conversation {number} of {len(conversations)}: {size}, {learned} of them learned"
            f"{left_out}"
        )
        print(draw(tokenizer, rendered), end="\n\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
