"""What a row has to do at the least, and how long that takes at what a GPU was measured to do."""

import time
from dataclasses import dataclass
from math import ceil

import torch

from gptfast.clock import median_ms, timed
from gptfast.ledger.job import Job
from gptfast.ledger.kinds import (
    ADAMW,
    ATTENTION,
    GRADIENT_NORM,
    MEMORY,
    MUON_ELEMENTWISE,
    NEWTON_SCHULZ,
    OPTIMIZER_GROUP,
    PRODUCTS,
)
from gptfast.ledger.trace import FORWARD
from gptfast.model import parameter_counts

_NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Ceilings:
    """What one GPU was measured to do, hot, a second."""

    copy: float
    """Bytes read + written by a copy within the device."""
    product: float
    """FLOPs of a bf16 product of 8192 x 8192 matrices."""

    def __str__(self) -> str:
        return (
            f"copy {self.copy / 1e12:.2f} TB/s (read + written), "
            f"bf16 product {self.product / 1e12:.0f} TFLOP/s"
        )


def measure_ceilings(device: torch.device, seconds: float = 1.5) -> Ceilings | None:
    """Copies and products in turn until the card is hot, then the median of what follows; None
    without a GPU, or without the 1.4 GiB that it takes."""
    if device.type != "cuda":
        return None
    n, values = 8192, 2**28
    try:
        source, target = torch.empty(2, values, device=device, dtype=torch.bfloat16)
        # A generator of its own: the run's random numbers stay what they are.
        generator = torch.Generator(device).manual_seed(0)
        source.normal_(generator=generator)
        a, b = torch.randn(2, n, n, generator=generator, device=device, dtype=torch.bfloat16)
        product = torch.empty_like(a)
    except torch.OutOfMemoryError:
        return None
    copies: list = []
    products: list = []
    begin = time.monotonic()
    while time.monotonic() - begin < seconds or len(copies) < 10:
        # Ten in a row: a single one runs at clocks that none keeps under load.
        with timed(device, products):
            for _ in range(10):
                torch.mm(a, b, out=product)
        # Behind the products, whose time the host has to queue them: alone, a copy of 0.25 ms is
        # timed with its launch (2.9 to 4.0 TB/s instead of 4.15, H200, 2026-11-23).
        with timed(device, copies):
            for _ in range(10):
                target.copy_(source)
        # The host must not run seconds ahead.
        copies[-1][1].synchronize()
    hot = slice(len(copies) // 2, None)
    return Ceilings(
        copy=10 * 2 * source.nbytes / (median_ms(copies[hot]) / 1e3),
        product=10 * 2 * n**3 / (median_ms(products[hot]) / 1e3),
    )


def known_costs(group: str, name: str, job: Job) -> tuple[float, float] | None:
    """(FLOPs, bytes) of a step for rows whose work follows from the model; None for the others.

    Attention: the products below the diagonal, two forward and five backward (the scores are made
    anew). Newton-Schulz: this process's share of the matrices, symmetric products at half price.
    AdamW and Muon: every fp32 state that an update must read or write, once.
    """
    config = job.config
    if group == ATTENTION:
        # One of them is a twelfth of the formula's six over the whole square.
        products = 2 if name == FORWARD else 5
        return products * job.attention_flops / 12 * job.counted_tokens, 0.0
    if group != OPTIMIZER_GROUP:
        return None
    counts = parameter_counts(config)
    blocks, rest = counts["blocks"], counts["embedding"] + counts["head"]
    bytes_a_parameter = {
        # Parameter, gradient and both moments in; parameter and both moments out.
        ADAMW: 7 * 4 * rest,
        GRADIENT_NORM: 4 * (blocks + rest),
        # Gradient and momentum in, momentum and a bf16 update out; that and the parameter in, the
        # parameter out.
        MUON_ELEMENTWISE: (4 + 4 + 4 + 2 + 2 + 4 + 4) * blocks,
    }
    if name == NEWTON_SCHULZ:
        return newton_schulz_flops(job), 0.0
    if name in bytes_a_parameter:
        return 0.0, bytes_a_parameter[name] / job.shards
    return None


def newton_schulz_flops(job: Job) -> float:
    """Of one process in one step: for matrices of R rows and C columns, R <= C, an iteration is
    R R C + R R R for the two symmetric products and 2 R R C for the plain one."""
    config = job.config
    C, KV, L = config.n_embd, config.n_kv_head * config.head_dim, config.n_layer
    matrices: dict[tuple[int, int], int] = {}
    for shape in ((C, C), (KV, C), (KV, C), (C, C), (4 * C, C), (C, 4 * C)):
        matrices[shape] = matrices.get(shape, 0) + L
    total = 0
    for shape, count in matrices.items():
        R, width = min(shape), max(shape)
        total += ceil(count / job.processes) * (3 * R * R * width + R**3)
    return float(_NEWTON_SCHULZ_STEPS * total)


def floor_ms(group: str, flops: float, moved: float, ceilings: Ceilings | None, ms: float) -> float:
    """The least time of a row: its work at the measured ceilings; 0 for what need not be there at
    all (gaps, exposed communication, copies). Where the work is not known, its own time: nothing
    is claimed of it."""
    if group not in (PRODUCTS, ATTENTION, MEMORY, OPTIMIZER_GROUP):
        return 0.0
    if ceilings is None or not (flops or moved):
        return ms
    return min(ms, 1e3 * max(flops / ceilings.product, moved / ceilings.copy))
