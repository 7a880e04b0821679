"""Vectors to search: features of real images, what is drawn with their spectrum, and white noise.

Crop features: 28×28 crops of CIFAR-10 (JPEG) at random places, mirrored at random and of random brightness and
contrast, through a small network without training: 128 whitened random 6×6 patches as filters, rectified, averaged over
quadrants (Coates, Lee & Ng 2011), square root, length 1; 512 values. Queries are crops of test images, half of them of
training images. Crop spectrum: what is drawn with mean and covariance of these. Where $DIFFMEM_VECTORS names a folder,
`<name>-training.npy` and `<name>-queries.npy` in it are measured, too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from diffmem.data import load_images

DIMENSION = 512
FILTERS, PATCH, CROP = 128, 6, 28
BLOCK = 2048
SHARD = 1_000_000


def storage() -> Path:
    """Where large sets are kept between runs."""
    folder = Path(os.environ.get("DIFFMEM_VECTOR_SETS", Path(tempfile.gettempdir()) / "diffmem-vector-sets"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def given() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, training vectors and queries of what $DIFFMEM_VECTORS holds."""
    folder = os.environ.get("DIFFMEM_VECTORS")
    for path in sorted(Path(folder).glob("*-training.npy")) if folder else ():
        name = path.name.removesuffix("-training.npy")
        yield name, np.load(path, mmap_mode="r"), np.load(path.with_name(f"{name}-queries.npy"))


def white_noise(count: int, seed: int) -> np.ndarray:
    """float16 [count, 512], of length 1, in every direction alike: nothing can be left out by components."""
    rows = np.empty((count, DIMENSION), np.float16)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, 16 * BLOCK):
        part = torch.randn(min(16 * BLOCK, count - start), DIMENSION, generator=generator)
        rows[start : start + len(part)] = functional.normalize(part).half().numpy()
    return rows


def crop_features(count: int, *, test: bool = False, seed: int = 0) -> np.ndarray:
    """float16 [count, 512] of so many crops."""
    images = cifar(test)
    filters, bias = _filters()
    rows = np.empty((count, DIMENSION), np.float16)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, BLOCK):
        here = min(BLOCK, count - start)
        which = (torch.arange(start, start + here) % len(images)).numpy()
        rows[start : start + here] = _features(_crops(images[which], generator), filters, bias).half().numpy()
    return rows


def crop_queries(count: int) -> np.ndarray:
    """Crops of test images, and as many of training images: copies in disguise."""
    return np.concatenate([crop_features(count // 2, test=True, seed=1), crop_features(count - count // 2, seed=2)])


class Spectrum:
    """Gaussian vectors of length 1 with mean and covariance of some features."""

    def __init__(self, features: np.ndarray) -> None:
        rows = torch.from_numpy(features).float()
        self.mean = rows.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov(rows.double().T))
        self.factor = (vectors * values.clamp(min=0).sqrt()).T.float()

    def draw(self, count: int, seed: int) -> np.ndarray:
        """float16 [count, 512]."""
        rows = np.empty((count, DIMENSION), np.float16)
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, count, 16 * BLOCK):
            part = torch.randn(min(16 * BLOCK, count - start), DIMENSION, generator=generator)
            rows[start : start + len(part)] = functional.normalize(part @ self.factor + self.mean).half().numpy()
        return rows


@cache
def cifar(test: bool) -> np.ndarray:
    """Images of CIFAR-10 (JPEG), uint8 [N, 3, 32, 32]; patches of photographs where it is missing."""
    folder = Path(os.environ.get("DIFFMEM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    path = folder / f"cifar10-{'test' if test else 'train'}.zip"
    if path.exists():
        return load_images(str(path)).images
    return load_images(f"builtin:patches?n={2000 if test else 20_000}&seed={int(test)}").images


def _crops(images: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """float32 [n, 3, 28, 28]."""
    side = images.shape[-1] - CROP + 1
    places = torch.randint(0, side, (len(images), 2), generator=generator)
    crops = np.empty((len(images), 3, CROP, CROP), np.uint8)
    for i, (y, x) in enumerate(places.tolist()):
        crops[i] = images[i, :, y : y + CROP, x : x + CROP]
    values = torch.from_numpy(crops).float() / 255
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    values[mirrored] = values[mirrored].flip(-1)
    contrast, brightness = (
        torch.empty(len(images), 1, 1, 1).uniform_(low, high, generator=generator)
        for low, high in ((0.8, 1.2), (-0.1, 0.1))
    )
    return (values - 0.5) * contrast + 0.5 + brightness


def _filters() -> tuple[torch.Tensor, torch.Tensor]:
    """Whitened random patches as filters [128, 3, 6, 6], and the threshold of each."""
    images = torch.from_numpy(cifar(False)[:5000]).float() / 255
    generator = torch.Generator().manual_seed(3)
    patches = functional.unfold(images, PATCH, stride=5).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH)
    patches = patches[torch.randperm(len(patches), generator=generator)[:20_000]]
    patches = patches - patches.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    whitening = vectors @ torch.diag((values + 1e-3).rsqrt()) @ vectors.T
    white = functional.normalize(patches @ whitening)
    chosen = white[:FILTERS] @ whitening
    responses = patches @ chosen.T
    return chosen.reshape(FILTERS, 3, PATCH, PATCH), responses.std(dim=0) * 0.5


def _features(crops: torch.Tensor, filters: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    # A patch's mean is taken away by taking it from the filter.
    filters = filters - filters.mean(dim=(1, 2, 3), keepdim=True)
    maps = functional.relu(functional.conv2d(crops, filters, stride=2) - threshold[:, None, None])
    return functional.normalize(functional.adaptive_avg_pool2d(maps, 2).flatten(1).sqrt())
