"""What a dry run says is what the run then does; and it writes nothing."""

import pytest

from pipeline.data import open_source
from pipeline.errors import UsageError
from pipeline.extract.estimate import estimate
from pipeline.extract.extractor import Settings, extract_all
from pipeline.store import open_store

from .conftest import write_image

SETTINGS = Settings(batch_size=4, n_threads=2, precision="fp32")


@pytest.fixture
def dry(photos, tmp_path):
    def run(backbones, settings=SETTINGS, **arguments):
        source = open_source(str(photos), cache_dir=tmp_path / "cache")
        arguments = {"cache_dir": tmp_path / "cache", **arguments}
        before = sorted(tmp_path.rglob("*"))
        found = estimate(source, backbones, settings, **arguments)
        assert sorted(tmp_path.rglob("*")) == before, "it wrote something"
        return found

    return run


def run(photos, tmp_path, backbones):
    source = open_source(str(photos), cache_dir=tmp_path / "cache")
    return extract_all(source, backbones, SETTINGS, cache_dir=tmp_path / "cache")


def test_it_names_the_stores_and_what_is_missing_in_each(dry, photos, tmp_path, pixels, resnet):
    (photos / "cat" / "broken.png").write_bytes(b"no image")
    run(photos, tmp_path, [pixels])
    write_image(photos / "cat" / "x.png", seed=50)
    found = dry([pixels, resnet])
    assert [(s.n_samples, s.n_cached, s.n_todo) for s in found.stores] == [(14, 12, 2), (14, 0, 14)]
    assert (found.n_files, found.failures.keys()) == (14, {"cat/broken.png"})
    reports = run(photos, tmp_path, [pixels, resnet])
    assert [r.store for r in reports] == [s.store for s in found.stores]
    assert [r.n_cached for r in reports] == [12, 0]


def test_the_store_grows_by_no_more_than_it_says(dry, photos, tmp_path, resnet):
    for i in range(100, 400):
        write_image(photos / "many" / f"{i}.png", seed=i)
    found = dry([resnet])
    (report,) = run(photos, tmp_path, [resnet])
    size_bytes = open_store(report.store).manifest.size_bytes
    assert 0.5 * found.bytes_needed < size_bytes <= found.bytes_needed
    assert found.free_bytes > 0


def test_the_time_is_that_of_the_measured_speed(dry, resnet):
    found = dry([resnet])
    assert found.n_tried == 12
    assert found.images_per_second > 0
    assert found.seconds == pytest.approx(found.n_files / found.images_per_second)
    assert list(found.engines.values()) == ["eager"]


def test_a_trial_ends_after_its_time_with_one_batch(dry, resnet):
    assert dry([resnet], trial_seconds=0.0).n_tried == 4


def test_a_backbone_named_twice_is_refused_as_in_the_run(dry, pixels):
    with pytest.raises(UsageError, match="named twice"):
        dry([pixels, pixels])


def test_where_nothing_is_missing_nothing_is_tried(dry, photos, tmp_path, pixels):
    run(photos, tmp_path, [pixels])
    found = dry([pixels])
    assert (found.n_files, found.n_tried, found.seconds, found.bytes_needed) == (0, 0, 0.0, 0)
