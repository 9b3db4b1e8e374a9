"""The model card: what the run's folder tells of hardware, time, data and scores.

Nothing is filled in by hand. What the folder does not tell is said to be missing, in its place.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gptfast.chat_data import MID_TRAIN, SFT_TRAIN
from gptfast.convert.trained import TrainedModel
from gptfast.data.fineweb import REPO as FINEWEB_EDU
from gptfast.evaluate.outcomes import of_the_first
from gptfast.report.figures import metric_of
from gptfast.report.runs import Run, read_run, stage_of
from gptfast.run import STAGES
from gptfast.tasks import CHAT_TASKS

MISSING = "not recorded in the run's folder"
# Where the Hub keeps what a chat task is made of: (dataset, its configuration).
_DATASETS = {
    "ARC-Easy": ("allenai/ai2_arc", "ARC-Easy"),
    "ARC-Challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "MMLU": ("cais/mmlu", "all"),
    "GSM8K": ("openai/gsm8k", "main"),
    "HumanEval": ("openai/openai_humaneval", "openai_humaneval"),
}
# What the stages that name no mixture train on.
_MIXTURES = {"mid": MID_TRAIN, "sft": SFT_TRAIN}

_TEXT = """# {name}

A GPT of {parameters:,} parameters: {n_layer} layers of width {n_embd}; heads of attention:
{n_head} for queries, {n_kv_head} for keys and values; a vocabulary of {vocab_size:,}; trained on
sequences of {sequence_len:,} tokens. Rotary positions, QK-norm, squared ReLU, no biases, softcapped
logits: the architecture that transformers calls `nanochat`.

## Training

{training}

## Scores

