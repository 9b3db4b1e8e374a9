"""The chat tasks: what share of their questions a model that was taught to talk answers right.

Each rank answers its share with its own copy of the model and adds up once, at the end. What is
scored does not depend on how it is shared or batched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from gptfast.engine import Engine
from gptfast.evaluate.categorical import answer_with_letters
from gptfast.evaluate.chat_results import ChatResult
from gptfast.evaluate.generative import Answering, answer_in_words
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
from gptfast.model import GPT
from gptfast.tasks import Task
from gptfast.tokenizer import Tokenizer

# Part of what is asked: raise it when the same answers would no longer mean the same.
_PROTOCOL = 1
# Sequences decoded together. More share one reading of the weights, until the keys and values that
# each of them reads are most of it, or fill the memory.
ANSWER_ROWS = 256


def evaluate_chat(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Mapping[str, Task],
    *,
    answering: Answering | None = None,
    batch_size: int | None = None,
    max_problems: int | None = None,
    group: dist.ProcessGroup | None = None,
    store: ResultStore | None = None,
    progress: bool = False,
) -> ChatResult:
    """Have every problem of the tasks answered, or the first `max_problems` of each.

    Args:
        model: plain; each rank has its own replica.
        tasks: name -> task; those of gptfast.tasks.CHAT_TASKS make ChatCORE.
        answering: of generative tasks; None: the defaults.
        batch_size: the most questions in a pass, and sequences decoded together.
        group: host (gloo) group of the ranks that share the work; all get the same result.
        store: outcomes found there are not computed again, new ones are added task by task.
        progress: show a bar of this rank's problems on stderr.

    Raises:
        UserError: a letter is not one token, answers leave no room for prompts, or programs cannot
            be run here.
    """
    answering = answering or Answering()
    first = cut_to(max_problems, map(len, tasks.values()))
    tasks = {name: task[:max_problems] for name, task in tasks.items()}
    # Without a store nothing has to be told from anything.
    asked = [
        Asked(name, len(task), _key(task, answering) if store else {})
        for name, task in tasks.items()
    ]
    rank, size = place_of(group)
    known = known_outcomes(asked, store, group)
    found = [np.zeros_like(table) for table in known]
    shares = deal(known, rank, size)
    answerer = _Answerer(model, tokenizer, answering, batch_size)
    with tqdm(
        total=sum(map(len, shares)), desc="chat tasks", unit="problem", disable=not progress
    ) as bar:
        for task, what, share, table in zip(tasks.values(), asked, shares, found):
            if not share:
                continue
            bar.set_postfix_str(what.label, refresh=False)
            table[share] = answerer.outcomes(task, share, bar)
            if store:
                store.save_part(what, table, rank)
    tables = complete_outcomes(asked, known, found, store, group)
    results = [
        TaskResult(name, task.baseline, table) for (name, task), table in zip(tasks.items(), tables)
    ]
    return ChatResult(tuple(results), first)


def evaluate_categorical(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    *,
    batch_size: int | None = None,
    max_problems: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> float:
    """The accuracy, 0 to 1, on one categorical task, as evaluate_chat finds it."""
    result = evaluate_chat(
        model,
        tokenizer,
        {"": task},
        batch_size=batch_size,
        max_problems=max_problems,
        group=group,
    )
    return result.tasks[0].accuracy


def deal(known: Sequence[np.ndarray], rank: int, size: int) -> list[list[int]]:
    """For each task, which of the problems that are still to answer are this rank's.

    One by one to the next rank, over all tasks: their order is random, so that shares take about
    the same time.
    """
    shares, dealt = [], 0
    for table in known:
        open_ = np.flatnonzero(table[:, DONE] == 0)
        shares.append(open_[(np.arange(len(open_)) + dealt) % size == rank].tolist())
        dealt += len(open_)
    return shares


@dataclass
class _Answerer:
    model: GPT
    tokenizer: Tokenizer
    answering: Answering
    batch_size: int | None

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer, max_rows=self.batch_size or ANSWER_ROWS)

    def outcomes(self, task: Task, share: Sequence[int], bar: tqdm) -> np.ndarray:
        """(len(share), 4), of these problems of the task."""
        if task.eval_type == "categorical":
            return answer_with_letters(
                self.model,
                self.tokenizer,
                task,
                share,
                batch_size=self.batch_size,
                progress=bar.update,
            )
        samples = self.answering.num_samples
        return answer_in_words(
            self.engine,
            task,
            share,
            self.answering,
            progress=lambda count: bar.update(count / samples),
        )


def _key(task: Task, answering: Answering) -> dict[str, object]:
    how = None if task.eval_type == "categorical" else asdict(answering)
    return {"protocol": _PROTOCOL, "task": task.fingerprint(), "answering": how}
