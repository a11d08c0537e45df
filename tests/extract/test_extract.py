"""Only what is new or changed is embedded, and every row belongs to its sample."""

import gc
import os
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.errors import DataError, EmptySourceError, StoreError, UsageError
from pipeline.extract.extractor import Settings, extract
from pipeline.store import open_store

from .conftest import write_image


def features_by_id(report):
    store = open_store(report.store)
    return dict(zip(store.ids(), np.asarray(store.features()), strict=True))


def alone(embed, tmp_path, file, **arguments):
    """Features of one image, embedded by itself."""
    folder = tmp_path / f"alone-{file.stem}"
    folder.mkdir()
    shutil.copy2(file, folder)
    (row,) = features_by_id(embed(folder, **arguments)).values()
    return row


def test_each_row_is_that_of_its_image_alone(embed, photos, tmp_path, resnet):
    rows = features_by_id(embed(photos, resnet))
    assert list(rows) == sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    for name in ("cat/04.png", "dog/11.png"):
        np.testing.assert_array_equal(rows[name], alone(embed, tmp_path, photos / name,
                                                        backbone=resnet))  # fmt: skip


def test_the_second_time_nothing_is_decoded(embed, photos):
    first = embed(photos)
    assert (first.n_embedded, first.n_cached, first.n_decoded) == (12, 0, 12)
    second = embed(photos)
    assert (second.n_embedded, second.n_cached, second.n_decoded) == (0, 12, 0)
    assert second.store == first.store


def test_only_added_images_are_embedded(embed, photos):
    before = features_by_id(embed(photos))
    for i in range(12, 15):
        write_image(photos / "cat" / f"a{i}.png", seed=i)
    report = embed(photos)
    assert (report.n_embedded, report.n_cached, report.n_decoded) == (3, 12, 3)
    after = features_by_id(report)
    assert len(after) == 15
    for name, row in before.items():
        np.testing.assert_array_equal(after[name], row)


def test_a_changed_image_is_embedded_anew(embed, photos, tmp_path):
    before = features_by_id(embed(photos))
    write_image(photos / "cat" / "02.png", seed=99)
    report = embed(photos)
    assert (report.n_embedded, report.n_cached) == (1, 11)
    after = features_by_id(report)
    assert not np.array_equal(after["cat/02.png"], before["cat/02.png"])
    np.testing.assert_array_equal(
        after["cat/02.png"], alone(embed, tmp_path, photos / "cat" / "02.png")
    )


def test_a_touched_image_is_read_but_not_decoded(embed, photos):
    embed(photos)
    os.utime(photos / "cat" / "00.png", (1, 1))
    report = embed(photos)
    assert (report.n_embedded, report.n_linked, report.n_decoded) == (0, 1, 0)
    assert embed(photos).n_cached == 12


def test_same_size_and_time_needs_verify_content(embed, photos):
    file = photos / "cat" / "00.png"
    embed(photos)
    stat = file.stat()
    data = bytearray(file.read_bytes())
    write_image(file, seed=50)
    fresh = file.read_bytes()
    padded = (fresh + bytes(len(data)))[: max(len(data), len(fresh))]
    if len(padded) != stat.st_size:  # make the lengths agree: bytes after IEND are ignored
        write_image(file, seed=50, size=(8, 6))
        padded = (file.read_bytes() + bytes(stat.st_size))[: stat.st_size]
    file.write_bytes(padded)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert embed(photos).n_embedded == 0
    report = embed(photos, verify_content=True)
    assert (report.n_embedded, report.n_linked) == (1, 11)


def test_removed_images_are_no_longer_served_and_come_back_cheaply(embed, photos, tmp_path):
    embed(photos)
    kept = (photos / "dog" / "03.png").rename(tmp_path / "kept.png")
    report = embed(photos)
    assert (report.n_removed, report.n_embedded) == (1, 0)
    assert "dog/03.png" not in features_by_id(report)
    kept.rename(photos / "dog" / "03.png")
    report = embed(photos)
    assert (report.n_embedded, report.n_linked, report.n_decoded) == (0, 1, 0)


