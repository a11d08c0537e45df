"""`tlpipe` processes of the tests: started fast, never waited for without a limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.soak._faults import Fault

ROOT = Path(__file__).parents[2]

HANG_SECONDS = 60.0
"""Far more than any of these runs takes: a process that is still there then hangs."""


@dataclass(frozen=True)
class Ended:
    """How a process ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str


class Run:
    """One running `tlpipe` process.

    Attributes:
        pid: its process id.
    """

    def __init__(self, server: ForkServer, pid: int, words: Sequence[str]) -> None:
        self._server = server
        self._words = words
        self._ended: Ended | None = None
        self.pid = pid
        # A name for this very process, whoever else may get its number when it is gone.
        self._handle = os.pidfd_open(pid)

    def poll(self) -> Ended | None:
        """How it ended; None if it still runs."""
        return self._wait(0.0)

    def wait(self, seconds: float = HANG_SECONDS) -> Ended:
        """Let it end by itself; one that does not is shown where it hangs, and killed."""
        ended = self._wait(seconds)
        if ended is None:
            self.signal(signal.SIGUSR1)  # prints the stack of every thread
            self._wait(1.0)
            ended = self.kill()
            raise AssertionError(
                f"tlpipe {' '.join(self._words)} still ran after {seconds} s:\n{ended.err}"
            )
        return ended

    def signal(self, number: int) -> None:
        """Send a signal; a process that has ended already does not mind."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def __del__(self) -> None:
        os.close(self._handle)

    def kill(self) -> Ended:
        """SIGKILL it."""
        self.signal(signal.SIGKILL)
        ended = self._wait(HANG_SECONDS)
        assert ended is not None
        return ended

    def _wait(self, seconds: float) -> Ended | None:
        if self._ended is None:
            answer = self._server.ask(do="wait", pid=self.pid, seconds=seconds)
            if answer["code"] is not None:
                self._ended = Ended(**answer)
        return self._ended


class ForkServer:
    """See `_server.py`; use as a context manager.

    Args:
        preload: compiled `faulty_io.c`, where faults are wanted.
        wrapper: words before the server's own command line, such as those that mount something.

    Attributes:
        can_fail: whether runs can be started with a fault.
    """

    def __init__(self, preload: Path | None = None, wrapper: Sequence[str] = ()) -> None:
        self.can_fail = preload is not None
        environment = {
            **os.environ,
            "OMP_WAIT_POLICY": "PASSIVE",
            # Its threads would start with numpy, before any fork.
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "tests.soak._server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest, which then ends the server
        )

    def __enter__(self) -> ForkServer:
        self.pid = self._answer()["ready"]
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(HANG_SECONDS)
        self._process.stdout.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has died; see its error output"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(
        self,
        *words: str | Path,
        cwd: Path,
        commit_seconds: float | None = None,
        max_file_bytes: int | None = None,
        max_open_files: int | None = None,
        fault: Fault | None = None,
    ) -> Run:
        """Start ``tlpipe WORDS``.

        Args:
            words: of the command line.
            cwd: folder to run in.
            commit_seconds: rows are committed after so long; None for the usual time.
            max_file_bytes: no file may grow beyond this, as on a disk that is full.
            max_open_files: as on a machine with a low limit.
            fault: what its file operations suffer.
        """
        arguments = [str(word) for word in words]
        answer = self.ask(
            do="start",
            arguments=arguments,
            cwd=str(cwd),
            commit_seconds=commit_seconds,
            max_file_bytes=max_file_bytes,
            max_open_files=max_open_files,
            fault=None if fault is None else fault.to_json(),
        )
        return Run(self, answer["pid"], arguments)
