"""A speedrun on several nodes: the first decides, the others run what it tells them.

They talk through torch's TCP store on the first node. Folder of runs and data must be one that all
see; the steps themselves meet as torchrun's workers do.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from gptfast.errors import UserError
from gptfast.speedrun.attempt import Attempt, locked
from gptfast.speedrun.plan import Plan, Step
from gptfast.speedrun.settings import NodeSettings

# Another node asks this often whether there is something to do. The first may be at a step of its
# own for hours: waiting in the store for that long, Python would not hear Ctrl-C.
_LOOK_SECONDS = 0.5
_CONNECT = timedelta(minutes=10)
# Another node says this often that it lives, and is given up after so long without a word.
_BEAT_SECONDS = 1.0
_SILENCE = timedelta(seconds=60)


class Followers:
    """The other nodes, as the first one sees them."""

    def __init__(self, node: NodeSettings) -> None:
        self._nodes, self._number = node.nodes, 0
        self._store = _store(node)

    def start(self, step: Step, extra: Sequence[str]) -> None:
        """Have the step run on all of them."""
        self._number += 1
        told = json.dumps({"step": step.name, "extra": list(extra)})
        self._store.set(f"command/{self._number}", told)

    def results(self) -> list[tuple[int, float | None]]:
        """(exit code, joules) of the step on each of them, once it has ended there. UserError if
        one has gone."""
        found = []
        for rank in range(1, self._nodes):
            key, heard = f"result/{self._number}/{rank}", -1
            while not self._has(key, _SILENCE):
                beats = self._store.add(f"beats/{rank}", 0)
                if beats == heard:
                    raise UserError(f"node {rank} has gone; start the speedrun again on all nodes")
                heard = beats
            found.append(tuple(json.loads(self._store.get(key))))
        return found

    def end(self) -> None:
        """Let them go."""
        self._store.set(f"command/{self._number + 1}", json.dumps(None))
        for rank in range(1, self._nodes):
            # One that does not hear it any more has gone already.
            self._has(f"gone/{rank}", timedelta(seconds=5))

    def _has(self, key: str, patience: timedelta) -> bool:
        try:
            self._store.wait([key], patience)
        except DistStoreError:
            return False
        return True


def follow(
    plan: Plan,
    node: NodeSettings,
    command: Callable[[Step, Sequence[str]], list[str]],
    say: Callable[[str], None],
) -> None:
    """Run on this node what the first node tells, until it says that all is done. UserError if it
    goes away without that, or tells of a step that this node's command has not."""
    store, folder = _store(node), plan.folder / f"node{node.node_rank}"
    with locked(folder, say) as lock:
        try:
            for number in itertools.count(1):
                while not store.check([f"command/{number}"]):
                    time.sleep(_LOOK_SECONDS)
                told = json.loads(store.get(f"command/{number}"))
                if told is None:
                    store.set(f"gone/{node.node_rank}", "")
                    return
                step = plan.step(told["step"])
                if step is None:
                    raise UserError(f"the first node runs {told['step']}: give all the same flags")
                log = folder / f"{step.name}.log"
                say(f"{step.name}: {log}")
                attempt = Attempt(command(step, told["extra"]), log, lock, gpus=plan.gpus)
                code = attempt.wait(_Beat(store, node.node_rank))
                result = json.dumps([code, attempt.joules])
                store.set(f"result/{number}/{node.node_rank}", result)
        except DistNetworkError as error:
            # What still runs here ends with this process.
            raise UserError(
                "the first node's speedrun has ended; start it again on all nodes"
            ) from error


class _Beat:
    """Tells the first node now and then that this one lives."""

    def __init__(self, store: TCPStore, rank: int) -> None:
        self._store, self._key, self._last = store, f"beats/{rank}", 0.0

    def __call__(self) -> None:
        if time.monotonic() - self._last > _BEAT_SECONDS:
            self._last = time.monotonic()
            self._store.add(self._key, 1)


def _store(node: NodeSettings) -> TCPStore:
    first = node.node_rank == 0
    try:
        store = TCPStore(
            node.master_addr,
            node.master_port,
            is_master=first,
            wait_for_workers=False,
            timeout=_CONNECT,
        )
    except (DistNetworkError, DistStoreError, RuntimeError) as error:
        what = "cannot listen on" if first else "found no speedrun at"
        raise UserError(
            f"{what} {node.master_addr}:{node.master_port}: {str(error).splitlines()[0]}"
        ) from error
    return store
