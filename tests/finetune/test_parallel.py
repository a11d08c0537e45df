"""Several processes train as one does, and end together."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.errors import UnknownNameError, UsageError
from pipeline.finetune import Settings, finetune
from pipeline.finetune.bundle import load_network
from pipeline.finetune.cached import StoredBatches
from pipeline.finetune.fit import Watcher
from pipeline.finetune.images import plain_order
from pipeline.finetune.parallel import ALONE, Team, _attempt, _buckets, _unpack
from tests.finetune.conftest import write_photos
from tests.finetune.test_multitask import BOTH, write_table

ROOT = Path(__file__).parents[2]
MODEL = "model.safetensors"

# 18 images are trained on in batches of 5, 5, 4 and 4, of which two processes have 3 and 2 or 2.
QUICK = {"epochs": 3, "batch_size": 5, "lr": 2e-3, "augment": "trivial", "precision": "fp32",
         "device": "cpu", "checkpoint_seconds": 0, "cache_bytes": 10**8}  # fmt: skip
CASES = {
    "full": {"ema": 0.9, "label_smoothing": 0.1, "l2_sp": 0.01},
    "gradual": {"policy": "gradual", "micro_batch_size": 1, "optimizer": "sgd"},
    "searched": {"policy": "last:1", "lr": None},
    "cached": {"policy": "last:1", "cached": True, "augment": "none"},
    "hungry": {"policy": "last:2", "label_smoothing": 0.1},
    # Of a fifth of the images the light is not known, so the parts of a batch differ in weight.
    "labels": {"policy": "last:1", "task_weights": "uncertainty", "label_smoothing": 0.1},
}

# What torchrun runs: train each case, as one of the processes.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from pipeline.errors import DataError, TlpipeError
from pipeline.extract.interrupt import graceful_interrupt
from pipeline.finetune.checkpoint import StoppedError
from pipeline.finetune.fit import Watcher
from pipeline.finetune.parallel import together
from tests.finetune.test_parallel import train

folder, cases, ending = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]

def in_the_second_epoch(should_stop, act):
    calls = iter(range(22))  # 15 images are read, and an epoch has 4 steps
    return lambda: should_stop() or (next(calls, None) is None and act())

try:
    with together() as team, graceful_interrupt(lambda _: None) as should_stop:
        other = not team.is_first
        for name, settings in cases.items():
            watcher, resume = Watcher(should_stop=should_stop), name == "stopped"
            if ending == "killed" and other:
                die = lambda: os.kill(os.getpid(), signal.SIGKILL)
                watcher = Watcher(should_stop=in_the_second_epoch(should_stop, die))
            if name == "stopped":
                ask = in_the_second_epoch(should_stop, lambda: True) if other else should_stop
                try:
                    train(folder, name, settings, team, Watcher(should_stop=ask))
                except StoppedError as stop:
                    (folder / f"stopped-{team.rank}.txt").write_text(str(stop))
            run = train(folder, name, settings, team, watcher, resume=resume)
            team.first(run.save)
        if ending == "broken" and other:
            raise DataError("photos/a.png could be read when training began, and now cannot.")
except TlpipeError as error:
    sys.exit(f"Error: {error}")
"""


def train(folder, name, settings, team=ALONE, watcher=None, **arguments):
    """Train in ``runs/<name>`` of a folder; alone, or with a team that calls this, too."""
    network = load_backbone("timm:test_efficientnet", weights="random", image_size=32)
    if name == "hungry" and not team.is_first:
        network.module.register_forward_pre_hook(run_out_of_memory)
    several = name.startswith("labels")
    data = folder / "table" / "table.csv" if several else folder / "photos"
    return finetune(
        open_source(str(data), cache_dir=folder / "cache"),
        network,
        Settings(**QUICK | settings),
        label=BOTH if several else None,
        out=folder / "runs" / name,
        cache_dir=folder / "cache",
        init_head="none",
        team=team,
        watcher=watcher,
        **arguments,
    )


