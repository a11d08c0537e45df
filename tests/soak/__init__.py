"""The store under fire, from outside: the real command line, killed, starved and failed.

Nothing here is a mock: a child process runs ``tlpipe extract`` on real images, and what happens to
it comes from the kernel (signals, limits) or from the C library's calls (`faulty_io.c`).
"""

import pytest

SOAK = [pytest.mark.slow, pytest.mark.timeout(3600)]
"""Marks of what `make soak` runs; minutes each, and more on a busy machine."""
