"""Images aligned with candidates among the training images that another search found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from diffmem.features.aligned import byte_images
from diffmem.features.aligned.geometry import Geometry
from diffmem.ops.registry import core_threads, on_one_core

COARSE = 16  # side at which pairs are looked at first
# Coarse score up to which a pair is looked at again: 14 % of 10,000 CIFAR-10 (JPEG) test images are, and 99.6 % of
# those whose score is below 0.6.
COARSE_LIMIT = 0.72


def align_candidates(
    images: np.ndarray, training: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of its candidates each image fits best, and how much better than the others.

    Images are aligned at half the working size first; those that fit no candidate there are not looked at again.

    Args:
        images: [n, C, H, W], uint8 or real.
        training: [N, C, h, w] of the same channels; another size is brought to the same working size.
        candidates: int64 [n, k], indices of training images.

    Returns:
        scores: float64 [n], as `AlignedMatcher` gives them, over these candidates: lower = more like a copy; above
            `COARSE_LIMIT` the coarse one.
        best: int64 [n], the column of the best candidate; the first of equals.
        residuals: float64 [n], what then remains, as `AlignedMatcher` gives it.
    """
    geometry = Geometry(*training.shape[2:])
    neighbors = max(1, candidates.shape[1] - 1)
    factor = min(geometry.working) // COARSE
    if byte_images.fit(images, geometry) and byte_images.fit(training, geometry):
        aligned, coarse = byte_images.aligned, byte_images.coarse
    else:
        from diffmem.features.aligned import second_look_tensors

        aligned, coarse = second_look_tensors.aligned, second_look_tensors.coarse
    if factor < 2:
        return aligned(images, training, candidates, geometry, neighbors)
    scores, best, residuals = coarse(images, training, candidates, geometry, factor, neighbors)
    rows = np.flatnonzero(scores <= COARSE_LIMIT)
    if len(rows):
        some = aligned(images[rows], training, candidates[rows], geometry, neighbors)
        scores[rows], best[rows], residuals[rows] = some
    return scores, best, residuals


def side_by_side(
    work: Callable[[np.ndarray], Any], blocks: Sequence[np.ndarray], images: np.ndarray, training: np.ndarray
) -> Iterator[Any]:
    """`work` of each block, in their order. Blocks that are for the compiled core alone are done side by side, each by
    one thread: what is between its calls keeps no other core waiting."""
    geometry = Geometry(*training.shape[2:])
    threads = min(core_threads(), len(blocks))
    if threads < 2 or not (byte_images.fit(images, geometry) and byte_images.fit(training, geometry)):
        yield from map(work, blocks)
        return

    def alone(block: np.ndarray) -> Any:
        with on_one_core():
            return work(block)

    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(alone, blocks)
    finally:
        pool.shutdown(cancel_futures=True)
