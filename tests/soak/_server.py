"""Starts a `tlpipe` process in milliseconds: a process that has torch imported, and forks.

It speaks JSON lines: one request on stdin, one answer on stdout. A forked child runs the real
command line and is waited for only when asked: until then its process id cannot be another's.
Nothing is computed here before a fork, so a child starts without torch's threads, like any process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from importlib import import_module
from itertools import chain
from pkgutil import iter_modules
from typing import Any

import pipeline.backbones
import pipeline.commands.extract
import pipeline.data
import pipeline.extract
import pipeline.store.writer
from pipeline.commands import main

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
PIPE_BYTES = 1 << 20  # nobody reads while the child runs: what it prints must fit


def import_everything() -> None:
    """What a run imports only when it needs it, a child should find there."""
    for package in (pipeline.backbones, pipeline.data, pipeline.extract, pipeline.store):
        for module in iter_modules(package.__path__, f"{package.__name__}."):
            import_module(module.name)


def run(request: dict[str, Any]) -> int:
    """In the child: arrange the circumstances, run the command line, give its exit code."""
    os.chdir(request["cwd"])
    if request["commit_seconds"] is not None:
        pipeline.store.writer.COMMIT_SECONDS = request["commit_seconds"]
    if request["max_file_bytes"] is not None:
        limit = request["max_file_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if request["max_open_files"] is not None:
        limit = request["max_open_files"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if request["fault"] is not None:
        arm(request["fault"])
    sys.argv = ["tlpipe", *request["arguments"]]
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a program
        traceback.print_exc()
        return 1
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    return 0


def arm(fault: dict[str, Any]) -> None:
    """Tell the preloaded `faulty_io.c` what to do from now on."""
    failed = ctypes.CDLL(None).faulty_arm(
        os.fsencode(fault["prefix"]),
        ctypes.c_uint(fault["classes"]),
        ctypes.c_long(fault["nth"]),
        ctypes.c_int(fault["lasting"]),
        ctypes.c_double(fault["probability"]),
        ctypes.c_uint(fault["seed"]),
        ctypes.c_int(fault["action"]),
        ctypes.c_int(fault["error_number"]),
        os.fsencode(fault["report"]),
    )
    assert not failed, "the fault could not be armed"


class Children:
    """The processes that were started and not yet waited for."""

    def __init__(self) -> None:
        self._pipes: dict[int, tuple[int, int]] = {}

    def start(self, request: dict[str, Any]) -> int:
        """Fork a child that runs the command line; its process id."""
        out, err = os.pipe(), os.pipe()
        for _, end in (out, err):
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        # A child that is not yet in the command line would be ended by its first signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        pid = os.fork()
        if pid == 0:
            os.close(out[0])
            os.close(err[0])
            self._become(request, out[1], err[1])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        os.close(out[1])
        os.close(err[1])
        self._pipes[pid] = (out[0], err[0])
        return pid

    def _become(self, request: dict[str, Any], out: int, err: int) -> None:
        """In the child, never to return."""
        code = 1
        try:
            nothing = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((nothing, 0), (out, 1), (err, 2)):
                os.dup2(source, target)
            for end in (nothing, out, err, *chain(*self._pipes.values())):
                os.close(end)
            # Python's own streams remember what kind of file they were opened on.
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
            faulthandler.register(signal.SIGUSR1, all_threads=True)
            code = run(request)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def wait(self, pid: int, seconds: float) -> dict[str, Any]:
        """Exit code and what was printed; the code is None if it still runs."""
        deadline = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            if time.monotonic() >= deadline:
                return {"code": None}
            time.sleep(0.002)
        texts = []
        for end in self._pipes.pop(pid):
            with os.fdopen(end, errors="replace") as stream:
                texts.append(stream.read())
        return {"code": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1]}

    def end(self) -> None:
        """Kill what still runs."""
        for pid in self._pipes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def serve() -> None:
    """Answer requests until stdin is closed."""
    import_everything()
    children = Children()
    gc.freeze()  # a child that collects garbage would copy all of the parent's memory
    print(json.dumps({"ready": os.getpid()}), flush=True)
    try:
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "start":
                answer: dict[str, Any] = {"pid": children.start(request)}
            elif request["do"] == "shell":
                done = subprocess.run(request["words"], check=False)
                answer = {"code": done.returncode}
            else:
                answer = children.wait(request["pid"], request["seconds"])
            print(json.dumps(answer), flush=True)
    finally:
        children.end()


if __name__ == "__main__":
    serve()
    os._exit(0)  # without torch's long goodbye
