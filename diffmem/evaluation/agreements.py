"""Do two models agree? The images of the same seeds compared with each other, and with the models' training images.

Kadkhodaie et al. 2024 ("Generalization in diffusion models arises from geometry-adaptive harmonic representations",
arXiv 2310.02557) train two networks on disjoint halves of a set: on few images each reproduces its own, on many both
generate nearly the same image from the same noise. Likeness is the cosine of two images from each of which its own mean
level is taken away first, as in the paper's published code; without that all images of one brightness would be alike.
The criterion `disjoint_halves` says the same of two sets of images as means, with the more alike of both networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffmem.errors import InputError
from diffmem.memorization.criteria.comparison import Points, Searches
from diffmem.memorization.criteria.disjoint_halves import mean_free, pair_cosines


@dataclass(frozen=True)
class Agreement:
    """How alike images are, as medians over the seeds of cosines, mean levels removed.

    Attributes:
        between: Images of the two models from the same seed.
        chance: Those from different seeds.
        nearest: Of either model: its images and the training image most like each.
        images: How many seeds there are.
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
    return Agreement(
        float(np.median(pair_cosines(first, second))),
        float(np.median(pair_cosines(first, np.roll(second, 1, axis=0)))),
        (_nearest(first, first_training), _nearest(second, second_training)),
        len(first),
    )


def _nearest(images: np.ndarray, training: np.ndarray) -> float:
    """The median cosine to the training image most alike; that of an image of one level is 0."""
    points = Points(mean_free(images), "generated"), Points(mean_free(training), "training")
    return float(np.median(np.nan_to_num(Searches(device="cpu").largest_cosine(*points), nan=0.0)))
