"""Muon and AdamW over any layout of processes against a plain single-process implementation.

One set of four processes runs every layout (forkserver: torch is imported once for all of them);
what each rank saw comes back in files. Gradients are small integers, so that their sums over
ranks are exact and layouts may be compared bit by bit.
"""

import math
import multiprocessing
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gptfast import optim
from gptfast.config import LearningSettings
from gptfast.errors import UserError
from gptfast.model import GPT, GPTConfig
from gptfast.optim import (
    AdamWGroup,
    Grid,
    MuonOperators,
    Optimizer,
    adamw_learning_rate,
    assemble,
    build_optimizer,
    disassemble,
    muon_operators,
    packet,
    unpack,
)
from kernels.muon import add_update, add_update_ref, nesterov, nesterov_ref
from kernels.newton_schulz import newton_schulz_ref
from tests.operators import host_never_waits, poisoned_memory

# Over four ranks: even rows, a rank without rows, fewer rows than ranks; and five, two and one
# matrices of a shape, none a multiple of four.
MATRICES = {
    **{f"tall{i}": (8, 4) for i in range(5)},
    **{f"wide{i}": (6, 10) for i in range(2)},
    "small": (3, 5),
}
ADAMW = {"embedding": (10, 4), "head": (3, 4)}
SHAPES = MATRICES | ADAMW
RATES = {"embedding": 0.2, "head": 0.004}

# Norms of the mean gradient are near 90 / tokens: the second step is clipped, the first is not.
FINE, NAN_GRADIENT, INF_LOSS, NO_TOKENS = "fine", "nan gradient", "inf loss", "no tokens"
STEPS = [
    {"lr_multiplier": 1.0, "momentum": 0.85, "tokens": 128, "what": FINE},
    {"lr_multiplier": 1.0, "momentum": 0.88, "tokens": 32, "what": FINE},
    {"lr_multiplier": 1.0, "momentum": 0.90, "tokens": 128, "what": NAN_GRADIENT},
    {"lr_multiplier": 0.5, "momentum": 0.92, "tokens": 96, "what": FINE},
    {"lr_multiplier": 0.5, "momentum": 0.95, "tokens": 128, "what": INF_LOSS},
    {"lr_multiplier": 0.5, "momentum": 0.95, "tokens": 0, "what": NO_TOKENS},
    {"lr_multiplier": 0.25, "momentum": 0.95, "tokens": 128, "what": FINE},
]
HAPPENS = [step["what"] == FINE for step in STEPS]
SAVED_AFTER = 3

# Name -> shape of the mesh, (replicas, shards) or (shards,); it takes the first ranks it needs.
LAYOUTS = {"1": (1,), "2": (2,), "2x1": (2, 1), "4": (4,), "2x2": (2, 2), "4x1": (4, 1)}
RESUMED = {"2 from 4": (2,), "2x2 from 4": (2, 2)}


def layouts_of(size: int) -> dict[str, tuple[int, ...]]:
    """What so many processes can run."""
    asked = LAYOUTS | RESUMED if size >= 4 else LAYOUTS
    return {name: shape for name, shape in asked.items() if math.prod(shape) <= size}


