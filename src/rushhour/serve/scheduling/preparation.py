"""What is done to a request on threads before it is queued: its pictures are decoded, or its texts tokenised.

`Preparer` has the threads, and predicts how long they take; `Preparation` is one request on them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

from rushhour.errors import WireError
from rushhour.wire import PictureRequest

_MEMORY = 0.05
"""Weight of the newest request in the speed."""

Done = Callable[[tuple[memoryview, ...] | WireError], None]
"""Called once, on the event loop: the samples' raw rows of each input, or the error in one of them."""


class Preparer(ABC):
    """Prepares requests for one model. Created and closed on any thread, used on the event loop's.

    Args:
        threads: that work.
        name: of them.
        at_once: items of a request that a thread takes as one task.

    Attributes:
        at_once: the same.
        backlog: bytes of requests that are not prepared yet.
    """

    def __init__(self, threads: int, name: str, at_once: int = 1) -> None:
        self.at_once = at_once
        self.backlog = 0
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, name)
        self._bytes = 1.0
        self._seconds = 0.0

    def seconds(self, request: PictureRequest) -> float:
        """Seconds until a request that arrives now would be prepared."""
        tasks = min(self._threads, -(-request.rows // self.at_once))
        size = sum(map(len, request.pictures))
        return self._seconds / self._bytes * (self.backlog / self._threads + size / tasks)

    def start(self, request: PictureRequest, done: Done) -> Preparation:
        """Prepare a request, some items at a time on the next thread that is free; `done` is called later."""
        preparation = self._preparation(request, done)
        try:
            for first in range(0, request.rows, self.at_once):
                self._pool.submit(preparation.run, first)
        except BaseException:
            preparation.cancel()
            raise
        return preparation

    def close(self) -> None:
        """End the threads when they have finished the current tasks."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def took(self, size: int, seconds: float) -> None:
        """A request of so many bytes has been prepared."""
        # Outliers are capped at 4x the prediction: one very slow request must not cause all others to be shed.
        seconds = min(seconds, 4 * max(1, size) * self._seconds / self._bytes)
        self._bytes += _MEMORY * (size - self._bytes)
        self._seconds += _MEMORY * (seconds - self._seconds)

    @abstractmethod
    def _preparation(self, request: PictureRequest, done: Done) -> Preparation: ...


class Preparation(ABC):
    """One request on the threads."""

    FAILED: ClassVar[str]
    """What to say where an item fails in an unknown way."""

    def __init__(self, preparer: Preparer, request: PictureRequest, done: Done) -> None:
        self._items = request.pictures
        self._preparer = preparer
        self._size = sum(map(len, request.pictures))
        self._done: Done | None = done
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._rows = self._missing = request.rows
        self._seconds = 0.0
        self._error: WireError | None = None
        preparer.backlog += self._size

    def cancel(self) -> None:
        """Skip what has not begun, and do not call `done`. Further calls have no effect."""
        if self._done is not None:
            self._done = None
            self._preparer.backlog -= self._size
            self._items = ()  # a thread that is about to take one finds none, and its error is dropped

    def run(self, first: int) -> None:
        """Prepare some items, unless they are not needed any more; on a thread."""
        began = time.perf_counter()
        rows = min(self._preparer.at_once, self._rows - first)
        error = self._tried(lambda: self._prepare(first, rows))
        with self._lock:
            self._error = self._error or error
            self._seconds += time.perf_counter() - began
            self._missing -= rows
            if self._missing:
                return
        self._error = self._error or self._tried(self._complete)
        self._loop.call_soon_threadsafe(self._finish)

    def _tried(self, work: Callable[[], None]) -> WireError | None:
        """Do it, if it is still needed; returns the error that it ends in."""
        if self._done is None or self._error is not None:
            return None
        try:
            work()
        except WireError as wrong:
            return wrong
        except Exception as wrong:
            return WireError(self.FAILED, repr(wrong), "", status=500)
        return None

    def _finish(self) -> None:
        done = self._done
        if done is None:
            return
        self.cancel()
        if self._error is not None:
            done(self._error)
        else:
            self._preparer.took(self._size, self._seconds)
            done(self._prepared())

    @abstractmethod
    def _prepare(self, first: int, rows: int) -> None:
        """Prepare `rows` items from `first` on; on a thread. Raises a `WireError` for the client."""

    def _complete(self) -> None:  # noqa: B027 - most have nothing more to do
        """All items are prepared; on a thread."""

    @abstractmethod
    def _prepared(self) -> tuple[memoryview, ...]:
        """The samples' raw rows of each input; on the event loop."""
