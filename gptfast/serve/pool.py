"""Who answers what: replicas with slots, the queue before them, and the answers on their way.

All of it lives on the event loop. What a replica sends is read by a thread of its own and handed
over; what is sent to it goes through another, so that a full pipe stops nobody.
"""

import asyncio
import itertools
import multiprocessing
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from gptfast.engine import Engine
from gptfast.engine.generation import Request
from gptfast.serve.protocol import ApiError, queue_is_full, unavailable
from gptfast.serve.worker import (
    SIGNALS,
    Add,
    Cancel,
    End,
    Failed,
    Progress,
    Ready,
    work,
    work_in_process,
)

STARTING, READY, STOPPING, FAILED = "starting", "ready", "stopping", "failed"
# A worker that was told to end is given so long.
_LAST_SECONDS = 5.0
_ENDED = Failed("its process has ended", by_user=False)


class Answer:
    """One request's tokens as they come. Leave it as a context, and nobody works for it any more.

    `finish` says why it ended, once it has; `replica` who answers, once somebody does.
    """

    def __init__(self, pool: "Pool", number: int, request: Request) -> None:
        self.number, self.request = number, request
        self.replica: int | None = None
        self.finish: str | None = None
        self.started = time.monotonic()
        self._pool = pool
        self._ids: list[int] = []
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    async def more(self) -> list[int]:
        """The tokens that came since the last call, once there are any; none after the last.
        Raises ApiError if there will not be any more although the answer is not complete."""
        await self._news.wait()
        ids, self._ids = self._ids, []
        if not self.over:
            self._news.clear()
        if not ids and self._failure is not None:
            raise self._failure
        return ids

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_) -> None:
        self._pool.leave(self)

    @property
    def over(self) -> bool:
        return self.finish is not None or self._failure is not None

    def take(self, ids: Sequence[int], finish: str | None) -> None:
        self._ids += ids
        self.finish = finish
        if ids or finish:
            self._news.set()

    def fail(self, failure: Exception) -> None:
        self._failure = failure
        self._news.set()


