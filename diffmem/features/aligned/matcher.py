"""`AlignedMatcher`: which training image each image shows, whatever its brightness, contrast, position and size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffmem.data import ImageSet, load_images
from diffmem.errors import InputError
from diffmem.features.aligned.candidates import CandidateIndex
from diffmem.features.aligned.geometry import Geometry
from diffmem.features.aligned.pairs import as_tensor
from diffmem.features.aligned.second_stage import align
from diffmem.progress import Progress, silent
from diffmem.search.rows import check_finite

if TYPE_CHECKING:
    from diffmem.data import ImageSource

BLOCK = 512  # query images at a time, of the first stage
ALIGNED = 64  # of the second
READ = 1024  # training images brought to the working size at a time


@dataclass(frozen=True)
class AlignedMatches:
    """What `AlignedMatcher.match` found for Q images.

    Attributes:
        scores: float64 [Q], lower = more like a copy: the least residual over that of the next candidates; 0 for the
            same image, about 0.9 for one that is like none.
        indices: int64 [Q, k] of the candidates, by residual.
        residuals: float32 [Q, k], √(1 − correlation) after alignment, the more the image had to be deformed for it: 0
            for the same image, 1 for one that has nothing to do with it.
        mirrored: bool [Q], whether the first candidate is the image's mirror image.
        scale: float32 [Q], by which the first candidate is enlarged in the image.
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
    remains. For the best of them a close affine map is sought (`diffmem.ops.affine_alignment`): parts of pixels, other
    proportions. An image's score is its least residual over that of the next candidates, r of the mean of their
    correlations: where one training image fits far better than all others, it is the one that was copied. Those that
    the training set holds several times do not hide each other, up to two thirds of the candidates.

    Args:
        training: The training images: anything that `diffmem.load_images` reads.
        candidates: How many training images are aligned with each image.
        neighbors: How many of those after the nearest one the residual is held against.
        threads: Threads of the computation; None: as many as PyTorch uses.
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
                f"{_size(self.image_shape)}: convert both to one size and number of channels (resize=, color=)"
            )
        if exclude is not None and (np.shape(exclude) != (len(images),)):
            raise InputError(f"exclude must hold one index per image, {len(images)}; got {np.shape(exclude)}")
        with _threads(self.threads):
            return self._match(images, exclude)

    def _match(self, images: ImageSet, exclude: np.ndarray | None) -> AlignedMatches:
        queries, wanted = len(images), min(self.candidates, len(self) - (exclude is not None))
        parts = []
        self.progress("aligning with training images", 0, queries)
        for start in range(0, queries, BLOCK):
            part = slice(start, start + BLOCK)
            own = None if exclude is None else np.asarray(exclude)[part]
            block = self._working(images.select(part), "images").float()
            found = torch.from_numpy(self._index.query(block, wanted, own))
            parts += [self._align(*each) for each in zip(block.split(ALIGNED), found.split(ALIGNED), strict=True)]
            self.progress("aligning with training images", min(start + BLOCK, queries), queries)
        scores, columns, residuals, mirrored, maps, indices = map(np.concatenate, zip(*parts, strict=True))
        indices = np.take_along_axis(indices, columns, 1)
        scale = np.sqrt(np.linalg.det(maps[:, :, :2]))
        shift = maps[:, ::-1, 2] * (np.array(self.image_shape[1:]) / self.geometry.working)
        return AlignedMatches(
            scores, indices, residuals.astype(np.float32), mirrored, scale.astype(np.float32), shift.astype(np.float32)
        )

    def _align(self, images: torch.Tensor, found: torch.Tensor) -> tuple[np.ndarray, ...]:
        templates = self.geometry.templates(self._images[found].float())
        return *align(images, templates, self.geometry, self.neighbors), found.numpy()

    def _working(self, images: ImageSet, what: str) -> torch.Tensor:
        """The images at the working size, uint8 where they are uint8 of that size, else float32."""
        parts = []
        for start in range(0, len(images), READ):
            rows = as_tensor(images.images[start : start + READ])
            check_finite(rows.flatten(1), f"{what} ({images.source})")
            parts.append(rows if rows.dtype == torch.uint8 and self._at_working_size else self.geometry.reduce(rows))
        return torch.cat(parts) if parts else torch.zeros(0, *images.image_shape)

    @property
    def _at_working_size(self) -> bool:
        return self.geometry.working == self.image_shape[1:]


class _threads:
    """PyTorch's number of threads, for the time of a `with` block."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
