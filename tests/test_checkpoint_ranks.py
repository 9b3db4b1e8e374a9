"""Checkpoints of several processes: resharded, failing on one rank, killed half-way and resumed."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_checkpoint import flip_a_byte, names, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gptfast.checkpoint import Checkpointer, files
from gptfast.errors import UserError


def _enter(rank: int, world_size: int, store: str, work, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    work(rank, world_size, dist.new_group(backend="gloo"), *args)
    dist.destroy_process_group()


def start(tmp_path: Path, world_size: int, work, *args) -> list:
    """`work(rank, world_size, gloo_group, *args)` in that many processes."""
    context = multiprocessing.get_context("forkserver")
    # Imported once for all: torch._dynamo is what the first collective on a DTensor pulls in.
    context.set_forkserver_preload(["gptfast.checkpoint", "torch._dynamo"])
    store = tmp_path / f"store{time.monotonic_ns()}"
    ranks = [
        context.Process(target=_enter, args=(rank, world_size, str(store), work, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def run(tmp_path: Path, world_size: int, work, *args) -> None:
    ranks = start(tmp_path, world_size, work, *args)
    try:
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0] * world_size
    finally:
        for process in ranks:
            process.kill()


def checkpointer(folder: Path, group: dist.ProcessGroup) -> Checkpointer:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return Checkpointer(folder, keep=2, process_group=group, rank=rank, world_size=world_size)


def sharded_state(world_size: int, seed: int) -> dict:
    """A sharded model and its moments; rows 7, 5 and 2 do not divide by 4: uneven and empty."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5), nn.Linear(5, 2))
    meshes = [init_device_mesh("cpu", (world_size,))] * 3
    if world_size == 4:
        # The first layer's shards are on two ranks each, and written once.
        meshes[0] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer, mesh in zip(model, meshes):
        fully_shard(layer, mesh=mesh)
    optimizer = {
        name: {
            "exp_avg": distribute_tensor(
                torch.randn(param.shape), param.device_mesh, param.placements
            ),
            "step": torch.tensor(float(seed)),
        }
        for name, param in model.named_parameters()
    }
    return {"model": model.state_dict(), "optimizer": optimizer}


def whole(state: dict) -> dict[str, torch.Tensor]:
    flat = files.flatten(state).items()
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in flat}


def reshard(rank: int, world_size: int, group, folder: Path, load: int | None, save: int) -> None:
    """Load a step that another number of ranks wrote, compare, and write the next."""
    checkpoints = checkpointer(folder, group)
    step, warnings = checkpoints.latest()
    assert (step, warnings) == (load, [])
    state = sharded_state(world_size, seed=4)
    if load is not None:
        expected, state = whole(state), sharded_state(world_size, seed=99)
        ranks, meta = checkpoints.load(load, state)
        assert same(whole(state), expected)
        assert ranks == [{"rank": r} for r in range(meta["world_size"])]
    checkpoints.save(save, state, {"rank": rank}, {"world_size": world_size})
    mine, _ = checkpoints.load(save, state)
    assert mine == {"rank": rank}
    checkpoints.close()


def test_another_world_size_loads_what_4_ranks_wrote(tmp_path):
    folder = tmp_path / "run"
    run(tmp_path, 4, reshard, folder, None, 4)
    run(tmp_path, 2, reshard, folder, 4, 6)
    run(tmp_path, 1, reshard, folder, 6, 8)
    assert files.read_manifest(folder / "step_000006")["world_size"] == 2
    # Two ranks' layout and one rank's hold the same numbers, and plain tensors can take them.
    checkpoints = Checkpointer(folder, keep=2)
    of_two, of_one = (files.load_full_state(folder / f"step_00000{step}") for step in (6, 8))
    assert same(of_two, of_one)
    plain = {name: torch.empty_like(tensor) for name, tensor in of_two.items()}
    ranks, _ = checkpoints.load(6, plain)
    assert ranks == [{"rank": 0}, {"rank": 1}]
    assert same(plain, of_two)
    checkpoints.close()


