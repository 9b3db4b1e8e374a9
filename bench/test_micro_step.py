"""How long is a micro-step of d20, forward + backward, with our kernels and without?

    pytest bench/test_micro_step.py

ours      `--kernels triton`
compile   `--kernels reference`: the same model in plain PyTorch, which torch.compile fuses

Two models in one process, each built as training builds it: FSDP2 over one process, bf16 gathered
from fp32, blocks compiled one by one. They have the same weights, none of them zero as at the start
(a product with zeros takes less power, and so less time), and take turns on the same tokens. The
rate is in the report's FLOPs, of whole attention. Memory is a model's own: its weights, and the
most that a step adds, gradients included; there is no optimizer.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.case import BOTH, Size, sizes
from bench.providers import COMPILE, OURS
from bench.report import Row
from bench.suite import Result, Suite, speed
from bench.timing import Contender, Cost, Stages, interleave
from gptfast import parallel
from gptfast.attention import choose_attention
from gptfast.exchange import local
from gptfast.model import GPT, flops_per_token

KERNELS = {OURS: "triton", COMPILE: "reference"}
ON_GPU = torch.cuda.is_available()
[SIZE] = sizes(on_gpu=ON_GPU, every=False)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# What the two may differ by, relative to the reference: loss, and all gradients as one vector. bf16
# rounds hundreds of times on the way through 20 layers; a wrong kernel in one block shows.
LARGEST_DIFFERENCES = (1e-3, 0.1) if ON_GPU else (1e-6, 1e-5)


class Model(NamedTuple):
    gpt: GPT
    weight_bytes: int
    first_step_seconds: float

    def micro_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The summed loss, its gradients in the parameters."""
        loss = self.gpt(*batch)
        loss.backward()
        return loss.detach()

    def without_gradients(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.gpt.zero_grad(set_to_none=True)
        return batch

    @property
    def stages(self) -> Stages:
        return Stages(self.without_gradients, self.micro_step)

    @property
    def gradients(self) -> list[Tensor]:
        found = []
        for name, parameter in self.gpt.named_parameters():
            assert parameter.grad is not None, name
            found.append(local(parameter.grad))
        return found


class Models:
    """Each provider's, built and taken through its first step when it is first asked for."""

    def __init__(self, world: parallel.World, size: Size):
        self.world, self.size = world, size
        generator = torch.Generator(world.device).manual_seed(1)
        shape = (2, size.batch, size.config.sequence_len)
        vocabulary = size.config.vocab_size
        ids, targets = torch.randint(vocabulary, shape, generator=generator, device=world.device)
        self.batch = ids.int(), targets
        self._built: dict[str, Model] = {}

    def __getitem__(self, provider: str) -> Model:
        if provider not in self._built:
            self._built[provider] = self._build(KERNELS[provider])
        return self._built[provider]

    def _build(self, kernels: str) -> Model:
        begin, before = time.perf_counter(), allocated()
        config = self.size.config
        attention = choose_attention("auto", self.world.device, DTYPE, config.head_dim)
        gpt = parallel.build_sharded(
            partial(GPT, config, kernels=kernels, attention_backend=attention.backend),
            self.world,
            compute_dtype=DTYPE,
            reshard_after_forward=False,
            compile_blocks=ON_GPU,
            seed=1,
        )
        fill_zeros(gpt, torch.Generator(self.world.device).manual_seed(2))
        weight_bytes = allocated() - before
        Model(gpt, 0, 0.0).micro_step(self.batch).item()
        return Model(gpt, weight_bytes, time.perf_counter() - begin)


@torch.no_grad()
def fill_zeros(gpt: GPT, generator: torch.Generator) -> None:
    for parameter in map(local, gpt.parameters()):
        if not parameter.any():
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)


def allocated() -> int:
    return torch.cuda.memory_allocated() if ON_GPU else 0


def differences(ours: Model, theirs: Model, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of loss and of gradients, relative to `theirs`."""
    loss, reference = (m.micro_step(m.without_gradients(batch)).item() for m in (ours, theirs))
    pairs = list(zip(ours.gradients, theirs.gradients, strict=True))
    apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
    whole = sum(float(b.double().square().sum()) for _, b in pairs)
    return abs(loss / reference - 1), (apart / whole) ** 0.5


def measure(suite: Suite, models: Models) -> dict[str, Result]:
    gpu, ceilings = suite.instruments()
    of_loss, of_gradients = differences(models[OURS], models[COMPILE], models.batch)
    contenders = {
        name: Contender(gpu, models[name].stages, [models.batch], suite.load_ms) for name in KERNELS
    }
    for contender in contenders.values():
        # A step has as many launches as CUDA queues, so the host cannot be done before the GPU
        # begins. Behind the step that is the load it is ahead all the same.
        contender.waits_for_gpu = True
    peaks = {}
    for name in KERNELS:
        models[name].without_gradients(models.batch)
        peaks[name] = models[name].weight_bytes + gpu.peak_bytes(models[name].stages, models.batch)
    samples = interleave(
        {name: contender.sample for name, contender in contenders.items()},
        seconds=0.0,
        least=8,
        warm_up=1,
    )

    cost = Cost(flops=flops_per_token(SIZE.config) * SIZE.tokens)
    results = {}
    for name in KERNELS:
        row = Row(
            *("micro_step", SIZE.name, BOTH, name),
            **speed(samples[name], cost, ceilings),
            sm_ghz=median(contenders[name].ghz),
            peak_gib=peaks[name] / 2**30,
            note=f"first step {models[name].first_step_seconds:.0f} s",
        )
        if name == OURS:
            apart = f"from the reference's: loss {of_loss:.1e}, gradients {of_gradients:.1e} apart"
            row = replace(
                row,
                errors={"loss": of_loss, "gradients": of_gradients},
                note=f"{row.note}; {apart}",
            )
        results[name] = Result(row, samples[name])
    return results


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    with parallel.start() as world:
        yield Models(world, SIZE)


@pytest.mark.parametrize("provider", KERNELS)
def test_every_parameter_has_a_gradient(models, provider):
    """The first step, compilation included."""
    model = models[provider]
    model.micro_step(model.without_gradients(models.batch))
    names = [name for name, _ in model.gpt.named_parameters()]
    norms = torch.stack([grad.norm() for grad in model.gradients]).tolist()
    assert {n: norm for n, norm in zip(names, norms) if not 0 < norm < float("inf")} == {}


def test_same_loss_and_gradients(models):
    found = differences(models[OURS], models[COMPILE], models.batch)
    assert all(a <= b for a, b in zip(found, LARGEST_DIFFERENCES)), found


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("provider", KERNELS)
def test_micro_step(suite, hand_over, models, provider):
    key = ("micro_step", SIZE.name, BOTH)
    hand_over(suite.once(key, lambda: measure(suite, models))[provider])
