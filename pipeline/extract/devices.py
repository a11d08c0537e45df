"""Several devices of one machine: a process each, on a fixed share of the files.

Whatever the devices' speeds, units come in the same order: one from each in turn. Nothing but the
process that started them writes to a store.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import MismatchError, ResourceError, TlpipeError
from pipeline.extract.recall import Request
from pipeline.extract.settings import Settings
from pipeline.extract.stream import Job, Unit, embed
from pipeline.extract.timings import Timings
from pipeline.store.key import recipe_differences
from pipeline.store.manifest import read_manifest
from pipeline.store.writer import known_rows

Provenance = Mapping[str, Any]


@dataclass(frozen=True)
class Order:
    """What one backbone has to do, as it is sent to another process.

    Attributes:
        request: how to load the backbone.
        recipe: of its store, which has to come of that.
        folder: the store, to see which images are known.
        wants: (n_files,) which of the files it embeds.
        engine: what its rows were made with so far; None where there is none.
    """

    request: Request
    recipe: dict[str, Any]
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
class _Note:
    """Something that the user should know."""

    text: str


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
    on_note: Callable[[str], None],
) -> Iterator[Unit]:
    """The same as :func:`~pipeline.extract.stream.embed`, on ``settings.devices``.

    Args:
        files: image files.
        orders: what the backbones have to do.
        settings: layers, pooling, precision and the like.
        timings: of all processes; the largest of each stage, and the sum of what threads do.
        should_stop: asked after each unit; what the devices have in hand is finished.
        on_begin: is told of each job what runs it, before its first unit.
        on_note: is told, in a sentence each, what is worth knowing.

    Raises:
        ResourceError: a process was ended from outside.
        TlpipeError: what went wrong in one of them.
    """
    stop = multiprocessing.get_context("spawn").Event()
    workers: list[_Worker] = []
    chosen: dict[int, Provenance | None] = {}
    timings.n_threads = 0
    try:
        for k in range(len(settings.devices)):
            workers.append(_Worker(k, files, orders, settings, stop))
        working = list(workers)
        while working:
            for worker in list(working):
                message = worker.receive()
                while isinstance(message, _Asks | _Begun | _Note):
                    if isinstance(message, _Note):
                        on_note(f"{worker.device}: {message.text}")
                    elif isinstance(message, _Asks):
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


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; the first one decides what becomes of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
        with _ignoring_interrupts():  # the new process, too, from its first moment
            self._process.start()
        theirs.close()

    def receive(self) -> Unit | Timings | _Asks | _Begun | _Note:
        """What the process did next; the files of a unit are indices of all files."""
        try:
            message = self._connection.recv()
        except (EOFError, OSError):  # also in the middle of a message
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
        assert isinstance(message, Timings | _Asks | _Begun | _Note)
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
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process asks to stop
        signal.signal(number, signal.SIG_IGN)
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
    def on_note(text: str) -> None:
        connection.send(_Note(text))

    timings = Timings()
    with timings.spent("loading"):
        jobs = [_job(k, order, settings, connection, on_note) for k, order in enumerate(orders)]
    for unit in embed(files, jobs, timings, stop.is_set, decode=settings.decode, on_note=on_note):
        connection.send(unit)
    for note in dict.fromkeys(job.embedder.note for job in jobs if job.embedder.note):
        on_note(note)
    connection.send(timings)


def _job(
    k: int,
    order: Order,
    settings: Settings,
    connection: Connection,
    on_note: Callable[[str], None],
) -> Job:
    """The job of an order; it asks before its first batch what the others run on.

    Raises:
        MismatchError: this device would make features of another recipe.
    """
    from pipeline.backbones import load_backbone
    from pipeline.extract.embedder import Embedder

    as_stored = replace(settings, precision=str(order.recipe["precision"]))
    embedder = Embedder(load_backbone(**vars(order.request)), as_stored)
    if embedder.recipe != order.recipe:
        lines = recipe_differences(order.recipe, embedder.recipe)
        raise MismatchError(
            f"{settings.device} would make features of another recipe than {order.folder} holds:\n"
            + "".join(f"  {line}\n" for line in lines)
            + "  Nothing of it was stored. Run the same command again."
        )
    known = known_rows(order.folder, read_manifest(order.folder))

    def is_known(digest: bytes) -> bool:
        return known.find(digest) is not None

    def begin(images: list[torch.Tensor]) -> None:
        connection.send(_Asks(k))
        elsewhere = connection.recv()
        n_passes = int(order.wants.sum()) * settings.n_views
        for note in embedder.prepare(images, n_passes, order.engine or elsewhere):
            on_note(note)
        connection.send(_Begun(k, embedder.provenance()))

    return Job(embedder, order.wants, is_known, begin)
