"""Is a product with squared ReLU in its epilogue faster than cuBLAS and an elementwise kernel?

    python -m bench.tune_squared_relu_product      # one Hopper GPU, about a minute

At d20's hidden layer, forward and the input gradient behind it (kernels/squared_relu_product.py):
cuBLAS's product alone, a pair of kernels, and the fused kernel with each of the launch
configurations below, under load and interleaved (bench/timing.py). The last line of each table says
what the best of them would save in a step.

Predicted before this kernel was measured, of its forerunner in Triton (1.36 ms forward; backward
1.58, and 1.77 in a step of two GPUs; cuBLAS alone 1.35): the epilogue beside the next tile takes
cuBLAS's time, or 1.31 ms each way if that is reached. Forward it does; backward shared memory,
which has to carry the gate too, allows no less than 1.47.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Size, rand, sizes
from bench.timing import LOAD_MS, Contender, Cost, Gpu, Stages, as_it_is, buffer_sets, interleave
from kernels.squared_relu import squared_relu
from kernels.squared_relu_product import CONFIG, squared_relu_product

PRODUCT, PAIR = "cuBLAS, product alone", "cuBLAS + elementwise"

# Changes to the kernel's own; all compile for sm_90 without spills.
CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"GATES": 2},
    {"STAGES": 4, "GATES": 2, "OUTS": 1},
    {"PARTS": 4, "GATES": 1, "OUTS": 1},
    {"GROUP_M": 4},
    {"GROUP_M": 16},
)


def contenders_of(
    pair: Callable[..., Tensor], product: Callable[..., Tensor], fused: Callable[..., Tensor]
) -> dict[str, Callable[..., Tensor]]:
    ours = {
        f"fused {changed or ''}": partial(fused, config=CONFIG | changed) for changed in CONFIGS
    }
    return {PRODUCT: product, PAIR: pair} | ours


def forward(size: Size) -> tuple[Callable[[], tuple[Tensor, ...]], dict[str, Callable]]:
    m, c, f = size.tokens, size.config.n_embd, 4 * size.config.n_embd
    calls = contenders_of(
        pair=lambda x, w: squared_relu(x @ w.T),
        product=lambda x, w: x @ w.T,
        fused=lambda x, w, config: squared_relu_product(x, w, None, config),
    )
    return lambda: (rand(m, c), rand(f, c, scale=c**-0.5)), calls


def input_gradient(size: Size) -> tuple[Callable[[], tuple[Tensor, ...]], dict[str, Callable]]:
    m, c, f = size.tokens, size.config.n_embd, 4 * size.config.n_embd
    calls = contenders_of(
        pair=lambda dy, w, h: torch.ops.gptfast.squared_relu_bwd(dy @ w, h),
        product=lambda dy, w, h: dy @ w,
        fused=squared_relu_product,
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
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("needs a Hopper GPU")
    gpu, [size] = Gpu(), sizes(on_gpu=True, every=False)
    print(gpu.name)
    for name, of in (("forward", forward), ("input gradient", input_gradient)):
        print(f"\n{size.name}, {name}")
        measure(gpu, size, *of(size))
        gpu.release()


if __name__ == "__main__":
    main()
