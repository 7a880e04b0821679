"""What an image's residual is held against."""

from __future__ import annotations

import numpy as np

REFINED = 4  # candidates of each image for which an affine map is sought
ITERATIONS = 6
LEAST_SHARE = 0.7  # of the last candidates' residual: what the best one is held against at least


def against(correlations: np.ndarray, neighbors: int) -> np.ndarray:
    """What the least residual is held against, of candidates' correlations [Q, k], largest first: float64 [Q].

    √(1 − mean) of the next correlations after the first one, and at least `LEAST_SHARE` of that of the last ones:
    where the training set holds an image several times, the next ones are that image too. 1, the residual of an image
    that has nothing to do with it, where there are no others.
    """
    others = correlations[:, 1:]
    if others.shape[1] == 0 or neighbors < 1:
        return np.ones(len(correlations))
    near, far = (np.sqrt(1 - each.mean(axis=1)) for each in (others[:, :neighbors], others[:, -neighbors:]))
    return np.maximum(np.maximum(near, LEAST_SHARE * far), np.finfo(np.float32).eps)


def unrefined(correlations: np.ndarray, neighbors: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, best columns and residuals of images by their candidates' correlations [Q, k] alone."""
    wide = correlations.astype(np.float64)
    ordered = np.minimum(-np.sort(-wide, axis=1), 1)
    residuals = np.sqrt(1 - ordered[:, 0])
    return residuals / against(ordered, neighbors), wide.argmax(axis=1), residuals
