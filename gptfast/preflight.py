"""What is fetched, built and checked before step 0, so that none of it fails in the middle."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from gptfast.config import BaseSettings, DataSettings
from gptfast.data import Corpus, iter_texts, prepare_corpus, shards_for
from gptfast.errors import UserError
from gptfast.memory import GIB, estimate_memory, largest_device_batch
from gptfast.model import GPTConfig, parameter_counts
from gptfast.parallel import World
from gptfast.tokenizer import Tokenizer, train_tokenizer
from kernels.cross_entropy import CHUNKS

# 4.8 to 4.9 on this text in the report's tokenizer evaluation; a little more here, so that a run
# does not start its text anew unawares.
_CHARACTERS_PER_TOKEN = 5.0
# PyTorch's allocator and CUDA itself need room beside what is counted.
_MEMORY_MARGIN = 0.92


def prepare_text(
    settings: DataSettings,
    *,
    vocab_size: int,
    tokens: int,
    world: World,
    say: Callable[[str], None],
) -> tuple[Corpus, Tokenizer]:
    """Fetch and verify the text of a run of so many tokens; load its tokenizer, or train it.

    One process a node does the work, the others find it done.
    """
    with world.node_leader_first() as first:
        corpus = prepare_corpus(
            settings.data,
            cache=settings.cache / "data",
            train_shards=shards_for(tokens, _CHARACTERS_PER_TOKEN),
            validation=settings.validation,
            progress=first,
        )
        tokenizer = _load_or_train(settings, corpus, vocab_size, say)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer holds {tokenizer.vocab_size} tokens, not --vocab-size {vocab_size}: "
            f"give --vocab-size {tokenizer.vocab_size}, or another --tokenizer"
        )
    return corpus, tokenizer


def _load_or_train(
    settings: DataSettings, corpus: Corpus, vocab_size: int, say: Callable[[str], None]
) -> Tokenizer:
    folder = settings.tokenizer
    if folder is None:
        folder = tokenizer_folder(settings.cache, corpus.name, vocab_size)
        if not folder.exists():
            say(f"no tokenizer of {vocab_size} tokens for this text yet: training one")
            limits = {"max_chars": settings.tokenizer_chars, "doc_cap": 10_000}
            texts = iter_texts(corpus.train, **limits)
            train_tokenizer(texts, folder, vocab_size=vocab_size, settings=limits)
    tokenizer = Tokenizer.load(folder)
    say(f"tokenizer: {tokenizer.vocab_size} tokens, {folder}")
    return tokenizer


def check_memory(settings: BaseSettings, config: GPTConfig, accumulation: int, world: World) -> str:
    """One line with the estimate of this run's GPU memory; UserError if it cannot fit, with the
    largest device batch that should."""
    shared = {
        "shards": world.local_size,
        "accumulates": accumulation > 1,
        "logits_chunks": CHUNKS,
        "bytes_per_value": 2 if world.device.type == "cuda" else 4,
    }
    batch = settings.optim.device_batch_size
    estimate = estimate_memory(config, device_batch_size=batch, **shared)
    if world.device.type != "cuda":
        return f"memory: about {estimate} a process"
    available = torch.cuda.get_device_properties(world.device).total_memory
    if estimate.total > _MEMORY_MARGIN * available:
        # A smaller batch is accumulated, which keeps fp32 gradients of all parameters.
        smaller = {**shared, "accumulates": True}
        most = largest_device_batch(int(_MEMORY_MARGIN * available), config, **smaller)
        advice = f"--device-batch-size {most} should fit" if most else "no batch size fits"
        raise UserError(
            f"not enough GPU memory: {batch} sequences of {config.sequence_len} take about "
            f"{estimate}, the GPU has {available / GIB:.1f} GiB; {advice}"
        )
    return f"memory: about {estimate} of {available / GIB:.1f} GiB a GPU"


def check_disk(folder: Path, keep: int, config: GPTConfig) -> None:
    """UserError unless the checkpoints of a run fit on its disk: those kept, and one in writing."""
    counts = parameter_counts(config)
    # fp32: a parameter and its momentum for Muon, and two moments for AdamW.
    one = 4 * (2 * counts["blocks"] + 3 * (counts["embedding"] + counts["head"]))
    free = shutil.disk_usage(folder).free
    if free < (keep + 1) * one:
        raise UserError(
            f"{keep} checkpoints of {one / 1e9:.2f} GB and one being written need "
            f"{(keep + 1) * one / 1e9:.2f} GB; {folder} has {free / 1e9:.2f} GB free: "
            "keep fewer (--keep), or put the run elsewhere (--out)"
        )


def tokenizer_folder(cache: Path, corpus_name: str, vocab_size: int) -> Path:
    """Where the cache keeps the tokenizer of a text. A text given by its path is told from others
    of the same last name by a digest of the whole path."""
    name = Path(corpus_name).name
    if name != corpus_name:
        digest = hashlib.sha256(str(Path(corpus_name).absolute()).encode()).hexdigest()
        name = f"{name}-{digest[:8]}"
    return cache / "tokenizers" / f"{name}-{vocab_size}"