class Toy(nn.Module):
    """Parameters whose gradients are what forward is given."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator).to(device)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((getattr(self, name) * g).sum() for name, g in gradients.items())


def gradients_of(step: int) -> dict[str, Tensor]:
    """The whole gradients, summed over tokens and ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randint(-8, 9, shape, generator=generator).float()
        for name, shape in SHAPES.items()
    }


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """nanochat d6d86cb's quintic iteration over any leading dimensions, bf16 in and out.

    fp32 between the two: in bf16 the order of additions, which layouts and devices may change,
    would show in the second digit.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.bfloat16().float()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).bfloat16()


class Plain:
    """The oracle: whole tensors, one process, one matrix at a time, torch.optim.AdamW."""

    def __init__(self) -> None:
        self.parameters = dict(Toy().named_parameters())
        self.momentum = {name: torch.zeros(shape) for name, shape in MATRICES.items()}
        self.adamw = torch.optim.AdamW(
            [{"params": [self.parameters[name]], "lr": lr} for name, lr in RATES.items()],
            betas=(0.8, 0.95),
            eps=1e-10,
            weight_decay=0.0,
        )

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], lr_multiplier: float, momentum: float) -> float:
        """gradients are the means over tokens; returns their norm before clipping."""
        norm = sum((g.double() ** 2).sum() for g in gradients.values()).sqrt().item()
        gradients = {name: g * min(1.0, 1.0 / (norm + 1e-6)) for name, g in gradients.items()}
        for name, (rows, columns) in MATRICES.items():
            g, buffer = gradients[name], self.momentum[name]
            buffer.copy_(momentum * buffer + (1 - momentum) * g)
            orthogonal = newton_schulz((1 - momentum) * g + momentum * buffer).float()
            self.parameters[name] -= (
                0.02 * lr_multiplier * max(1, rows / columns) ** 0.5 * orthogonal
            )
        for group, (name, lr) in zip(self.adamw.param_groups, RATES.items(), strict=True):
            group["lr"] = lr * lr_multiplier
            self.parameters[name].grad = gradients[name]
        self.adamw.step()
        return norm

    def state(self) -> dict[str, Tensor]:
        state = {f"{name}.momentum": buffer for name, buffer in self.momentum.items()}
        for name in ADAMW:
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{moment}"] = self.adamw.state[self.parameters[name]][moment]
        return state


class Counting:
    """Newton-Schulz that counts the matrices it is given, other than padding."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor, steps: int) -> Tensor:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        self.count += int(x.flatten(1).any(dim=1).sum())
        return newton_schulz(x, steps)


def operators_of(
    device: str, newton_schulz: Callable = newton_schulz, kernels: str = "triton"
) -> MuonOperators:
    return muon_operators(kernels, torch.device(device))._replace(newton_schulz=newton_schulz)


