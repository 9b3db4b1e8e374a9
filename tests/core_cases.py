"""What CORE's tests share: a small bundle, a model, and a naive evaluation to compare with."""

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gptfast.evaluate.core_bundle import CORE_TASKS
from gptfast.evaluate.loading import Placement, random_model
from gptfast.evaluate.outcomes import CORRECT, MARGIN
from gptfast.model import GPT, GPTConfig
from gptfast.tokenizer import Tokenizer

VOCAB = 400
WORDS = ("river", "stone", "cloud", "seven", "lantern", "green", "under", "house", "maple", "song")


def rows_of(kind: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    if kind == "schema":
        return [
            {
                "context_options": [f"{words(2, 5)} {words(1, 2)}", f"{words(2, 5)} {words(1, 2)}"],
                "continuation": f"{words(1, 4)}.",
                "gold": rng.randrange(2),
            }
            for _ in range(count)
        ]
    if kind == "language_modeling":
        return [{"context": f" {words(3, 9)}: ", "continuation": words(1, 2)} for _ in range(count)]
    return [
        {"query": words(4, 12), "choices": [words(1, 5) for _ in range(4)], "gold": i % 4}
        for i in range(count)
    ]


def coqa_rows(count: int) -> list[dict]:
    head = (
        "Below is a story followed by a series of related questions. Please answer the final "
        "question by referring to the story and the previous questions.\n"
    )
    rows = []
    for i in range(count):
        asked = "".join(f"\nQuestion: what is {w}?\nAnswer: a {w}" for w in WORDS[:i])
        before = f"\nPreceding questions:{asked}" if i else ""
        context = f"{head}Story: {' '.join(WORDS)}.{before}\n\nFinal question:\nQuestion: where?"
        rows.append({"context": f"{context}\nAnswer: ", "continuation": WORDS[i]})
    return rows


# Tasks of every kind, with and without shots; coqa's text is laid out as in the real file.
TASKS = {
    "arc_easy": ("multiple_choice", 3, "\nAnswer: ", rows_of("multiple_choice", 14, 1)),
    "hellaswag": ("multiple_choice", 0, None, rows_of("multiple_choice", 9, 2)),
    "winograd": ("schema", 0, None, rows_of("schema", 11, 3)),
    "winogrande": ("schema", 2, None, rows_of("schema", 8, 4)),
    "jeopardy": ("language_modeling", 4, "\nAnswer: ", rows_of("language_modeling", 13, 5)),
    "coqa": ("language_modeling", 0, None, coqa_rows(7)),
}
# Equal choices, the right one among them; a choice that another continues.
TASKS["arc_easy"][3][3]["choices"][:2] = ["the same"] * 2
BEGINS = ["stone river", "stone", "stone river", "stone under"]
TASKS["arc_easy"][3][5]["choices"] = BEGINS


def write_bundle(folder: Path, tasks: dict = TASKS) -> Path:
    lines = ["icl_tasks:"]
    for label, (kind, shots, delimiter, rows) in tasks.items():
        uri = f"some/{label}.jsonl"
        lines += ["-", f"  label: {label}", f"  dataset_uri: {uri}", f"  num_fewshot: [{shots}]"]
        lines += [f"  icl_task_type: {kind}"]
        if delimiter:
            lines.append(f"  continuation_delimiter: {json.dumps(delimiter)}")
        path = folder / "eval_data" / uri
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    baselines = "".join(f"{label},25\n" for label in CORE_TASKS)
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\n{baselines}")
    return folder


def make_tokenizer() -> Tokenizer:
    return Tokenizer.train([json.dumps(TASKS)], VOCAB)


def make_model(
    vocab_size: int = VOCAB,
    *,
    sequence_len: int = 64,
    dtype: str = "float32",
    kernels: str = "reference",
) -> GPT:
    # Two heads share one of keys and values.
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    config = GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, **shape)
    placement = Placement(torch.device("cpu"), dtype, kernels, "math")
    return random_model(config, placement, seed=3)


# --- a naive evaluation, from the protocol's description, sharing no code -------------------------


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def naive_prompts(kind: str, item: dict, shown: list[dict], delimiter: str) -> list[str]:
    if kind == "multiple_choice":
        solved = [e["query"] + delimiter + e["choices"][e["gold"]] for e in shown]
        return ["\n\n".join([*solved, item["query"] + delimiter + c]) for c in item["choices"]]
    if kind == "schema":
        solved = [e["context_options"][e["gold"]] + delimiter + e["continuation"] for e in shown]
        options = [c + delimiter + item["continuation"] for c in item["context_options"]]
        return ["\n\n".join([*solved, option]) for option in options]
    solved = [e["context"].strip() + delimiter + e["continuation"] for e in shown]
    asked = "\n\n".join([*solved, item["context"].strip() + delimiter])
    return [asked.strip(), asked + item["continuation"]]


@torch.no_grad()
def naive_example(model, tokenizer, task, data: list[dict], index: int) -> tuple[bool, float]:
    """(correct, margin): every prompt alone, all of its logits, PyTorch's cross-entropy."""
    kind, shots, delimiter, _ = task
    others = [i for i in range(len(data)) if i != index]
    drawn = random.Random(1234 + index).sample(others, shots)
    prompts = naive_prompts(kind, data[index], [data[i] for i in drawn], delimiter or " ")
    ids = [tokenizer.encode(prompt, prepend=tokenizer.bos_id) for prompt in prompts]
    if kind == "language_modeling":
        starts, ids = [len(ids[0])], ids[1:]
    elif kind == "multiple_choice":
        starts = [min(first_difference(ids[0], other) for other in ids)] * len(ids)
    else:
        suffix = first_difference(ids[0][::-1], ids[1][::-1])
        starts = [len(each) - suffix for each in ids]
    losses, context = [], 10 * model.config.sequence_len
    for each, start in zip(ids, starts):
        cut = max(0, len(each) - context)
        each, start = torch.tensor([each[cut:]]), start - cut
        logits = model(each)[0, start - 1 : -1]
        target = each[0, start:]
        if kind == "language_modeling":
            chosen = logits.gather(1, target[:, None])[:, 0]
            rest = logits.scatter(1, target[:, None], -torch.inf).amax(1)
            return bool((logits.argmax(1) == target).all()), float((chosen - rest).min())
        loss = F.cross_entropy(logits, target, reduction="none")
        losses.append(float(loss.mean()) if len(loss) else float("inf"))
    gold = data[index]["gold"]
    best_other = min(loss for i, loss in enumerate(losses) if i != gold)
    return losses.index(min(losses)) == gold, best_other - losses[gold]


def naive_task(model, tokenizer, task, count: int | None = None) -> np.ndarray:
    data = list(task[3])
    random.Random(1337).shuffle(data)
    indices = range(len(data) if count is None else count)
    return np.array([naive_example(model, tokenizer, task, data, i) for i in indices])


def assert_same(outcomes: np.ndarray, expected: np.ndarray) -> None:
    assert outcomes[:, CORRECT].tolist() == expected[:, 0].tolist()
    np.testing.assert_allclose(outcomes[:, MARGIN], expected[:, 1], atol=2e-5, rtol=0)
