"""`AlignedMatcher`: which training image each image shows, whatever its brightness, contrast, position and size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffmem.data import ImageSet, load_images
from diffmem.errors import InputError
from diffmem.features.aligned.candidates import CandidateIndex
from diffmem.features.aligned.geometry import SCALES, Geometry, variant_of
from diffmem.ops.alignment import alignment
from diffmem.progress import Progress, silent
from diffmem.search.rows import check_finite

if TYPE_CHECKING:
    from diffmem.data import ImageSource

BLOCK = 128  # query images at a time
READ = 1024  # training images brought to the working size at a time


@dataclass(frozen=True)
class AlignedMatches:
    """What `AlignedMatcher.match` found for Q images.

    Attributes:
        scores: float64 [Q] in 0 … 1, lower = more like a copy: the least residual over that of the next candidates.
        indices: int64 [Q, k] of the candidates, by residual, ties to the lower index.
        residuals: float32 [Q, k], √(1 − correlation) after alignment: 0 for the same image, about 1 for others.
        mirrored: bool [Q], whether the nearest candidate is the image's mirror image.
        scale: float32 [Q], by which the nearest candidate is enlarged in the image.
        shift: float32 [Q, 2], how far it then lies down and right of the image's center, in pixels, before mirroring.
    """

    scores: np.ndarray
    indices: np.ndarray
    residuals: np.ndarray
    mirrored: np.ndarray
    scale: np.ndarray
    shift: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


class AlignedMatcher:
    """Finds the training image that each image shows, by pixels, in two stages and without a network.

    Candidates are the training images whose leading principal components are nearest to those of the image, shifted
    and mirrored. Each candidate is then aligned with the image: mirrored or not, seven scales, all shifts up to an
    eighth of the image, brightness and color removed per channel, contrast over all; r = √(1 − correlation) is what
    remains. An image's score is its least residual over the residual of the mean correlation of the next candidates:
    where one training image fits far better than all others, it is the one that was copied.

    Args:
        training: The training images: anything that `diffmem.load_images` reads.
        candidates: How many training images are aligned with each image.
        neighbors: How many of those after the nearest one the residual is held against.
        threads: Of the computation; None: as many as PyTorch uses.
        progress: A callback (`diffmem.progress`), or None.

    Raises:
        InputError: The training set is empty, its images are smaller than 4 pixels, or it holds NaN or infinity.

    Example:
        >>> import diffmem
        >>> digits = diffmem.load_images("builtin:digits").images
        >>> darker = digits[:3] // 2
        >>> found = AlignedMatcher(digits[:500]).match(darker)
        >>> found.indices[:, 0].tolist(), bool((found.scores < 0.5).all())
        ([0, 1, 2], True)
    """

    def __init__(
        self,
        training: ImageSource,
        *,
        candidates: int = 24,
        neighbors: int = 8,
        threads: int | None = None,
        progress: Progress | None = None,
    ):
        for name, value in (("candidates", candidates), ("neighbors", neighbors)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.candidates, self.neighbors, self.threads = candidates, neighbors, threads
        self.progress = progress or silent
        training = load_images(training, progress=self.progress)
        if len(training) == 0:
            raise InputError(f"the training set ({training.source}) is empty")
        self.image_shape = training.image_shape
        self.geometry = Geometry(*self.image_shape[1:])
        with _threads(threads):
            self._images = self._working(training, "training images")
            self._index = CandidateIndex(self._images, self.geometry, self.progress)

    def __len__(self) -> int:
        """N, the number of training images."""
        return len(self._images)

    def match(self, images: Any, *, exclude: np.ndarray | None = None) -> AlignedMatches:
        """What each image is most like.

        Args:
            images: Images of the training images' size: an array or tensor [Q, C, H, W], or anything that
                `diffmem.load_images` reads. Their range of values may differ from that of the training images.
            exclude: int64 [Q], for each image a training image that it is not compared with: the image itself, where
                the training set is held against itself.

        Raises:
            InputError: The images have another size or another number of channels than the training images, or hold
                NaN or infinity; or `exclude` does not fit.
        """
        layout = "NCHW" if tuple(getattr(images, "shape", ()))[1:] == self.image_shape else None
        images = load_images(images, layout=layout, progress=self.progress)
        if images.image_shape != self.image_shape:
            raise InputError(
                f"images ({images.source}) are {_size(images.image_shape)}, the training images "
                f"{_size(self.image_shape)}: bring both to one size and number of channels (resize=, color=)"
            )
        if exclude is not None and (np.shape(exclude) != (len(images),)):
            raise InputError(f"exclude must hold one index per image, {len(images)}; got {np.shape(exclude)}")
        with _threads(self.threads):
            return self._match(images, exclude)

    def _match(self, images: ImageSet, exclude: np.ndarray | None) -> AlignedMatches:
        queries, wanted = len(images), min(self.candidates, len(self) - (exclude is not None))
        indices = np.zeros((queries, wanted), np.int64)
        correlations = np.zeros((queries, wanted), np.float32)
        positions = np.zeros((queries, wanted), np.int64)
        self.progress("aligning with training images", 0, queries)
        for start in range(0, queries, BLOCK):
            part = slice(start, start + BLOCK)
            block = self._working(images.select(part), "images")
            own = None if exclude is None else np.asarray(exclude)[part]
            found = self._index.query(block.float(), wanted, own)
            templates = self.geometry.templates(self._images[torch.from_numpy(found)].float())
            correlation, position = (
                each.numpy() for each in alignment(self.geometry.variants(block.float()), templates)
            )
            order = np.lexsort((found, -correlation), axis=1)
            for into, values in ((indices, found), (correlations, correlation), (positions, position)):
                into[part] = np.take_along_axis(values, order, 1)
            self.progress("aligning with training images", min(start + BLOCK, queries), queries)
        residuals = np.sqrt(1 - correlations.astype(np.float64))
        best = torch.from_numpy(positions[:, 0] if wanted else np.zeros(queries, np.int64))
        mirrored, scale, down, right = variant_of(best, self.geometry)
        enlarged = 1 / torch.tensor(SCALES, dtype=torch.float64)[scale]
        factors = np.array(
            [size / small for size, small in zip(self.image_shape[1:], self.geometry.working, strict=True)]
        )
        shift = torch.stack([down, right], 1).numpy() * enlarged[:, None].numpy() * factors
        return AlignedMatches(
            scores=scores_of(correlations.astype(np.float64), self.neighbors),
            indices=indices,
            residuals=residuals.astype(np.float32),
            mirrored=mirrored.numpy(),
            scale=enlarged.numpy().astype(np.float32),
            shift=shift.astype(np.float32),
        )

    def _working(self, images: ImageSet, what: str) -> torch.Tensor:
        """The images at the working size, uint8 where they are uint8 of that size, else float32."""
        parts = []
        for start in range(0, len(images), READ):
            rows = torch.from_numpy(np.ascontiguousarray(images.images[start : start + READ]))
            check_finite(rows.flatten(1), f"{what} ({images.source})")
            parts.append(rows if rows.dtype == torch.uint8 and self._at_working_size else self.geometry.reduce(rows))
        return torch.cat(parts) if parts else torch.zeros(0, *images.image_shape)

    @property
    def _at_working_size(self) -> bool:
        return self.geometry.working == self.image_shape[1:]


def scores_of(correlations: np.ndarray, neighbors: int) -> np.ndarray:
    """The scores of candidates' correlations [Q, k], largest first: √(1 − c₁) over √(1 − mean of the next ones).

    Where there are no others, the residual is held against 1, that of an image that has nothing to do with it.
    """
    if correlations.shape[1] == 0:
        return np.ones(len(correlations))
    others = correlations[:, 1 : 1 + neighbors]
    mean = others.mean(axis=1) if others.shape[1] else np.zeros(len(correlations))
    residual, against = np.sqrt(1 - correlations[:, 0]), np.sqrt(1 - mean)
    return np.divide(residual, against, out=np.zeros(len(correlations)), where=against > 0)


class _threads:
    """PyTorch's number of threads, for the time of a `with` block."""

    def __init__(self, threads: int | None):
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
