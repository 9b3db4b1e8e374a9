"""CORE: the mean of 22 tasks' accuracies, each scaled so that guessing is 0 and perfect is 1.

Ranks share the examples by what they cost, work on their own and add up once, at the end. What
is scored does not depend on how it is shared or batched.
"""

from collections.abc import Iterator, Sequence
from heapq import heapreplace

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from gptfast.data.prefetch import Prefetch
from gptfast.evaluate.core_bundle import Bundle
from gptfast.evaluate.core_prompts import Item, Prompter
from gptfast.evaluate.core_results import CoreResult, judge
from gptfast.evaluate.core_scoring import Scorer
from gptfast.evaluate.outcomes import (
    DONE,
    Asked,
    ResultStore,
    TaskResult,
    complete_outcomes,
    cut_to,
    known_outcomes,
    place_of,
)
from gptfast.tokenizer import Tokenizer

# Part of what is asked: raise it when the same scores would no longer mean the same.
_PROTOCOL = 1
# Examples tokenised at a time, while the device scores those before.
_CHUNK = 256


def evaluate_core(
    scorer: Scorer,
    tokenizer: Tokenizer,
    bundle: Bundle,
    *,
    max_per_task: int | None = None,
    group: dist.ProcessGroup | None = None,
    store: ResultStore | None = None,
    threads: int = 4,
    progress: bool = False,
) -> CoreResult:
    """Score every example of the bundle, or the first `max_per_task` of each task.

    Args:
        scorer: holds the model; each rank has its own replica.
        group: host (gloo) group of the ranks that share the work; all get the same result.
        store: outcomes found there are not computed again, new ones are added task by task.
        threads: that tokenise at a time.
        progress: show a bar of this rank's examples on stderr.

    Raises:
        UserError: a task has too few examples for its shots, or an answer exceeds the context.
    """
    rank, size = place_of(group)
    context = len(scorer.model.cos)
    prompters = [
        Prompter(task, tokenizer, context=context, max_per_task=max_per_task)
        for task in bundle.tasks
    ]
    asked = [_asked(prompter) for prompter in prompters]
    known = known_outcomes(asked, store, group)
    shares = [each[rank] for each in share_out(prompters, known, size)]
    found = [np.zeros_like(table) for table in known]

    chunks = Prefetch(_chunks(prompters, shares, threads), depth=2)
    bar = tqdm(total=sum(map(len, shares)), desc="CORE", unit="example", disable=not progress)
    try:
        for number, items, last in chunks:
            task = bundle.tasks[number]
            bar.set_postfix_str(task.label, refresh=False)
            for item, scores in zip(items, scorer.scores(items, task.kind)):
                outcome = judge(scores, item.gold, task.kind)
                found[number][item.index] = (1, *outcome, item.cropped)
            if store and last:
                store.save_part(asked[number], found[number], rank)
            bar.update(len(items))
    finally:
        chunks.close()
        bar.close()

    tables = complete_outcomes(asked, known, found, store, group)
    results = [
        TaskResult(task.label, task.baseline, table) for task, table in zip(bundle.tasks, tables)
    ]
    first = cut_to(max_per_task, (len(task.examples) for task in bundle.tasks))
    return CoreResult(tuple(results), bundle.missing, first)


def _asked(prompter: Prompter) -> Asked:
    task = prompter.task
    parts = ("label", "kind", "shots", "delimiter", "sha256")
    key = {"protocol": _PROTOCOL, "task": {name: getattr(task, name) for name in parts}}
    return Asked(task.label, len(prompter), key)


def share_out(
    prompters: Sequence[Prompter], known: Sequence[np.ndarray], size: int
) -> list[list[list[int]]]:
    """For each task and rank, the examples still to score, longest first.

    Each goes to the rank with the least to do so far, over all tasks; the same on every rank.
    """
    loads = [(0, rank) for rank in range(size)]
    shares = []
    for prompter, table in zip(prompters, known):
        share: list[list[int]] = [[] for _ in range(size)]
        costs = {int(i): prompter.cost(int(i)) for i in np.flatnonzero(table[:, DONE] == 0)}
        for index in sorted(costs, key=costs.__getitem__, reverse=True):
            load, rank = loads[0]
            share[rank].append(index)
            heapreplace(loads, (load + costs[index], rank))
        shares.append(share)
    return shares


def _chunks(
    prompters: Sequence[Prompter], shares: Sequence[Sequence[int]], threads: int
) -> Iterator[tuple[int, list[Item], bool]]:
    """(task's number, items, whether they are the task's last)."""
    for number, (prompter, indices) in enumerate(zip(prompters, shares)):
        for start in range(0, len(indices), _CHUNK):
            items = prompter.items(indices[start : start + _CHUNK], threads)
            yield number, items, start + _CHUNK >= len(indices)
