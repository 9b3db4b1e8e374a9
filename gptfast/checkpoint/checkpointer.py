"""Saving and resuming a run: sharded over the ranks, in the background, complete or not there.

A save copies this rank's shards to the CPU and returns; a thread writes them, then a manifest, then
renames the folder into place. Killed at any moment, the newest complete checkpoint is untouched.
gptfast/checkpoint/files.py says what lies on disk and how damage is found.

    checkpoints = Checkpointer(folder, keep=3, process_group=gloo, rank=rank, world_size=8)
    step, warnings = checkpoints.latest()
    if step is not None:
        rank_state, meta = checkpoints.load(step, state, model_config=config)
    ...
    checkpoints.save(step, state, rank_state, meta)  # every N steps; returns once copied
    ...
    checkpoints.close()  # the last write is complete

Every method is called by all ranks, in the same order; if it fails on one it raises on all.
torch's own async_save is not used: manifest and rename follow the tensors on the same thread, and
its stager copies whole storages where a shard is a view, keeping them (pytorch #170163).
"""

import errno
import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from gptfast.checkpoint import files
from gptfast.checkpoint.files import DISCARDED, MANIFEST, PARTIAL, DamagedCheckpoint
from gptfast.errors import UserError

T = TypeVar("T")

# Room for what a shard costs beyond its bytes, in zip headers and .metadata: 1.8 kB each measured
# (246 shards, torch 2.11 and 2.13).
_BYTES_A_SHARD = 4096
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class _DiskError(UserError):
    """A save that the disk refused; once there is room, or it answers again, the next one works."""


@dataclass(frozen=True)
class _Snapshot:
    """What a save writes: made whole while the caller waits, written while it trains on."""

    step: int
    # Live tensors, for their names and layout alone; their values are in the staged copies.
    tensors: dict[str, Tensor]
    rank_state: bytes
    meta: dict[str, Any]
    # On disk, all ranks together.
    size: int


