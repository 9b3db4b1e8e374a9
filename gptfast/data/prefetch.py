"""Run an iterator ahead of its consumer, in a thread."""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """The items of `source`, produced by a thread that is at most `depth` items ahead.

    An exception of the source is raised in place of the next item. The thread ends with the
    source, with `close()`, when this object is collected and at the interpreter's exit.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._queue: _Queue[T] = _Queue(depth)
        # The thread knows the queue, not this object: else it would keep it alive.
        thread = threading.Thread(target=_produce, args=(source, self._queue), daemon=True)
        self._finalizer = weakref.finalize(self, _end, self._queue, thread)
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._queue.get()

    def close(self) -> None:
        """End the thread, and wait until it has ended. Later items are lost."""
        self._finalizer()


class _Queue(Generic[T]):
    """A bounded queue that its producer can finish, with an exception, and its consumer close."""

    def __init__(self, depth: int) -> None:
        self._items: deque[T] = deque()
        self._depth = depth
        self._end: Exception | None = None
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T) -> bool:
        """Wait for room. False if nobody wants items any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def get(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._end or self._closed)
            if self._closed:
                raise StopIteration
            if self._end is not None and not self._items:
                raise self._end
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def finish(self, end: Exception) -> None:
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _produce(source: Iterator[T], queue: _Queue[T]) -> None:
    try:
        for item in source:
            if not queue.put(item):
                return
    except Exception as error:
        queue.finish(error)
    else:
        queue.finish(StopIteration())


def _end(queue: _Queue, thread: threading.Thread) -> None:
    queue.close()
    # The collector may run this in any thread, that one included.
    if thread is not threading.current_thread():
        thread.join()
