from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.extract.extractor import Settings as ExtractSettings
from pipeline.extract.extractor import extract
from pipeline.finetune import Settings, finetune
from pipeline.store import open_store

SIZE = 32


def write_photos(folder: Path, n_each: int = 10, classes: str = "abc", split: str = "") -> Path:
    """Noisy images whose colour tells the class: learnable in a few steps."""
    rng = np.random.default_rng(len(split))
    for code, name in enumerate(classes):
        for i in range(n_each):
            values = rng.integers(0, 120, (40, 36, 3), dtype=np.uint8)
            values[..., code % 3] += 130
            path = folder / split / name / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    return folder


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


@pytest.fixture(scope="session")
def backbone():
    """A network of a hundred thousand parameters with BatchNorm and random weights."""
    return load_backbone("timm:test_efficientnet", weights="random", image_size=SIZE)


@pytest.fixture
def embed(tmp_path, photos, backbone):
    """A feature store of a folder, exact to float32."""

    def run(data=photos, network=backbone, layers=("penultimate",)):
        source = open_source(str(data), cache_dir=tmp_path / "cache")
        settings = ExtractSettings(
            layers=layers, precision="fp32", storage="float32", device="cpu", engine="eager"
        )
        return open_store(extract(source, network, settings, cache_dir=tmp_path / "cache").store)

    return run


@pytest.fixture
def train(tmp_path, photos, backbone):
    """Train on a folder with quick settings; more of them as keywords."""

    def run(data=photos, network=backbone, *, settings=None, **arguments):
        quick = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "augment": "none", "precision": "fp32",
                 "n_threads": 2, "device": "cpu"}  # fmt: skip
        source = open_source(str(data), cache_dir=tmp_path / "cache")
        arguments = {"out": tmp_path / "runs", "init_head": "none"} | arguments
        return finetune(source, network, Settings(**{**quick, **(settings or {})}), **arguments)

    return run
