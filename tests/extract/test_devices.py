"""Several devices: a process each, and the same store as with one."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from pipeline.data import open_source
from pipeline.errors import ResourceError, UsageError
from pipeline.extract.extractor import Settings, extract_all
from pipeline.extract.recall import Request
from pipeline.store import open_store

REQUESTS = [Request("resnet18", "random", 32, 0), Request("pixels:8", "default", None, 0)]
SETTINGS = {"batch_size": 2, "n_threads": 1, "precision": "fp32"}


@pytest.fixture
def embed_all(photos, tmp_path):
    (photos / "cat" / "broken.png").write_bytes(b"no image")

    def run(devices, cache, requests=REQUESTS, **arguments):
        source = open_source(str(photos), cache_dir=tmp_path / cache)
        settings = Settings(**SETTINGS, device="cpu", devices=devices)
        return extract_all(source, requests, settings, cache_dir=tmp_path / cache, **arguments)

    return run


def test_two_processes_make_the_store_that_one_makes(embed_all):
    one = embed_all((), "one")
    progress = []
    two = embed_all(("cpu", "cpu"), "two", on_progress=progress.append)
    assert sum(progress) == 26
    for left, right in zip(one, two, strict=True):
        assert right.failures.keys() == left.failures.keys() == {"cat/broken.png"}
        assert right.n_embedded == left.n_embedded == 12
        a, b = open_store(left.store), open_store(right.store)
        assert a.ids() == b.ids()
        assert np.asarray(a.features()).tobytes() == np.asarray(b.features()).tobytes()
    assert two[0].timings.decoding > 0


def test_asked_to_stop_both_end_and_the_rest_is_done_later(embed_all):
    stopped = embed_all(("cpu", "cpu"), "cache", REQUESTS[1:], should_stop=lambda: True)
    assert stopped[0].interrupted
    n_first = stopped[0].n_embedded
    assert 0 < n_first < 12
    (ended,) = embed_all((), "cache", REQUESTS[1:])
    assert (ended.n_embedded, ended.interrupted) == (12 - n_first, False)


def test_a_process_that_is_killed_is_told_and_what_was_committed_is_kept(embed_all):
    def kill(_):
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(
        ResourceError, match=r"process of cpu was ended from outside \(exit code -9"
    ):
        embed_all(("cpu", "cpu"), "cache", REQUESTS[1:], on_progress=kill)
    (report,) = embed_all((), "cache", REQUESTS[1:])
    assert report.n_cached + report.n_embedded + report.n_linked == 12


def test_an_error_in_a_process_is_the_users_error(embed_all):
    with pytest.raises(UsageError, match="Unknown device 'tpu'"):
        embed_all(("cpu", "tpu"), "cache", REQUESTS[1:])


def test_a_loaded_network_cannot_be_sent(embed_all, pixels):
    with pytest.raises(UsageError, match="how to load the backbone"):
        embed_all(("cpu", "cpu"), "cache", [pixels])
