"""Processes, mesh and sharding: the one reader of torchrun's variables.

A process group always exists, of one process too, so that training has one code path. Tensors
travel by NCCL on GPUs and by gloo on CPU; what the host exchanges (flags, file lists) goes by
gloo on either.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gptfast.errors import UserError
from gptfast.exchange import local
from gptfast.model import GPT

# Blocks of a sharding unit within one node. What a unit gathers and reduces runs beside products,
# and these wait for the multiprocessors that a collective has (bench/did_not_help.md). d20's
# forward and backward on two H200s, by the same unsharded, in turns: units of 1 block 1.045, of 5
# 1.033, of 10 1.025, all in one 1.025 for 0.9 GiB more (2026-11-22).
BLOCKS_PER_UNIT = 10

# Torchrun kills its processes so many seconds after it has handed a signal on to them, where this
# variable names no other number; torch 2.11 does not read it.
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_SHUTDOWN_SECONDS = 30

# Waiting for a node's leader to fetch shards or train a tokenizer is not a hang.
_PREPARATION_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process among all: ranks, device, mesh, and the host's own group.

    mesh: 1-D ("shard",) within one node; 2-D ("replicate", "shard") over several nodes.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    mesh: DeviceMesh
    host_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.size // self.local_size

    def new_host_group(self) -> dist.ProcessGroup:
        """A gloo group of all ranks for one user alone, a background thread say."""
        return _new_host_group()

    def gather(self, value: object) -> list:
        """Every rank's value (any picklable), in rank order, on every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set anywhere; the same answer on every rank."""
        vote = torch.tensor([int(flag)])
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(vote.item())

    @contextmanager
    def node_leader_first(self) -> Iterator[bool]:
        """The body runs on one process of each node, then on the others: what the first fetched
        or built, they find. Yields whether this is the first. A failure of any leader ends all."""
        leader = self.local_rank == 0
        if leader:
            try:
                yield True
            except BaseException:
                self.any(True)
                raise
        if self.any(False):
            raise SystemExit(2)
        if not leader:
            yield False


