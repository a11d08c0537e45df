"""Ctrl-C once ends cleanly after the batch in hand; twice stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def graceful_interrupt(tell: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Within it, the first SIGINT or SIGTERM only makes the yielded function return True.

    The second acts as usual. Outside the main thread, where signals cannot be handled, nothing
    changes.

    Args:
        tell: is given one line for the user at the first signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    n_asked = 0
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 1:
            tell("Stopping after the batch in hand; once more stops at once.")
            return
        for each, handler in before.items():
            signal.signal(each, handler)
        signal.raise_signal(number)

    def should_stop() -> bool:
        if n_asked > 1:  # an exception raised within a destructor is lost
            raise KeyboardInterrupt
        return n_asked == 1

    for number in signals:
        signal.signal(number, on_signal)
    try:
        yield should_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
