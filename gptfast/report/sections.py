"""The stages' sections, in the reference report's order and with its fields.

A section begins with the reference's fields in their order, ours beside them; what only we know
follows. A stage that was not run keeps its fields, empty on our side.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from gptfast import hardware
from gptfast.evaluate.samples import PROMPTS
from gptfast.report import curves
from gptfast.report.document import (
    ABSENT,
    DONE,
    UNFINISHED,
    Block,
    Cell,
    Fact,
    Facts,
    Samples,
    Section,
    Table,
    Text,
)
from gptfast.report.figures import RESULTS, metric_of
from gptfast.report.reference import ALIASES, gpu_peak, reference
from gptfast.report.runs import Folders, Run, leaves
from gptfast.report.spelling import MISSING, short_gpu, spell, spell_score, spell_scores

TOKENIZER, TOKENIZER_EVALUATION = "Tokenizer training", "Tokenizer evaluation"
BASE, LOSS, CORE = "Base model training", "Base model loss", "Base model evaluation"
# A stage's section of training, and of its evaluation by chat tasks.
TRAINING = {"base": BASE, "mid": "Midtraining", "sft": "Chat SFT", "rl": "Chat RL"}
CHAT = {stage: f"Chat evaluation {stage}" for stage in ("mid", "sft", "rl")}


def stage_sections(folders: Folders) -> list[Section]:
    base, mid, sft, rl = (folders.runs.get(stage) for stage in TRAINING)
    return [
        tokenizer_training(folders.tokenizer),
        tokenizer_evaluation(folders.tokenizer),
        training("base", base),
        base_loss(base),
        base_evaluation(base),
        training("mid", mid),
        chat_evaluation("mid", mid),
        training("sft", sft),
        chat_evaluation("sft", sft),
        training("rl", rl),
        chat_evaluation("rl", rl),
    ]


def tokenizer_training(tokenizer: Mapping) -> Section:
    ours = tokenizer.get("training", {})
    return _section(
        TOKENIZER,
        [Facts(side_by_side(ours, _theirs(TOKENIZER)))],
        status=DONE if ours else ABSENT,
        timestamp=tokenizer.get("timestamp", ""),
    )


def tokenizer_evaluation(tokenizer: Mapping) -> Section:
    found = tokenizer.get("evaluation", {})
    blocks: list[Block] = []
    for label, why in found.get("missing", {}).items():
        blocks.append(Text(f"{label} is missing: {why}", warning=True))
    if "skipped" in found:
        # Of tokenizers from when ours was not evaluated alone.
        blocks.append(Text(f"Not compared: {found['skipped']}", warning=True))
        found = {}
    for label, theirs in reference()["tokenizer_tables"].items():
        pairs = zip_longest(found.get(label, []), theirs, fillvalue={})
        columns = ("Text Type", "Bytes", f"{label} Tokens", f"{label} Ratio")
        columns += ("Our Tokens", "Our Ratio", "Relative Diff %")
        rows = tuple(_tokenizer_row(*pair) for pair in pairs)
        blocks.append(Table(columns, rows, title=f"Comparison with {label}"))
    legend = (
        "Ratio: bytes a token. Relative diff: how many per cent fewer tokens are ours. The texts "
        "are of the same kinds as the reference's, not the same texts."
    )
    return _section(
        TOKENIZER_EVALUATION,
        [*blocks, Text(legend)],
        status=DONE if found else ABSENT,
        timestamp=tokenizer.get("evaluation_timestamp", "") if found else "",
    )


def _tokenizer_row(mine: Mapping, ref: Mapping) -> tuple[Cell | str, ...]:
    def figures(row: Mapping) -> list[str]:
        if not row:
            return [MISSING] * 6
        size, theirs, ours = row["bytes"], row["theirs"], row["ours"]
        mine = [f"{ours:,}", f"{size / ours:.2f}"]
        if theirs is None:
            return [f"{size:,}", MISSING, MISSING, *mine, MISSING]
        diff = f"{100 * (theirs - ours) / theirs:+.1f} %"
        return [f"{size:,}", f"{theirs:,}", f"{size / theirs:.2f}", *mine, diff]

    cells = (Cell(*pair) for pair in zip(figures(mine), figures(ref), strict=True))
    return (str(mine.get("text") or ref.get("text", "")), *cells)


def training(stage: str, run: Run | None) -> Section:
    """Settings, results and curves of a stage that trains."""
    title = TRAINING[stage]
    theirs = _theirs(title)
    settings = _settings(run, theirs) if run else {}
    results = RESULTS[stage](run) if run else {}
    blocks = _settings_and_results(settings, results, theirs, _notes(stage, run))
    if run is None:
        return _section(title, blocks, status=ABSENT)
    if not run.finished:
        blocks.insert(0, Text(f"Not finished: {run.steps_done:,} step(s) done.", warning=True))
    return _section(
        title,
        [*blocks, *curves.of_stage(run)],
        status=DONE if run.finished else UNFINISHED,
        timestamp=run.ended(),
    )


def _settings_and_results(
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    theirs: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> list[Block]:
    """Two lists, less what is empty: the reference begins the names of results with a capital
    letter, those of settings not."""
    their_results = {name: value for name, value in theirs.items() if name[0].isupper()}
    their_settings = {name: value for name, value in theirs.items() if name not in their_results}
    lists = [
        Facts(side_by_side(settings, their_settings), folded=True, title="Settings"),
        Facts(side_by_side(results, their_results, notes), title="Results"),
    ]
    # Of RL the reference tells nothing: where it was not run there is nothing to head.
    return [each for each in lists if each.rows]


def _settings(run: Run, theirs: Mapping) -> dict[str, Any]:
    """The run's settings, those that the reference has too under its names."""
    ours = {"run": run.folder.name, **dict(leaves(run.settings))}
    return _renamed(ours, theirs)


