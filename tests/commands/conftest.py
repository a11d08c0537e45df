import sys

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
