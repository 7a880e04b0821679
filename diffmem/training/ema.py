"""The exponential moving average of the weights: the four rules by which its decay follows training.

With s images seen before the step, batch b, N training images, H = 500,000 images, and the half-life
h = min(H·N/50000, ramp-up·s):

    by-size       β = 0.5^(b/h)                           half-life grows with the training set
    compensated   β = 0.5^(512·N / (50000·h))             the same decay per epoch, whatever the batch
    constant      β = 0.5^(b/H)
    target r      β = r / 0.5^(b/H) · 0.5^(b·N / (50000·h))   ends at r

Gu et al. (arXiv 2310.02664) study the last; the half-life with ramp-up is EDM's (arXiv 2206.00364).

Two protocols give H·N/50000: "paper", as it stands there; and "published", the paper's public code, which floors it to
whole thousands of images: 2,000 instead of 2,500 at N = 250, and 0 below N = 100, where β is 0 and the EMA weights
are those of the last step. The rule "constant" does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffmem.errors import InputError

RULES = ("by-size", "compensated", "constant", "target")
PROTOCOLS = ("paper", "published")
_REFERENCE_SIZE = 50_000
_REFERENCE_BATCH = 512


@dataclass(frozen=True)
class EMA:
    """A rule for the decay β of the EMA weights, ema ← β·ema + (1 − β)·weights after every step.

    Attributes:
        rule: "by-size", "compensated", "constant" or "target"; see `diffmem.training.ema` for the formulas.
        halflife_images: H, the half-life in images seen at N = 50,000.
        rampup: The half-life is at most this share of the images seen.
        target: r in [0, 1], the decay at which the rule "target" ends; for that rule only.
        protocol: "paper": the half-life H·N/50000 as the paper has it; "published": floored to whole thousands of
            images, as in its public code.

    Raises:
        InputError: Another value.

    Example:
        >>> EMA().beta(images_seen=10_000_000, batch=512, size=50_000)  # a half-life of 500,000 images
        0.9992904...
    """

    rule: str = "compensated"
    halflife_images: int = 500_000
    rampup: float = 0.05
    target: float | None = None
    protocol: str = "paper"

    def __post_init__(self) -> None:
        for name, choices in (("rule", RULES), ("protocol", PROTOCOLS)):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
        if self.rule == "target" and self.target is None:
            raise InputError("EMA rule='target' needs target=…, such as 0.99")
        if self.rule != "target" and self.target is not None:
            raise InputError(f"target is {self.target}, but must go with rule='target', not with {self.rule}")
        if self.target is not None and not 0 <= self.target <= 1:
            raise InputError(f"target is {self.target}, but must lie in 0 … 1")
        for name in ("halflife_images", "rampup"):
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"{name} is {value}, but must be above 0")

    def beta(self, images_seen: int, batch: int, size: int) -> float:
        """β of the step of `batch` images that follows `images_seen`, on a training set of `size`; 0 at the start."""
        constant = 0.5 ** (batch / self.halflife_images)
        if self.rule == "constant":
            return constant
        halflife = min(self.full_halflife(size), self.rampup * images_seen)
        if halflife == 0:
            return 0.0
        if self.rule == "by-size":
            return 0.5 ** (batch / halflife)
        if self.rule == "compensated":
            return 0.5 ** (_REFERENCE_BATCH * size / (_REFERENCE_SIZE * halflife))
        return self.target / constant * 0.5 ** (batch * size / (_REFERENCE_SIZE * halflife))

    def full_halflife(self, size: int) -> float:
        """The half-life in images, on a training set of `size`, once it is no longer limited by the images seen."""
        if self.rule == "constant":
            return self.halflife_images
        halflife = self.halflife_images * size / _REFERENCE_SIZE
        return (
            halflife if self.protocol == "paper" else 1000.0 * (self.halflife_images * size // (1000 * _REFERENCE_SIZE))
        )

    def describe(self, size: int) -> str:
        """The rule and what it comes to on a training set of `size`, in words."""
        rule = f"target {self.target:g}" if self.rule == "target" else self.rule
        if self.rule == "constant":
            return f"{rule}, half-life {self.halflife_images:,} images"
        halflife = self.full_halflife(size)
        if not halflife:
            below = _smallest(self.halflife_images)
            return f"{rule}, by the published code: none below N = {below:,}, so the weights of the last step"
        how = "as in the paper" if self.protocol == "paper" else "floored to whole thousands as in the published code"
        return f"{rule}, half-life {halflife:,.0f} images at N = {size:,}, {how}"


def _smallest(halflife_images: int) -> int:
    """The smallest training set whose half-life is a thousand images or more."""
    return -(-1000 * _REFERENCE_SIZE // halflife_images)