def test_identical_images_are_embedded_once(embed, photos):
    shutil.copy2(photos / "cat" / "00.png", photos / "dog" / "00-copy.png")
    report = embed(photos)
    assert (report.n_embedded, report.n_linked) == (12, 1)
    rows = features_by_id(report)
    np.testing.assert_array_equal(rows["cat/00.png"], rows["dog/00-copy.png"])


@pytest.mark.parametrize("how", ["move", "copy", "copy without times"])
def test_a_moved_or_copied_folder_still_hits(embed, photos, tmp_path, how):
    first = embed(photos)
    target = tmp_path / "elsewhere" / "photos"
    target.parent.mkdir()
    if how == "move":
        photos.rename(target)
    else:
        copy = shutil.copy2 if how == "copy" else shutil.copy
        shutil.copytree(photos, target, copy_function=copy)
    report = embed(target)
    assert (report.store, report.n_embedded, report.n_decoded) == (first.store, 0, 0)


def test_two_folders_of_one_name_do_not_share_a_store(embed, photos, tmp_path):
    first = embed(photos)
    other = tmp_path / "other" / "photos"
    for i in range(4):
        write_image(other / "cat" / f"x{i}.png", seed=100 + i)
    second = embed(other)
    assert second.store != first.store
    assert len(open_store(first.store)) == 12
    assert len(open_store(second.store)) == 4
    assert embed(other).store == second.store
    assert embed(photos).n_cached == 12


def test_new_labels_and_splits_need_no_extraction(embed, photos, tmp_path):
    manifest = tmp_path / "m.csv"
    names = sorted(p.relative_to(tmp_path).as_posix() for p in photos.rglob("*.png"))
    manifest.write_text("path,label,split\n" + "".join(f"{n},a,train\n" for n in names))
    embed(manifest)
    manifest.write_text("path,colour,split\n" + "".join(f"{n},red,test\n" for n in names))
    report = embed(manifest)
    assert (report.n_embedded, report.n_cached) == (0, 12)
    store = open_store(report.store)
    assert set(store.labels("colour", split="test")) == {"red"}


def test_reordering_keeps_rows_with_their_samples(embed, photos, tmp_path):
    manifest = tmp_path / "m.csv"
    names = sorted(p.relative_to(tmp_path).as_posix() for p in photos.rglob("*.png"))
    manifest.write_text("path,label\n" + "".join(f"{n},a\n" for n in names))
    before = features_by_id(embed(manifest))
    manifest.write_text("path,label\n" + "".join(f"{n},a\n" for n in reversed(names)))
    report = embed(manifest)
    after = features_by_id(report)
    assert report.n_embedded == 0
    assert list(after) == names[::-1]
    for name in names:
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize(
    "change",
    [
        {"layers": ("layer2",)},
        {"layers": ("layer2",), "pooling": "max"},
        {"precision": "bf16"},
        {"storage": "float32"},
    ],
    ids=str,
)
def test_whatever_decides_values_gets_a_store_of_its_own(embed, photos, resnet, change):
    settings = Settings(batch_size=4, precision="fp32")
    base = embed(photos, resnet, settings)
    other = embed(photos, resnet, replace(settings, **change))
    assert other.store != base.store
    assert other.n_embedded == 12


def test_what_does_not_decide_values_does_not(embed, photos, resnet):
    base = embed(photos, resnet, Settings(batch_size=4))
    other = embed(photos, resnet, Settings(batch_size=5, n_threads=1))
    assert (other.store, other.n_embedded) == (base.store, 0)


def test_an_interrupted_run_resumes_to_the_same_bytes(embed, photos, resnet, tmp_path):
    whole = features_by_id(embed(photos, resnet))
    shutil.rmtree(tmp_path / "cache")
    report = embed(photos, resnet, should_stop=lambda: True)
    assert report.interrupted
    assert report.n_embedded == 4
    assert len(open_store(report.store)) == 4
    report = embed(photos, resnet)
    assert (report.n_cached, report.n_embedded) == (4, 8)
    resumed = features_by_id(report)
    assert list(resumed) == list(whole)
    for name, row in whole.items():
        assert resumed[name].tobytes() == row.tobytes()


