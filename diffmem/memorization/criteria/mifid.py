"""MiFID (Bai et al. 2021): the Fréchet distance, divided by how far the generated images are from memorized ones.

Formulas. With cosine distance c(x, y) = 1 − |⟨x, y⟩| / (‖x‖ ‖y‖) and vectors of zeros left out,

    mifid_distance_generated = mean over generated x of min over training y of c(x, y)    (the paper, Kaggle's code)
    mifid_distance_real      = mean over training y of min over generated x of c(x, y)    (torchmetrics, as it calls it)

Low: copying. `mifid` = FID / M with M = mifid_distance_generated, taken as 1 where it is eps = 0.1 or more, and
FID = ‖μ − μ'‖² + tr(Σ + Σ' − 2 (ΣΣ')^½) of the means and covariances (divided by n − 1) of both sets.

Variants: `mifid:kaggle`: FID / (M + 1e-14), M over generated images. `mifid:torchmetrics` (1.9): the same, M over real
images, and 0 where FID ≤ 1e-8. Kaggle's and torchmetrics' code leave out vectors whose *sum* is zero; here those of
zeros.

Source: Bai et al., On Training Sample Memorization: Lessons from Benchmarking Generative Modeling with a Large-scale
Competition (KDD 2021), on Inception features. The trace of the root comes from the eigenvalues of a symmetric product
(scipy), in float64; torchmetrics takes those of ΣΣ': both agree to about 1e-6 of FID where covariances are regular,
1e-4 where not. In "all", FID is left out where d > 2,048: its cost grows as d³, and nobody takes it of so many pixels.

What it cannot see: a single copy among many images moves no mean; a model that copies little but draws badly has a high
FID, and one that copies everything a low one, and M decides between them only below eps.
"""

from __future__ import annotations

import numpy as np

from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.memorization.criteria.comparison import BLOCK_VALUES, Comparison, Points
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value, Variant

EPS = 0.1
LARGEST = 2048
KAGGLE_FLOOR = 10e-15  # as written there


def distance_generated(comparison: Comparison) -> np.ndarray:
    """float64 [M]: 1 − |cosine| of each generated image to the nearest training image; NaN for images of zeros."""
    return _distances(comparison, comparison.generated, comparison.training)


def distance_real(comparison: Comparison) -> np.ndarray:
    """float64 [N]: of each training image to the nearest generated image."""
    return _distances(comparison, comparison.training, comparison.generated)


def _distances(comparison: Comparison, points: Points, targets: Points) -> np.ndarray:
    # Both directions come of one search, which is kept: the larger set is searched by the smaller one.
    searches = comparison.searches
    if points is comparison.training:
        searches.largest_cosine(targets, points, absolute=True)
    cosines = np.abs(searches.largest_cosine(points, targets, absolute=True))
    # Rounding can take the cosine of equal vectors beyond 1.
    return np.maximum(1 - cosines, 0.0)


def _mean(distances: np.ndarray, what: str) -> float:
    if np.isnan(distances).all():
        raise InputError(f"{what}: all vectors are zero and have no direction")
    return float(np.nanmean(distances))


def measure_distances(comparison: Comparison) -> Measured:
    """`mifid_distance_generated` and `mifid_distance_real`."""
    ours, theirs = distance_generated(comparison), distance_real(comparison)
    error = np.nanstd(theirs) / np.sqrt(len(theirs))
    real = _mean(theirs, "training")
    return Measured(
        {"mifid_distance_generated": _mean(ours, "generated"), "mifid_distance_real": real},
        {"cosine_distance": ours},
        {"mifid_distance_generated": "cosine_distance"},
        {"mifid_distance_real": (real - 1.96 * float(error), real + 1.96 * float(error))},
    )


