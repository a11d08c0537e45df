"""Batches: the same for the same seed, epoch and sample, whatever the threads do."""

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.finetune import Settings
from pipeline.finetune.augment import Seeded, make_augment, make_mix, seeded_step
from pipeline.finetune.images import ImageBatches, Images, epoch_order
from tests.finetune.conftest import write_photos


def batches(tmp_path, backbone, *, n_threads=2, cache_bytes=0, **settings):
    folder = write_photos(tmp_path / "p", n_each=5)
    files = sorted(str(path) for path in folder.rglob("*.png"))
    images = Images(files, n_threads=n_threads, cache_bytes=cache_bytes)
    chosen = Settings(**settings)
    return ImageBatches(
        images=images,
        rows=np.arange(len(files)),
        ids=np.array(files, dtype=object),
        targets=torch.arange(len(files)),
        preprocess=backbone.preprocess,
        augment=make_augment(chosen, backbone.preprocess),
        batch_size=4,
        seed=chosen.seed,
    )


def epoch_of(source, epoch, first_step=0):
    parts = list(source.training(epoch, first_step))
    return torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts])


@pytest.mark.parametrize("augment", ["crop", "trivial", "rand"])
def test_views_depend_on_seed_epoch_and_sample_alone(tmp_path, backbone, augment):
    one = batches(tmp_path, backbone, n_threads=1, augment=augment)
    many = batches(tmp_path, backbone, n_threads=4, cache_bytes=10**9, augment=augment)
    torch.manual_seed(1)
    first, targets = epoch_of(one, 3)
    epoch_of(many, 0)  # now some images are in memory
    torch.manual_seed(2)
    second, again = epoch_of(many, 3)

    assert torch.equal(first, second)
    assert torch.equal(targets, again)
    other, _ = epoch_of(one, 4)
    assert not torch.equal(first, other)
    reseeded, _ = epoch_of(batches(tmp_path, backbone, augment=augment, seed=1), 3)
    assert not torch.equal(first, reseeded)


def test_an_epoch_can_be_taken_up_in_its_middle(tmp_path, backbone):
    source = batches(tmp_path, backbone, augment="crop")

    inputs, targets = epoch_of(source, 0)
    rest, rest_targets = epoch_of(source, 0, first_step=2)

    assert torch.equal(inputs[-len(rest) :], rest)
    assert torch.equal(targets[-len(rest) :], rest_targets)
    assert 0 < len(rest) < len(inputs)


def test_plain_views_are_those_of_extraction_and_in_order(tmp_path, backbone):
    source = batches(tmp_path, backbone, augment="rand")

    plain = list(source.plain())
    without, targets = epoch_of(batches(tmp_path, backbone, augment="none"), 0)

    assert torch.equal(torch.cat([p.targets for p in plain]), torch.arange(15))
    assert torch.equal(torch.cat([p.inputs for p in plain])[targets], without)


def test_no_batch_is_left_with_a_single_sample():
    sizes = [len(rows) for rows in epoch_order(9, 4, 0, 0)]

    assert sizes == [3, 3, 3]
    assert sorted(np.concatenate(epoch_order(9, 4, 0, 0))) == list(range(9))


def test_random_numbers_of_threads_do_not_meet():
    def draws():
        return torch.rand(2), torch.randint(100, (2,)), torch.empty(2).uniform_(0, 1)

    with Seeded(5):
        first = draws()
    before = torch.get_rng_state()
    with Seeded(5):
        second = draws()

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("settings", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 1, "cutmix": 1}])
def test_mixed_targets_are_shares_and_repeat_with_the_seed(settings):
    mix = make_mix(Settings(**settings), n_classes=3)
    inputs = torch.rand(6, 3, 8, 8)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])

    results = []
    for seed in (0, 0, 1):
        with seeded_step(seed, torch.device("cpu")):
            results.append(mix(inputs, targets))

    assert results[0][1].shape == (6, 3)
    torch.testing.assert_close(results[0][1].sum(dim=1), torch.ones(6))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[2][0])


def test_an_image_that_goes_away_while_training(tmp_path, backbone):
    source = batches(tmp_path, backbone)
    (tmp_path / "p" / "a" / "00.png").unlink()

    with pytest.raises(DataError) as caught:
        epoch_of(source, 0)

    assert "00.png could be read when training began, and now cannot" in str(caught.value)
    assert "--resume" in str(caught.value)
