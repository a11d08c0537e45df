"""An unchanged rerun knows its recipe without loading the network, and never wrongly."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.extract.extractor import Settings, extract
from pipeline.extract.recall import Request, recall
from pipeline.extract.target import Target
from pipeline.extract.timings import Timings
from pipeline.store import open_store

from .conftest import write_image

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(precision="fp32", batch_size=4, n_threads=2)


@pytest.fixture
def weights(tmp_path):
    """A file of resnet18's weights."""
    file = tmp_path / "weights.safetensors"
    save_file(load_backbone("resnet18", weights="random").module.state_dict(), file)
    return file


@pytest.fixture
def request_of(weights):
    return Request("resnet18", str(weights), 32, 0)


def run(tmp_path, photos, request, settings=SETTINGS):
    return extract(open_source(str(photos)), request, settings, cache_dir=tmp_path / "cache")


def recalled(tmp_path, photos, request, settings=SETTINGS):
    return recall(tmp_path / "cache", open_source(str(photos)), request.digest(settings))


def test_what_was_asked_before_is_known_again(tmp_path, photos, request_of):
    assert recalled(tmp_path, photos, request_of) is None
    report = run(tmp_path, photos, request_of)
    assert recalled(tmp_path, photos, request_of).recipe == open_store(report.store).recipe
    again = run(tmp_path, photos, request_of, replace(SETTINGS, batch_size=8))
    assert (again.store, again.n_cached, again.n_decoded) == (report.store, 12, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda r, s: (replace(r, image_size=40), s),
        lambda r, s: (replace(r, spec="resnet34"), s),
        lambda r, s: (replace(r, weights="random"), s),
        lambda r, s: (r, replace(s, layers=("layer1",))),
        lambda r, s: (r, replace(s, precision="bf16")),
        lambda r, s: (r, replace(s, storage="float32")),
        lambda r, s: (r, replace(s, device="cpu")),
    ],
)
def test_another_request_is_not_taken_for_it(tmp_path, photos, request_of, change):
    run(tmp_path, photos, request_of)
    assert recalled(tmp_path, photos, *change(request_of, SETTINGS)) is None


def test_other_weights_under_one_name_are_noticed(tmp_path, photos, request_of, weights):
    first = run(tmp_path, photos, request_of)
    before = weights.stat()
    other = load_backbone("resnet18", weights="random", seed=1).module.state_dict()
    save_file(other, weights)
    assert weights.stat().st_size == before.st_size
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert recalled(tmp_path, photos, request_of) is None
    second = run(tmp_path, photos, request_of)
    assert second.store != first.store
    assert second.n_embedded == 12


def test_a_touched_file_is_read_once_and_then_known(tmp_path, photos, request_of, weights):
    first = run(tmp_path, photos, request_of)
    os.utime(weights)
    assert recalled(tmp_path, photos, request_of) is None
    assert run(tmp_path, photos, request_of).store == first.store
    assert recalled(tmp_path, photos, request_of) is not None


def test_what_is_new_is_embedded_as_if_nothing_had_been_known(tmp_path, photos, request_of):
    run(tmp_path, photos, request_of)
    write_image(photos / "cat" / "new.png", seed=99)
    report = run(tmp_path, photos, request_of)
    assert (report.n_cached, report.n_embedded) == (12, 1)
    whole = extract(open_source(str(photos)), request_of, SETTINGS, cache_dir=tmp_path / "another")
    rows, expected = open_store(report.store), open_store(whole.store)
    assert rows.ids() == expected.ids()
    np.testing.assert_array_equal(rows.features()[:], expected.features()[:])


def test_an_unchanged_rerun_imports_no_torch(tmp_path, photos):
    command = [
        sys.executable, "-c",
        "import sys, json; sys.argv[0] = 'tlpipe'\n"
        "from pipeline.commands import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'timm', 'sklearn', 'PIL'} & set(sys.modules)), "
        "file=sys.stderr)",
        "extract", str(photos), "--backbone", "pixels:8", "--json",
        "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    runs = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (json.loads(process.stdout) for process in runs)
    assert (first["n_embedded"], second["n_cached"]) == (12, 12)
    assert "torch" in runs[0].stderr.splitlines()[-1]
    assert runs[1].stderr.splitlines()[-1] == "[]"


def test_a_weights_file_that_is_replaced_while_images_are_embedded_is_not_taken_for_the_old_one(
    tmp_path, photos, request_of, weights
):
    other = load_backbone("resnet18", weights="random", seed=1).module.state_dict()
    report = extract(
        open_source(str(photos)),
        request_of,
        SETTINGS,
        cache_dir=tmp_path / "cache",
        on_plan=lambda *_: save_file(other, weights),
    )
    again = run(tmp_path, photos, request_of)
    assert again.store != report.store
    assert again.n_embedded == 12


def test_a_rerun_that_embeds_nothing_leaves_what_was_said_of_the_rows(tmp_path, photos, request_of):
    report = run(tmp_path, photos, request_of)
    before = open_store(report.store).manifest.provenance
    extract(
        open_source(str(photos)), request_of, replace(SETTINGS, batch_size=3, n_threads=1),
        cache_dir=tmp_path / "cache", verify_content=True,
    )  # fmt: skip
    assert open_store(report.store).manifest.provenance == before


@pytest.mark.parametrize(("should_stop", "goes_on"), [(True, True), (False, False)])
def test_only_what_was_interrupted_has_to_go_on_with_eager(
    tmp_path, photos, request_of, should_stop, goes_on
):
    extract(
        open_source(str(photos)), request_of, SETTINGS,
        cache_dir=tmp_path / "cache", should_stop=lambda: should_stop,
    )  # fmt: skip
    write_image(photos / "cat" / "new.png", seed=40)
    target = Target(
        open_source(str(photos)), request_of, SETTINGS,
        cache_dir=tmp_path / "cache", limit=None, trust=True, timings=Timings(),
    )  # fmt: skip
    with target.open(print):
        target.begin(verify_content=False, on_note=print)
        assert (target._engine_so_far is not None) == goes_on