class Checkpointer:
    """The checkpoints of one run, in one folder.

    folder: seen by every rank (a shared file system if there are several nodes); made if missing.
    keep: how many complete checkpoints stay; an older one goes once a newer one is complete.
    process_group: a gloo group of all ranks that nothing else uses, since the background thread
        talks over it; None for a single process.
    say: told on every rank of a save that failed, when it does.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        process_group: dist.ProcessGroup | None = None,
        rank: int = 0,
        world_size: int = 1,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep must be at least 1 checkpoint, got {keep}")
        if process_group is None and world_size != 1:
            raise ValueError(f"{world_size} ranks need a process group")
        self.folder = Path(folder)
        self._keep = keep
        self._group = process_group
        self._rank = rank
        self._world_size = world_size
        self._say = say
        self._staged: dict[str, Tensor] = {}
        # What verify found, by step: a line about the damage, or None.
        self._verified: dict[int, str | None] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        if process_group is None:
            # For good, not around each call: filters belong to the process, calls to the thread.
            files.ignore_single_process_warning()

    # --- saving -----------------------------------------------------------------------------------

    def save(
        self, step: int, state: dict[str, Any], rank_state: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Start writing step_<step>; everything may change as soon as this returns.

        state: tensors and DTensors in dicts; a plain tensor is the same on every rank.
        rank_state: this rank's own: numbers, strings, containers of them, tensors.
        meta: JSON, the same on every rank; `load` compares meta["model_config"].

        An existing checkpoint of the same step is replaced, those of later steps are left alone.
        A save that the disk refuses, full or failing, is told by `say`; `wait` raises it as a
        UserError unless another save is tried before. Waits for the save before, and raises what
        else went wrong in it; ValueError for a state that is no dict of tensors.
        """
        self._together(self._wait_for_another)
        snapshot = self._together(lambda: self._prepare(step, state, rank_state, meta))
        try:
            self._on_rank_0(lambda: self._make_room(snapshot))
        except _DiskError as error:
            self._say(f"not saved: {error}")
            self._writing = Future()
            self._writing.set_exception(error)
            return
        for name, tensor in snapshot.tensors.items():
            self._stage(name, tensor)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._verified.pop(step, None)
        self._writing = self._thread.submit(self._write, snapshot)

    def wait(self) -> None:
        """Until the save in flight, if any, is complete; raises what went wrong in it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _wait_for_another(self) -> None:
        with suppress(_DiskError):
            self.wait()

    def close(self) -> None:
        """Wait, and end the thread; the last call."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _prepare(self, step: int, state: dict, rank_state: dict, meta: dict) -> _Snapshot:
        tensors = files.flatten(state)
        rank_bytes = files.rank_state_bytes(rank_state)
        size = sum(math.prod(tensor.shape) * tensor.itemsize for tensor in tensors.values())
        size += self._world_size * (len(rank_bytes) + len(tensors) * _BYTES_A_SHARD)
        return _Snapshot(step, tensors, rank_bytes, _as_json(meta), size)

    def _make_room(self, snapshot: _Snapshot) -> None:
        """Rank 0: the folder to write to, what dead runs left removed, and room on the disk."""
        partial = self._path(snapshot.step, PARTIAL)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove(PARTIAL)
            self._remove(DISCARDED)
            if shutil.disk_usage(self.folder).free < snapshot.size:
                raise _DiskError(self._disk_full(partial, snapshot.size))
            partial.mkdir()
        except OSError as error:
            raise _DiskError(f"cannot write checkpoints in {self.folder}: {error}") from error

    def _stage(self, name: str, tensor: Tensor) -> None:
        """Start copying this rank's shard into its CPU buffer, the same one at every save.

        Pinned and kept: 54 GB/s from an H100, where a reused pageable buffer took 12 and a new one
        1.2; pinning, at 1.4 GB/s, is paid by the first save (5.2 GB, torch 2.11, 2026-11-22).
        """
        shard = tensor.detach()
        if isinstance(shard, DTensor):
            shard = shard.to_local()
        buffer = self._staged.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (shard.shape, shard.dtype):
            buffer = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)
            self._staged[name] = buffer
        buffer.copy_(shard, non_blocking=True)

    def _write(self, snapshot: _Snapshot) -> None:
        """The background half of a save; collective. Raises the same on every rank."""
        partial = self._path(snapshot.step, PARTIAL)
        writer = files.Writer(partial)
        rank_file = files.rank_file(self._rank)
        try:
            self._together(lambda: writer.write_file(rank_file, snapshot.rank_state))
            with torch.no_grad():
                dcp.save(
                    snapshot.tensors,
                    storage_writer=writer,
                    planner=files.StagedPlanner(self._staged),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
            written = {k: v for share in self._gather(writer.written) for k, v in share.items()}
            self._on_rank_0(lambda: self._complete(writer, snapshot, written))
        except (Exception, CheckpointException) as error:
            cause = _first_cause(error)
            message = f"saving {self._path(snapshot.step)} failed: {cause}"
            if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
                message = self._disk_full(cause.filename or partial, snapshot.size)
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self._say(f"not saved: {message}")
            kind = UserError if isinstance(cause, UserError) else RuntimeError
            raise (_DiskError if isinstance(cause, OSError) else kind)(message) from error

    def _complete(self, writer: files.Writer, snapshot: _Snapshot, written: dict) -> None:
        """Rank 0, when every file is written: the manifest, the rename, the outdated ones."""
        for name, entry in written.items():
            path = writer.folder / name
            if not path.is_file() or path.stat().st_size != entry["size"]:
                raise UserError(f"rank 0 does not see {path}: all nodes must share the file system")
        manifest = {
            "format": files.FORMAT,
            "step": snapshot.step,
            "world_size": self._world_size,
            "torch": torch.__version__,
            "files": written,
            "meta": snapshot.meta,
        }
        writer.write_file(MANIFEST, files.manifest_text(manifest).encode())
        files.sync_folder(writer.folder)
        if self._path(snapshot.step).exists():
            self._discard(snapshot.step)
        writer.folder.rename(self._path(snapshot.step))
        files.sync_folder(self.folder)
        older = [step for step in files.list_steps(self.folder) if step < snapshot.step]
        damaged = [step for step in older if self._verified.get(step)]
        whole = [step for step in older if step not in damaged]
        for step in damaged + whole[: max(0, len(whole) - (self._keep - 1))]:
            self._discard(step)
        self._remove(DISCARDED)

    def _path(self, step: int, suffix: str = "") -> Path:
        return files.step_folder(self.folder, step, suffix)

    def _discard(self, step: int) -> None:
        """Out of sight at once: a folder half deleted would look like a damaged checkpoint."""
        self._path(step).rename(self._path(step, DISCARDED))

    def _remove(self, suffix: str) -> None:
        for step in files.list_steps(self.folder, suffix):
            shutil.rmtree(self._path(step, suffix))

    def _disk_full(self, path: Path | str, size: int) -> str:
        free = shutil.disk_usage(self.folder).free
        return (
            f"disk full: {path} needs {size / 1e9:.3f} GB for the whole checkpoint, "
            f"{free / 1e9:.3f} GB are free; make room or keep fewer (keep={self._keep})"
        )

    # --- resuming ---------------------------------------------------------------------------------

    def latest(self) -> tuple[int | None, list[str]]:
        """The newest complete step (None: there is none), and a line for each newer one refused.

        Reads every file of the candidates, a share on each rank.
        """
        self.wait()
        steps, partial = self._on_rank_0(
            lambda: (files.list_steps(self.folder), files.list_steps(self.folder, PARTIAL))
        )
        refused = [
            (step, f"{self._path(step, PARTIAL)} is half-written: the run died while saving it")
            for step in partial
        ]
        newest = None
        for step in reversed(steps):
            problem = self.verify(step)
            if problem is None:
                newest = step
                break
            refused.append((step, problem))
        refused.sort(reverse=True)
        return newest, [line for step, line in refused if newest is None or step > newest]

    def verify(self, step: int) -> str | None:
        """None if every file of the checkpoint is what was written, else the first damage found."""
        self.wait()
        folder = self._path(step)
        found = self._gather(files.find_damage(folder, self._rank, self._world_size))
        self._verified[step] = next((line for line in found if line is not None), None)
        return self._verified[step]

    def load(
        self, step: int, state: dict[str, Any], *, model_config: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any] | list[dict[str, Any]], dict[str, Any]]:
        """Fill the tensors of `state` in place, each rank its own shards, whoever wrote them.

        state: as given to `save`, or some of its top-level keys ({"model": ...} alone).
        model_config: what meta["model_config"] must equal.
        Returns (rank_state, meta); on another world size than that of the save, the list of all
        ranks' states in place of this rank's own.

        Raises DamagedCheckpoint if the checkpoint is not whole (verified here unless `latest` just
        did), UserError naming the first differences if it is of another architecture.
        """
        self.wait()
        if problem := self._verified[step] if step in self._verified else self.verify(step):
            raise DamagedCheckpoint(problem)
        folder = self._path(step)
        reader = files.Reader(folder)

        def check() -> tuple[dict[str, Tensor], dict[str, Any]]:
            manifest, tensors = files.read_manifest(folder), files.flatten(state)
            configs = ({}, {})
            if model_config is not None:
                configs = manifest["meta"].get("model_config", {}), _as_json(model_config)
            found = files.differences(reader.layout(), tensors, *configs)
            if found:
                more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
                raise UserError(
                    f"{folder} is of another architecture: {'; '.join(found[:3])}{more}"
                )
            return tensors, manifest

        tensors, manifest = self._together(check)
        no_dist = self._group is None
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self._group, no_dist=no_dist)
        except CheckpointException as error:
            raise RuntimeError(f"loading {folder} failed: {_first_cause(error)}") from error
        same = manifest["world_size"] == self._world_size
        ranks = [self._rank] if same else range(manifest["world_size"])
        states = self._together(lambda: [files.read_rank_state(folder, rank) for rank in ranks])
        return states[0] if same else states, manifest["meta"]

    # --- the ranks together -----------------------------------------------------------------------

    def _gather(self, mine: T) -> list[T]:
        if self._group is None:
            return [mine]
        everyone: list[Any] = [None] * self._world_size
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def _together(self, work: Callable[[], T]) -> T:
        """This rank's result of `work`; if it failed on any rank, the first failure on all."""
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        for error in self._gather(failure):
            if error is not None:
                raise error
        # pyrefly: ignore[bad-return]  (work gave it, as it did not fail)
        return result

    def _on_rank_0(self, work: Callable[[], T]) -> T:
        """Rank 0's result of `work`, on every rank."""
        # pyrefly: ignore[bad-return]  (None is what the others give)
        return self._gather(self._together(lambda: work() if self._rank == 0 else None))[0]


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: a copy, tuples as lists. Raises TypeError if it is no JSON."""
    return json.loads(json.dumps(value))


def _first_cause(error: BaseException) -> BaseException:
    """Of all that torch gathered from the ranks: an operating system's word if there is one."""
    if not isinstance(error, CheckpointException):
        return error
    causes = [error.failures[rank][0] for rank in sorted(error.failures)]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