def fail_on_one_rank(rank: int, world_size: int, group, folder: Path) -> None:
    checkpoints = checkpointer(folder, group)
    mesh = init_device_mesh("cpu", (world_size,))
    state = {"w": distribute_tensor(torch.ones(4096), mesh, [Shard(0)])}
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()
    if rank == 1:
        counted_file = files._CountedFile
        # The kernel's own "no space left", in the middle of this rank's tensors.
        files._CountedFile = lambda path: counted_file(
            Path("/dev/full") if path.suffix == ".distcp" else path
        )
    checkpoints.save(2, state, {}, {})
    # The next is tried; it fails alike, and nothing comes after it.
    checkpoints.save(3, state, {}, {})
    with pytest.raises(
        UserError, match=r"disk full: .*step_000003.partial/__1_0.distcp needs 0\.000"
    ):
        checkpoints.wait()
    dist.barrier()
    assert names(folder) == ["step_000001"]
    # What one rank alone does wrong is an error on all of them, not a hang.
    with pytest.raises(ValueError, match=r"lr is a float"):
        checkpoints.save(3, {"lr": 0.1} if rank == 1 else state, {}, {})
    if rank == 0:
        flip_a_byte(folder / "step_000001" / "__1_0.distcp")
    dist.barrier()
    step, warnings = checkpoints.latest()
    assert step is None
    assert len(warnings) == 1
    assert "__1_0.distcp has checksum" in warnings[0]
    checkpoints.close()


def test_a_failure_of_one_rank_is_raised_on_all(tmp_path):
    run(tmp_path, 2, fail_on_one_rank, tmp_path / "run")


STEPS, EVERY = 6, 2


def stick(file: str, at_write: int, told: Path) -> None:
    """At the n-th write to this file of step 4: tell the test by a file, and write no further."""
    write, count = files._CountedFile.write, itertools.count()

    def stuck(self, data):
        if self.name.parts[-2:] == ("step_000004.partial", file) and next(count) == at_write:
            self.flush()
            told.touch()
            time.sleep(60)
        return write(self, data)

    files._CountedFile.write = stuck


def train(rank: int, world_size: int, group, folder: Path, out: Path, stuck: tuple | None) -> None:
    """A little run: sharded model, momentum, a schedule; each rank its own data and randomness."""
    if stuck is not None:
        stick(*stuck, out)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.GELU(), nn.Linear(30, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    params = dict(model.named_parameters())
    momentum = {name: torch.zeros_like(param) for name, param in params.items()}
    state = {"model": params, "optimizer": momentum}
    data, first = random.Random(rank), 0
    torch.manual_seed(100 + rank)
    checkpoints = checkpointer(folder, group)
    step, warnings = checkpoints.latest()
    if step is not None:
        mine, meta = checkpoints.load(step, state)
        first = meta["step"]
        data.setstate(mine["data"])
        torch.set_rng_state(mine["torch"])
    told = [f"resumed from {step}", *warnings]
    for step in range(first + 1, STEPS + 1):
        x = torch.tensor([[data.random() for _ in range(8)] for _ in range(4)])
        loss = (model(x + 0.1 * torch.randn(4, 8)) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        with torch.no_grad():
            for name, param in params.items():
                momentum[name].mul_(0.9).add_(param.grad)
                param.sub_(momentum[name], alpha=0.01 * (1 - step / (2 * STEPS)))
        model.zero_grad()
        if step % EVERY == 0:
            rank_state = {"data": data.getstate(), "torch": torch.get_rng_state()}
            checkpoints.save(step, state, rank_state, {"step": step})
    checkpoints.close()
    final = whole(state)
    if rank == 0:
        torch.save({"state": final, "told": told}, out)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    tmp_path = tmp_path_factory.mktemp("uninterrupted")
    run(tmp_path, 2, train, tmp_path / "run", tmp_path / "out", None)
    return torch.load(tmp_path / "out")["state"]


@pytest.mark.parametrize("stuck", [("__1_0.distcp", 5), ("manifest.json", 0)], ids=lambda s: s[0])
def test_killed_while_writing_it_resumes_bit_for_bit(tmp_path, uninterrupted, stuck):
    folder, out = tmp_path / "run", tmp_path / "out"
    ranks = start(tmp_path, 2, train, folder, out, stuck)
    while not out.exists():
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.02)
    for process in ranks:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    out.unlink()
    assert names(folder) == ["step_000002", "step_000004.partial"]

    run(tmp_path, 2, train, folder, out, None)
    resumed = torch.load(out)
    assert resumed["told"] == [
        "resumed from 2",
        f"{folder / 'step_000004.partial'} is half-written: the run died while saving it",
    ]
    assert same(resumed["state"], uninterrupted)
    assert names(folder) == ["step_000004", "step_000006"]
