"""How fast is text made into batches, and how much of tiktoken's own rate is left?

    python -m bench.loader --data corpus/ --tokenizer tokenizer/
    python -m bench.loader --data corpus/ --encoding gpt2 --cores 2 --out loader.json

Every round times, one after another on the same row groups and cores: reading parquet into
strings; tiktoken alone on those strings, by its own batch call and by one numpy call for each
document in a pool of threads (the faster of the two is the limit); encode_documents, which makes
one array of them; and the loader, from parquet to (B, T) batches, its start included. Shown are
tokens a second of wall clock, in the median and in the fastest round, and in the median a second of
processor time, all threads added up: where other processes use the cores too, only the latter two
say something. The last line is JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import tyro

from gptfast.config import DEFAULT_CACHE
from gptfast.data import BatchLoader, RowGroup, iter_texts, prepare_corpus
from gptfast.machine import describe_machine
from gptfast.run import exit_code, prepare_to_write, timestamp, write_json
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.evaluation import load_encoding


@dataclass(frozen=True)
class Settings:
    data: str = "embedded"
    """As for training: embedded, or a file or folder."""
    tokenizer: Path | None = None
    """Folder of a trained tokenizer."""
    encoding: str = "gpt2"
    """Without a tokenizer's folder: an encoding that tiktoken knows."""
    cache: Path = DEFAULT_CACHE
    cores: int = 2
    """Cores to run on, and threads that tokenise."""
    row_groups: int = 4
    """Read in every round, from the start of the training set."""
    rounds: int = 5
    batch_size: int = 32
    sequence_len: int = 2048
    out: Path | None = None
    """Also write the JSON here."""


class TiktokenDocuments:
    """A published encoding behind the interface of our tokenizer; its end of text comes first."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding

    def encode_documents(self, texts: list[str], threads: int) -> np.ndarray:
        bos = np.array([self.encoding.eot_token], dtype=np.uint32)
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(partial(_encode_one, self.encoding), texts)
            return np.concatenate([part for ids in parts for part in (bos, ids)]).view(np.int32)


def main() -> None:
    measure(tyro.cli(Settings, description=__doc__))


def measure(settings: Settings) -> None:
    """Print the table and, last, the JSON; write that, if it is asked for."""
    if settings.out is not None:
        prepare_to_write(settings.out)
    if settings.tokenizer is not None:
        tokenizer = Tokenizer.load(settings.tokenizer)
    else:
        tokenizer = TiktokenDocuments(load_encoding(settings.encoding))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.cores])
    corpus = prepare_corpus(settings.data, cache=settings.cache / "data")
    groups = corpus.train[: settings.row_groups]
    texts = list(iter_texts(groups))
    tokens = len(tokenizer.encode_documents(texts, threads=settings.cores))

    phases = phases_of(settings, groups, texts, tokenizer)
    wall: dict[str, list[float]] = {name: [] for name in phases}
    cpu: dict[str, list[float]] = {name: [] for name in phases}
    for _ in range(settings.rounds):
        for name, run in phases.items():
            wall_begin, cpu_begin = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - wall_begin)
            cpu[name].append(time.process_time() - cpu_begin)

    rates = {
        "median": {name: round(tokens / statistics.median(wall[name])) for name in phases},
        "fastest": {name: round(tokens / min(wall[name])) for name in phases},
        "per cpu s": {name: round(tokens / statistics.median(cpu[name])) for name in phases},
    }
    characters = sum(map(len, texts))
    result = {
        "tokens_per_second": rates,
        "tokens": tokens,
        "characters": characters,
        "settings": asdict(settings),
        "environment": {"ended": timestamp(), **describe_machine()},
    }
    print(f"{tokens:,} tokens, {characters:,} characters, {settings.cores} cores")
    show(rates)
    if settings.out is not None:
        write_json(settings.out, result)
    print(json.dumps(result, default=str))


def phases_of(
    settings: Settings,
    groups: list[RowGroup],
    texts: list[str],
    tokenizer: Tokenizer | TiktokenDocuments,
) -> dict[str, Callable[[], object]]:
    """name -> what is timed under it; every one handles all of the texts once."""
    encoding, threads = tokenizer.encoding, settings.cores

    def one_by_one() -> list[np.ndarray]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(partial(_encode_one, encoding), texts))

    def batches() -> int:
        loader = BatchLoader(
            groups,
            tokenizer,
            batch_size=settings.batch_size,
            sequence_len=settings.sequence_len,
            epochs=1,
            threads=threads,
        )
        return sum(1 for _ in loader)

    return {
        "read parquet": lambda: list(iter_texts(groups)),
        "tiktoken, batch": lambda: encoding.encode_ordinary_batch(texts, num_threads=threads),
        "tiktoken, numpy": one_by_one,
        "encode_documents": lambda: tokenizer.encode_documents(texts, threads=threads),
        "parquet to batch": batches,
    }


def show(rates: dict[str, dict[str, int]]) -> None:
    """rates: kind of rate -> phase -> tokens a second."""
    print(f"{'tokens/s':18}" + "".join(f"{kind:>12}{'of limit':>10}" for kind in rates))
    for phase in rates["median"]:
        cells = []
        for by_phase in rates.values():
            limit = max(by_phase["tiktoken, batch"], by_phase["tiktoken, numpy"])
            cells.append(f"{by_phase[phase]:12,}{by_phase[phase] / limit:10.0%}")
        print(f"{phase:18}{''.join(cells)}")


def _encode_one(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    return encoding.encode_to_numpy(text, disallowed_special=())


if __name__ == "__main__":
    sys.exit(exit_code(main))
