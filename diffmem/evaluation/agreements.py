"""Do two models agree? The images of the same seeds compared with each other, and with the models' training images.

Kadkhodaie et al. 2024 ("Generalization in diffusion models arises from geometry-adaptive harmonic representations",
arXiv 2310.02557) train two networks on disjoint halves of a set: on few images each reproduces its own, on many both
generate nearly the same image from the same noise. Likeness is the cosine of two images from each of which its own mean
level is taken away first, as in the paper's published code; without that all images of one brightness would be alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffmem.errors import InputError

_BLOCK = 1 << 24  # cosines at a time


@dataclass(frozen=True)
class Agreement:
    """How alike images are, as medians over the seeds of cosines, mean levels removed.

    Attributes:
        between: Images of the two models from the same seed.
        chance: Those from different seeds.
        nearest: Of either model: its images and the training image most like each.
        images: Seeds.
    """

    between: float
    chance: float
    nearest: tuple[float, float]
    images: int

    @property
    def margin(self) -> float:
        """By how much the models are more alike than they are like their training images: negative where they copy."""
        return self.between - sum(self.nearest) / 2


def agreement(
    first: np.ndarray, second: np.ndarray, first_training: np.ndarray, second_training: np.ndarray
) -> Agreement:
    """How much two models agree, and how near they are to their training images.

    Args:
        first: Images of one model [n, C, H, W], by seed, n at least 2; of any number type.
        second: Those of the other, from the same seeds and latents, in the same order.
        first_training: What the one was trained on [N, C, H, W].
        second_training: What the other was trained on.

    Raises:
        InputError: The images do not fit together.

    Example:
        >>> from diffmem.data import load_images
        >>> digits = load_images("builtin:digits").images
        >>> agreement(digits[:50], digits[:50], digits[:50], digits[50:100]).between > 0.999
        True
    """
    if first.shape != second.shape or len(first) < 2:
        raise InputError(
            f"first holds {len(first):,} images and second {len(second):,}, but both must hold those of the same seeds,"
            " 2 or more, of one shape"
        )
    for name, training in (("first_training", first_training), ("second_training", second_training)):
        if training.shape[1:] != first.shape[1:] or not len(training):
            raise InputError(f"{name} holds images of {training.shape[1:]}, but must hold some of {first.shape[1:]}")
    one, other = _directions(first), _directions(second)
    return Agreement(
        float(np.median((one * other).sum(1))),
        float(np.median((one * np.roll(other, 1, axis=0)).sum(1))),
        (_nearest(one, first_training), _nearest(other, second_training)),
        len(first),
    )


def _directions(images: np.ndarray) -> np.ndarray:
    """Images as vectors of length 1 around their own mean; zeros where an image is of one level."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.where(norms > 0, norms, 1.0)


def _nearest(images: np.ndarray, training: np.ndarray) -> float:
    best = np.full(len(images), -np.inf)
    step = max(1, _BLOCK // max(len(images), images.shape[1]))
    for start in range(0, len(training), step):
        best = np.maximum(best, (images @ _directions(training[start : start + step]).T).max(axis=1))
    return float(np.median(best))
