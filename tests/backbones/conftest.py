from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def photos() -> dict[str, Image.Image]:
    """scikit-learn's two sample photographs, 640×427."""
    sample = load_sample_images()
    names = [Path(name).stem for name in sample.filenames]
    return {name: Image.fromarray(image) for name, image in zip(names, sample.images, strict=True)}


@pytest.fixture(scope="session")
def photo_pixels(photos) -> dict[str, torch.Tensor]:
    """The same as (3, H, W) uint8."""
    return {
        name: torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)
        for name, photo in photos.items()
    }
