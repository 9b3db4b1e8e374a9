"""Where text comes from, and how it becomes batches."""

from gptfast.data.batches import BatchLoader, reshard_states
from gptfast.data.fineweb import shards_for, shards_in
from gptfast.data.parquet import RowGroup, iter_texts
from gptfast.data.sources import Corpus, prepare_corpus

__all__ = [
    "BatchLoader",
    "Corpus",
    "RowGroup",
    "iter_texts",
    "prepare_corpus",
    "reshard_states",
    "shards_for",
    "shards_in",
]
