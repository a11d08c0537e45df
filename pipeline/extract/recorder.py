"""The one thread that writes what the others make, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

# Batches that may wait for the disk: enough to hide a slow fsync, and few to hold in memory.
_MAX_WAITING = 4


class Recorder:
    """Runs calls one after the other in a thread of its own; use as a context manager.

    Leaving it waits for every call; where one fails, the rest are dropped and its error is raised
    by the next :meth:`put`, or by leaving. Where the block itself fails, what waits is dropped.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "write")
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, call: Callable[[], None]) -> None:
        """Have ``call`` run after those before it; waits while too many do."""
        self._waiting.append(self._pool.submit(self._run, call))
        while len(self._waiting) > _MAX_WAITING or self._waiting[0].done():
            self._waiting.popleft().result()
            if not self._waiting:
                return

    def _run(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except BaseException:
            self._failed = True
            raise
