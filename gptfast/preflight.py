"""What is fetched, built and checked before step 0, so that none of it fails in the middle."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptfast.chat_data import Tokens, open_mixtures, tokenise
from gptfast.chat_data.mixture import EMBEDDED
from gptfast.checkpoint.files import DISCARDED, PARTIAL, list_steps, step_folder
from gptfast.config import DataSettings
from gptfast.config_chat import AccuracySettings, MixtureSettings
from gptfast.data import Corpus, iter_texts, prepare_corpus, shards_for
from gptfast.errors import UserError
from gptfast.memory import (
    GIB,
    USABLE_SHARE,
    MemoryEstimate,
    checkpoint_bytes,
    estimate_memory,
    largest_device_batch,
)
from gptfast.model import GPTConfig
from gptfast.parallel import World
from gptfast.tasks import Task, chat_task
from gptfast.tasks.embedded import ChosenSums
from gptfast.tokenizer import Tokenizer, train_tokenizer
from kernels.cross_entropy import CHUNKS
from kernels.launch import INTERPRETED


def prepare_text(
    settings: DataSettings,
    *,
    vocab_size: int,
    tokens: int,
    world: World,
    say: Callable[[str], None],
    kept: Path | None = None,
) -> tuple[Corpus, Tokenizer]:
    """Fetch and verify the text of a run of so many tokens; load its tokenizer, or train it.

    kept: where a run that is resumed may have its tokenizer, whatever became of the text.

    One process a node does the work, the others find it done.
    """
    with world.node_leader_first() as first:
        corpus = prepare_corpus(
            settings.data,
            cache=settings.cache / "data",
            train_shards=shards_for(tokens),
            validation=settings.validation,
            progress=first,
        )
        say(f"text: {corpus.split}")
        _check_documents(corpus, world.size)
        tokenizer = _load_or_train(settings, corpus, vocab_size, say, kept)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer holds {tokenizer.vocab_size} tokens, not --vocab-size {vocab_size}: "
            f"give --vocab-size {tokenizer.vocab_size}, or another --tokenizer"
        )
    return corpus, tokenizer


def _check_documents(corpus: Corpus, processes: int) -> None:
    """UserError unless each process has a document to train on and one to validate with."""
    parts = (
        ("train on", corpus.train, "more text"),
        ("validate with", corpus.val, "a --validation file with more of them"),
    )
    for use, groups, more in parts:
        documents = sum(group.rows for group in groups)
        if documents < processes:
            raise UserError(
                f"{corpus.name} has {documents} document(s) to {use}, too few for {processes} "
                f"processes to share: give {more}, or start fewer processes"
            )


def prepare_conversations(
    settings: MixtureSettings,
    tokenizer: Tokenizer,
    *,
    train: Sequence[str],
    val: Sequence[str],
    val_tokens: int,
    max_tokens: int,
    world: World,
    say: Callable[[str], None],
) -> tuple[Tokens, Tokens]:
    """The tokens of the training and of the validation conversations, of the latter about
    val_tokens; each conversation cut after max_tokens. train, val: parts of the reference's
    mixtures, for where the settings name none.

    One process a node does the work, the others find it done.
    """
    with world.node_leader_first() as first:
        mixtures = open_mixtures(settings, train=train, val=val, progress=first)
        on_disk = partial(
            tokenise,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            cache=settings.cache,
            progress=first,
        )
        found = on_disk(mixtures.train), on_disk(mixtures.val, most=val_tokens)
    for name, tokens in zip(("training", "validation"), found):
        say(f"{name}: {len(tokens):,} conversations, {len(tokens.codes):,} tokens")
    return found


def prepare_questions(
    settings: AccuracySettings, mixture: MixtureSettings, world: World
) -> dict[str, Task]:
    """The tasks whose accuracy is wanted, by name, from where the mixture is from."""
    with world.node_leader_first() as first:
        return {
            name: ChosenSums(split="val")
            if name == EMBEDDED
            else chat_task(name, data=mixture.chat_data, cache=mixture.cache, progress=first)
            for name in settings.accuracy_of
        }


def _load_or_train(
    settings: DataSettings,
    corpus: Corpus,
    vocab_size: int,
    say: Callable[[str], None],
    kept: Path | None,
) -> Tokenizer:
    folder = settings.tokenizer
    if folder is None and kept is not None and kept.is_dir():
        folder = kept
    if folder is None:
        limits = {"max_chars": settings.tokenizer_chars, "doc_cap": 10_000}
        folder = _cached_tokenizer(settings.cache, corpus, vocab_size, limits)
        if not folder.exists():
            say(f"no tokenizer of {vocab_size} tokens for this text yet: training one")
            texts = iter_texts(corpus.train, **limits)
            train_tokenizer(texts, folder, vocab_size=vocab_size, settings=limits)
    tokenizer = Tokenizer.load(folder)
    say(f"tokenizer: {tokenizer.vocab_size} tokens, {folder}")
    return tokenizer


def _cached_tokenizer(cache: Path, corpus: Corpus, vocab_size: int, limits: dict[str, int]) -> Path:
    """Where the cache keeps the tokenizer of this text, read up to these limits."""
    # Of FineWeb-Edu, whose identity is that of all shards, as many are read as hold max_chars.
    files = min(len({group.path for group in corpus.train}), shards_for(limits["max_chars"], 1.0))
    digest = hashlib.sha256(json.dumps([corpus.identity, files, limits]).encode()).hexdigest()
    folder = tokenizer_folder(cache, corpus.name, vocab_size)
    return folder.with_name(f"{folder.name}-{digest[:8]}")


def check_kernels(kernels: str, device: torch.device) -> None:
    """UserError where Triton's kernels are asked for and plain PyTorch would run: on a CPU, unless
    Triton interprets them (TRITON_INTERPRET=1)."""
    if kernels == "triton" and device.type == "cpu" and not INTERPRETED:
        raise UserError(
            "--kernels triton takes a GPU, and this runs on the CPU: give --kernels reference"
        )


@dataclass(frozen=True)
class MemoryNeed:
    """What a run takes of each GPU's memory.

    batch: sequences in one forward + backward of one GPU; accumulation: of those a step has.
    evenly: whether they must share a step without a rest. kernels, generator: see estimate_memory.
    """

    config: GPTConfig
    batch: int
    accumulation: int
    world: World
    reshard_after_forward: bool = False
    kernels: str = "triton"
    evenly: bool = True
    generator: int = 0

    def check(self) -> str:
        """One line with the estimate; UserError if it cannot fit, with the largest device batch
        that should."""
        if self.world.device.type != "cuda":
            return f"memory: about {self._estimate} a process"
        available = self._available / GIB
        if self._estimate.total > USABLE_SHARE * self._available:
            raise UserError(
                f"not enough GPU memory: {self._sequences} take about {self._estimate}, the GPU "
                f"has {available:.1f} GiB; {self._what_fits(self._available)}"
            )
        return f"memory: about {self._estimate} of {available:.1f} GiB a GPU"

    @contextmanager
    def told(self) -> Iterator[None]:
        """Where the body runs out of memory all the same, UserError with what should fit."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.world.device)
            others = total - free - torch.cuda.memory_reserved(self.world.device)
            # What the estimate left out, it leaves out of smaller batches, too.
            room = min(total - others, self._estimate.total)
            held = f", {others / GIB:.1f} GiB of it in use elsewhere" if others > 2 * GIB else ""
            saving = "" if self.reshard_after_forward else "--reshard-after-forward and "
            raise UserError(
                f"out of GPU memory: {self._sequences} were estimated at {self._estimate}, the GPU "
                f"has {self._available / GIB:.1f} GiB{held}; {self._what_fits(room)}; {saving}more "
                "GPUs also help"
            ) from error

    @property
    def _sequences(self) -> str:
        return f"{self.batch} sequences of {self.config.sequence_len}"

    @property
    def _available(self) -> int:
        return torch.cuda.get_device_properties(self.world.device).total_memory

    @property
    def _settings(self) -> dict[str, Any]:
        """Of estimate_memory."""
        return {
            "shards": self.world.local_size,
            "logits_chunks": CHUNKS,
            "bytes_per_value": 2 if self.world.device.type == "cuda" else 4,
            "generator": self.generator,
            "reshard_after_forward": self.reshard_after_forward,
            "kernels": self.kernels,
        }

    @property
    def _estimate(self) -> MemoryEstimate:
        accumulates = self.accumulation > 1
        return estimate_memory(
            self.config, device_batch_size=self.batch, accumulates=accumulates, **self._settings
        )

    def _what_fits(self, room: int) -> str:
        """Flags with which a run should do with so many bytes."""
        largest = partial(
            largest_device_batch,
            int(USABLE_SHARE * room),
            self.config,
            # A smaller batch is accumulated, which keeps fp32 gradients of all parameters.
            accumulates=True,
            sequences=self.batch * self.accumulation if self.evenly else None,
        )
        if most := largest(**self._settings):
            return f"--device-batch-size {most} should fit"
        if most := largest(**self._settings | {"reshard_after_forward": True}):
            return f"--device-batch-size {most} with --reshard-after-forward should fit"
        return "no batch size fits" + (", but fewer --max-rows may" if self.generator else "")


