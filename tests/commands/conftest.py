import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.commands import main


@pytest.fixture
def tlpipe(capsys, monkeypatch):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tlpipe", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


@pytest.fixture
def interrupted():
    """Run a command line in a folder until a file appears, then press Ctrl-C: as ``tlpipe``."""
    root = Path(__file__).parents[2]

    def run(words, folder, pattern):
        process = subprocess.Popen(
            [sys.executable, str(root / "cli.py"), *words],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not list(folder.glob(pattern)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return run