def test_bad_images_are_skipped_with_reasons_and_nothing_shifts(embed, photos, tmp_path):
    good = features_by_id(embed(photos))
    shutil.rmtree(tmp_path / "cache")
    whole = (photos / "cat" / "00.png").read_bytes()
    (photos / "cat" / "00a.png").write_bytes(b"")
    (photos / "cat" / "02a.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (photos / "dog" / "03a.png").write_bytes(whole[: len(whole) // 2])
    (photos / "dog" / "05a.png").symlink_to(photos / "nowhere.png")
    report = embed(photos)
    assert sorted(report.failures) == ["cat/00a.png", "cat/02a.jpg", "dog/03a.png", "dog/05a.png"]
    assert "empty" in report.failures["cat/00a.png"]
    assert "cannot be read" in report.failures["dog/05a.png"]
    assert all(report.failures.values())
    rows = features_by_id(report)
    assert set(rows) == set(good)
    for name, row in good.items():
        np.testing.assert_array_equal(rows[name], row)


def test_a_mended_image_is_embedded_on_the_next_run(embed, photos):
    (photos / "cat" / "bad.png").write_bytes(b"")
    assert len(embed(photos).failures) == 1
    write_image(photos / "cat" / "bad.png", seed=77)
    report = embed(photos)
    assert (report.failures, report.n_embedded) == ({}, 1)


def test_awkward_images_have_features(embed, tmp_path):
    folder = tmp_path / "awkward"
    folder.mkdir()
    photo = Image.open(write_image(tmp_path / "base.png", seed=1, size=(40, 30)))
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    palette = photo.convert("P")
    palette.info["transparency"] = 3
    palette.save(folder / "palette.png", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.rotate(90, expand=True).save(folder / "rotated.jpg", exif=exif, quality=98)
    frames = [photo.convert("P"), photo.rotate(180).convert("P")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    photo.save(folder / "upright.jpg", quality=98)
    report = embed(folder)
    assert report.failures == {}
    rows = {k: v.astype(np.float32) for k, v in features_by_id(report).items()}
    assert set(rows) == {p.name for p in folder.iterdir()}
    for name in ("cmyk.jpg", "rotated.jpg", "moving.gif"):
        assert np.abs(rows[name] - rows["upright.jpg"]).mean() < 0.06, name
    assert len(report.notes) >= 2


def test_features_are_those_of_the_plain_network(embed, photos, resnet):
    settings = Settings(layers=("layer1", "penultimate"), precision="fp32", storage="float32",
                        batch_size=4)  # fmt: skip
    store = open_store(embed(photos, resnet, settings).store)
    rows = np.asarray(store.features(layers=["penultimate"]))
    network = resnet.module
    for name, row in zip(store.ids(), rows, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(photos / name).convert("RGB")))
        image = resnet.preprocess(pixels.permute(2, 0, 1).contiguous())
        x = resnet.preprocess.normalise(image[None])
        with torch.inference_mode():
            for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
                x = getattr(network, part)(x)
        plain = x.mean((2, 3))[0].numpy()
        cosine = row @ plain / np.linalg.norm(row) / np.linalg.norm(plain)
        assert cosine > 0.99999


class Broken(torch.nn.Module):
    """Turns images whose first pixel is bright into a value that is not finite."""

    def __init__(self, net, value):
        super().__init__()
        self.net, self.value = net, value
        self.layers, self.pooling, self.shapes = net.layers, net.pooling, net.shapes

    def forward(self, x):
        (features,) = self.net(x)
        bad = x[:, 0, 0, 0] > 0
        return (torch.where(bad[:, None], torch.full_like(features, self.value), features),)


@pytest.mark.parametrize(
    ("value", "why"), [(float("nan"), "not a number"), (1e6, "larger than float16 holds")]
)
def test_features_that_are_not_finite_are_refused(photos, pixels, value, why, tmp_path):
    from pipeline.extract.forward import FrozenForward

    forward = FrozenForward(
        Broken(pixels.feature_net(), value),
        pixels.preprocess,
        device=torch.device("cpu"),
        precision="fp32",
        storage="float16",
        batch_size=4,
    )
    images = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 255, 0)]
    features, refused = forward(images)
    assert list(refused) == [1]
    assert why in refused[1]
    assert np.isfinite(features["penultimate"][[0, 2]]).all()


