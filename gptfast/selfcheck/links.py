"""How fast GPUs of one node talk to each other: a short all-reduce, against what the links give."""

import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

_BYTES = 256 * 2**20
_WARMUP, _REPEATS = 5, 20


def all_reduce_gb_per_second(processes: int, *, backend: str = "nccl", size: int = _BYTES) -> float:
    """GB/s that each process sends in an all-reduce of `size` bytes among so many on this node
    ("bus bandwidth": 2 (n - 1) / n of the buffer, whatever the algorithm).

    backend: nccl, one process a GPU; or gloo, on CPU.
    """
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (processes, port, backend, size, answer)
    multiprocessing.spawn(_reduce, args=arguments, nprocs=processes)
    seconds = answer.get()
    return 2 * (processes - 1) / processes * size / seconds / 1e9


def _reduce(rank: int, processes: int, port: int, backend: str, size: int, answer) -> None:
    """One process; the first tells the seconds of one all-reduce."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes
    )
    try:
        buffer = torch.zeros(size // 4, device=device)
        for _ in range(_WARMUP):
            dist.all_reduce(buffer)
        _finish(device)
        began = time.perf_counter()
        for _ in range(_REPEATS):
            dist.all_reduce(buffer)
        _finish(device)
        if rank == 0:
            answer.put((time.perf_counter() - began) / _REPEATS)
    finally:
        dist.destroy_process_group()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