def process_count() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launcher() -> list[str]:
    """What started this process, as words of a command: python, or torchrun with where it runs.
    On several nodes --node_rank is this node's."""
    local_size = os.environ.get("LOCAL_WORLD_SIZE")
    if local_size is None:
        return ["python"]
    nodes = []
    if (count := process_count() // int(local_size)) > 1:
        nodes = [
            f"--nnodes={count}",
            f"--node_rank={os.environ['GROUP_RANK']}",
            f"--master_addr={os.environ['MASTER_ADDR']}",
            f"--master_port={os.environ['MASTER_PORT']}",
        ]
    return ["torchrun", *nodes, f"--nproc_per_node={local_size}"]


def seconds_to_save() -> int | None:
    """What torchrun gives this process to end after a signal, unless --shutdown-timeout said
    otherwise; None without torchrun."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return None
    if torch.__version__ < "2.12":
        return _SHUTDOWN_SECONDS
    return int(os.environ.get(SHUTDOWN_VARIABLE, _SHUTDOWN_SECONDS))


def is_main() -> bool:
    """Whether this is the one process that talks."""
    return int(os.environ.get("RANK", 0)) == 0


def will_use_gpus() -> bool:
    """Whether this command trains on GPUs: there are some, and --device cpu is not among its flags.
    Asked before they are read, as the defaults of the others follow from it."""
    flags = sys.argv[1:]
    on_cpu = "--device=cpu" in flags or ("--device", "cpu") in itertools.pairwise(flags)
    return torch.cuda.is_available() and not on_cpu


def check_gpu(index: int) -> None:
    """UserError unless this GPU is one of NVIDIA's that has bf16."""
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        raise UserError(
            f"GPU {index} is a {name}, but the kernels are for NVIDIA's GPUs: give --device cpu"
        )
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise UserError(
            f"GPU {index} is a {name} of compute capability {major}.{minor}, and bf16 takes 8.0 or "
            "higher: name others in CUDA_VISIBLE_DEVICES, or give --device cpu"
        )


@contextmanager
def start(*, cpu: bool = False, deterministic: bool = False) -> Iterator[World]:
    """Join the process group that torchrun describes (alone without torchrun); leave it at the end.

    cpu forces gloo and CPU tensors although there is a GPU. deterministic makes PyTorch's own
    operators repeatable bit for bit, or raise. UserError when a node has fewer GPUs than processes,
    or for a GPU that `check_gpu` refuses.
    """
    if deterministic:
        # Read by cuBLAS when it starts; without it, products may differ from run to run.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        # Filling every fresh tensor with NaN would find bugs, but costs bandwidth.
        # pyrefly: ignore[missing-attribute]  (the module makes it at runtime)
        torch.utils.deterministic.fill_uninitialized_memory = False
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size = process_count()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size % local_size:
        raise UserError(f"{size} processes over nodes of {local_size}: nodes must be of one size")
    on_gpu = torch.cuda.is_available() and not cpu
    if on_gpu and torch.cuda.device_count() < local_size:
        raise UserError(
            f"{local_size} processes on this node, but {torch.cuda.device_count()} GPU(s): "
            f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        check_gpu(local_rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    store = dist.HashStore() if size == 1 else next(dist.rendezvous("env://"))[0]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        device_id=device if on_gpu else None,
    )
    try:
        nodes = size // local_size
        shape, names = ((size,), ("shard",))
        if nodes > 1:
            shape, names = ((nodes, local_size), ("replicate", "shard"))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        yield World(rank, local_rank, size, local_size, device, mesh, _new_host_group())
    except UserError as error:
        error.told_elsewhere = store.add(f"error: {error}", 1) > 1
        raise
    finally:
        dist.destroy_process_group()


def _new_host_group() -> dist.ProcessGroup:
    # pyrefly: ignore[bad-return]  (every rank is in it: never a number instead of a group)
    return dist.new_group(backend="gloo", timeout=_PREPARATION_TIMEOUT)


def build_sharded(
    make_gpt: Callable[[], GPT],
    world: World,
    *,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool,
    compile_blocks: bool,
    seed: int,
) -> GPT:
    """A model made on the meta device, compiled by blocks, sharded, given its initial values."""
    with torch.device("meta"):
        model = make_gpt()
    shard(
        model,
        world,
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
        compile_blocks=compile_blocks,
    )
    materialise(model, world, seed)
    return model


def shard(
    model: GPT,
    world: World,
    *,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool,
    compile_blocks: bool,
) -> None:
    """Compile the blocks one by one, then shard the model in place with FSDP2.

    Units: embedding, blocks (`blocks_per_unit`), the head with its norm and loss, and the root.
    Parameters and the reduction of gradients stay fp32; compute_dtype is what is gathered. Blocks
    share their code, so the first compiles and the others reuse it. Gradients are summed over
    ranks, not averaged: the optimizer divides by the global count of tokens.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if compile_blocks:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    step = blocks_per_unit(world.nodes, reshard_after_forward=reshard_after_forward)
    units: list[list[nn.Module]] = [[model.transformer["wte"]]]
    for at in range(0, len(model.blocks), step):
        units.append([*model.blocks[at : at + step]])
    units.append([model.lm_head])
    units.append([model])
    for unit in units:
        fully_shard(
            unit, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
        )
        # The modules of a unit share their state.
        sharded = unit[0]
        assert isinstance(sharded, FSDPModule)
        if world.size == 1:
            # (A factor of 1 would be divided by, on one process alone.)
            # pyrefly: ignore[bad-argument-type]  (torch keeps the class that it would have to be)
            sharded.set_custom_reduce_scatter(InPlace())
        else:
            sharded.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum; a plain sum is what a factor of 1 asks for anyway.
            sharded.set_force_sum_reduction_for_comms(True)


class InPlace:
    """One process's reduction of a unit's gradients, which leaves them where they are.

    FSDP2 asks for memory for what is to be reduced, fills that, asks for memory for the result, and
    on one process copies. Given the same memory twice it copies nothing.
    """

    def __init__(self) -> None:
        self._given: torch.Tensor | None = None

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        given, self._given = self._given, None
        if given is None:
            given = self._given = torch.empty(*size, dtype=dtype, device=device)
        assert (*given.shape, given.dtype) == (*size, dtype), "not the result of what was given"
        return given

    def __call__(self, *_: object, **__: object) -> None:
        raise AssertionError("one process alone has nothing to exchange")


def blocks_per_unit(nodes: int, *, reshard_after_forward: bool) -> int:
    """How many blocks gather and reduce together. Between nodes communication is too slow not to
    be hidden, and what is freed after forward is to be little: then it is one."""
    return 1 if nodes > 1 or reshard_after_forward else BLOCKS_PER_UNIT


@torch.no_grad()
def materialise(model: GPT, world: World, seed: int) -> None:
    """Give a sharded model on the meta device memory and its initial values.

    Every rank draws every whole parameter, one at a time, from the same seed and keeps its shard:
    the values do not depend on the number of processes. Memory is filled with NaN first, so that
    whatever initialisation forgets shows at once.
    """
    model.to_empty(device=world.device)
    for tensor in (*model.parameters(), *model.buffers()):
        local(tensor).fill_(float("nan"))
    generator = torch.Generator(world.device).manual_seed(seed)
    for tensor, value in model.initial_values(generator):
        if isinstance(tensor, DTensor):
            value = distribute_tensor(
                value, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        tensor.copy_(value)


def synchronise_gradients(model: GPT, enabled: bool) -> None:
    """Off for every micro-step of a step but the last: gradients then add up locally."""
    assert isinstance(model, FSDPModule), "a model that was not sharded"
    model.set_requires_gradient_sync(enabled)
    model.set_is_last_backward(enabled)
    model.set_reshard_after_backward(enabled)


@torch.no_grad()
def gather_replica(model: GPT, plain: GPT) -> GPT:
    """Fill `plain`, an unsharded GPT of the same configuration, with the sharded model's weights
    (each cast to plain's dtype). Every rank calls it; after it ranks may go their own ways."""
    theirs = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        # pyrefly: ignore[missing-attribute]  (FSDP2 has made them DTensors)
        parameter.copy_(theirs[name].full_tensor())
    for name, buffer in plain.named_buffers():
        buffer.copy_(model.get_buffer(name))
    return plain
