"""Pure functions of the step: how long a run is, its learning rate, Muon's momentum.

Steps count from 0: a run of `total_steps` updates the weights at steps 0 ... total_steps - 1.
Values are nanochat d6d86cb's (scripts/base_train.py).
"""

from gptfast.errors import UserError

# arXiv:2203.15556, as in the report.
TOKENS_PER_PARAM = 20.0


def horizon(
    *,
    n_params: int,
    flops_per_token: int,
    total_batch_size: int,
    iterations: int | None = None,
    tokens: int | None = None,
    target_flops: float | None = None,
    tokens_per_param: float | None = None,
) -> int:
    """The number of steps of a run, from the first of these that is given, at last 20 tokens for
    each parameter:

    1. iterations, as it is;
    2. tokens // total_batch_size;
    3. round(target_flops / (flops_per_token * total_batch_size));
    4. tokens_per_param * n_params // total_batch_size, with every parameter counted.

    total_batch_size is in tokens. UserError when less than one step comes out.
    """
    if iterations is not None:
        steps, why = iterations, f"iterations={iterations}"
    elif tokens is not None:
        steps, why = tokens // total_batch_size, f"tokens={tokens}"
    elif target_flops is not None:
        steps = round(target_flops / (flops_per_token * total_batch_size))
        why = f"target_flops={target_flops:g} at {flops_per_token:g} a token"
    else:
        ratio = TOKENS_PER_PARAM if tokens_per_param is None else tokens_per_param
        steps = int(ratio * n_params // total_batch_size)
        why = f"{ratio:g} tokens for each of {n_params} parameters"
    if steps < 1:
        raise UserError(
            f"{why} with batches of {total_batch_size} tokens gives {steps} steps; "
            "at least 1 is needed: ask for more, or make the batch smaller"
        )
    return steps


def check_ratios(warmup_ratio: float, warmdown_ratio: float) -> None:
    """UserError unless one run has room for both."""
    if not (min(warmup_ratio, warmdown_ratio) >= 0 and warmup_ratio + warmdown_ratio <= 1):
        raise UserError(
            f"warmup_ratio={warmup_ratio} and warmdown_ratio={warmdown_ratio} must be shares of "
            "one run: neither below 0, together at most 1"
        )


def learning_rate_multiplier(
    step: int,
    total_steps: int,
    *,
    warmup_ratio: float = 0.0,
    warmdown_ratio: float = 0.2,
    final_fraction: float = 0.0,
) -> float:
    """What every learning rate is multiplied by at this step.

    With w = round(warmup_ratio * total_steps) and d = round(warmdown_ratio * total_steps):
    (step + 1) / w at steps 0 ... w - 1; then 1 up to and including step total_steps - d; then a
    line that would reach final_fraction at step total_steps. So the last update, at step
    total_steps - 1, still moves: by final_fraction + (1 - final_fraction) / d.
    warmdown_ratio=1 is the straight line 1 - step / total_steps.
    """
    check_ratios(warmup_ratio, warmdown_ratio)
    warmup_steps = round(warmup_ratio * total_steps)
    warmdown_steps = round(warmdown_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    remaining = max(0, total_steps - step)
    if remaining >= warmdown_steps:
        return 1.0
    return final_fraction + (1.0 - final_fraction) * remaining / warmdown_steps


def muon_momentum(
    step: int, *, start: float = 0.85, end: float = 0.95, ramp_steps: int = 300
) -> float:
    """Linear from `start` at step 0 to `end` at step `ramp_steps`, and `end` from there on.

    ramp_steps=0 is `end` throughout (fine-tuning).
    """
    if step >= ramp_steps:
        return end
    done = step / ramp_steps
    return (1.0 - done) * start + done * end