class OverflowsInHalf(torch.nn.Module):
    layers, pooling, shapes = ("penultimate",), "avg", {"penultimate": (2,)}

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2, bias=False)
        torch.nn.init.ones_(self.linear.weight)

    def forward(self, x):
        y = self.linear(x.mean((2, 3)))
        return (torch.where(torch.tensor(y.dtype == torch.bfloat16), y * float("inf"), y),)


def test_a_batch_that_overflows_in_half_precision_is_run_in_float32(pixels):
    from pipeline.extract.forward import FrozenForward

    forward = FrozenForward(OverflowsInHalf(), pixels.preprocess, device=torch.device("cpu"),
                            precision="bf16", storage="float16", batch_size=4)  # fmt: skip
    features, refused = forward([torch.full((3, 8, 8), 255, dtype=torch.uint8)])
    assert refused == {}
    assert np.isfinite(features["penultimate"]).all()


def test_an_empty_folder(embed, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptySourceError) as caught:
        embed(tmp_path / "empty")
    assert caught.value.exit_code == 4


def test_nothing_but_bad_images(embed, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match="None of the 1 images"):
        embed(tmp_path / "bad")


def test_a_cache_that_is_a_file(photos, pixels, tmp_path):
    (tmp_path / "cache").write_text("")
    source = replace(open_source(str(photos)), name="photos")
    with pytest.raises(StoreError, match="Give another with --cache"):
        extract(source, pixels, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(device="gpu"), "Unknown device 'gpu'"),
        (Settings(device="cuda:7"), "CUDA|There is no"),
        (Settings(precision="fp16", device="cpu"), "CPUs are slow in fp16"),
        (Settings(layers=("layr2",)), "Did you mean: layer2"),
    ],
)
def test_settings_that_cannot_be(embed, photos, resnet, settings, message):
    with pytest.raises(UsageError, match=message):
        embed(photos, resnet, settings)


@pytest.mark.parametrize("old_is_gone", [True, False])
def test_another_folder_with_the_same_names_sizes_and_times_is_not_mistaken(
    embed, tmp_path, old_is_gone
):
    """Uncompressed frames are all of one size, and archives carry one time."""
    folders = [tmp_path / name / "frames" for name in ("a", "b")]
    for k, folder in enumerate(folders):
        for i in range(6):
            path = write_image(folder / "x" / f"{i}.bmp", seed=10 * k + i)
            os.utime(path, (1, 1))
    first = embed(folders[0])
    before = features_by_id(first)
    if old_is_gone:
        shutil.rmtree(folders[0])
        folders[1] = folders[1].rename(tmp_path / "b" / "other")
    second = embed(folders[1])
    assert second.store != first.store
    assert second.n_embedded == 6
    for name, row in features_by_id(second).items():
        assert not np.array_equal(row, before[name])
    for name, row in features_by_id(first).items():
        np.testing.assert_array_equal(row, before[name])


def test_shards_without_a_manifest_are_never_swept(embed, photos):
    report = embed(photos)
    (report.store / "store.json").rename(report.store / "kept.json")
    with pytest.raises(StoreError, match=r"has lost its store\.json"):
        embed(photos)
    (report.store / "store.backup.json").unlink()
    with pytest.raises(StoreError, match=r"store\.json and its copy are lost"):
        embed(photos)
    (report.store / "kept.json").rename(report.store / "store.json")
    assert embed(photos).n_cached == 12


