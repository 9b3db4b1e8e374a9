"""The marks that the kernels have to reach at d20, each computed from the rows of one session."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.case import BACKWARD, BOTH, FORWARD
from bench.providers import EAGER, EIGHT_CHUNKS, OURS, RIVALS
from bench.report import Row, timed

SIZE = "d20"

# Limited by memory: a share of the copy ceiling, and a place among the rivals.
MEMORY_BOUND = ("rms_norm", "add_rms_norm", "rotary_qk_norm", "squared_relu")
COPY_SHARE = 0.88
RIVAL_LEAD = 0.02  # no rival may be faster by more
OPEN_SHARE = 0.85  # with the best rival below, ours must be ahead of all

LOGITS_PASS_SHARE = 0.80
QK_NORM_BACKWARD_MS = 0.36  # of an H200
QK_NORM_GPU = "H200"
CROSS_ENTROPY_BY_PRODUCTS = 1.12
CROSS_ENTROPY_PEAK_GIB = 3.0
NEWTON_SCHULZ_BY_BMM = 1.2
DO_BENCH_DIFFERENCE = 0.05


@dataclass(frozen=True)
class Mark:
    what: str
    measured: str = "not measured"
    met: bool | None = None
    """None: not measured, or not judged on this GPU."""

    def __str__(self) -> str:
        verdict = {True: "met", False: "NOT MET", None: "open"}[self.met]
        return f"{verdict:<8}{self.what} -> {self.measured}"


def marks(rows: Sequence[Row], gpu: str) -> list[Mark]:
    return [
        *(_memory_bound(rows, case, d) for case in MEMORY_BOUND for d in (FORWARD, BACKWARD)),
        _logits_pass(rows),
        _qk_norm_backward(rows, gpu),
        _cross_entropy_time(rows),
        _cross_entropy_memory(rows),
        _newton_schulz(rows),
        _weight_gradient(rows),
        _do_bench(rows),
    ]


def _memory_bound(rows: Sequence[Row], case: str, direction: str) -> Mark:
    what = (
        f"{case} {direction}: at least {COPY_SHARE:.0%} of the copy ceiling, no rival over "
        f"{RIVAL_LEAD:.0%} faster, none ahead if the best is below {OPEN_SHARE:.0%}"
    )
    group = timed(rows, case, SIZE, direction)
    rivals = [group[name] for name in RIVALS if name in group]
    if OURS not in group or not rivals:
        return Mark(what)
    ours, best = group[OURS], min(rivals, key=lambda row: row.ms)
    allowed = best.ms if best.of_ceiling < OPEN_SHARE else best.ms * (1 + RIVAL_LEAD)
    return Mark(
        what,
        f"{ours.of_ceiling:.1%}; best rival {best.provider} {best.of_ceiling:.1%}, "
        f"{best.ms / ours.ms:.3f} x ours' time",
        ours.of_ceiling >= COPY_SHARE and ours.ms <= allowed,
    )


def _logits_pass(rows: Sequence[Row]) -> Mark:
    what = f"cross_entropy_logits: at least {LOGITS_PASS_SHARE:.0%} of its own roofline"
    group = timed(rows, "cross_entropy_logits", SIZE, FORWARD)
    if OURS not in group:
        return Mark(what)
    share = group[OURS].of_ceiling
    return Mark(what, f"{share:.1%}", share >= LOGITS_PASS_SHARE)


def _qk_norm_backward(rows: Sequence[Row], gpu: str) -> Mark:
    what = f"rotary_qk_norm backward, packed gradient and all: at most {QK_NORM_BACKWARD_MS} ms"
    group = timed(rows, "rotary_qk_norm", SIZE, BACKWARD)
    if OURS not in group:
        return Mark(what)
    ms = group[OURS].ms
    if QK_NORM_GPU not in gpu:
        return Mark(what, f"{ms:.3f} ms; the mark is for an {QK_NORM_GPU}")
    return Mark(what, f"{ms:.3f} ms", ms <= QK_NORM_BACKWARD_MS)


def _cross_entropy_time(rows: Sequence[Row]) -> Mark:
    what = (
        f"linear_cross_entropy both: at most {CROSS_ENTROPY_BY_PRODUCTS} x its three products' time"
    )
    products = timed(rows, "linear_cross_entropy", SIZE, BOTH).get("products")
    if products is None:
        return Mark(what)
    ratio = products.ours_ms / products.ms
    return Mark(
        what,
        f"{ratio:.3f} x ({products.ours_ms:.2f} ms, products {products.ms:.2f} ms)",
        ratio <= CROSS_ENTROPY_BY_PRODUCTS,
    )


def _cross_entropy_memory(rows: Sequence[Row]) -> Mark:
    what = f"linear_cross_entropy both: peak memory at most {CROSS_ENTROPY_PEAK_GIB:g} GiB"
    group = timed(rows, "linear_cross_entropy", SIZE, BOTH)
    if OURS not in group:
        return Mark(what)
    peak = group[OURS].peak_gib
    return Mark(what, f"{peak:.2f} GiB", peak <= CROSS_ENTROPY_PEAK_GIB)


def _newton_schulz(rows: Sequence[Row]) -> Mark:
    what = f"newton_schulz: at least {NEWTON_SCHULZ_BY_BMM} x as fast as batched torch.bmm"
    group = timed(rows, "newton_schulz", SIZE, FORWARD)
    if OURS not in group or EAGER not in group:
        return Mark(what)
    ratio = group[EAGER].ms / group[OURS].ms
    return Mark(
        what,
        f"{ratio:.3f} x ({group[OURS].ms:.2f} ms, bmm {group[EAGER].ms:.2f} ms)",
        ratio >= NEWTON_SCHULZ_BY_BMM,
    )


def _weight_gradient(rows: Sequence[Row]) -> Mark:
    what = "linear_cross_entropy, 8 chunks: dweight no further from fp32 than unchunked PyTorch"
    group = timed(rows, "linear_cross_entropy", SIZE, BOTH)
    if EIGHT_CHUNKS not in group or EAGER not in group:
        return Mark(what)
    ours, eager = (group[name].errors["dweight"] for name in (EIGHT_CHUNKS, EAGER))
    return Mark(what, f"{ours:.3e}, PyTorch {eager:.3e}", ours <= eager)


def _do_bench(rows: Sequence[Row]) -> Mark:
    what = f"medians of long calls within {DO_BENCH_DIFFERENCE:.0%} of triton.testing.do_bench"
    apart = {" ".join(row.group): row.ms / row.do_bench_ms - 1 for row in rows if row.do_bench_ms}
    if not apart:
        return Mark(what)
    worst = max(apart, key=lambda group: abs(apart[group]))
    return Mark(
        what,
        f"{apart[worst]:+.1%} at most in {len(apart)} passes, of {worst}",
        abs(apart[worst]) <= DO_BENCH_DIFFERENCE,
    )