class Replica:
    """The server's end of one worker. in_process=False: a thread of this process, for tests."""

    def __init__(self, number: int, make_engine: Callable[[], Engine], *, in_process: bool) -> None:
        self.number, self.make_engine, self.in_process = number, make_engine, in_process
        self.ready: Ready | None = None
        self.failure: Failed | None = None
        self.answers: dict[int, Answer] = {}

    @property
    def state(self) -> str:
        """STARTING, READY or FAILED."""
        if self.failure is not None:
            return FAILED
        return STARTING if self.ready is None else READY

    def start(self, slots: int, context: int | None, deliver: Callable[[object], None]) -> None:
        """Start the worker; `deliver` gets its messages on the running event loop, at last a Failed
        if it ends by itself."""
        on_the_loop = partial(asyncio.get_running_loop().call_soon_threadsafe, deliver)
        # Spawned: a process that has used CUDA or threads cannot be forked.
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        arguments = (theirs, self.make_engine, slots, context)
        self._worker: BaseProcess | threading.Thread
        if self.in_process:
            self._worker = spawn.Process(target=work_in_process, args=arguments, daemon=True)
            with _signals_held_back():
                self._worker.start()
            # So that this end reads the end of the stream where the process dies.
            theirs.close()
        else:
            self._worker = threading.Thread(target=work, args=arguments, daemon=True)
            self._worker.start()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix=f"to replica {self.number}")
        self._reader = threading.Thread(
            target=_read, args=(self._connection, on_the_loop), name=f"from replica {self.number}"
        )
        self._reader.daemon = True
        self._reader.start()

    def send(self, message: Add | Cancel | End) -> None:
        self._sender.submit(self._send, message)

    def _send(self, message: Add | Cancel | End) -> None:
        try:
            self._connection.send(message)
        except OSError:
            # The worker is gone; the reader tells.
            return

    def close(self) -> None:
        """End the worker and wait for it."""
        self.send(End())
        self._sender.shutdown(wait=False)
        self._worker.join(_LAST_SECONDS)
        if not isinstance(self._worker, threading.Thread) and self._worker.is_alive():
            # Still compiling, or hanging.
            self._worker.kill()
            self._worker.join()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started here gets no signal of the group's before it can ignore them: it
    imports torch first."""
    # Or else the first worker's start would start it, which lets the signals through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read(connection: Connection, deliver: Callable[[object], object]) -> None:
    try:
        while True:
            deliver(connection.recv())
    except (EOFError, OSError):
        connection.close()
    try:
        deliver(_ENDED)
    except RuntimeError:
        # The event loop has closed: the server is gone, as it should be.
        return


class Pool:
    """The replicas and the requests between them: first come, first served.

    Args:
        make_engines: one for each replica, called in its process.
        slots: how many answers a replica writes at a time.
        queue: how many requests may wait for one.
        context: the most tokens of prompt and answer; None: as many as the model was trained with.
    """

    def __init__(
        self,
        make_engines: Sequence[Callable[[], Engine]],
        *,
        slots: int,
        queue: int,
        context: int | None = None,
        in_process: bool = True,
    ) -> None:
        self.slots, self.queue, self._context = slots, queue, context
        self.replicas = [
            Replica(number, make_engine, in_process=in_process)
            for number, make_engine in enumerate(make_engines)
        ]
        self.state = STARTING
        # What went wrong with a replica; the first to fail.
        self.failure: Failed | None = None
        self.answered = self.refused = self.cancelled = self.tokens = 0
        self._waiting: deque[Answer] = deque()
        self._numbers = itertools.count()
        # Of an answer that has a slot, on average: what one in the queue has to wait.
        self._seconds = 1.0
        # Called with the pool when its state has changed.
        self.on_change: Callable[[Pool], None] = lambda _: None
        # Called with a replica that has failed while others go on.
        self.on_loss: Callable[[Replica, Failed], None] = lambda *_: None

    def start(self) -> None:
        """Start the workers; `state` tells when they are ready."""
        for replica in self.replicas:
            replica.start(self.slots, self._context, partial(self._receive, replica))

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state == READY]

    @property
    def workers(self) -> list[Ready]:
        """What the workers of `ready` told of themselves."""
        return [replica.ready for replica in self.ready if replica.ready]

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer. ApiError while no replica is ready."""
        self._check_open()
        return min(worker.context for worker in self.workers)

    @property
    def running(self) -> int:
        return sum(len(replica.answers) for replica in self.replicas)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def ask(self, request: Request) -> Answer:
        """Have a request answered; the result must be left as a context. ApiError if the queue is
        full, or nobody is there to answer."""
        self._check_open()
        free = self.slots * len(self.ready) - self.running
        if free <= 0 and self.waiting >= self.queue:
            self.refused += 1
            seconds = self._seconds * (self.waiting + 1) / (self.slots * len(self.ready))
            raise queue_is_full(self.waiting, seconds)
        answer = Answer(self, next(self._numbers), request)
        self._waiting.append(answer)
        self._dispatch()
        return answer

    def leave(self, answer: Answer) -> None:
        """Nobody wants more of this answer: its slot, or its place in the queue, is free."""
        if answer.over:
            return
        self.cancelled += 1
        if answer.replica is None:
            self._waiting.remove(answer)
            return
        replica = self.replicas[answer.replica]
        del replica.answers[answer.number]
        replica.send(Cancel(answer.number))
        self._dispatch()

    def stop_asking(self) -> None:
        """No new requests; those that wait are told so, those that run go on."""
        self._change(STOPPING)
        while self._waiting:
            self._waiting.popleft().fail(_shutting_down())

    def give_up(self) -> None:
        """End the answers that still run."""
        for replica in self.replicas:
            for answer in list(replica.answers.values()):
                answer.fail(_shutting_down())
            replica.answers.clear()

    async def close(self) -> None:
        self.stop_asking()
        self.give_up()
        await asyncio.gather(*(asyncio.to_thread(replica.close) for replica in self.replicas))

    def _check_open(self) -> None:
        if self.state == STOPPING:
            raise _shutting_down()
        if not self.ready:
            if self.failure is not None:
                raise unavailable(
                    "the model has stopped working; the server's log says why", code="failed"
                )
            raise unavailable("the model is being loaded: try again soon", code="starting")

    def _dispatch(self) -> None:
        while self._waiting and self.ready:
            replica = min(self.ready, key=lambda replica: len(replica.answers))
            if len(replica.answers) >= self.slots:
                return
            answer = self._waiting.popleft()
            answer.replica, answer.started = replica.number, time.monotonic()
            replica.answers[answer.number] = answer
            replica.send(Add(answer.number, answer.request))

    def _receive(self, replica: Replica, message: Ready | Failed | list[Progress]) -> None:
        if isinstance(message, Ready):
            replica.ready = message
            if self.state == STARTING and len(self.ready) == len(self.replicas):
                self._change(READY)
        elif isinstance(message, Failed):
            self._lose(replica, message)
        else:
            for news in message:
                self._progress(replica, *news)
        self._dispatch()

    def _progress(self, replica: Replica, number: int, ids: list[int], finish: str | None) -> None:
        # Of those who have left, there may be some on the way.
        answer = replica.answers.get(number)
        if answer is None:
            return
        self.tokens += len(ids)
        answer.take(ids, finish)
        if finish is not None:
            del replica.answers[number]
            self.answered += 1
            seconds = time.monotonic() - answer.started
            self._seconds += 0.1 * (seconds - self._seconds)

    def _lose(self, replica: Replica, failure: Failed) -> None:
        # After its own message follows that the connection has ended.
        if self.state == STOPPING or replica.failure is not None:
            return
        replica.failure = failure
        self.failure = self.failure or failure
        for answer in replica.answers.values():
            answer.fail(
                unavailable("the model has stopped working in the middle of it", code="failed")
            )
        replica.answers.clear()
        if self.state == STARTING or not self.ready:
            self._change(FAILED)
            while self._waiting:
                self._waiting.popleft().fail(
                    unavailable("the model has stopped working", code="failed")
                )
        else:
            self.on_loss(replica, failure)

    def _change(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self.on_change(self)


def _shutting_down() -> ApiError:
    return unavailable("the server is shutting down", code="shutting_down", retry_after=10)