def test_a_damaged_store_of_other_data_is_no_concern(embed, photos, tmp_path):
    broken = embed(photos).store
    (broken / "store.json").write_text("{")
    other = tmp_path / "more"
    write_image(other / "1.png", seed=3)
    assert embed(other).n_embedded == 1


def test_the_view_never_shows_what_the_store_no_longer_serves(embed, photos):
    report = embed(photos)
    for i, path in enumerate(sorted(photos.rglob("*.png"))):
        write_image(path, seed=200 + i)

    def die(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        embed(photos, on_progress=die)
    assert len(open_store(report.store)) == 0
    assert not (report.store / "features.h5").exists()


def test_a_pipe_in_a_manifest_is_skipped(embed, photos, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,label\nphotos/cat/00.png,a\npipe.jpg,b\n")
    assert embed(manifest).failures == {"pipe.jpg": "not a file"}


@pytest.mark.parametrize("columns", ["a,a/b", ".,..", "x/,y"])
def test_label_columns_that_hdf5_would_stumble_over(embed, photos, tmp_path, columns):
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"path,{columns}\nphotos/cat/00.png,1,2\nphotos/cat/02.png,3,4\n")
    store = open_store(embed(manifest).store)
    assert store.labels(columns.split(",")[0]).tolist() == ["1", "3"]
    assert (store.path / "features.h5").exists()


@pytest.mark.parametrize("recipe_change", [{}, {"precision": "fp16"}])
def test_a_head_can_predict_whatever_the_store_was_made_with(embed, photos, resnet, recipe_change):
    from pipeline.extract.embed import embed_files, embedder_for

    settings = Settings(layers=("layer2", "penultimate"), pooling="max", batch_size=4)
    store = open_store(embed(photos, resnet, settings).store)
    recipe = {**store.recipe, **recipe_change}
    origin = store.manifest.provenance["backbone"]
    embedder = embedder_for(recipe, origin, n_files=12, device="cpu")
    found = embed_files(embedder, [str(photos / name) for name in store.ids()])
    stored = np.asarray(store.features(layers=["penultimate"])).astype(np.float32)
    fresh = found.layers["penultimate"].astype(np.float32)
    cosine = (
        (fresh * stored).sum(1) / np.linalg.norm(fresh, axis=1) / np.linalg.norm(stored, axis=1)
    )
    assert cosine.min() > 0.999


def test_a_rerun_with_a_bad_image_writes_nothing(embed, photos):
    (photos / "cat" / "broken.png").write_bytes(b"not an image")
    folder = embed(photos).store

    def contents():
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()}

    before = contents()
    report = embed(photos)
    assert list(report.failures) == ["cat/broken.png"]
    after = contents()
    assert {p.name for p in before} == {p.name for p in after}
    assert {p for p in after if p.suffix in (".h5", ".json") and after[p] != before[p]} == set()


def notes_of(embed, *arguments, **keywords):
    notes = []
    return embed(*arguments, on_note=notes.append, **keywords), notes


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"precision": "bf16"}, "precision: fp32, now bf16"),
        ({"storage": "float32"}, "storage: float16, now float32"),
        ({"layers": ("layer2",)}, 'layers: ["penultimate"], now ["layer2"]'),
    ],
    ids=str,
)
def test_a_new_store_beside_another_says_what_differs(embed, photos, resnet, change, text):
    settings = Settings(batch_size=4, precision="fp32")
    base, notes = notes_of(embed, photos, resnet, settings)
    assert notes == []

    other, notes = notes_of(embed, photos, resnet, replace(settings, **change))

    assert notes == [f"{base.store} is kept: it differs in {text}. Extracting beside it."]
    assert other.store.parent == base.store.parent
    assert notes_of(embed, photos, resnet, replace(settings, **change))[1] == []


def test_other_weights_are_told_by_their_first_digits(embed, photos, resnet):
    other = load_backbone("resnet18", weights="random", image_size=32, seed=1)
    base = embed(photos, resnet)

    _, (note,) = notes_of(embed, photos, other)

    old, new = resnet.weights_digest[:8], other.weights_digest[:8]
    assert note == (
        f"{base.store} is kept: it differs in weights: {old}, now {new}. Extracting beside it."
    )


