"""What a measure of copying is: `Criterion`, its values and its variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from diffmem.memorization.criteria.comparison import Comparison

Better = Literal["higher", "lower", "zero", "half", "neither"]
Need = Literal["holdout", "images", "second"]


@dataclass(frozen=True)
class Value:
    """One number that a criterion gives.

    Attributes:
        what: What it is, in one phrase.
        better: Where a generator that copies less lies: "higher", "lower", at "zero", at one "half", or "neither".
        share: Whether it is a share of images, 0 to 1.
    """

    what: str
    better: Better
    share: bool = False


@dataclass(frozen=True)
class Measured:
    """What a criterion found.

    Attributes:
        values: By stable name.
        per_image: By name, an array [M] with what each generated image contributes.
        means_of: Of the values that are the mean of an array of `per_image`: which one. Their intervals are taken from
            it.
        intervals: Of other values, 95 %.
        notes: What else a person should know, one sentence each.
    """

    values: Mapping[str, float]
    per_image: Mapping[str, np.ndarray] = field(default_factory=dict)
    means_of: Mapping[str, str] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """The same measure as somebody else's code computes it, asked for by its name alone ("authenticity:fld").

    Attributes:
        value: What its one number is.
        measure: Computes it; the value's name is the variant's.
        needs: As of a criterion.
        source: Whose it is.
    """

    value: Value
    measure: Callable[[Comparison], Measured]
    source: str
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True)
class Criterion:
    """A measure of copying.

    Attributes:
        name: By which it is asked for.
        formula: In one line.
        source: The paper, and whose variant it is where there are several.
        values: What it gives, by stable name; the first is the one that it is known for.
        measure: Computes it.
        blind: What it cannot see, in one sentence.
        needs: "holdout": real images that the model has not seen; "images": sets of images, not of vectors; "second":
            the images of a second model from the same latents.
        neighbors: How many nearest training images of each generated image it asks for.
        decides: Of one that says of a single image whether it is a copy, whatever images come with it: the array of
            `per_image` that says so, and which value of it means a copy.
        variants: By name, without the criterion's own and the colon.
        honest: What its values are for honest images, where that does not come from playing the holdout set against
            the training set.
    """

    name: str
    formula: str
    source: str
    values: Mapping[str, Value]
    measure: Callable[[Comparison], Measured]
    blind: str
    needs: tuple[Need, ...] = ()
    neighbors: int = 1
    decides: tuple[str, bool] | None = None
    variants: Mapping[str, Variant] = field(default_factory=dict)
    honest: Callable[[Comparison], Mapping[str, float]] | None = None
