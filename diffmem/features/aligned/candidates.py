"""The first stage of aligned search: which training images could be what a query image shows.

Central windows less the mean of each channel, of unit length, are projected on their leading principal components.
Each query is looked for shifted in nine ways, and mirrored; the exact search engine finds what is nearest to any of
these eighteen windows.
"""

from __future__ import annotations

import numpy as np
import torch

from diffmem.features.aligned.geometry import Geometry, shifts
from diffmem.ops.alignment.reference import normalized
from diffmem.progress import Progress, silent
from diffmem.search import TrainingIndex
from diffmem.search.basis import principal_components, sample_rows

COMPONENTS = 128
BLOCK = 512  # images at a time


class CandidateIndex:
    """Training images at the working size, ready to be asked for candidates.

    Args:
        images: [N, C, h, w] at the geometry's working size, uint8 or float32.
        geometry: Of the images.
        progress: A callback (`diffmem.progress`).
    """

    def __init__(self, images: torch.Tensor, geometry: Geometry, progress: Progress = silent):
        self.geometry = geometry
        down, right = geometry.step
        sample = self._windows(sample_rows(images.flatten(1)).view(-1, *images.shape[1:]), down, right)
        self.mean = sample.mean(dim=0)
        self.components = principal_components(sample - self.mean, COMPONENTS)
        parts = []
        progress("indexing training images", 0, len(images))
        for start in range(0, len(images), BLOCK):
            parts.append(self._project(self._windows(images[start : start + BLOCK], down, right)))
            progress("indexing training images", min(start + BLOCK, len(images)), len(images))
        self.index = TrainingIndex(torch.cat(parts), device="cpu")

    def __len__(self) -> int:
        return len(self.index)

    def query(self, images: torch.Tensor, count: int, exclude: np.ndarray | None = None) -> np.ndarray:
        """The `count` training images nearest to any window of each image [n, C, h, w]: int64 [n, count].

        They are in the order of their distance, ties to the lower index, each once; −1 fills up where there are fewer.
        exclude: For each image, a training image that is no candidate (itself).
        """
        wanted = min(len(self), count + (exclude is not None))
        vectors = torch.stack(
            [
                self._project(self._windows(each, y, x))
                for each in (images, images.flip(-1))
                for y, x in shifts(self.geometry)
            ],
            dim=1,
        )
        found = self.index.query(vectors.flatten(0, 1), wanted)
        indices = found.indices.reshape(len(images), -1)
        return nearest_once(indices, found.squared_distances.reshape(indices.shape), count, exclude)

    def _windows(self, images: torch.Tensor, y: int, x: int) -> torch.Tensor:
        """The windows of images [n, C, h, w] that begin at (y, x), as unit rows."""
        (height, width), (down, right) = self.geometry.working, self.geometry.step
        return normalized(images[:, :, y : y + height - 2 * down, x : x + width - 2 * right].float()).flatten(1)

    def _project(self, windows: torch.Tensor) -> torch.Tensor:
        return (windows - self.mean) @ self.components.T


def nearest_once(indices: np.ndarray, distances: np.ndarray, count: int, exclude: np.ndarray | None) -> np.ndarray:
    """The `count` nearest of each row of indices, each index once; −1 fills up."""
    if exclude is not None:
        distances = np.where(indices == exclude[:, None], np.inf, distances)
    by_distance = np.lexsort((distances, indices), axis=1)
    indices = np.take_along_axis(indices, by_distance, 1)
    distances = np.take_along_axis(distances, by_distance, 1)
    distances[:, 1:][indices[:, 1:] == indices[:, :-1]] = np.inf
    order = np.lexsort((indices, distances), axis=1)[:, :count]
    nearest = np.where(np.isinf(np.take_along_axis(distances, order, 1)), -1, np.take_along_axis(indices, order, 1))
    missing = np.full((len(nearest), count - nearest.shape[1]), -1)
    return np.concatenate([nearest, missing], axis=1).astype(np.int64)