def optimizer_of(model: nn.Module, **choices) -> Optimizer:
    parameters = dict(model.named_parameters())
    return Optimizer(
        {name: parameters[name] for name in MATRICES},
        [AdamWGroup({name: parameters[name]}, lr) for name, lr in RATES.items()],
        operators=operators_of(parameters["head"].device.type, **choices),
    )


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on CPU that no sharding is left of."""
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in full.items()}


def train(
    mesh: DeviceMesh | None,
    *,
    resume: Path | None = None,
    save: Path | None = None,
    device: str = "cpu",
) -> list[dict]:
    """What this rank sees of every step: parameters, state, statistics, matrices orthogonalised."""
    model = Toy(device)
    rank, size = 0, 1
    if mesh is not None:
        fully_shard(model, mesh=mesh)
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
        rank, size = int((mesh.mesh == dist.get_rank()).flatten().nonzero()), mesh.size()
    counting = Counting()
    optimizer = optimizer_of(model, newton_schulz=counting)
    start = 0
    if resume is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        group = mesh.get_group() if mesh is not None and mesh.ndim == 1 else None
        dcp.load(state, checkpoint_id=resume, process_group=group, no_dist=mesh is None)
        optimizer.load_state_dict(state["optimizer"])
        start = SAVED_AFTER + 1
    history = []
    for index, step in enumerate(STEPS[start:], start):
        # Weights of size, -1, -1, ... add up to 1: every rank contributes, the sum is exact.
        weight = size if rank == 0 else -1
        gradients = {name: weight * g.to(device) for name, g in gradients_of(index).items()}
        if step["what"] == NAN_GRADIENT and rank == size - 1:
            gradients["small"][2, 4] = torch.nan
        loss = model(gradients)
        loss.backward()
        if step["what"] == INF_LOSS and rank == size - 1:
            loss = torch.full_like(loss, torch.inf)
        counting.count = 0
        stats = optimizer.step(
            lr_multiplier=step["lr_multiplier"],
            momentum=step["momentum"],
            token_count=torch.tensor(step["tokens"], device=device),
            loss=loss.detach(),
        )
        assert all(parameter.grad is None for parameter in model.parameters())
        seen = {"orthogonalised": counting.count, **stats._asdict()}
        seen |= {"parameters": whole(dict(model.named_parameters()))}
        seen |= {"state": whole(optimizer.state_dict())}
        history.append(seen)
        if save is not None and index == SAVED_AFTER:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            dcp.save(state, checkpoint_id=save)
    return history


def _process(rank: int, size: int, device_type: str, folder: Path) -> None:
    """One rank: every layout that fits, one after the other; what it sees goes to files."""
    torch.set_num_threads(1)
    device = device_type
    if device_type == "cpu":
        warnings.simplefilter("error")
    else:
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    host_group = dist.new_group(backend="gloo")
    for name, shape in layouts_of(size).items():
        names = ("replicate", "shard")[-len(shape) :]
        ranks = torch.arange(math.prod(shape)).view(shape)
        mesh = DeviceMesh(device_type, ranks, mesh_dim_names=names)
        if mesh.get_coordinate() is not None:
            resume = folder / "checkpoint" if name in RESUMED else None
            save = folder / "checkpoint" if name == "4" else None
            history = train(mesh, device=device, resume=resume, save=save)
            torch.save(history, folder / f"{name}.rank{rank}")
        if name == "2" and rank < 2:
            _refuses_what_it_cannot_shard(mesh)
        dist.barrier(group=host_group)
    dist.destroy_process_group()


def _refuses_what_it_cannot_shard(mesh: DeviceMesh) -> None:
    matrix = torch.ones(4, 4, device=mesh.device_type)
    by_columns = nn.Parameter(distribute_tensor(matrix, mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"Shard\(dim=1\).*at most one Shard\(0\)"):
        Grid.of({"a": by_columns})
    with pytest.raises(ValueError, match="lie in 2 different ways"):
        Grid.of({"a": by_columns, "b": nn.Parameter(matrix)})


def launch(size: int, device_type: str, folder: Path) -> dict[str, list[list[dict]]]:
    """Layout -> what each of its ranks saw, step by step."""
    multiprocessing.set_forkserver_preload(
        ["torch.distributed.fsdp", "torch.distributed.checkpoint"]
    )
    mp.start_processes(
        _process, (size, device_type, folder), nprocs=size, start_method="forkserver"
    )
    return {
        name: [
            torch.load(folder / f"{name}.rank{rank}", map_location="cpu")
            for rank in range(math.prod(shape))
        ]
        for name, shape in layouts_of(size).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, list[list[dict]]]:
    """Every layout on CPU, and "plain": the optimizer on tensors that nothing sharded."""
    return launch(4, "cpu", folder) | {"plain": [train(None)]}


@pytest.fixture(scope="module")
def oracle() -> list[dict]:
    plain, history = Plain(), []
    for index, step in enumerate(STEPS):
        norm = None
        if HAPPENS[index]:
            mean = {name: g / step["tokens"] for name, g in gradients_of(index).items()}
            norm = plain.step(mean, step["lr_multiplier"], step["momentum"])
        seen = {"parameters": whole(plain.parameters), "state": whole(plain.state())}
        history.append({"grad_norm": norm, **seen})
    return history


def assert_follows(history: list[dict], oracle: list[dict], what: str) -> None:
    """A rank's run against the oracle's, step by step."""
    for index, (seen, expected) in enumerate(zip(history, oracle, strict=True)):
        if HAPPENS[index]:
            assert seen["grad_norm"].item() == pytest.approx(expected["grad_norm"], rel=1e-6)
        state = dict(seen["state"])
        assert state.pop("applied_steps") == sum(HAPPENS[: index + 1])
        assert state.pop("skipped_steps") == index + 1 - sum(HAPPENS[: index + 1])
        assert_near(state, expected["state"], f"{what} step {index}")
        assert_near(seen["parameters"], expected["parameters"], f"{what} step {index}")


def assert_near(tensors: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        # Where matrix products add up in another order, an entry of an orthogonalised matrix
        # (about 1 in size at most) may round to the next bf16, 2^-8 away: 1e-4 after the
        # learning rate of 0.02 x sqrt(2). A wrong entry is off by some 5e-3.
        atol = 2e-4 if name in MATRICES else 1e-6
        torch.testing.assert_close(
            tensor, expected[name], atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_every_layout_follows_the_plain_implementation(layout, runs, oracle):
    for rank, history in enumerate(runs[layout]):
        assert_follows(history, oracle, f"{layout} rank {rank}")


def test_kernels_follow_the_plain_implementation(oracle, monkeypatch):
    """The passes that a GPU makes, interpreted; also where a step is skipped."""
    monkeypatch.setattr(optim, "nesterov_ref", nesterov)
    monkeypatch.setattr(optim, "add_update_ref", add_update)
    assert_follows(train(None), oracle, "kernels")


def test_the_reference_has_no_kernel_of_ours(monkeypatch):
    reference = (newton_schulz_ref, nesterov_ref, add_update_ref)
    assert muon_operators("reference", torch.device("cuda")) == reference
    ours = muon_operators("triton", torch.device("cuda"))
    assert ours == (optim.newton_schulz, nesterov, add_update)

    monkeypatch.setattr(optim, "muon_operators", lambda *asked: asked)
    config = GPTConfig(sequence_len=8, vocab_size=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    for kernels in ("triton", "reference"):
        optimizer = build_optimizer(GPT(config), LearningSettings(), kernels=kernels)
        assert optimizer.operators == (kernels, torch.device("cpu"))


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_ranks_and_replicas_agree_bit_by_bit(layout, runs):
    first, *others = runs[layout]
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            for kind in ("parameters", "state"):
                for name, tensor in ours[kind].items():
                    assert same_bits(tensor, theirs[kind][name]), name
            assert same_bits(ours["grad_norm"], theirs["grad_norm"])


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_each_matrix_is_orthogonalised_once_in_the_whole_world(layout, runs):
    for index, happens in enumerate(HAPPENS):
        counts = [history[index]["orthogonalised"] for history in runs[layout]]
        assert sum(counts) == (len(MATRICES) if happens else 0), (index, counts)
    # Eight matrices in groups of five, two and one over four processes.
    if layout in ("4", "2x2", "4x1"):
        assert counts == [2 + 1 + 1, 2 + 1, 1, 0]


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_a_skipped_step_leaves_every_bit_and_is_counted(layout, runs):
    for history in runs[layout]:
        assert [seen["finite"].item() for seen in history] == HAPPENS
        assert [seen["skipped_steps"].item() for seen in history] == [0, 0, 1, 1, 2, 3, 3]
        for index, happens in enumerate(HAPPENS):
            if happens:
                continue
            before, after = history[index - 1], history[index]
            for kind in ("parameters", "state"):
                for name, tensor in after[kind].items():
                    if name != "skipped_steps":
                        assert same_bits(tensor, before[kind][name]), (index, name)


@pytest.mark.parametrize("layout", RESUMED)
def test_state_saved_by_four_continues_on_other_layouts(layout, runs, oracle):
    uninterrupted = runs["4"][0][SAVED_AFTER + 1 :]
    for history in runs[layout]:
        assert_continues(history, uninterrupted)


# What it warns of is meant: there is one process and nothing is initialised.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_state_saved_by_four_continues_unsharded(runs, folder):
    assert_continues(train(None, resume=folder / "checkpoint"), runs["4"][0][SAVED_AFTER + 1 :])


def assert_continues(history: list[dict], uninterrupted: list[dict]) -> None:
    for resumed, expected in zip(history, uninterrupted, strict=True):
        assert_near(resumed["parameters"], expected["parameters"], "resumed")
        assert_near(resumed["state"], expected["state"], "resumed")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()


def packed(shards: Tensor, n_rows: int, grid: Grid) -> Tensor:
    with poisoned_memory():
        room = packet(shards, n_rows, grid)
    unpack(room, shards.shape).copy_(shards)
    return room


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (2, 4), (3, 2), (5, 1)], ids=str)
@pytest.mark.parametrize(("n", "R"), [(7, 16), (24, 12), (1, 3), (3, 1)], ids=str)
def test_exchange_assembles_whole_matrices_and_returns_every_row(grid, n, R):
    n_replicas, n_shards = grid
    matrices = torch.randn(n, R, 5).bfloat16()
    # As FSDP2 cuts rows: chunks of ceil(R / n_shards), then a shorter one, then empty ones.
    shards = list(matrices.chunk(n_shards, dim=1))
    shards += [matrices[:, :0]] * (n_shards - len(shards))
    sent = [packed(shard, R, Grid(n_replicas, n_shards)) for shard in shards]
    gathered = [[] for _ in range(n_shards)]
    held = []
    for replica in range(n_replicas):
        whole = [
            assemble(torch.stack([packets[replica, owner] for packets in sent]), R)
            for owner in range(n_shards)
        ]
        held += whole
        returned = [disassemble(matrix, n_shards) for matrix in whole]
        for rank in range(n_shards):
            gathered[rank].append(torch.stack([rows[rank] for rows in returned]))
    held = torch.cat(held)
    assert torch.equal(held[:n], matrices)
    assert not held[n:].any()
    for rank, shard in enumerate(shards):
        assert torch.equal(unpack(torch.stack(gathered[rank]), shard.shape), shard)


def test_one_process_moves_nothing():
    shards = torch.randn(3, 4, 5)
    send = packed(shards, 4, Grid())
    whole = assemble(send[0], 4)
    returned = unpack(disassemble(whole, 1).unsqueeze(0), shards.shape)
    assert send.data_ptr() == whole.data_ptr() == returned.data_ptr()


def test_learning_rate_falls_with_the_root_of_the_width():
    assert adamw_learning_rate(0.2, 768) == 0.2
    assert adamw_learning_rate(0.2, 3072) == 0.1
    assert adamw_learning_rate(0.004, 1280) == pytest.approx(0.0030983867)


def take_step(optimizer: Optimizer, tokens: int = 1) -> None:
    optimizer.step(
        lr_multiplier=1.0, momentum=0.9, token_count=torch.tensor(tokens), loss=torch.tensor(1.0)
    )


def test_no_clipping_with_an_infinite_limit():
    head = nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer(
        {}, [AdamWGroup({"head": head}, 0.1)], operators=operators_of("cpu"), max_norm=math.inf
    )
    head.grad = torch.full((2, 2), 800.0)
    take_step(optimizer, tokens=4)
    assert torch.equal(optimizer.state_dict()["head.exp_avg"], torch.full((2, 2), 40.0))


def test_wrong_parameters_are_refused_by_name():
    weight = nn.Parameter(torch.ones(2, 2))
    make = partial(Optimizer, operators=operators_of("cpu"))
    with pytest.raises(ValueError, match="2 parameters given under 1 different names"):
        make({"a": weight}, [AdamWGroup({"a": weight}, 0.1)])
    with pytest.raises(ValueError, match=r"a is torch\.bfloat16; master weights are float32"):
        make({"a": nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}, [])
    with pytest.raises(ValueError, match=r"a has shape \(2,\); Muon trains matrices"):
        make({"a": nn.Parameter(torch.ones(2))}, [])
    with pytest.raises(RuntimeError, match="a has no gradient"):
        take_step(make({"a": weight}, []))


def test_state_of_another_model_is_refused():
    optimizer = optimizer_of(Toy())
    state = optimizer.state_dict()
    del state["small.momentum"]
    with pytest.raises(UserError, match=r"1 missing \(first \['small.momentum'\]\), 0 unexpected"):
        optimizer.load_state_dict(state)
    state["small.momentum"] = torch.zeros(1, 5)
    with pytest.raises(UserError, match=r"small.momentum: local shape \(1, 5\) given, \(3, 5\)"):
        optimizer.load_state_dict(state)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_on_a_gpu_no_step_waits_for_the_host(kernels, oracle):
    model = Toy("cuda")
    optimizer = optimizer_of(model, kernels=kernels)
    for index in range(2):
        model({name: g.cuda() for name, g in gradients_of(index).items()}).backward()
        inputs = {"token_count": torch.tensor(STEPS[index]["tokens"], device="cuda")}
        inputs |= {"loss": torch.zeros((), device="cuda")}
        options = {key: STEPS[index][key] for key in ("lr_multiplier", "momentum")}
        with host_never_waits():
            optimizer.step(**options, **inputs)
    assert_near(whole(dict(model.named_parameters())), oracle[1]["parameters"], "cuda")


@pytest.mark.multigpu
def test_on_gpus_every_layout_follows_the_plain_implementation(tmp_path, oracle):
    size = 4 if torch.cuda.device_count() >= 4 else 2
    for layout, ranks in launch(size, "cuda", tmp_path).items():
        for rank, history in enumerate(ranks):
            if layout in LAYOUTS:
                assert_follows(history, oracle, f"{layout} rank {rank}")
