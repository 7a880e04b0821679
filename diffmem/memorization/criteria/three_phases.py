"""Three phases (Pham et al. 2025): memorized, spurious, generalized.

Formula. A generated image is memorized where the distance to its nearest training image is at most δ_m; spurious where
it is not and the distance to the nearest *other generated* image is at most δ_s; generalized else.

Source: Pham et al., Memorization to Generalization: Emergence of Diffusion Models from Associative Memory (arXiv
2505.21777), with LPIPS on values from 0 to 1, δ_m = 0.03 and δ_s = 0.02. Not strict; a generated image is not compared
with itself, but with exact repetitions of itself. For images the distance here is root mean square on values from 0 to
1 (gray levels divided by 255) with the same two numbers, which then mean 7.65 and 5.1 gray levels: rms is not LPIPS.
For vectors there is no such scale: choose thresholds, in Euclidean distance, by settings={"three_phases": {"delta_m":
…, "delta_s": …}}.

What it cannot see: spurious images that the model repeats rarely: the share grows with the number of generated images.
"""

from __future__ import annotations

import numpy as np

from diffmem.errors import InputError
from diffmem.memorization.criteria.comparison import Comparison
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value

DELTA_M, DELTA_S = 0.03, 0.02


def phases(to_training: np.ndarray, to_generated: np.ndarray, delta_m: float, delta_s: float) -> np.ndarray:
    """int64 [M]: 0 memorized, 1 spurious, 2 generalized, from distances to the nearest training image and the nearest
    other generated image."""
    return np.where(to_training <= delta_m, 0, np.where(to_generated <= delta_s, 1, 2))


def measure(comparison: Comparison) -> Measured:
    """The shares of the three phases."""
    chosen = [comparison.setting("three_phases", name, None) for name in ("delta_m", "delta_s")]
    if not comparison.integer or not comparison.images:
        if None in chosen:
            raise InputError(
                "three_phases: its thresholds are for images with values from 0 to 255; for other features choose them "
                'with settings={"three_phases": {"delta_m": …, "delta_s": …}}'
            )
        scale = 1.0
    else:
        scale = 255 * np.sqrt(comparison.training.dimension)
    delta_m, delta_s = (
        default if one is None else float(one) for one, default in zip(chosen, (DELTA_M, DELTA_S), strict=True)
    )
    generated = comparison.generated
    if len(generated) < 2:
        to_generated = np.full(len(generated), np.inf)
    else:
        to_generated = comparison.searches.nearest(generated, generated, 1).distances[:, 0]
    found = phases(comparison.nearest(1).distances[:, 0] / scale, to_generated / scale, delta_m, delta_s)
    names = [f"three_phases_{phase}" for phase in ("memorized", "spurious", "generalized")]
    per_image = {name: found == place for place, name in enumerate(names)}
    return Measured(
        {name: float(which.mean()) for name, which in per_image.items()}, per_image, {name: name for name in names}
    )


THREE_PHASES = Criterion(
    name="three_phases",
    formula="memorized: d(nearest training image) ≤ δ_m; else spurious: d(nearest other generated image) ≤ δ_s",
    source="Pham et al. 2025, arXiv 2505.21777 (there with LPIPS)",
    values={
        "three_phases_memorized": Value("share within δ_m = 0.03 of a training image", "lower", True),
        "three_phases_spurious": Value("share of others within δ_s = 0.02 of another generated image", "lower", True),
        "three_phases_generalized": Value("share of the rest", "higher", True),
    },
    measure=measure,
    decides=("three_phases_memorized", True),
    blind="repetitions that are rare among the generated images; copies beyond a fixed distance",
)
