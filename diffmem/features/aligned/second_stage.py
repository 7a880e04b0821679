"""The second stage of aligned search: each image against each of its candidates."""

from __future__ import annotations

import numpy as np
import torch

from diffmem.features.aligned.geometry import Geometry, starts
from diffmem.features.aligned.scoring import ITERATIONS, REFINED, against
from diffmem.ops.affine_alignment import affine_alignment
from diffmem.ops.alignment import alignment
from diffmem.ops.core_arrays import SCALING


def align(
    images: torch.Tensor, templates: torch.Tensor, geometry: Geometry, neighbors: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """How well images [n, C, h, w] at the working size fit each of their templates [n, k, C, y, x].

    Returns:
        scores: float64 [n].
        columns: int64 [n, k], the templates by residual, ties to the lower one.
        residuals: float64 [n, k], in that order.
        mirrored: bool [n], of the first.
        maps: float64 [n, 2, 3], of the first: from the template to the image.
    """
    n, wanted = templates.shape[:2]
    if wanted == 0:
        nothing = np.zeros((n, 0))
        return np.ones(n), nothing.astype(np.int64), nothing, np.zeros(n, bool), np.tile(np.eye(2, 3), (n, 1, 1))
    correlations, positions = alignment(geometry.variants(images), templates)
    mirrored, maps = starts(positions, geometry)
    # As the op that follows counts it: scaling costs.
    scaling = torch.linalg.det(maps[..., :2].double()).log().abs() / 2
    residuals = (1 - correlations.double()).sqrt() * (SCALING * scaling).exp()
    residuals.clamp_(max=1)
    order = residuals.argsort(dim=1, stable=True)
    # The best ones may be moved by parts of a pixel, and stretched.
    best, rows = order[:, :REFINED], torch.arange(n)[:, None]
    sides = torch.stack([images, images.flip(-1)], dim=1)[rows, mirrored[rows, best].long()]
    remainders, better = affine_alignment(
        sides.flatten(0, 1), templates[rows, best].flatten(0, 1), maps[rows, best].flatten(0, 1), ITERATIONS
    )
    residuals[rows, best] = remainders.view(best.shape).double()
    maps[rows, best] = better.view(*best.shape, 2, 3)
    columns = residuals.argsort(dim=1, stable=True)
    residuals, first, row = residuals.gather(1, columns).numpy(), columns[:, 0], torch.arange(n)
    return (
        residuals[:, 0] / against(-np.sort(-correlations.double().numpy(), axis=1), neighbors),
        columns.numpy(),
        residuals,
        mirrored[row, first].numpy(),
        maps[row, first].double().numpy(),
    )
