from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.extract.extractor import Settings, extract


def write_image(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    """A smooth random image, different for each seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve PNG files of two classes."""
    for i in range(12):
        write_image(tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i:02d}.png", seed=i)
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def pixels():
    return load_backbone("pixels:8")


@pytest.fixture(scope="session")
def resnet():
    """A small real network with random weights."""
    return load_backbone("resnet18", weights="random", image_size=32)


@pytest.fixture
def embed(tmp_path: Path, pixels):
    """Extract a folder with small batches; more settings and arguments as keywords."""

    def run(data: Path, backbone=pixels, settings: Settings | None = None, **arguments):
        settings = settings or Settings(batch_size=4, n_threads=2)
        source = open_source(str(data), cache_dir=tmp_path / "cache")
        return extract(source, backbone, settings, cache_dir=tmp_path / "cache", **arguments)

    return run
