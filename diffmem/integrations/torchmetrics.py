"""Metrics of torchmetrics: the share of copies among the images that a metric is updated with.

They work as any other metric: counts are summed over ranks, they can be in a `MetricCollection`, be pickled, cloned and
merged. The training set is held once by all clones of a metric, on the CPU or where `device` says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import torch

from diffmem.errors import InputError, MissingExtraError
from diffmem.integrations.images import gray_levels
from diffmem.memorization import CopyDetector, CopyRate, Detection, is_index

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    raise MissingExtraError("torchmetrics", "torchmetrics", "diffmem.integrations.torchmetrics") from None

if TYPE_CHECKING:
    from diffmem.data import ImageSource

__all__ = ["CopyDetection", "MemorizationRatio"]


class CopyDetection(Metric):
    """The share of images that are copies of training images, by any features and rule of `diffmem.CopyDetector`.

    `compute` returns it as a scalar, NaN where there were no images; `rate` tells the counts and the 95 % interval.

    Args:
        training: The training images: anything that `diffmem.load_images` reads, or a `diffmem.CopyDetector`, which
            several metrics may share.
        value_range: The values of black and white where images are floats; those of uint8 are gray levels.
        detector: Options of `diffmem.CopyDetector`, such as features, rule, threshold, flip or holdout.
        **options: Of `torchmetrics.Metric`.

    Raises:
        InputError: As `diffmem.CopyDetector` does.

    Example:
        >>> metric = CopyDetection("builtin:digits", detector={"threshold": "1/4"})  # doctest: +SKIP
        >>> metric.update(images)  # doctest: +SKIP
        >>> metric.compute(), metric.rate.interval  # doctest: +SKIP
    """

    full_state_update: bool | None = False
    higher_is_better: bool | None = False
    is_differentiable: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    copies: torch.Tensor
    images: torch.Tensor
    judged_by: torch.Tensor

    def __init__(
        self,
        training: ImageSource | CopyDetector,
        *,
        value_range: tuple[float, float] = (0.0, 1.0),
        detector: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self._held = _Held(_detector(training, dict(detector or {})))
        self._value_range = value_range
        self.add_state("copies", torch.zeros((), dtype=torch.int64), "sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), "sum")
        # What decides a verdict, as a state: a MetricCollection shares the states of metrics whose states are equal,
        # and those of ranks or files are added up; only metrics that agree about every image may.
        self.add_state("judged_by", _digest(self._held.detector, value_range), _the_same)

    @property
    def detector(self) -> CopyDetector:
        """What decides about an image."""
        return self._held.detector

    @property
    def rate(self) -> CopyRate:
        """How many of the images are copies, with the interval of their share."""
        return CopyRate(int(self.copies), int(self.images))

    def update(self, images: Any) -> None:
        """Adds images.

        Args:
            images: uint8 or float [B, C, H, W], on any device, in any precision; vectors [B, d], where the features are
                precomputed.

        Raises:
            InputError: They do not fit the training images.
        """
        detection = self.judge(images)
        self.copies += detection.count
        self.images += len(detection)

    def judge(self, images: Any) -> Detection:
        """Which of the images are copies, and of what; they are not added.

        Args:
            images: As for `update`.
        """
        if isinstance(images, torch.Tensor) and not len(images):
            raise InputError("update: there are no images in this batch")
        if self.detector.compared.vectors_only:
            return self.detector.judge(images)
        shape = getattr(self.detector.training, "image_shape", None)
        layout = "NCHW" if tuple(getattr(images, "shape", ()))[1:] == shape else None
        return self.detector.judge(gray_levels(images, self._value_range, layout=layout))

    def compute(self) -> torch.Tensor:
        """The share of copies, float32, 0-dimensional."""
        return self.copies.to(torch.float32) / self.images

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draws one value or several; see `torchmetrics.Metric.plot`.

        Args:
            val: What `compute` or `forward` returned, or a list of such values; None: what `compute` returns now.
            ax: The axes to draw on; None: new ones.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)


class MemorizationRatio(CopyDetection):
    """R_mem of Gu et al. (arXiv 2310.02664): the share of images whose pixels lie nearer than a third of the distance
    to the second nearest training image to the nearest one.

    Args:
        training: As for `CopyDetection`.
        threshold: On d1/d2.
        duplicates: What becomes of duplicates among the training images; see `diffmem.CopyDetector`.
        flip: Whether mirrored images are compared too.
        value_range: The values of black and white where images are floats; those of uint8 are gray levels.
        device: Where the training images are searched: "cpu", "cuda", or "auto".
        **options: Of `torchmetrics.Metric`.

    Raises:
        InputError: As `diffmem.CopyDetector` does.

    Example:
        >>> metric = MemorizationRatio("builtin:digits")  # doctest: +SKIP
        >>> for images in batches:  # doctest: +SKIP
        ...     metric.update(images)
        >>> metric.compute()  # doctest: +SKIP
        tensor(0.1250)
    """

    def __init__(
        self,
        training: ImageSource | CopyDetector,
        *,
        threshold: float | str | Fraction = 1 / 3,
        duplicates: Literal["collapse", "keep"] = "collapse",
        flip: bool = False,
        value_range: tuple[float, float] = (0.0, 1.0),
        device: str = "auto",
        **options: Any,
    ):
        if isinstance(training, CopyDetector):
            detector = {}
            if (threshold, duplicates, flip, device) != (1 / 3, "collapse", False, "auto"):
                raise InputError("training is a CopyDetector, which has its own rule: do not pass another")
        else:
            detector = {"threshold": threshold, "duplicates": duplicates, "flip": flip, "device": device}
        super().__init__(training, value_range=value_range, detector=detector, **options)


class _Held:
    """A detector that clones of a metric share: it is not changed by what they are updated with."""

    def __init__(self, detector: CopyDetector):
        self.detector = detector

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


def _detector(training: Any, options: dict[str, Any]) -> CopyDetector:
    if isinstance(training, CopyDetector):
        if options:
            raise InputError("training is a CopyDetector, which has its own options: remove detector")
        return training
    if is_index(training):
        return CopyDetector(training, **{"exact": True, **options})
    if options.get("features") != "precomputed":
        training = gray_levels(training)
        if options.get("holdout") is not None:
            options["holdout"] = gray_levels(options["holdout"])
    return CopyDetector(training, **options)


def _digest(detector: CopyDetector, value_range: tuple[float, float]) -> torch.Tensor:
    """SHA-256 of what decides the verdict of an image, int64 [32]: numbers so small that nothing rounds them."""
    identity = json.dumps([detector.identity, *map(float, value_range)], sort_keys=True, default=str).encode()
    return torch.tensor(list(hashlib.sha256(identity).digest()), dtype=torch.int64)


def _the_same(digests: torch.Tensor) -> torch.Tensor:
    if not bool((digests == digests[0]).all()):
        raise InputError(
            "training: these metrics hold different training sets or rules, so their counts cannot be added: use the "
            "same on all ranks"
        )
    return digests[0]