def test_the_nearest_store_is_the_one_compared_with(embed, photos, resnet):
    settings = Settings(batch_size=4, precision="fp32")
    embed(photos, resnet, replace(settings, storage="float32", layers=("layer1",)))
    near = embed(photos, resnet, replace(settings, storage="float32")).store

    _, notes = notes_of(embed, photos, resnet, settings)

    assert notes == [
        f"{near} is kept: it differs in storage: float32, now float16. Extracting beside it."
    ]


def test_other_backbones_other_folders_and_damaged_stores_are_not_compared_with(
    embed, photos, pixels, resnet, tmp_path
):
    embed(photos, pixels)
    broken = embed(photos, resnet, Settings(storage="float32")).store
    (broken / "store.json").write_text("{")
    assert notes_of(embed, photos, resnet)[1] == []
    shutil.rmtree(tmp_path / "cache")
    embed(photos, resnet)
    write_image(tmp_path / "other" / "photos" / "1.png", seed=9)
    report, notes = notes_of(
        embed, tmp_path / "other" / "photos", resnet, Settings(storage="float32")
    )
    assert notes == []
    assert report.n_embedded == 1


def test_copies_of_an_image_keep_no_pixels(embed, photos, pixels):
    """What is kept until a batch is full does not grow with the number of copies in it."""
    for i in range(40):
        shutil.copy(photos / "cat" / "00.png", photos / "cat" / f"00-copy{i:02d}.png")
    batch_size, n_alive = 4, []

    def count(_):
        n_alive.append(
            sum(
                type(thing) is torch.Tensor and thing.shape == (3, 8, 8)
                for thing in gc.get_objects()
            )
        )

    settings = Settings(batch_size=batch_size, n_threads=1)
    report = embed(photos, settings=settings, on_progress=count)

    assert (report.n_embedded, report.n_linked) == (12, 40)
    lookahead = 2 * batch_size
    assert max(n_alive) <= batch_size + lookahead + 1


def test_an_interrupted_run_leaves_a_finished_store(embed, photos):
    """The batch in hand is committed, the log is folded and ``features.h5`` shows it."""
    report = embed(photos, should_stop=lambda: True)
    store = open_store(report.store)
    assert report.interrupted
    assert store.manifest.folded == store.manifest.shards[-1].number
    with h5py.File(report.store / "features.h5") as file:
        assert file["id"].asstr()[:].tolist() == store.ids() == list(features_by_id(report))
        assert len(store) == 4


def test_a_head_is_used_with_images_decoded_as_its_store_was(embed, tmp_path):
    from pipeline.extract.embed import embed_files, embedder_for

    rng = np.random.default_rng(0)
    folder = tmp_path / "large"
    folder.mkdir()
    for i in range(2):
        noise = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.jpg", quality=90)
    backbone = load_backbone("pixels:16")
    stores = [
        open_store(embed(folder, backbone, Settings(batch_size=4, decode=decode)).store)
        for decode in ("cpu", "fast")
    ]
    assert not np.array_equal(*(np.asarray(store.features()) for store in stores))
    for store in stores:
        recipe, origin = store.recipe, store.manifest.provenance["backbone"]
        embedder = embedder_for(recipe, origin, n_files=2, device="cpu")
        files = [str(folder / sample_id) for sample_id in store.ids()]
        found = embed_files(embedder, files).layers["penultimate"]
        np.testing.assert_array_equal(found, np.asarray(store.features()))


def cost_of(report):
    return open_store(report.store).manifest.provenance["cost"]


def test_the_store_adds_up_what_its_rows_took(embed, photos):
    first = cost_of(embed(photos))
    write_image(photos / "cat" / "zz.png", seed=50)
    second = cost_of(embed(photos))
    third = cost_of(embed(photos))

    assert (first["n_embedded"], second["n_embedded"]) == (12, 13)
    assert 0 < first["seconds"] < second["seconds"]
    assert third == second
