"""Aligned search as a loop over images: the recipe in plain steps, to test the fast one against."""

from __future__ import annotations

import math

import numpy as np
import torch

from diffmem.features.aligned.geometry import SCALES, Geometry, resampling
from diffmem.features.aligned.scoring import ITERATIONS, LEAST_SHARE, REFINED
from diffmem.ops.affine_alignment import affine_alignment
from diffmem.ops.alignment import alignment
from diffmem.ops.alignment.reference import normalized
from diffmem.ops.core_arrays import SCALING


def candidates(
    training: torch.Tensor, image: torch.Tensor, geometry: Geometry, mean: torch.Tensor, components: torch.Tensor
) -> list[int]:
    """All training images by their least distance to a window of the image [C, h, w], or of its mirror image."""
    (down, right), (height, width) = geometry.step, geometry.working
    size = height - 2 * down, width - 2 * right

    def coordinates(windows: torch.Tensor) -> torch.Tensor:
        return (normalized(windows.double()).flatten(1) - mean.double()) @ components.double().T

    known = coordinates(training[:, :, down : down + size[0], right : right + size[1]])
    least = np.full(len(training), np.inf)
    for side in (image, image.flip(-1)):
        for y in (0, down, 2 * down):
            for x in (0, right, 2 * right):
                window = coordinates(side[None, :, y : y + size[0], x : x + size[1]])
                least = np.minimum(least, (known - window).square().sum(dim=1).numpy())
    return np.argsort(least, kind="stable").tolist()


def match(
    training: torch.Tensor,
    image: torch.Tensor,
    mean: torch.Tensor,
    components: torch.Tensor,
    count: int = 24,
    neighbors: int = 8,
) -> tuple[float, list[int], list[float]]:
    """Score, candidates by residual, and residuals of one image [C, h, w]; everything at the working size."""
    geometry = Geometry(*image.shape[1:])
    found = candidates(training, image, geometry, mean, components)[:count]
    top, left = geometry.margin
    h, w = (size - 2 * margin for size, margin in zip(image.shape[1:], geometry.margin, strict=True))
    goals = training[found].double()[:, :, top : top + h, left : left + w]
    sides = [image.double(), image.double().flip(-1)]
    enlarged = [
        resampling(image.shape[1], scale) @ side @ resampling(image.shape[2], scale).T
        for side in sides
        for scale in SCALES
    ]
    correlations, positions = (
        each[0].tolist() for each in alignment(torch.stack(enlarged)[None], goals[None], impl="reference")
    )
    places = [np.unravel_index(each, (len(enlarged), 2 * top + 1, 2 * left + 1)) for each in positions]
    scales = [SCALES[variant % len(SCALES)] for variant, _, _ in places]
    residuals = {
        i: min(1.0, math.sqrt(max(0.0, 1 - correlations[i])) * math.exp(SCALING * abs(math.log(scales[i]))))
        for i in range(len(found))
    }
    for i in sorted(residuals, key=lambda i: (residuals[i], i))[:REFINED]:
        variant, y, x = places[i]
        start = torch.tensor([[1.0, 0.0, x - left], [0.0, 1.0, y - top]], dtype=torch.float64) / scales[i]
        side = sides[variant // len(SCALES)]
        remainder, _ = affine_alignment(side[None], goals[i : i + 1], start[None], ITERATIONS, impl="reference")
        residuals[i] = float(remainder[0])
    others = sorted(correlations, reverse=True)[1:]
    against = 1.0
    if others:
        near, far = (math.sqrt(1 - sum(part) / len(part)) for part in (others[:neighbors], others[-neighbors:]))
        against = max(near, LEAST_SHARE * far)
    by_residual = sorted(residuals, key=lambda i: (residuals[i], i))
    score = min(residuals.values()) / against
    return score, [found[i] for i in by_residual], [residuals[i] for i in by_residual]
