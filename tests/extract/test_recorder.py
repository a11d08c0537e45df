"""What is put runs in order, in one thread, and a failure is never passed over."""

import threading
import time

import pytest

from pipeline.extract.recorder import Recorder


def test_calls_run_in_order_in_one_thread():
    done, threads = [], set()

    def call(i):
        threads.add(threading.get_ident())
        time.sleep(0.001 * (i % 3))
        done.append(i)

    with Recorder() as recorder:
        for i in range(50):
            recorder.put(lambda i=i: call(i))
    assert done == list(range(50))
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_few_wait_at_a_time():
    gate, n_put = threading.Event(), 0

    def put_all(recorder):
        nonlocal n_put
        for _ in range(20):
            recorder.put(gate.wait)
            n_put += 1

    with Recorder() as recorder:
        putting = threading.Thread(target=put_all, args=(recorder,))
        putting.start()
        putting.join(0.2)
        assert putting.is_alive()
        assert n_put < 10
        gate.set()
        putting.join()
    assert n_put == 20


def test_after_a_failure_nothing_more_runs_and_it_is_raised():
    done = []

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Recorder() as recorder:  # noqa: PT012
        recorder.put(lambda: done.append(1))
        recorder.put(fail)
        for _ in range(3):
            recorder.put(lambda: done.append(2))
    assert done == [1]


def test_where_the_block_fails_its_own_error_is_raised_and_what_waits_is_dropped():
    done, gate = [], threading.Event()

    def wait():
        gate.wait()
        done.append(0)

    with pytest.raises(KeyboardInterrupt), Recorder() as recorder:  # noqa: PT012
        for call in (wait, lambda: done.append(1), lambda: done.append(2)):
            recorder.put(call)
        threading.Timer(0.1, gate.set).start()
        raise KeyboardInterrupt
    assert done == [0]
