"""Muon and AdamW over any layout of processes against a plain single-process implementation.

One set of four processes runs every layout (forkserver: torch is imported once for all of them);
what each rank saw comes back in files.
"""

import math
import multiprocessing
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from gptfast.optim import Grid
from tests.optim_cases import (
    HAPPENS,
    MATRICES,
    SAVED_AFTER,
    assert_follows,
    assert_near,
    oracle,
    train,
)

__all__ = ["oracle"]

# Name -> shape of the mesh, (replicas, shards) or (shards,); it takes the first ranks it needs.
LAYOUTS = {"1": (1,), "2": (2,), "2x1": (2, 1), "4": (4,), "2x2": (2, 2), "4x1": (4, 1)}
RESUMED = {"2 from 4": (2,), "2x2 from 4": (2, 2)}


def layouts_of(size: int) -> dict[str, tuple[int, ...]]:
    """What so many processes can run."""
    asked = LAYOUTS | RESUMED if size >= 4 else LAYOUTS
    return {name: shape for name, shape in asked.items() if math.prod(shape) <= size}


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


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_every_layout_follows_the_plain_implementation(layout, runs, oracle):
    for rank, history in enumerate(runs[layout]):
        assert_follows(history, oracle, f"{layout} rank {rank}")


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


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()


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


@pytest.mark.multigpu
def test_on_gpus_every_layout_follows_the_plain_implementation(tmp_path, oracle):
    size = 4 if torch.cuda.device_count() >= 4 else 2
    for layout, ranks in launch(size, "cuda", tmp_path).items():
        for rank, history in enumerate(ranks):
            if layout in LAYOUTS:
                assert_follows(history, oracle, f"{layout} rank {rank}")
