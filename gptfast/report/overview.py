"""What is above and below the stages: environment, headline figures, summary, time and money."""

from collections.abc import Mapping
from typing import Any

from gptfast import hardware
from gptfast.evaluate.outcomes import of_the_first
from gptfast.machine import code_size, dependencies
from gptfast.memory import GIB
from gptfast.report.cost import Cost
from gptfast.report.document import (
    ABSENT,
    DONE,
    UNFINISHED,
    Block,
    Cell,
    Fact,
    Facts,
    Section,
    Table,
    Text,
    Tile,
    anchor_of,
)
from gptfast.report.figures import achieved_flops, metric_of, model_config, training_flops
from gptfast.report.reference import gpu_peak, reference
from gptfast.report.runs import Folders, Run
from gptfast.report.sections import BASE, CHAT, CORE, LOSS, TOKENIZER, TRAINING
from gptfast.report.spelling import MISSING, short_gpu, spell, spell_score, spell_scores, times

_STAGE_NAMES = {"base": "Base", "mid": "Mid-training", "sft": "SFT", "rl": "RL"}


def machine_of(folders: Folders) -> dict[str, Any]:
    """The speedrun's own record of where it ran, or the first run's."""
    first = folders.first
    recorded = dict(first.environment) if first else {}
    recorded |= dict(folders.speedrun.get("machine", {}))
    if first:
        recorded["processes"] = first.processes
        # A machine has GPUs; whether they were used, the run knows.
        recorded["device"] = first.environment.get("device", recorded.get("device"))
    return recorded


def environment(folders: Folders, cost: Cost) -> Section:
    """Git, hardware, software, size of the code and of what it needs."""
    theirs = reference()["environment"]
    machine = machine_of(folders)
    note = cost.price.source if cost.price else ""
    groups = {
        "Git": _git(machine),
        "Hardware": {**_hardware(machine), "Hourly Rate": cost.hourly_rate},
        "Software": _software(machine),
        "Bloat": _size(),
        "": {"Run started": cost.started},
    }
    blocks = tuple(
        Facts(
            tuple(
                Fact(
                    label,
                    spell(ours, label),
                    spell(theirs.get(label), label),
                    note if label == "Hourly Rate" else "",
                )
                for label, ours in group.items()
            ),
            title=title,
        )
        for title, group in groups.items()
    )
    return Section("Environment", blocks)


def _git(machine: Mapping) -> dict[str, Any]:
    commit = str(machine.get("git_commit") or "")[:7]
    return {
        "Branch": machine.get("git_branch"),
        "Commit": f"{commit} (dirty)" if commit and machine.get("git_dirty") else commit,
        "Message": machine.get("git_message"),
    }


def _hardware(machine: Mapping) -> dict[str, Any]:
    gpu, gpus = machine.get("device"), int(machine.get("processes") or 1)
    if gpu == "cpu":
        gpu = None
    cores, threads = machine.get("cpu_cores") or MISSING, machine.get("cpu_count")
    memory, card = machine.get("memory_bytes"), machine.get("gpu_memory_bytes")
    return {
        "Platform": machine.get("platform"),
        "CPUs": f"{cores} cores ({threads} logical)" if threads else "",
        "Memory": f"{memory / GIB:.1f} GB" if memory else "",
        "GPUs": f"{gpus}x {gpu}" if gpu else "none" if machine else "",
        "GPU Memory": f"{gpus * card / GIB:.1f} GB total" if gpu and card else "",
        "CUDA Version": machine.get("cuda"),
    }


def _software(machine: Mapping) -> dict[str, Any]:
    names = {"Python": "python", "PyTorch": "torch", "Triton": "triton"}
    names |= {"cuDNN": "cudnn", "NCCL": "nccl"}
    found = {label: machine.get(key) for label, key in names.items()}
    # A version, not a quantity.
    return {label: value and str(value) for label, value in found.items()}


