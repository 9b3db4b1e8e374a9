"""A run's results under the reference report's names: numbers, not yet spelled."""

from collections.abc import Callable, Mapping
from typing import Any

from gptfast import hardware
from gptfast.config import HorizonSettings
from gptfast.errors import UserError
from gptfast.model import GPTConfig, flops_per_token, parameter_counts
from gptfast.report.runs import Run
from gptfast.schedule import horizon

MIB = 2**20
Figures = dict[str, Any]


def base_results(run: Run) -> Figures:
    config, tokens = model_config(run), run.tokens
    parameters = sum(parameter_counts(config).values()) if config else None
    validations = [row["val_bpb"] for row in run.validations if row.get("val_bpb") is not None]
    return {
        "Number of parameters": parameters,
        "Number of FLOPs per token": float(flops_per_token(config)) if config else None,
        "Calculated number of iterations": planned_steps(run),
        "Number of training tokens": tokens,
        "Tokens : Params ratio": tokens / parameters if tokens and parameters else None,
        "DDP world size": run.processes,
        "Minimum validation bpb": min(validations, default=None),
        "Final validation bpb": validations[-1] if validations else None,
        "MFU %": percent(run.steady("mfu_report")),
        "Total training flops": training_flops(run),
        "Total training time": minutes(run.training_seconds),
        "Peak memory usage": peak_memory(run),
        **speed(run),
    }


def mid_results(run: Run) -> Figures:
    validations = [row["val_bpb"] for row in run.validations if row.get("val_bpb") is not None]
    return {
        "Number of iterations": run.steps_done,
        "DDP world size": run.processes,
        "Minimum validation bpb": min(validations, default=None),
        "Final validation bpb": validations[-1] if validations else None,
        "Number of training tokens": run.tokens,
        **shared_results(run),
    }


def sft_results(run: Run) -> Figures:
    losses = [row["loss"] for row in run.steps if row.get("loss") is not None]
    return {
        "Training rows": _last(run, "training_rows"),
        "Number of iterations": run.steps_done,
        "Training loss": losses[-1] if losses else None,
        "Validation loss": _last(run, "val_loss"),
        **accuracies(run),
        "Supervised tokens": sum(row.get("supervised_tokens", 0) for row in run.steps) or None,
        **shared_results(run),
    }


def rl_results(run: Run) -> Figures:
    rewards = [row["reward"] for row in run.steps if row.get("reward") is not None]
    tenth = max(1, len(rewards) // 10)
    return {
        "Number of iterations": run.steps_done,
        "Mean reward, first tenth": sum(rewards[:tenth]) / tenth if rewards else None,
        "Mean reward, last tenth": sum(rewards[-tenth:]) / tenth if rewards else None,
        **accuracies(run),
        **shared_results(run),
    }


RESULTS: Mapping[str, Callable[[Run], Figures]] = {
    "base": base_results,
    "mid": mid_results,
    "sft": sft_results,
    "rl": rl_results,
}


def shared_results(run: Run) -> Figures:
    """What every stage that trains can tell beyond the reference's fields."""
    return {
        "MFU %": percent(run.steady("mfu_report")),
        "Total training time": minutes(run.training_seconds),
        "Peak memory usage": peak_memory(run),
        **speed(run),
    }


def speed(run: Run) -> Figures:
    rate = run.steady("tokens_per_second_per_gpu")
    skipped = run.steps[-1].get("skipped_steps") if run.steps else None
    events = [row for row in run.rows if row.get("kind") == "event"]
    first = next((row for row in events if "first_step_seconds" in row), {})
    return {
        "MFU of this GPU's own peak %": percent(run.steady("mfu_own_peak")),
        "Tokens a second and process" if run.gpu is None else "Tokens a second and GPU": rate,
        "First step, compilation included": first.get("first_step_seconds"),
        "Launch to step 1": first.get("launch_to_step_1_seconds"),
        "Steps skipped as not finite": skipped,
    }


def accuracies(run: Run) -> Figures:
    """What validation found besides the loss: accuracies, pass@k."""
    known = {"kind", "step", "tokens", "val_bpb", "val_loss", "loss"}
    last: Mapping = run.validations[-1] if run.validations else {}
    return {
        name: value
        for name, value in last.items()
        if name not in known and isinstance(value, int | float)
    }


def model_config(run: Run) -> GPTConfig | None:
    """Its architecture: the checkpoint's, or what its settings come to; None if neither tells."""
    saved = run.meta.get("model_config")
    names = ("depth", "vocab_size", "sequence_len")
    asked = {name: run.setting(name) for name in names}
    try:
        if isinstance(saved, Mapping):
            return GPTConfig(**saved)
        return GPTConfig.from_depth(**asked) if all(asked.values()) else None
    except (TypeError, UserError):
        # Written by another version; the report does without what would follow from it.
        return None


def planned_steps(run: Run) -> int | None:
    """How many steps the run has, or would have had."""
    if run.finished:
        return run.steps_done
    config = model_config(run)
    if config is None:
        return None
    try:
        length = HorizonSettings(**run.settings["horizon"])
        return horizon(
            n_params=sum(parameter_counts(config).values()),
            flops_per_token=flops_per_token(config),
            total_batch_size=run.setting("total_batch_size"),
            iterations=length.iterations(run.setting("device")),
            tokens=length.target_tokens,
            target_flops=length.target_flops,
            tokens_per_param=length.target_param_data_ratio,
        )
    except (KeyError, TypeError, AttributeError, UserError):
        # Another stage's settings, or another version's: nobody can tell.
        return None


def training_flops(run: Run) -> float | None:
    config, tokens = model_config(run), run.tokens
    return float(flops_per_token(config)) * tokens if config and tokens else None


def achieved_flops(run: Run) -> float | None:
    """Model FLOP/s of one GPU, by the report's formula; None on CPU."""
    share = run.steady("mfu_report")
    return share * hardware.REPORT_PEAK_FLOPS if share is not None else None


def peak_memory(run: Run) -> float | None:
    """MiB of one GPU."""
    peaks = [row["peak_memory_bytes"] for row in run.steps if row.get("peak_memory_bytes")]
    return max(peaks) / MIB if peaks else None


def gpu_hours(run: Run) -> float | None:
    """Of its training steps; None on CPU."""
    if run.gpu is None or run.training_seconds is None:
        return None
    return run.processes * run.training_seconds / 3600


def metric_of(evaluation: Mapping, name: str) -> float | None:
    """CORE or ChatCORE, be it of the first examples of each task; None if a task is missing."""
    if evaluation.get("missing"):
        return None
    return evaluation.get(name, evaluation.get(f"{name}_partial"))


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def minutes(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 60


def _last(run: Run, name: str) -> object:
    return next((row[name] for row in reversed(run.rows) if row.get(name) is not None), None)
