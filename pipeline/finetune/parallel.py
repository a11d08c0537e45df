"""Several processes, started by torchrun, that train one network together.

All of them run the same program. Each computes its part of every batch, gradients are added up once
a step, and whatever is decided by a clock, a signal or a file is decided for all of them, so that
they never part ways. Control goes over gloo, gradients over NCCL where they are on GPUs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import EXIT_INTERRUPTED, TlpipeError, UsageError
from pipeline.finetune.settings import Settings

T = TypeVar("T")

# The others wait while the first embeds activations, which may take days. Nobody waits for the
# dead: their connections are closed, and torchrun ends the rest.
_PATIENCE = timedelta(days=14)
# The first to fail speaks before the others' end can have torchrun end it.
_LEAD_SECONDS = 1.0
_BUCKET_BYTES = 64_000_000


class LostProcessError(TlpipeError):
    """Another process has ended before the training did."""


@dataclass(frozen=True)
class Team:
    """The processes that train together; by default one alone, which shares and sends nothing.

    Attributes:
        rank: number of this process, from 0.
        n: processes in all.
        local_rank: number of this process on this machine.
        n_local: processes on this machine.
    """

    rank: int = 0
    n: int = 1
    local_rank: int = 0
    n_local: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def part(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """This process's rows; parts differ by one row at most, and follow each other by rank."""
        return np.array_split(rows, self.n)[self.rank]

    def own(self, settings: Settings) -> Settings:
        """Settings with this process's GPU, and its part of the machine's cores and memory.

        The GPU becomes the current one, which libraries take where none is named.

        Raises:
            UsageError: there is no GPU for it.
        """
        if self.n == 1:
            return settings
        return replace(
            settings,
            device=self._own_device(settings.device),
            n_threads=settings.n_threads or _cores_each(self.n_local),
            cache_bytes=settings.cache_bytes // self.n_local,
        )

    def _own_device(self, device: str) -> str:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            return device
        if device != "cuda":
            raise UsageError(
                f"With several processes, --device {device} is not understood; each takes a GPU of "
                "its own.\n  Use --device cuda or --device cpu, or a single process."
            )
        n_gpus = torch.cuda.device_count()
        if self.n_local > n_gpus:
            raise UsageError(
                f"torchrun started {self.n_local} processes on this machine, but torch sees "
                f"{n_gpus} GPU(s), and each process needs one.\n"
                f"  Use --nproc-per-node {max(1, n_gpus)}, or --device cpu."
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add tensors up over all processes, in place; all on one device, of the same shapes."""
        if self.n == 1:
            return
        for some in _buckets(tensors):
            # In the order of their indices: their memory formats may differ.
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            with self._connected():
                dist.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in some])
            for tensor, part in zip(some, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def largest(self, value: float) -> float:
        """The largest of the processes' values, such as what their clocks say."""
        if self.n == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        with self._connected():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def any(self, flag: bool) -> bool:
        """Whether it is so for any process."""
        return self.largest(float(flag)) > 0

    def joined(self, part: torch.Tensor) -> torch.Tensor:
        """The processes' tensors, on the CPU, one after the other by rank."""
        if self.n == 1:
            return part
        return torch.cat([other for other in self.each(lambda: part) if len(other)])

    def each(self, work: Callable[[], T]) -> list[T]:
        """What every process's work gives, by rank.

        Raises:
            TlpipeError: in every process, where the work of one failed.
        """
        if self.n == 1:
            return [work()]
        outcomes: list[T | _Failure | None] = [None] * self.n
        mine = _attempt(work)
        with self._connected():
            dist.all_gather_object(outcomes, mine)
        return [_unpack(outcome) for outcome in outcomes]

    def first(self, work: Callable[[], T]) -> T:
        """What the first process's work gives; the others do nothing but wait for it.

        Raises:
            TlpipeError: in every process, where the work failed.
        """
        if self.n == 1:
            return work()
        outcome = [_attempt(work) if self.is_first else None]
        with self._connected():
            dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        return _unpack(outcome[0])

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that torch.distributed raises
            line = (str(error).splitlines() or [type(error).__name__])[0]
            why = line.rpartition("] ")[2].partition(". ")[0]  # without where in torch it happened
            raise LostProcessError(
                f"One of the {self.n} processes ended before the training did ({why:.100}).\n"
                "  Where it left no message it was killed, often for want of memory. Go on with "
                "the same command and --resume."
            ) from error


ALONE = Team()


@dataclass(frozen=True)
class _Failure:
    """An error on its way to the other processes; its class may want more than its text."""

    kind: type[TlpipeError]
    text: str


def _attempt(work: Callable[[], T]) -> T | _Failure:
    try:
        return work()
    except TlpipeError as error:
        return _Failure(type(error), str(error))


def _unpack(outcome: T | _Failure | None) -> T:
    if isinstance(outcome, _Failure):
        raise outcome.kind.__new__(outcome.kind, outcome.text)
    return outcome  # type: ignore[return-value]  # None only where the work gave it


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors that are sent together: neither one by one nor with a copy of all of them."""
    some: list[torch.Tensor] = []
    for tensor in tensors:
        some.append(tensor)
        if sum(one.nbytes for one in some) >= _BUCKET_BYTES:
            yield some
            some = []
    if some:
        yield some


@contextmanager
def together() -> Iterator[Team]:
    """Meet the other processes that torchrun started; without torchrun, be alone.

    On the way out all wait for the last one. Of those that fail, the first raises its error, and
    the others leave without a word.

    Raises:
        SystemExit: it failed as others had before.
        LostProcessError: the others cannot be reached.
    """
    n = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    if n == 1:
        yield ALONE
        return
    n_local = int(os.environ["LOCAL_WORLD_SIZE"])
    team = Team(int(os.environ["RANK"]), n, int(os.environ["LOCAL_RANK"]), n_local)
    if os.environ.get("OMP_NUM_THREADS") == "1":  # what torchrun sets where the user has not
        torch.set_num_threads(_cores_each(n_local))
    with team._connected():
        store, *_ = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=team.rank, world_size=n, timeout=_PATIENCE
        )
    try:
        yield team
        team.any(False)
    except BaseException as error:
        # torchrun ends all processes once one has ended; those that are leaving leave in order.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if _is_first_to_fail(store):
            raise
        time.sleep(_LEAD_SECONDS)
        sys.exit(_exit_code(error))
    dist.destroy_process_group()


def _cores_each(n_local: int) -> int:
    return max(1, (os.cpu_count() or 1) // n_local)


def _is_first_to_fail(store: Any) -> bool:
    try:
        return int(store.add("tlpipe/failed", 1)) == 1
    except RuntimeError:  # torchrun itself is gone
        return True


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TlpipeError):
        return error.exit_code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