def _size() -> dict[str, Any]:
    size, (direct, all_) = code_size(), dependencies()
    return {
        "Characters": size["characters"],
        "Lines": size["lines"],
        "Files": size["files"],
        "Tokens (approx)": size["characters"] // 4,
        "Dependencies": f"{direct} asked for, {all_} installed with what they bring",
    }


def tiles(folders: Folders, cost: Cost) -> tuple[Tile, ...]:
    """The figures that a reader wants first."""
    base = folders.runs.get("base")
    theirs = reference()["sections"]
    mfu = base.steady("mfu_report") if base else None
    rate = base.steady("tokens_per_second_per_gpu") if base else None
    their_mfu = theirs[BASE]["MFU %"]
    their_rate = their_mfu / 100 * hardware.REPORT_PEAK_FLOPS
    their_rate /= theirs[BASE]["Number of FLOPs per token"]
    their_own = their_mfu / 100 * hardware.REPORT_PEAK_FLOPS / gpu_peak()
    same_model = bool(base and base.setting("depth") == theirs[BASE]["depth"])
    own = base.steady("mfu_own_peak") if base else None
    ours_of_own = f"{100 * own:.1f} % of its own peak; " if own else ""
    loss = base.evaluations.get("loss", {}).get("val_bpb") if base else None
    core = base.evaluations.get("core", {}) if base else {}
    sft = folders.runs.get("sft")
    chat = sft.evaluations.get("chat", {}) if sft else {}
    return (
        Tile(
            "MFU of 989 TFLOP/s",
            f"{100 * mfu:.1f} %" if mfu else MISSING,
            f"{their_mfu} %",
            times(100 * mfu if mfu else None, their_mfu),
            f"{ours_of_own}reference: {100 * their_own:.1f} % of an A100's own 312",
        ),
        Tile(
            "Tokens/s a GPU" if not base or base.gpu else "Tokens/s on CPU",
            f"{rate:,.0f}" if rate else MISSING,
            f"{their_rate:,.0f}",
            times(rate, their_rate) if same_model and base and base.gpu else "",
            "" if same_model else "of another model than the reference's",
        ),
        Tile("Bits per byte", spell(loss), spell(theirs[LOSS]["val bpb"])),
        _score_tile("CORE", core, "core_metric", theirs[CORE]["CORE metric"]),
        _score_tile(
            "ChatCORE after SFT",
            chat,
            "chatcore_metric",
            theirs[CHAT["sft"]]["ChatCORE metric"],
        ),
        *cost.tiles(),
    )


def _score_tile(label: str, evaluation: Mapping, metric: str, theirs: float) -> Tile:
    first = evaluation.get("first_of_each_task")
    ours = spell(metric_of(evaluation, metric))
    return Tile(label, ours, spell(theirs), note=of_the_first(first) if first else "")


def stages(folders: Folders) -> tuple[tuple[str, str, str], ...]:
    """(name, status, anchor) of what a speedrun consists of."""
    tokenizer = DONE if folders.tokenizer.get("training") else ABSENT
    found = [("Tokenizer", tokenizer, anchor_of(TOKENIZER))]
    for stage, name in _STAGE_NAMES.items():
        run = folders.runs.get(stage)
        status = ABSENT if run is None else DONE if run.finished else UNFINISHED
        found.append((name, status, anchor_of(TRAINING[stage])))
    return tuple(found)


