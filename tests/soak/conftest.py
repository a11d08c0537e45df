import sys
from pathlib import Path

import pytest

from tests.soak._faults import compile_shim
from tests.soak._photos import NETWORK, PIXELS, Photos, Reference, make_photos, make_reference
from tests.soak._runs import ForkServer


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Path | None:
    """`faulty_io.c`, compiled; None where that is not possible."""
    return compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def server(shim):
    """Starts `tlpipe` processes."""
    if sys.platform != "linux":
        pytest.skip("faults are injected by means of Linux only")
    with ForkServer(shim) as server:
        yield server


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Photos:
    """150 images, for runs of a fraction of a second; tests must not change them."""
    return make_photos(tmp_path_factory.mktemp("soak") / "photos", 150)


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Photos:
    """Six images, a copy and a broken one, for the shortest runs; tests must not change them."""
    root = tmp_path_factory.mktemp("soak") / "few"
    return make_photos(root, 8, copy_every=5, broken_every=7, seed=1)


@pytest.fixture(scope="session")
def reference(server, photos, tmp_path_factory) -> Reference:
    """The uninterrupted run over ``photos``."""
    return make_reference(server, photos, PIXELS, tmp_path_factory.mktemp("reference") / "cache")


@pytest.fixture(scope="session")
def network_reference(server, photos, tmp_path_factory) -> Reference:
    """The uninterrupted run over ``photos`` with a real network."""
    cache = tmp_path_factory.mktemp("reference") / "cache"
    return make_reference(server, photos, NETWORK, cache)


@pytest.fixture(scope="session")
def few_reference(server, few, tmp_path_factory) -> Reference:
    """The uninterrupted run over ``few``."""
    return make_reference(server, few, PIXELS, tmp_path_factory.mktemp("reference") / "cache")
