"""Several devices of one machine: a process each, on a fixed share of the files.

Whatever the devices' speeds, units come in the same order: one from each in turn. Nothing but the
process that started them writes to a store.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import ResourceError, TlpipeError
from pipeline.extract.recall import Request
from pipeline.extract.settings import Settings
from pipeline.extract.stream import Job, Unit, embed
from pipeline.extract.timings import Timings
from pipeline.store.manifest import read_manifest
from pipeline.store.writer import known_rows

Provenance = Mapping[str, Any]


@dataclass(frozen=True)
class Order:
    """What one backbone has to do, as it is sent to another process.

    Attributes:
        request: how to load the backbone.
        folder: its store, to see which images are known.
        wants: (n_files,) which of the files it embeds.
        engine: what its rows were made with so far; None where there is none.
    """

    request: Request
    folder: Path
    wants: NDArray[np.bool_]
    engine: Provenance | None


@dataclass(frozen=True)
class _Asks:
    """The first batch of a job is there: which engine do the others use?"""

    job: int


@dataclass(frozen=True)
class _Begun:
    """What a job runs on."""

    job: int
    provenance: dict[str, Any]


@dataclass(frozen=True)
class _Failed:
    """An error of which the user is told, or the traceback of one that is a bug."""

    kind: type[TlpipeError] | None
    text: str


def embed_on_devices(
    files: Sequence[str],
    orders: Sequence[Order],
    settings: Settings,
    timings: Timings,
    should_stop: Callable[[], bool],
    on_begin: Callable[[int, Provenance], None],
) -> Iterator[Unit]:
    """The same as :func:`~pipeline.extract.stream.embed`, on ``settings.devices``.

    Args:
        files: image files.
        orders: what the backbones have to do.
        settings: layers, pooling, precision and the like.
        timings: of all processes; the largest of each stage, and the sum of what threads do.
        should_stop: asked after each unit; what the devices have in hand is finished.
        on_begin: is told of each job what runs it, before its first unit.

    Raises:
        ResourceError: a process was ended from outside.
        TlpipeError: what went wrong in one of them.
    """
    stop = multiprocessing.get_context("spawn").Event()
    workers = [_Worker(k, files, orders, settings, stop) for k in range(len(settings.devices))]
    chosen: dict[int, Provenance | None] = {}
    try:
        working = list(workers)
        while working:
            for worker in list(working):
                message = worker.receive()
                while isinstance(message, _Asks | _Begun):
                    if isinstance(message, _Asks):
                        worker.answer(chosen.get(message.job))
                    elif message.job not in chosen:
                        chosen[message.job] = message.provenance.get("engine")
                        on_begin(message.job, message.provenance)
                    message = worker.receive()
                if isinstance(message, Timings):
                    timings.add(message)
                    working.remove(worker)
                    continue
                yield message
                if should_stop():
                    stop.set()
    finally:
        stop.set()
        for worker in workers:
            worker.end()


class _Worker:
    """A process and its share of the files."""

    def __init__(
        self,
        k: int,
        files: Sequence[str],
        orders: Sequence[Order],
        settings: Settings,
        stop: Event,
    ) -> None:
        n_workers = len(settings.devices)
        self.device = settings.devices[k]
        self._share = np.arange(k, len(files), n_workers)
        own = replace(settings, device=self.device, devices=())
        if settings.n_threads is None:
            own = replace(own, n_threads=max(1, (multiprocessing.cpu_count()) // n_workers))
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (
            theirs,
            [files[i] for i in self._share.tolist()],
            [replace(order, wants=order.wants[self._share]) for order in orders],
            own,
            stop,
            n_workers,
        )
        self._process: SpawnProcess = multiprocessing.get_context("spawn").Process(
            target=_work, args=arguments, name=f"tlpipe {self.device}", daemon=True
        )
        self._process.start()
        theirs.close()

    def receive(self) -> Unit | Timings | _Asks | _Begun:
        """What the process did next; the files of a unit are indices of all files."""
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise ResourceError(
                f"The process of {self.device} was ended from outside "
                f"(exit code {self._process.exitcode}): out of memory, perhaps.\n"
                "  What was committed is kept. Run the same command again, with a smaller "
                "--batch-size or fewer --threads."
            ) from None
        if isinstance(message, _Failed):
            if message.kind is None:
                raise RuntimeError(f"In the process of {self.device}:\n{message.text}")
            error = message.kind.__new__(message.kind)
            error.args = (message.text,)
            raise error
        if isinstance(message, Unit):
            return replace(message, files=self._share[message.files].tolist())
        assert isinstance(message, Timings | _Asks | _Begun)
        return message

    def answer(self, engine: Provenance | None) -> None:
        """Have a job run on the same engine as elsewhere; None lets the process choose."""
        with suppress(ConnectionError):  # its end is noticed by receive()
            self._connection.send(engine)

    def end(self) -> None:
        """Wait for the process, which has been told to stop."""
        self._connection.close()  # whatever it still sends is wanted by nobody
        self._process.join()


def _work(
    connection: Connection,
    files: Sequence[str],
    orders: Sequence[Order],
    settings: Settings,
    stop: Event,
    n_workers: int,
) -> None:
    """Embed a share of the files, and send what became of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process asks to stop
    with suppress(ConnectionError):  # that process is gone, or has seen enough
        try:
            if settings.device == "cpu":
                torch.set_num_threads(max(1, torch.get_num_threads() // n_workers))
            _send_all(connection, files, orders, settings, stop)
        except ConnectionError:
            raise
        except TlpipeError as error:
            connection.send(_Failed(type(error), str(error)))
        except Exception:  # noqa: BLE001 - a bug keeps its traceback, where the user sees it
            connection.send(_Failed(None, traceback.format_exc()))


def _send_all(
    connection: Connection,
    files: Sequence[str],
    orders: Sequence[Order],
    settings: Settings,
    stop: Event,
) -> None:
    jobs = [_job(k, order, settings, connection) for k, order in enumerate(orders)]
    timings = Timings()
    for unit in embed(files, jobs, timings, stop.is_set, decode=settings.decode):
        connection.send(unit)
    connection.send(timings)


def _job(k: int, order: Order, settings: Settings, connection: Connection) -> Job:
    """The job of an order; it asks before its first batch what the others run on."""
    from pipeline.backbones import load_backbone
    from pipeline.extract.embedder import Embedder

    embedder = Embedder(load_backbone(**vars(order.request)), settings)
    known = known_rows(order.folder, read_manifest(order.folder))

    def is_known(digest: bytes) -> bool:
        return known.find(digest) is not None

    def begin(images: list[torch.Tensor]) -> None:
        connection.send(_Asks(k))
        elsewhere = connection.recv()
        n_passes = int(order.wants.sum()) * settings.n_views
        embedder.prepare(images, n_passes, order.engine or elsewhere)
        connection.send(_Begun(k, embedder.provenance()))

    return Job(embedder, order.wants, is_known, begin)