def check_disk(folder: Path, keep: int, config: GPTConfig) -> None:
    """UserError unless the checkpoints of a run fit on its disk: those kept, and one in writing.
    What a resumed run has already, and what its first save removes, needs no room."""
    root, one = folder / "checkpoints", checkpoint_bytes(config)
    there = min(keep, len(list_steps(root)))
    left = [
        step_folder(root, step, s) for s in (PARTIAL, DISCARDED) for step in list_steps(root, s)
    ]
    free = shutil.disk_usage(folder).free
    free += sum(file.stat().st_size for half in left for file in half.iterdir())
    needed = (keep + 1 - there) * one
    if free < needed:
        already = f", {there} of them there already," if there else ""
        raise UserError(
            f"{keep} checkpoints of {one / 1e9:.2f} GB{already} and one being written need "
            f"{needed / 1e9:.2f} GB; {folder} has {free / 1e9:.2f} GB free: "
            "keep fewer (--keep), or put the run elsewhere (--out)"
        )


def tokenizer_folder(cache: Path, corpus_name: str, vocab_size: int) -> Path:
    """Where the cache kept the tokenizer of a text before its name told what it was trained on; now
    the beginning of that name. A text given by its path is told from others of the same last name
    by a digest of the whole path."""
    name = Path(corpus_name).name
    if name != corpus_name:
        digest = hashlib.sha256(str(Path(corpus_name).absolute()).encode()).hexdigest()
        name = f"{name}-{digest[:8]}"
    return cache / "tokenizers" / f"{name}-{vocab_size}"