def run_out_of_memory(_, inputs):
    """In training, with more than one image."""
    if torch.is_grad_enabled() and len(inputs[0]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def torchrun(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def run_of(folder):
    (path,) = folder.glob("finetune-*")
    return path


@pytest.fixture
def folder(tmp_path):
    write_photos(tmp_path / "photos", 10)
    write_table(tmp_path / "table", n=30)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def errors_in(done):
    assert done.returncode != 0
    return re.findall("^Error: .*", done.stderr, re.MULTILINE)


def assert_same(path, run):
    """That two processes ended where one did."""
    document = json.loads((path / "run.json").read_text())
    found = load_network(path).network.state_dict()
    for key, wanted in run.network.state_dict().items():
        torch.testing.assert_close(found[key], wanted, rtol=1e-3, atol=2e-4)
    assert document["lr"] == run.lr
    assert document["n_fit"] == run.n_fit
    for one, other in zip(document["curve"][1:], run.curve[1:], strict=True):
        assert one["step"] == other["step"]
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
    nll = run.metrics_dict()["test"]["nll"]["value"]
    assert document["metrics"]["test"]["nll"]["value"] == pytest.approx(nll, rel=1e-3)
    if len(run.tasks) > 1:
        assert run.task_weights[0] != run.task_weights[1]
        assert document["task_weights"] == pytest.approx(run.task_weights, rel=1e-3)


def test_two_processes_end_where_one_does(folder):
    cases = CASES | {"stopped": CASES["full"]}
    done = torchrun(folder / "script.py", folder, json.dumps(cases), "broken")

    for name, settings in CASES.items():
        assert_same(run_of(folder / "runs" / name), train(folder, f"{name}-alone", settings))
    # Stopped because one was asked to, and taken up by as many: bit by bit the same.
    stopped, whole = (run_of(folder / "runs" / name) / MODEL for name in ("stopped", "full"))
    assert stopped.read_bytes() == whole.read_bytes()
    texts = {(folder / f"stopped-{rank}.txt").read_text() for rank in range(2)}
    assert texts == {"Stopped after step 7 of 12; all of it is kept."}
    # In the end one failed.
    assert errors_in(done) == [
        "Error: photos/a.png could be read when training began, and now cannot."
    ]


def test_one_is_killed_and_another_number_of_processes_takes_up(folder):
    case = json.dumps({"killed": CASES["full"]})

    done = torchrun(folder / "script.py", folder, case, "killed")
    told = []
    resumed = train(folder, "killed", CASES["full"], watcher=Watcher(note=told.append), resume=True)

    (message,) = errors_in(done)
    assert re.search(
        r"One of the 2 processes ended before .* \(.*Connection .* by peer.*\)", message
    )
    assert "Go on with the same command and --resume." in done.stderr
    assert told == ["Taken up at step 6 of 12."]
    assert_same(resumed.save(), train(folder, "whole", CASES["full"]))


def test_the_command_works_as_it_is(folder):
    arguments = [
        *["finetune", folder / "photos", "--backbone", "timm:test_efficientnet", "--image-size=32"],
        *["--weights=random", "--epochs=1", "--lr=0.001", "--batchnorm=train", "--device=cpu"],
        *["--out", folder / "runs" / "command", "--cache", folder / "cache"],
    ]
    (folder / "photos" / "a" / "broken.png").write_bytes(b"no image")

    done = torchrun("-m", "cli", *arguments)

    path = run_of(folder / "runs" / "command")
    document = json.loads((path / "run.json").read_text())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(path)
    assert done.stdout.count("scored on") == done.stderr.count("epoch 1 of 1") == 1
    assert document["command"].startswith("torchrun --nproc-per-node 2 --no-python tlpipe finetune")
    assert list(document["failures"]) == ["a/broken.png"]
    assert any("statistics of BatchNorm from its own part" in note for note in document["notes"])


# One process of a team


def test_parts_are_disjoint_and_follow_each_other():
    rows = np.random.default_rng(0).permutation(11)
    teams = [Team(rank, 3) for rank in range(3)]

    assert np.concatenate([team.part(rows) for team in teams]).tolist() == rows.tolist()
    assert sorted(len(team.part(rows)) for team in teams) == [3, 4, 4]
    every = [row for team in teams for part in plain_order(200, team) for row in part.tolist()]
    assert every == list(range(200))
    assert plain_order(2, teams[2]) == []


class Numbers:
    """Activations that are the numbers of their rows, in memory or not."""

    n_views, row_bytes, stretch, memory_bytes = 1, 8, 3, 100

    def __init__(self, fits):
        self.fits = fits

    def read(self, rows, views):
        return torch.from_numpy(rows + views).double()


@pytest.mark.parametrize("fits", [True, False])
def test_parts_of_a_batch_are_the_batch(fits):
    rows = np.arange(5, 28)
    alone = StoredBatches(Numbers(fits), rows, torch.from_numpy(rows), batch_size=5, seed=0)
    parts = [replace(alone, team=Team(rank, 2)) for rank in range(2)]

    steps = zip(*(source.training(1, first_step=1) for source in (alone, *parts)), strict=True)
    for whole, one, other in steps:
        assert torch.equal(torch.cat([one.inputs, other.inputs]), whole.inputs)
        assert torch.equal(torch.cat([one.targets, other.targets]), whole.targets)
        assert torch.equal(one.all_targets, whole.targets)
        assert len(one.targets) - len(other.targets) in (0, 1)
        assert one.n_all == other.n_all == len(whole.targets) == whole.n_all
    plain = [batch.inputs for source in parts for batch in source.plain()]
    assert torch.cat(plain).tolist() == rows.tolist()


def test_each_process_has_a_part_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    team = Team(rank=1, n=4, local_rank=1, n_local=2)
    settings = Settings(device="cpu", cache_bytes=1000)

    assert team.own(settings) == Settings(device="cpu", cache_bytes=500, n_threads=4)
    assert team.own(Settings(device="cpu", n_threads=3)).n_threads == 3
    assert Team().own(settings) is settings


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    with pytest.raises(UsageError) as caught:
        Team(rank=0, n=2, local_rank=0, n_local=2).own(Settings())
    with pytest.raises(UsageError, match="--device cuda:1 is not understood; each takes a GPU"):
        Team(rank=0, n=2, local_rank=0, n_local=1).own(Settings(device="cuda:1"))

    assert "started 2 processes on this machine, but torch sees 1 GPU" in str(caught.value)
    assert "Use --nproc-per-node 1, or --device cpu." in str(caught.value)


def test_batches_too_small_to_share(train):
    with pytest.raises(UsageError) as caught:
        train(settings={"batch_size": 2}, team=_Lonely(rank=0, n=3))

    assert "as few as 2 of the 18 images" in str(caught.value)
    assert "too few for 3 processes to share.\n  Use fewer processes" in str(caught.value)


class _Lonely(Team):
    """One of several that does not ask the others."""

    def each(self, work):
        return [work()]

    def first(self, work):
        return work()


def test_errors_travel_with_class_and_text():
    def fail():
        raise UnknownNameError("policy", "ful", ["full", "head"])

    with pytest.raises(UnknownNameError, match=r"^Unknown policy 'ful'\.\n  Did you mean: full\?$"):
        _unpack(_attempt(fail))
    assert _unpack(_attempt(lambda: None)) is None


def test_tensors_are_sent_together_but_not_all_at_once(monkeypatch):
    monkeypatch.setattr("pipeline.finetune.parallel._BUCKET_BYTES", 40)
    tensors = [torch.zeros(n) for n in (4, 6, 1, 30, 2)]

    assert [[len(t) for t in some] for some in _buckets(tensors)] == [[4, 6], [1, 30], [2]]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_all_find_wrong_is_said_by_one(rank):
    done = subprocess.run(
        [sys.executable, "cli.py", "finetune", "photos", "--nonsense"],
        cwd=ROOT, env={**os.environ, "TORCHELASTIC_RUN_ID": "1", "RANK": str(rank)},
        capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 2
    assert done.stdout == ""
    assert ("No such option" in done.stderr) == (rank == 0)
    assert bool(done.stderr) == (rank == 0)