def moments(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] (divided by n − 1), float64, block by block."""
    rows, d = points.rows, points.dimension
    if len(rows) < 2:
        raise InputError(f"{points.what}: FID needs at least two images")
    # A first guess of the mean keeps the sums of squares small; what it is off by is taken back.
    guess = rows[:1024].double().mean(dim=0)
    total, squares = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for block in rows.split(max(1, BLOCK_VALUES // d)):
        centered = block.double() - guess
        total += centered.sum(dim=0)
        squares.addmm_(centered.T, centered)
    mean = total / len(rows)
    covariance = (squares - len(rows) * torch.outer(mean, mean)) / (len(rows) - 1)
    return (guess + mean).numpy(), covariance.numpy()


def frechet_distance(some: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray]) -> float:
    """FID of two means and covariances: tr (ΣΣ')^½ is the sum of the roots of the eigenvalues of Σ^½ Σ' Σ^½."""
    from scipy.linalg import eigh, eigvalsh  # scikit-learn brings it

    (mean, covariance), (other_mean, other_covariance) = some, others
    values, vectors = eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    roots = np.sqrt(eigvalsh(root @ other_covariance @ root).clip(min=0))
    gap = mean - other_mean
    distance = gap @ gap + np.trace(covariance) + np.trace(other_covariance) - 2 * roots.sum()
    return max(float(distance), 0.0)  # what is below is rounding


def fid(comparison: Comparison) -> float:
    """The Fréchet distance of generated and training images."""
    return frechet_distance(moments(comparison.generated), moments(comparison.training))


def penalized(distance: float, memorization: float, eps: float = EPS, floor: float = 0.0) -> float:
    """FID / M, M taken as 1 where it is eps or more; infinite where M is 0 and FID is not."""
    divisor = (memorization if memorization < eps else 1.0) + floor
    if divisor == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / divisor


def measure_mifid(comparison: Comparison) -> Measured:
    """`mifid` and the `fid` in it."""
    memorization = _mean(distance_generated(comparison), "generated")
    found = fid(comparison)
    return Measured({"mifid": penalized(found, memorization), "fid": found})


def measure_kaggle(comparison: Comparison) -> Measured:
    """`mifid:kaggle`."""
    memorization = _mean(distance_generated(comparison), "generated")
    return Measured({"mifid:kaggle": penalized(fid(comparison), memorization, floor=KAGGLE_FLOOR)})


def measure_torchmetrics(comparison: Comparison) -> Measured:
    """`mifid:torchmetrics`."""
    found = fid(comparison)
    memorization = _mean(distance_real(comparison), "training")
    value = penalized(found, memorization, floor=KAGGLE_FLOOR) if found > 1e-8 else 0.0
    return Measured({"mifid:torchmetrics": value})


MIFID_DISTANCE = Criterion(
    name="mifid_distance",
    formula="mean of the least 1 − |cosine|, over generated images and over training images",
    source="Bai et al. 2021, arXiv 2106.03062; over training images as torchmetrics 1.9 calls it",
    values={
        "mifid_distance_generated": Value("mean over generated images", "higher"),
        "mifid_distance_real": Value("mean over training images, with the nearest generated one", "higher"),
    },
    measure=measure_distances,
    blind="a few copies among many images; mean over training images: copies of few of them",
)

MIFID = Criterion(
    name="mifid",
    formula="FID / M, M = mifid_distance_generated where below 0.1, else 1",
    source="Bai et al. 2021, arXiv 2106.03062",
    values={
        "mifid": Value("FID / M", "lower"),
        "fid": Value("Fréchet distance", "neither"),
    },
    measure=measure_mifid,
    blind="copying by a model with a low FID: both enter one number, and M matters only below 0.1",
    variants={
        "kaggle": Variant(
            Value("FID / (M + 1e-14), M over generated images", "lower"), measure_kaggle, "Kaggle's code"
        ),
        "torchmetrics": Variant(
            Value("FID / (M + 1e-14), M over training images", "lower"), measure_torchmetrics, "torchmetrics 1.9"
        ),
    },
)