{scores}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# {where}
path = "{path}"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
{example}
print(tokenizer.decode(model.generate(**inputs)[0]))
```

transformers 5.0 or later is needed, and no other code. {convention}

## Limits

A small model: it states falsehoods fluently, and nothing was done to make it safe. What it scores
above is what was measured; nothing else was.
"""

_CHAT_EXAMPLE = """messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, sanitize_control_tokens=True, return_tensors="pt"
)"""
_CHAT_CONVENTION = (
    "`sanitize_control_tokens=True` keeps a user from writing the special tokens that end a turn. "
    "The model may ask a calculator between `<|python_start|>` and `<|python_end|>`; "
    "answering it is up to who runs the model."
)
_BASE_EXAMPLE = 'inputs = tokenizer("The capital of France is", return_tensors="pt")'
_BASE_CONVENTION = "It continues text; it was not taught to chat."


def model_card(
    folder: Path, model: TrainedModel, *, name: str, path: str, license: str | None = None
) -> ModelCard:
    """The card of the model that the run in `folder` had at model.step.

    name: if it is OWNER/NAME, the example loads the model from there, on the Hub. path: of the
    card's folder, which the example loads otherwise. license: an identifier of the Hub's; without
    it the card says that none was stated.
    """
    stage = stage_of(folder)
    run = read_run(folder, stage or "model").at(model.step)
    evaluations = _evaluations(folder / "evaluation" / f"step_{model.step:06d}")
    results = _results(evaluations, _data(run))
    earlier = _earlier(run)
    first = earlier[0] if earlier else run
    on_fineweb = first.setting("data") == "fineweb-edu" and "imported_from" not in first.settings
    on_hub = "/" in name
    data = ModelCardData(
        model_name=name if results else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        language="en" if on_fineweb and first is run else None,
        datasets=[FINEWEB_EDU] if on_fineweb else None,
        tags=["nanochat", "gptfast"],
        eval_results=results or None,
    )
    chats = stage != "base"
    text = _TEXT.format(
        name=name,
        parameters=model.parameters,
        **model.config.to_dict(),
        where="On the Hub." if on_hub else "The folder of this file, or its name on the Hub.",
        path=name if on_hub else path,
        training=_table(
            _training(run, earlier, stage, model.step) | {"License": license or "not stated"}
        ),
        scores=_table(_scores(evaluations)),
        example=_CHAT_EXAMPLE if chats else _BASE_EXAMPLE,
        convention=_CHAT_CONVENTION if chats else _BASE_CONVENTION,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _earlier(run: Run) -> list[Run] | None:
    """The runs that it goes back to, base first; None if their folders do not tell, or are gone."""
    found: list[Run] = []
    while run.stage != "base":
        source = run.meta.get("source") or run.setting("source")
        # No run goes back further than to base, by mid and SFT.
        if not source or not Path(source).is_dir() or len(found) == len(STAGES):
            return None
        run = read_run(Path(source), stage_of(Path(source)) or "model")
        found.insert(0, run)
    return found


def _training(
    run: Run, earlier: list[Run] | None, stage: str | None, step: int
) -> dict[str, str | None]:
    """What the table of training says; None for what the folder does not tell."""
    environment, seconds = run.environment, run.training_seconds
    device, processes = environment.get("device"), environment.get("processes")
    versions = {name: environment.get(name) for name in ("torch", "triton", "cuda", "python")}
    validation = run.last_validation
    commit = environment.get("git_commit")
    source = run.meta.get("source") or run.setting("source")
    before = [f"{each.stage}: {_data(each) or MISSING}" for each in earlier or ()]
    dirty = ", changed since" if environment.get("git_dirty") else ""
    return {
        "Stage": stage,
        "Steps": f"{step:,}",
        "Tokens": f"{run.tokens:,}" if run.tokens else None,
        "Data": _data(run),
        **({} if stage == "base" else {"Data of the stages before": "; ".join(before) or None}),
        "Started from": Path(source).name if source else "nothing" if stage == "base" else None,
        "Hardware": (
            f"{processes} x {device}, {environment.get('nodes', 1)} node(s)" if device else None
        ),
        "Training time": (
            f"{seconds / 3600:.2f} h ({seconds:,.0f} s): steps of this stage alone, "
            "without evaluation and the stages before"
            if seconds
            else None
        ),
        "Software": ", ".join(f"{name} {found}" for name, found in versions.items() if found),
        "gptfast": f"commit {commit}{dirty}" if commit else None,
        "Validation, bits per byte": (
            f"{validation['val_bpb']:.4f} at step {validation['step']:,}" if validation else None
        ),
    }


def _data(run: Run) -> str | None:
    """Of files of one's own the last name of the path only: the rest is nobody's business."""
    if origin := run.settings.get("imported_from"):
        return f"not known: imported from {origin}"
    data = run.setting("task" if run.stage == "rl" else "data")
    mixture = run.settings.get("mixture", {}).get("train")
    if mixture is not None:
        return ", ".join(Path(part).name for part in mixture or _MIXTURES.get(run.stage, ()))
    return Path(data).name if isinstance(data, str) else None


def _evaluations(folder: Path) -> dict[str, Mapping]:
    """loss, core and chat -> what was evaluated at this very step; nothing of other steps."""
    found = {}
    for name in ("loss", "core", "chat"):
        path = folder / f"{name}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _scores(evaluations: Mapping[str, Mapping]) -> dict[str, str | None]:
    loss, core, chat = (evaluations.get(name, {}) for name in ("loss", "core", "chat"))
    part = _part(chat)
    rows = {
        "Training text, bits per byte": loss.get("train_bpb"),
        "Validation text, bits per byte": loss.get("val_bpb"),
        "CORE": core.get("core_metric"),
        f"ChatCORE{part}": metric_of(chat, "chatcore_metric"),
        **{
            f"{label}{part}": chat.get("tasks", {}).get(label, {}).get("accuracy")
            for label in CHAT_TASKS
        },
    }
    if "core_metric_partial" in core:
        without = f" without {', '.join(core['missing'])}" if core["missing"] else ""
        rows[f"CORE{without}{_part(core)}"] = core["core_metric_partial"]
    return {name: None if value is None else f"{value:.4f}" for name, value in rows.items()}


def _part(evaluation: Mapping) -> str:
    """How the name of a score goes on that is not of all examples."""
    first = evaluation.get("first_of_each_task")
    return f", {of_the_first(first)}" if first else ""


def _results(evaluations: Mapping[str, Mapping], data: str | None) -> list[EvalResult]:
    """The scores that the Hub can show: those of all examples, as it cannot tell others apart."""

    def result(dataset: str, name: str, metric: str, value: float, **more: Any) -> EvalResult:
        return EvalResult("text-generation", dataset, name, metric, round(value, 6), **more)

    loss, core, chat = (evaluations.get(name, {}) for name in ("loss", "core", "chat"))
    results = []
    if loss.get("val_bpb") is not None:
        text = data or "validation text"
        results.append(result(text, text, "bits_per_byte", loss["val_bpb"]))
    if "core_metric" in core:
        results.append(result("core", "CORE, 22 tasks", "centered_accuracy", core["core_metric"]))
    tasks = {} if _part(chat) else chat.get("tasks", {})
    for label, task in tasks.items():
        dataset, config = _DATASETS.get(label, (label, "default"))
        more = {"dataset_config": config, "dataset_split": "test"}
        results.append(result(dataset, label, "accuracy", task["accuracy"], **more))
    return results


def _table(rows: Mapping[str, str | None]) -> str:
    lines = [f"| {name} | {value or MISSING} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
