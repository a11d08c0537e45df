"""A training that is killed at a random step ends as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.finetune.conftest import write_photos

ROOT = Path(__file__).parents[2]

# Every step leaves a checkpoint, as if a minute had passed.
SCRIPT = """
import sys
from pathlib import Path
from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.finetune import Settings, finetune

folder, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
run = finetune(
    open_source(str(folder / "photos"), cache_dir=folder / "cache"),
    load_backbone("timm:test_efficientnet", weights="random", image_size=32),
    Settings(epochs=4, batch_size=6, lr=2e-3, augment="trivial", mixup=0.2, ema=0.9, dropout=0.1,
             precision="fp32", n_threads=2, device="cpu", checkpoint_seconds=0),
    out=folder / "runs", init_head="none", resume=resume,
)
print(run.save())
"""


def start(folder, resume="fresh"):
    # Its own threads, so that sums are added up in the same order in every process.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), resume],
        env=environment, cwd=folder, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    path, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads((Path(path.strip()) / "run.json").read_text()), Path(path.strip())


def lasting(document):
    """All that must not differ: everything but what a clock says."""
    dropped = {"seconds", "images_per_second", "command"}
    if isinstance(document, dict):
        return {k: lasting(v) for k, v in document.items() if k not in dropped}
    return [lasting(v) for v in document] if isinstance(document, list) else document


@pytest.mark.timeout(200)
def test_killed_and_taken_up_ends_the_same(tmp_path):
    for name in ("whole", "killed"):
        write_photos(tmp_path / name / "photos", 8)
    whole, path = finish(start(tmp_path / "whole"))
    process = start(tmp_path / "killed")
    metrics = Path("metrics.jsonl")
    deadline, n_lines = time.monotonic() + 60, random.randint(2, 3)
    while time.monotonic() < deadline:
        found = list((tmp_path / "killed" / "runs").glob(f".finetune-*/{metrics}"))
        if found and len(found[0].read_text().splitlines()) >= n_lines:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list((tmp_path / "killed" / "runs").glob("finetune-*"))

    resumed, other = finish(start(tmp_path / "killed", "resume"))

    source = whole["source"] = resumed["source"]
    assert source
    assert lasting(resumed) == lasting(whole)
    assert (other / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert (other / "predictions.csv").read_text() == (path / "predictions.csv").read_text()
