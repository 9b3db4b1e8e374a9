"""Is our product faster than cuBLAS's, with squared ReLU behind it and without?

    python -m bench.tune_product                     # d20; one Hopper GPU, under a minute
    python -m bench.tune_product --depths 12 26 32   # of other depths
    python -m bench.tune_product --every-config      # and with other launch configurations

Every product of a step but the weights' gradients: forward and input gradients, the head's of one
chunk, under load and interleaved (bench/timing.py). Where squared ReLU or its derivative follows,
cuBLAS stands alone and with an elementwise kernel behind it. Products whose tiles would leave gaps
are marked: kernels/linear.py leaves such to cuBLAS.

Predicted before this kernel was measured, of its forerunner in Triton (1.36 ms forward; backward
1.58, and 1.77 in a step of two GPUs; cuBLAS alone 1.35): the epilogue beside the next tile takes
cuBLAS's time, or 1.31 ms each way if that is reached. Forward it does; backward shared memory,
which has to carry the gate too, allows no less than 1.47.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor

from bench.case import rand
from bench.timing import LOAD_MS, Contender, Cost, Gpu, Stages, as_it_is, buffer_sets, interleave
from gptfast.model import GPTConfig
from gptfast.run import exit_code, prepare_to_write, write_json
from kernels.cross_entropy import CHUNKS, chunk_rows
from kernels.product import CONFIG, fills_gpu, product
from kernels.squared_relu import squared_relu, squared_relu_bwd

CUBLAS, PAIR, OURS = "cuBLAS", "cuBLAS + elementwise", "ours"

# Changes to the kernel's own; all compile for sm_90 without spills.
CONFIGS: tuple[dict[str, int], ...] = (
    {"STAGES": 4, "GATES": 2, "OUTS": 1},
    {"PARTS": 4, "GATES": 1, "OUTS": 1},
    {"GROUP_M": 4},
    {"GROUP_M": 16},
)


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, ...] = (20,)
    tokens: int = 65536
    """Rows; of the head's products, a quarter."""
    only: tuple[str, ...] = ()
    """Names of products, whole; otherwise all."""
    every_config: bool = False
    """Ours with each of CONFIGS, too."""
    out: Path | None = None
    """Keep the figures here, as JSON."""


@dataclass(frozen=True)
class Product:
    """(m, k) x (k, n), of a model's layer, and what follows."""

    name: str
    m: int
    k: int
    n: int
    transposed: bool = True
    squared_relu: bool = False
    gated: bool = False

    def operands(self) -> tuple[Tensor, ...]:
        shape = (self.n, self.k) if self.transposed else (self.k, self.n)
        a, b = rand(self.m, self.k), rand(*shape, scale=self.k**-0.5)
        b = b.t() if self.transposed else b
        return (a, b, rand(self.m, self.n).relu().square()) if self.gated else (a, b)

    def calls(self, every_config: bool) -> dict[str, Callable[..., Tensor]]:
        calls: dict[str, Callable[..., Tensor]] = {CUBLAS: lambda a, b, gate=None: a @ b}
        if self.squared_relu:
            calls[PAIR] = lambda a, b: squared_relu(a @ b)
        if self.gated:
            calls[PAIR] = lambda a, b, gate: squared_relu_bwd(a @ b, gate)
        for changed in ({}, *CONFIGS) if every_config else ({},):
            calls[f"{OURS} {changed or ''}".strip()] = partial(self._ours, CONFIG | changed)
        return calls

    def _ours(self, config: dict[str, int], a: Tensor, b: Tensor, gate=None) -> Tensor:
        return product(a, b, squared_relu=self.squared_relu, gate=gate, config=config)


def products(config: GPTConfig, tokens: int) -> Iterator[Product]:
    c = config.n_embd
    qkv, vocabulary = c + 2 * config.n_kv_head * config.head_dim, config.vocab_size
    chunk = chunk_rows(tokens, CHUNKS)
    yield Product("qkv", tokens, c, qkv)
    yield Product("attention projection", tokens, c, c)
    yield Product("mlp fc, squared ReLU", tokens, c, 4 * c, squared_relu=True)
    yield Product("mlp projection", tokens, 4 * c, c)
    yield Product("head, a chunk", chunk, c, vocabulary)
    yield Product("head, input gradient of a chunk", chunk, vocabulary, c, transposed=False)
    dgrad = partial(Product, transposed=False)
    yield dgrad("mlp projection, input gradient, gate", tokens, c, 4 * c, gated=True)
    yield dgrad("mlp fc, input gradient", tokens, 4 * c, c)
    yield dgrad("attention projection, input gradient", tokens, c, c)
    yield dgrad("qkv, input gradient", tokens, qkv, c)


def assert_equal(found: Tensor, truth: Tensor, name: str) -> None:
    """Both round to bf16, a pair of kernels twice."""
    error = ((found.float() - truth.float()).norm() / truth.float().norm()).item()
    assert error < 0.01, f"{name}: {error:.3g} from cuBLAS's"


def measure(gpu: Gpu, which: Product, every_config: bool) -> dict[str, float]:
    """Median ms of each contender; AssertionError for one that computes wrongly."""
    m, k, n = which.m, which.k, which.n
    cost = Cost(flops=2 * m * k * n, bytes=2 * (m * k + k * n + (1 + which.gated) * m * n))
    sets = [which.operands() for _ in range(buffer_sets(cost.bytes, gpu.l2_bytes))]
    calls = which.calls(every_config)
    truth = calls.get(PAIR, calls[CUBLAS])(*sets[0])
    for name in set(calls) - {CUBLAS}:
        assert_equal(calls[name](*sets[0]), truth, f"{which.name}, {name}")
    contenders = {
        name: Contender(gpu, Stages(as_it_is, lambda args, call=call: call(*args)), sets, LOAD_MS)
        for name, call in calls.items()
    }
    samples = interleave({n: c.sample for n, c in contenders.items()}, seconds=0.0)
    ms = {name: samples[name].quantile(0.5) for name in samples}
    gaps = "" if fills_gpu(*sets[0][:2]) else ", with gaps"
    print(f"{which.name}: {m} x {k} x {n}{gaps}")
    for name in ms:
        rate = cost.flops / ms[name] / 1e9
        print(f"  {name:50}{ms[name]:8.4f} ms{rate:6.0f} TFLOP/s{ms[name] / ms[CUBLAS]:7.3f}")
    return ms


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("needs a Hopper GPU")
    if settings.out is not None:
        prepare_to_write(settings.out)
    gpu, kept = Gpu(), {}
    print(f"{gpu.name}, torch {torch.__version__}")
    for depth in settings.depths:
        config = GPTConfig.from_depth(depth, vocab_size=65536)
        for which in products(config, settings.tokens):
            if settings.only and which.name not in settings.only:
                continue
            kept[f"d{depth}, {which.name}"] = measure(gpu, which, settings.every_config)
            gpu.release()
    if settings.out is not None:
        write_json(settings.out, {"gpu": gpu.name, "ms": kept})


if __name__ == "__main__":
    sys.exit(exit_code(main))