def _renamed(ours: dict[str, Any], theirs: Mapping) -> dict[str, Any]:
    named = {name: ours.pop(ALIASES.get(name, name), None) for name in theirs if name[0].islower()}
    return {**named, **ours}


def _notes(stage: str, run: Run | None) -> dict[str, str]:
    """What a reader must know to compare: denominators, hardware, what was counted."""
    on = f"{run.processes} × {short_gpu(run.gpu)}" if run and run.gpu else "CPU"
    denominator = f"{hardware.REPORT_PEAK_FLOPS / 1e12:.0f} TFLOP/s a GPU"
    notes = {
        "MFU %": f"of {denominator}, median of the steps after the 20th",
        "Total training time": f"on {on}: all steps, evaluation and profile apart",
        "Peak memory usage": "of one GPU",
    }
    if run and run.gpu is None:
        notes["MFU %"] = "no GPU, no MFU"
    if own := hardware.peak(run.gpu) if run and run.gpu else None:
        source = f"of {own.bf16_flops / 1e12:g} TFLOP/s, dense bf16 ({own.source})"
        notes["MFU of this GPU's own peak %"] = source
    if stage == "sft":
        notes["Training rows"] = "conversations; ours are packed, several to a row"
    if stage == "base":
        gpus, gpu = reference()["gpus"], short_gpu(reference()["gpu"])
        theirs = _theirs(BASE)["MFU %"] * hardware.REPORT_PEAK_FLOPS / gpu_peak()
        notes["MFU %"] += (
            f"; the reference: its last step, of the same {denominator} (an H100's rate) on "
            f"{gpus} × {gpu}, so {theirs:.1f} % of their own {gpu_peak() / 1e12:.0f}"
        )
        notes["Total training time"] += (
            f"; the reference: on {gpus} × {gpu}, its first 11 steps left out"
        )
        notes["Peak memory usage"] += f"; the reference: {gpu}"
        notes["CORE metric estimate"] = "not taken while ours trains; CORE is of the done model"
    return notes


def base_loss(run: Run | None) -> Section:
    loss = run.evaluations.get("loss", {}) if run else {}
    ours = {f"{split} bpb": loss.get(f"{split}_bpb") for split in ("train", "val")}
    facts = Facts(side_by_side(ours if loss else {}, _theirs(LOSS)))
    blocks: list[Block] = [facts, _samples(loss.get("samples", ()))]
    return _evaluation(LOSS, run, "loss", blocks)


