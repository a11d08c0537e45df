"""Several backbones in one pass: each image decoded once, each store as if it were alone."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from pipeline.data import open_source
from pipeline.errors import UsageError
from pipeline.extract.extractor import Settings, extract, extract_all
from pipeline.store import open_store

from .conftest import write_image

SETTINGS = Settings(batch_size=4, n_threads=2, precision="fp32")


@pytest.fixture
def embed_all(tmp_path):
    def run(data, backbones, settings=SETTINGS, cache="cache", **arguments):
        source = open_source(str(data), cache_dir=tmp_path / cache)
        return extract_all(source, backbones, settings, cache_dir=tmp_path / cache, **arguments)

    return run


def rows(report):
    store = open_store(report.store)
    return store.ids(), np.asarray(store.features())


def test_each_store_is_bit_equal_to_one_made_alone(embed_all, photos, pixels, resnet, tmp_path):
    (photos / "cat" / "broken.png").write_bytes(b"no image")
    together = embed_all(photos, [resnet, pixels])
    assert [report.n_embedded for report in together] == [12, 12]
    assert [list(report.failures) for report in together] == [["cat/broken.png"]] * 2
    for report, backbone in zip(together, (resnet, pixels), strict=True):
        source = open_source(str(photos), cache_dir=tmp_path / "alone")
        alone = extract(source, backbone, SETTINGS, cache_dir=tmp_path / "alone")
        assert alone.store.name == report.store.name
        assert rows(alone)[0] == rows(report)[0]
        assert rows(alone)[1].tobytes() == rows(report)[1].tobytes()


def test_an_image_is_read_and_decoded_once(embed_all, photos, pixels, resnet, monkeypatch):
    from pipeline.extract import loader

    decoded = []
    decode_image = loader.decode_image
    monkeypatch.setattr(
        loader, "decode_image", lambda data, **k: decoded.append(1) or decode_image(data, **k)
    )
    embed_all(photos, [resnet, pixels])
    assert len(decoded) == 12


def test_each_embeds_only_what_it_lacks(embed_all, photos, pixels, resnet):
    embed_all(photos, [pixels])
    for i in range(12, 15):
        write_image(photos / "cat" / f"{i}.png", seed=i)
    planned = []
    first, second = embed_all(photos, [pixels, resnet], on_plan=lambda *n: planned.append(n))
    assert (first.n_cached, first.n_embedded) == (12, 3)
    assert (second.n_cached, second.n_embedded) == (0, 15)
    assert planned == [(30, 18)]
    again = embed_all(photos, [pixels, resnet])
    assert [(report.n_cached, report.n_decoded) for report in again] == [(15, 0), (15, 0)]


def test_interrupted_it_goes_on_to_the_same_bytes(embed_all, photos, pixels, resnet, tmp_path):
    whole = [rows(report)[1].tobytes() for report in embed_all(photos, [resnet, pixels])]
    shutil.rmtree(tmp_path / "cache")
    settings = replace(SETTINGS, batch_size=3)
    stopped = embed_all(photos, [resnet, pixels], settings, should_stop=lambda: True)
    assert all(report.interrupted for report in stopped)
    assert 0 < sum(report.n_embedded for report in stopped) < 24
    ended = embed_all(photos, [resnet, pixels])
    assert [rows(report)[1].tobytes() for report in ended] == whole


def test_a_backbone_named_twice_is_refused(embed_all, photos, pixels):
    with pytest.raises(UsageError, match="named twice"):
        embed_all(photos, [pixels, pixels])
