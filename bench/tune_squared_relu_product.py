"""Is a product with squared ReLU in its epilogue faster than cuBLAS and an elementwise kernel?

    python -m bench.tune_squared_relu_product      # one Hopper GPU, about four minutes

At d20's hidden layer, forward and the input gradient behind it (kernels/squared_relu_product.py):
cuBLAS's product alone, a pair of kernels, and the fused kernel with each of the launch
configurations below, under load and interleaved (bench/timing.py); beside them its candidate, whose
epilogue runs beside the next tile (kernels/squared_relu_overlap.py, with what was predicted). The
last line of each table says what the best of them would save in a step.

Predicted before any was measured, of one H200's figures (bench/results/kernels-h200.json: pair 1.70
ms under load, of which the elementwise kernel 0.32, so cuBLAS 1.38 ms at 622 TFLOP/s; backward 1.38
+ 0.46): forward, the fused product wins from 81 % of cuBLAS's rate on; Triton's usual 85 to 90 %
would save 0.1 to 0.15 ms a layer, 0.5 to 0.8 % of a step. Backward it has to read h while it could
multiply: it wins from 75 % on, and 75 to 80 % is what to expect, so next to nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Size, rand, sizes
from bench.timing import LOAD_MS, Contender, Cost, Gpu, Stages, as_it_is, buffer_sets, interleave
from kernels.squared_relu import squared_relu
from kernels.squared_relu_overlap import CONFIG as OVERLAP
from kernels.squared_relu_overlap import squared_relu_overlap
from kernels.squared_relu_product import squared_relu_product

PRODUCT, PAIR = "cuBLAS, product alone", "cuBLAS + elementwise"


@dataclass(frozen=True)
class Config:
    tile: tuple[int, int, int]
    parts: int
    stages: int
    warps: int
    programs: int
    group: int = 8

    def __str__(self) -> str:
        tile = "x".join(map(str, self.tile))
        return (
            f"{tile}, {self.parts} parts, {self.stages} stages, {self.warps} warps, "
            f"{self.programs} an SM, groups of {self.group}"
        )

    @property
    def launch(self) -> dict[str, int]:
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        return {
            **dict(zip(names, self.tile)),
            "PARTS": self.parts,
            "GROUP_M": self.group,
            "num_stages": self.stages,
            "num_warps": self.warps,
            "programs": self.programs,
        }


# All compile for sm_90 without spills, and as many programs as said fit an SM; the first only
# forward, as its gate would take 65 KiB of shared memory more than there is.
CONFIGS = (
    Config((128, 256, 64), parts=1, stages=3, warps=8, programs=1),
    Config((128, 256, 64), parts=2, stages=3, warps=8, programs=1),
    Config((128, 256, 64), parts=2, stages=4, warps=8, programs=1),
    Config((128, 256, 64), parts=4, stages=4, warps=8, programs=1),
    Config((128, 256, 64), parts=4, stages=4, warps=8, programs=1, group=16),
    Config((256, 128, 64), parts=2, stages=3, warps=8, programs=1),
    Config((128, 128, 64), parts=4, stages=3, warps=8, programs=2),
    Config((128, 128, 64), parts=4, stages=3, warps=4, programs=2),
)

# Of the candidate, with as much shared memory as there is: fewer and wider parts, fewer of them a
# step, slots of half the depth, and other orders of tiles.
OVERLAPS: tuple[dict[str, int], ...] = (
    {},
    {"EVERY": 2},
    {"PARTS": 4, "GATES": 1, "EVERY": 2},
    {"PARTS": 4, "GATES": 1, "EVERY": 4},
    {"BLOCK_K": 32, "STAGES": 6, "EVERY": 2},
    {"GROUP_M": 4},
    {"GROUP_M": 16},
)


def contenders_of(
    pair: Callable[..., Tensor], product: Callable[..., Tensor], fused: Callable[..., Tensor]
) -> dict[str, Callable[..., Tensor]]:
    """fused(kernel, *arguments, config=...) is called with either kernel."""
    ours = {str(c): partial(fused, squared_relu_product, config=c.launch) for c in CONFIGS}
    overlaps = {
        f"overlap {changed or ''}": partial(fused, squared_relu_overlap, config=OVERLAP | changed)
        for changed in OVERLAPS
    }
    return {PRODUCT: product, PAIR: pair} | ours | overlaps


def forward(size: Size) -> tuple[Callable[[], tuple[Tensor, ...]], dict[str, Callable]]:
    m, c, f = size.tokens, size.config.n_embd, 4 * size.config.n_embd
    calls = contenders_of(
        pair=lambda x, w: squared_relu(x @ w.T),
        product=lambda x, w: x @ w.T,
        fused=lambda kernel, x, w, config: kernel(x, w, None, config),
    )
    return lambda: (rand(m, c), rand(f, c, scale=c**-0.5)), calls


def input_gradient(size: Size) -> tuple[Callable[[], tuple[Tensor, ...]], dict[str, Callable]]:
    m, c, f = size.tokens, size.config.n_embd, 4 * size.config.n_embd
    calls = contenders_of(
        pair=lambda dy, w, h: torch.ops.gptfast.squared_relu_bwd(dy @ w, h),
        product=lambda dy, w, h: dy @ w,
        fused=lambda kernel, dy, w, h, config: kernel(dy, w, h, config),
    )
    return lambda: (rand(m, c), rand(c, f, scale=c**-0.5), rand(m, f).relu().square()), calls


def check(calls: Mapping[str, Callable], arguments: tuple[Tensor, ...]) -> dict[str, str]:
    """Why a configuration is out: name -> what it said. AssertionError if one computes wrongly."""
    truth, out = calls[PAIR](*arguments).float(), {}
    for name in [name for name in calls if name not in (PRODUCT, PAIR)]:
        try:
            result = calls[name](*arguments).float()
        except Exception as problem:  # of the compiler, of the launch: of any kind
            out[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
            continue
        error = ((result - truth).norm() / truth.norm()).item()
        # Both round to bf16, the pair twice.
        assert error < 0.01, f"{name}: {error:.3g} from the pair"
    return out


def measure(gpu: Gpu, size: Size, inputs: Callable[[], Any], calls: dict[str, Callable]) -> None:
    m, c, f = size.tokens, size.config.n_embd, 4 * size.config.n_embd
    cost = Cost(flops=2 * m * c * f, bytes=2 * (m * c + c * f + m * f))
    sets = [inputs() for _ in range(buffer_sets(cost.bytes, gpu.l2_bytes))]
    out = check(calls, sets[0])
    contenders = {
        name: Contender(gpu, Stages(as_it_is, lambda args, call=call: call(*args)), sets, LOAD_MS)
        for name, call in calls.items()
        if name not in out
    }
    samples = interleave({n: c.sample for n, c in contenders.items()}, seconds=0.0)
    ms = {name: samples[name].quantile(0.5) for name in samples}
    for name in sorted(ms, key=ms.__getitem__):
        print(
            f"{name:60}{ms[name]:8.4f} ms{cost.flops / ms[name] / 1e9:6.0f} TFLOP/s"
            f"{ms[name] / ms[PAIR]:7.3f} x the pair"
        )
    for name, problem in out.items():
        print(f"{name:60}{problem}")
    best = min((name for name in ms if name not in (PRODUCT, PAIR)), key=ms.__getitem__)
    layers = size.config.n_layer
    print(f"best fused: {best}: {layers * (ms[PAIR] - ms[best]):+.2f} ms saved in {layers} layers")


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise SystemExit("needs a Hopper GPU")
    gpu, [size] = Gpu(), sizes(on_gpu=True, every=False)
    print(gpu.name)
    for name, of in (("forward", forward), ("input gradient", input_gradient)):
        print(f"\n{size.name}, {name}")
        measure(gpu, size, *of(size))
        gpu.release()


if __name__ == "__main__":
    main()
