"""Memory does not grow with the number of images."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.soak import SOAK
from tests.soak._runs import ROOT

pytestmark = SOAK


def test_ten_times_the_images_take_at_most_100_mb_more():
    script = ROOT / "benchmarks" / "extract_memory.py"
    done = subprocess.run(
        [
            sys.executable,
            str(script),
            "--few",
            "1000",
            "--many",
            "10000",
            "--repeats",
            "1",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, ((few,), (many,)) in json.loads(done.stdout).items():
        assert many - few < 100, f"{name}: {few:.0f} MB, then {many:.0f} MB"