def notices(folders: Folders) -> tuple[str, ...]:
    """What limits a comparison with the reference, one sentence each."""
    base = folders.runs.get("base")
    missing = [name for name, status, _ in stages(folders) if status == ABSENT and name != "RL"]
    found = [f"Missing: {', '.join(missing)}."] if missing else []
    left_out = folders.speedrun.get("left_out", {})
    found += [f"Left out: {step} ({why})." for step, why in left_out.items()]
    if base is None:
        return tuple(found)
    theirs = reference()["sections"][BASE]
    data, depth = base.setting("data"), base.setting("depth")
    if data not in (None, "fineweb-edu"):
        found.append(
            f"Trained on {data}, not on the reference's FineWeb-Edu: bits per byte and scores are "
            "not comparable with its."
        )
    if depth and depth != theirs["depth"]:
        found.append(f"The model is d{depth}; the reference's is d{theirs['depth']}.")
    if base.tokens and base.tokens < 0.99 * theirs["Number of training tokens"]:
        found.append(
            f"Trained on {base.tokens:,} tokens; the reference on "
            f"{theirs['Number of training tokens']:,}."
        )
    if base.gpu is None:
        found.append("Trained on CPU: speed, MFU, energy and cost say nothing about a GPU.")
    elif base.processes != reference()["gpus"]:
        found.append(
            f"Measured on {base.processes} × {short_gpu(base.gpu)}; what is told for "
            f"{reference()['gpus']} GPUs is a prediction."
        )
    return tuple(found)


def summary(folders: Folders) -> Section:
    """The table BASE | MID | SFT | RL, CORE first, ChatCORE last."""
    ours = {stage: stage_metrics(folders.runs.get(stage)) for stage in TRAINING}
    theirs: dict[str, Mapping[str, Any]] = {
        "base": {"CORE": reference()["sections"][CORE]["CORE metric"]}
    }
    for stage, title in CHAT.items():
        section = reference()["sections"].get(title, {})
        theirs[stage] = {
            name.removesuffix(" metric"): value
            for name, value in section.items()
            if name[0].isupper()
        }
    names = {name for column in (*ours.values(), *theirs.values()) for name in column}
    middle = sorted(names - {"CORE", "ChatCORE"})
    rows = tuple(
        (
            name,
            *(
                Cell(spell(ours[stage].get(name)), _or_nothing(theirs[stage].get(name)))
                for stage in TRAINING
            ),
        )
        for name in ("CORE", *middle, "ChatCORE")
    )
    columns = ("Metric", *(stage.upper() for stage in TRAINING))
    blocks: list[Block] = [Table(columns, rows)]
    evaluations = [found for run in folders.runs.values() for found in run.evaluations.values()]
    if any(found.get("first_of_each_task") for found in evaluations):
        blocks.append(Text("first N: of the first N of each task; the reference's are of all."))
    return Section("Summary", tuple(blocks), lead=True)


def stage_metrics(run: Run | None) -> dict[str, str | None]:
    """What the summary tells of a stage: metric -> as spelled, None where it is not to be had."""
    if run is None:
        return {}
    metrics: dict[str, str | None] = {}
    if core := run.evaluations.get("core"):
        metrics["CORE"] = spell_score(metric_of(core, "core_metric"), core)
    if chat := run.evaluations.get("chat"):
        metrics |= spell_scores(chat, "accuracy")
        metrics["ChatCORE"] = spell_score(metric_of(chat, "chatcore_metric"), chat)
    return metrics


def title(folders: Folders) -> str:
    base = folders.runs.get("base") or folders.first
    depth = base.setting("depth") if base else None
    if depth is None and base and (config := model_config(base)):
        depth = config.n_layer
    return f"Training report: d{depth}" if depth else "Training report"


def subtitle(folders: Folders) -> str:
    run = folders.first
    if run is None:
        return "nothing has been trained yet"
    where = f"{run.processes} × {short_gpu(run.gpu)}" if run.gpu else "CPU"
    flops = training_flops(run)
    parts = [where, f"{run.tokens:,} tokens of base training" if run.tokens else ""]
    if flops and (rate := achieved_flops(run)):
        parts.append(f"{flops:.3g} FLOPs at {rate / 1e12:.0f} TFLOP/s a GPU")
    return " · ".join(part for part in parts if part)


def _or_nothing(value: object) -> str:
    return "" if value is None else spell(value)
