"""A data set of small images, and what an uninterrupted run makes of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from pipeline.store import Store, open_store
from tests.soak._runs import ForkServer

PIXELS = ("--backbone", "pixels:8")
"""No network: most of a run is reading, writing and committing."""

NETWORK = ("--backbone", "resnet18", "--weights", "random", "--image-size", "32",
           "--precision", "fp32")  # fmt: skip
"""A real one, small enough for hundreds of runs."""


@dataclass(frozen=True)
class Photos:
    """A folder of class folders; some images are copies of others, some cannot be decoded.

    Attributes:
        root: the data source.
        ids: every sample, in the data source's order.
        broken: those without features.
    """

    root: Path
    ids: tuple[str, ...]
    broken: frozenset[str]

    @property
    def usable(self) -> list[str]:
        """Ids of the samples that can be embedded, in the data source's order."""
        return [sample_id for sample_id in self.ids if sample_id not in self.broken]

    def plus(self, sample_id: str, content: bytes, *, is_broken: bool = False) -> Photos:
        """Write a file, new or over an old one; the data set as it is then."""
        path = self.root / sample_id
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        broken = self.broken | {sample_id} if is_broken else self.broken - {sample_id}
        return Photos(self.root, tuple(sorted({*self.ids, sample_id})), broken)

    def minus(self, sample_id: str) -> Photos:
        """Remove a file; the data set as it is then."""
        (self.root / sample_id).unlink()
        ids = tuple(known for known in self.ids if known != sample_id)
        return Photos(self.root, ids, self.broken - {sample_id})


def make_photos(
    root: Path, n_images: int, *, copy_every: int = 10, broken_every: int = 50, seed: int = 0
) -> Photos:
    """Write ``n_images`` PNG files of two classes below ``root``."""
    rng = np.random.default_rng(seed)
    photos = Photos(root, (), frozenset())
    for i in range(1, n_images + 1):
        sample_id = f"{('cat', 'dog')[i % 2]}/{i:05d}.png"
        if i % broken_every == 0:
            photos = photos.plus(sample_id, b"\x89PNG\r\n\x1a\n", is_broken=True)
        elif i % copy_every == 0:
            copied = root / photos.usable[int(rng.integers(len(photos.usable)))]
            photos = photos.plus(sample_id, copied.read_bytes())
        else:
            photos = photos.plus(sample_id, noise(rng))
    return photos


def noise(rng: np.random.Generator) -> bytes:
    """A PNG file; no two are the same."""
    file = BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Reference:
    """What one run from beginning to end, which nothing disturbed, makes of a data set.

    Attributes:
        store: its result.
        place: the store's path inside its cache, which is the same in every cache.
        rows: features as bytes, by the image's digest in hex.
        digests: by sample id.
        seconds: that the run took.
    """

    store: Store
    place: Path
    rows: dict[str, bytes]
    digests: dict[str, str]
    seconds: float


def make_reference(
    server: ForkServer, photos: Photos, backbone: tuple[str, ...], cache: Path
) -> Reference:
    """Embed ``photos`` into the new folder ``cache``."""
    started = time.monotonic()
    ended = server.start(*extract_words(photos.root, backbone, cache), cwd=cache.parent).wait()
    seconds = time.monotonic() - started
    assert ended.code == (3 if photos.broken else 0), ended.err
    (folder,) = (path.parent for path in cache.glob("*/*/store.json"))
    store = open_store(folder)
    assert store.ids() == photos.usable
    digests = dict(zip(store.ids(), store.digests().tolist(), strict=True))
    features = np.asarray(store.features())
    rows = {digest: row.tobytes() for digest, row in zip(digests.values(), features, strict=True)}
    return Reference(store, folder.relative_to(cache), rows, digests, seconds)


def extract_words(data: Path, backbone: tuple[str, ...], cache: Path) -> list[str]:
    """The command line of every run: small batches, so that a run is many steps."""
    return ["extract", str(data), *backbone, "--cache", str(cache), "--batch-size", "4",
            "--threads", "1"]  # fmt: skip


def assert_view_is_current(store: Store) -> None:
    """`features.h5` shows plain HDF5 readers what the store holds."""
    with h5py.File(store.path / "features.h5") as file:
        assert file["id"].asstr()[:].tolist() == store.ids()
        assert file["label/label"].asstr()[:].tolist() == store.labels().tolist()
        for layer in store.layers:
            seen = file["features"][layer][:, 0]
            assert seen.tobytes() == np.asarray(store.features(layers=[layer])).tobytes()


def assert_bit_equal(found: Store, expected: Store) -> None:
    """The same samples with the same labels, splits and features, bit for bit."""
    assert found.ids() == expected.ids()
    assert found.labels().tolist() == expected.labels().tolist()
    assert found.splits().tolist() == expected.splits().tolist()
    assert found.digests().tolist() == expected.digests().tolist()
    assert found.failures == expected.failures
    same = np.asarray(found.features()).tobytes() == np.asarray(expected.features()).tobytes()
    assert same, "the features differ from those of an uninterrupted run"
    assert_view_is_current(found)
