"""Many fits side by side, one thread each, instead of one after the other on all cores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within it, numerical libraries use one thread in each thread that calls them.

    Fits of a few thousand rows do not fill several cores, and the thread pools of numpy, scipy and
    torch wait actively: on two cores they were seen to slow each other down eightfold.
    """
    torch = sys.modules.get("torch")
    n_threads = torch.get_num_threads() if torch else 0
    with threadpool_limits(1):
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(n_threads)
