"""The first stage of aligned search: which training images could be what a query image shows.

Central windows less the mean of each channel, of unit length, are projected on their leading principal components.
Each query is looked for shifted in nine ways, and mirrored; the exact search engine finds what is nearest to any of
these eighteen windows.
"""

from __future__ import annotations

import numpy as np
import torch

from diffmem.features.aligned.geometry import Geometry
from diffmem.ops.alignment.arguments import is_flat
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
        geometry: Geometry of the images.
        progress: A callback (`diffmem.progress`).

    Attributes:
        mean: float32 [d], the mean of the training images' windows.
        components: float32 [<= 128, d], their leading principal components.
    """

    def __init__(self, images: torch.Tensor, geometry: Geometry, progress: Progress = silent) -> None:
        self.geometry = geometry
        sample = sample_rows(images.flatten(1)).view(-1, *images.shape[1:])
        windows = normalized(geometry.inner(sample).float())
        rows = windows.flatten(1)
        self.mean = rows.mean(dim=0)
        self.components = principal_components(rows - self.mean, COMPONENTS)
        # Windows have no mean, so filters without one give the same coordinates of windows that keep theirs; flipped
        # filters give those of mirrored windows.
        filters = self.components.view(-1, *windows.shape[1:])
        filters = filters - filters.mean(dim=(2, 3), keepdim=True)
        self._filters = torch.stack([filters, filters.flip(-1)]).flatten(2)
        self._offset = self.components @ self.mean
        parts = []
        progress("indexing training images", 0, len(images))
        for start in range(0, len(images), BLOCK):
            parts.append(self._project(geometry.inner(images[start : start + BLOCK])[:, None], 1)[:, 0])
            progress("indexing training images", min(start + BLOCK, len(images)), len(images))
        self.index = TrainingIndex(torch.cat(parts), device="cpu")

    def __len__(self) -> int:
        return len(self.index)

    def query(self, images: torch.Tensor, count: int, exclude: np.ndarray | None = None) -> np.ndarray:
        """The `count` training images nearest to any window of each image [n, C, h, w]: int64 [n, count].

        They are in the order of their distance, ties to the lower index, each once; −1 fills up where there are fewer.
        exclude: For each image, a training image that is not a candidate (itself).
        """
        vectors = self._project(self.geometry.windows(images), 2)
        wanted = min(len(self), count + (exclude is not None))
        found = self.index.query(vectors.flatten(0, 1), wanted)
        indices = found.indices.reshape(len(images), -1)
        return nearest_once(indices, found.squared_distances.reshape(indices.shape), count, exclude)

    def _project(self, windows: torch.Tensor, sides: int) -> torch.Tensor:
        """Coordinates of windows [n, m, C, y, x] as they are and, for two sides, mirrored: [n, sides·m, components]."""
        n, m = windows.shape[:2]
        pixels = windows.shape[3] * windows.shape[4]
        windows = windows.float()
        center = windows.mean(dim=(1, 3, 4))[:, None, :, None, None]  # of each image and channel, for less rounding
        rows = (windows - center).flatten(0, 1).flatten(2)  # [n·m, C, pixels]
        means, center = rows.mean(dim=2), center[..., 0, 0].expand(n, m, -1).flatten(0, 1)
        squares = torch.linalg.vector_norm(rows, dim=(1, 2)).square()
        squared = squares - pixels * means.square().sum(dim=1)
        total = squares + pixels * (2 * means * center + center.square()).sum(dim=1)
        flat = is_flat(squared, total)
        inverse = torch.where(flat, 0.0, torch.where(flat, 1.0, squared).rsqrt())
        filters = self._filters[:sides].flatten(0, 1)
        coordinates = (rows.flatten(1) @ filters.T).mul_(inverse[:, None]).view(n, m, sides, -1) - self._offset
        return coordinates.transpose(1, 2).flatten(1, 2)


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