def _samples(written: Sequence[str]) -> Samples:
    """Prompt, our continuation, the reference's; a text of ours that begins otherwise is left
    whole."""

    def continuation(prompt: str, text: str) -> str:
        return text.removeprefix("<|bos|>").removeprefix(prompt).strip()

    ours = [continuation(*pair) for pair in zip(PROMPTS, written)] or [MISSING] * len(PROMPTS)
    theirs = [continuation(*pair) for pair in zip(PROMPTS, reference()["samples"], strict=True)]
    return Samples(tuple(zip(PROMPTS, ours, theirs)))


def base_evaluation(run: Run | None) -> Section:
    core = run.evaluations.get("core", {}) if run else {}
    missing = core.get("missing", [])
    ours: dict[str, Any] = {}
    if run and core:
        ours["Model"] = f"{run.folder.name} (step {run.evaluation_steps['core']})"
        ours["CORE metric"] = spell_score(metric_of(core, "core_metric"), core)
        ours |= spell_scores(core, "centered")
    # nanochat's dev/LEADERBOARD.md: 0.2512 to 0.2677.
    note = "mean of the 22 centred accuracies; seven runs alike of nanochat were 0.017 apart"
    blocks: list[Block] = [Facts(side_by_side(ours, _theirs(CORE), {"CORE metric": note}))]
    if core:
        blocks.append(curves.core(core["tasks"]))
    if missing:
        partial = core.get("core_metric_partial")
        text = f"{len(missing)} of 22 tasks are missing ({', '.join(missing)}), so there is no CORE"
        text += f" metric; the mean of the others, comparable with nothing, is {partial:.4f}."
        blocks.insert(0, Text(text, warning=True))
    return _evaluation(CORE, run, "core", _warned(blocks, core))


def chat_evaluation(stage: str, run: Run | None) -> Section:
    chat = run.evaluations.get("chat", {}) if run else {}
    title, theirs = CHAT[stage], _theirs(CHAT[stage])
    settings: dict[str, Any] = {}
    results: dict[str, Any] = {}
    if chat:
        settings = {**_renamed(dict(chat.get("arguments", {})), theirs), "source": stage}
        results = spell_scores(chat, "accuracy")
        results["ChatCORE metric"] = spell_score(metric_of(chat, "chatcore_metric"), chat)
    blocks = _settings_and_results(settings, results, theirs)
    if chat.get("missing"):
        missing = ", ".join(sorted(chat["missing"]))
        blocks.insert(0, Text(f"Not evaluated: {missing}; so no ChatCORE.", warning=True))
    return _evaluation(title, run, "chat", _warned(blocks, chat))


def _warned(blocks: list[Block], evaluation: Mapping) -> list[Block]:
    """Below a warning, if not all examples were scored."""
    first = evaluation.get("first_of_each_task")
    if not first:
        return blocks
    text = f"Scored on the first {first:,} examples of each task only; the reference's are of all."
    return [Text(text, warning=True), *blocks]


def _evaluation(title: str, run: Run | None, name: str, blocks: list[Block]) -> Section:
    found = run is not None and name in run.evaluations
    if found and (step := run.evaluation_steps[name]) < run.steps_done:
        text = f"Of the model at step {step:,}; {run.steps_done:,} steps have been trained."
        blocks = [Text(text, warning=True), *blocks]
    return _section(
        title,
        blocks,
        status=DONE if found else ABSENT,
        timestamp=run.evaluation_times[name] if found else "",
    )


def side_by_side(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> tuple[Fact, ...]:
    """The reference's fields in their order, then those that only we have."""
    notes = notes or {}
    return tuple(
        Fact(
            label,
            spell(ours.get(label), label),
            spell(theirs[label], label) if label in theirs else "",
            notes.get(label, ""),
        )
        for label in dict.fromkeys([*theirs, *ours])
        if label in theirs or ours[label] is not None
    )


def _theirs(title: str) -> Mapping[str, Any]:
    return reference()["sections"].get(title, {})


def _section(title: str, blocks: list[Block], *, status: str, timestamp: str = "") -> Section:
    their_time = reference()["timestamps"].get(title, "")
    return Section(title, tuple(blocks), status, timestamp, their_time)
