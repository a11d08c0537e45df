"""Checkpoints: one training at a time, and what a stopped search for the learning rate leaves."""

import pytest
import torch

from pipeline.errors import LockedError, StoreError
from pipeline.finetune.checkpoint import Checkpoint, StoppedError
from pipeline.finetune.fit import Watcher

FACTS = {"seed": 0}


def test_a_folder_is_of_one_training_at_a_time(tmp_path):
    one, other = Checkpoint(tmp_path, FACTS), Checkpoint(tmp_path, FACTS)
    one.acquire()
    one.save({"step": 1})

    with pytest.raises(LockedError, match=r"\.finetune-\w+ is being written by process \d+ on "):
        other.acquire()
    other.remove()

    assert one.load()["step"] == 1
    one.release()
    other.acquire()
    other.release()
    one.remove()
    assert not list(tmp_path.iterdir())


def test_a_training_that_kept_nothing_leaves_no_folder(tmp_path):
    checkpoint = Checkpoint(tmp_path / "runs", FACTS)
    checkpoint.acquire()

    checkpoint.release()

    assert not list((tmp_path / "runs").iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file")

    with pytest.raises(StoreError, match=r"cannot be made .*\n  Give another folder with --out"):
        Checkpoint(tmp_path / "runs", FACTS).acquire()


def test_what_is_kept_beside_is_in_every_state_and_dropped_with_it(tmp_path):
    checkpoint = Checkpoint(tmp_path, FACTS)
    checkpoint.acquire()
    checkpoint.beside = {"trials": [1.0]}

    checkpoint.save({"weights": torch.ones(2)})
    checkpoint.write_metrics([{"epoch": 0}])
    found = checkpoint.load()
    checkpoint.drop()

    assert found["trials"] == [1.0]
    assert torch.equal(found["weights"], torch.ones(2))
    assert not checkpoint.exists()
    checkpoint.release()


def test_a_stopped_search_of_the_learning_rate_is_taken_up(train):
    settings = {"lr": None, "policy": "last:1"}
    whole = train(settings=settings)
    whole.checkpoint.remove()
    told = []
    stop_after_three = Watcher(
        note=told.append, should_stop=lambda: len([t for t in told if "loss" in t]) == 3
    )
    with pytest.raises(StoppedError, match="learning rates were tried; those tried before"):
        train(settings=settings, watcher=stop_after_three)
    tried = [line for line in told if "loss" in line]
    told.clear()

    resumed = train(settings=settings, resume=True, watcher=Watcher(note=told.append))

    assert told[0] == "Taken up after 3 trials of learning rates."
    assert len(tried) + len([line for line in told if "loss" in line]) == len(whole.lr_trials) == 6
    assert resumed.lr == whole.lr
    assert [t["loss"] for t in resumed.lr_trials] == [t["loss"] for t in whole.lr_trials]
    assert [e["val_loss"] for e in resumed.curve] == [e["val_loss"] for e in whole.curve]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 and no more"])
def test_a_damaged_checkpoint_says_what_to_delete(tmp_path, content):
    checkpoint = Checkpoint(tmp_path, FACTS)
    checkpoint.acquire()
    checkpoint.save({"step": 1})
    checkpoint.release()
    checkpoint.path.write_bytes(content)

    with pytest.raises(StoreError, match=r"is damaged .*\n.*rm -r .*\.finetune-.*, then the same"):
        checkpoint.load()
