"""What an audit found: `Audit`, for programs, people and files."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

import diffmem
from diffmem.data import ImageSet, SkippedFile
from diffmem.html_report import percent, percent_range
from diffmem.memorization.calibration import Calibration, false_discovery_rates
from diffmem.memorization.criteria import published_rule
from diffmem.memorization.gate import Gate, decide_gate
from diffmem.memorization.rules import Rule
from diffmem.memorization.second_look import SecondLook
from diffmem.memorization.statistics import CopyRate, ReportsRate
from diffmem.memorization.verification import Verification
from diffmem.search import DuplicateGroups, Neighbors

if TYPE_CHECKING:
    import pandas

    from diffmem.features import FeatureSet
    from diffmem.indexes.originals import Originals

_PER_IMAGE = (
    "memorized", "raw_memorized", "published_memorized", "neighbors", "verdicts", "scores", "p_values", "q_values",
    "second_look",
)  # fmt: skip
COPY, NEAR, NO_COPY = "copy", "near", "not a copy"
_SHOWN = 10  # entries of a list in a summary


@dataclass(frozen=True)
class CopiedImage:
    """A training image that generated images are copies of.

    Attributes:
        index: In the training set.
        name: Name of its file, or "#index".
        count: How many generated images are copies of it.
    """

    index: int
    name: str
    count: int


@dataclass(frozen=True)
class SeenImage:
    """An image of the holdout set that is in the training set.

    Attributes:
        index: In the holdout set.
        name: Name of its file there.
        training_index: In the training set.
        training_name: Name of its file there.
        identical: Whether they are equal pixel for pixel (or mirrored), not only once they are aligned.
        residual: What remains after alignment; 0 for identical ones.
    """

    index: int
    name: str
    training_index: int
    training_name: str
    identical: bool = True
    residual: float = 0.0


@dataclass(frozen=True)
class UnkeptImages:
    """What is known about images that were not kept, or of which there are vectors alone: all but the pixels.

    Attributes:
        total: How many they are.
        names: Names of each, or None where they have none.
        source: Where they came from.
        skipped: Files that could not be read.
        labels: None: those of images that are not kept are not needed.
        originals: Reads single ones where they lie; None where nothing does.
    """

    total: int
    names: Sequence[str] | None
    source: str
    skipped: tuple[SkippedFile, ...] = ()
    labels: None = None
    originals: Originals | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, images: ImageSet | FeatureSet) -> UnkeptImages:
        return cls(len(images), images.names, images.source, getattr(images, "skipped", ()))

    def __len__(self) -> int:
        return self.total

    def name(self, index: int) -> str:
        """What to call image `index` in a report."""
        return self.names[index] if self.names is not None else f"#{index}"


@dataclass(frozen=True, repr=False)
class Audit(ReportsRate):
    """What an audit found. Per-image arrays follow the order of the generated images.

    Attributes:
        memorized: bool [Q], by the rule of `settings` (duplicates collapsed unless asked otherwise).
        raw_memorized: bool [Q], by the same rule, duplicates counted as neighbors (the paper's); d1 = 0 counts whatever
        d2 is.
        neighbors: The nearest training image, and the nearest of those that are farther than the duplicate radius from
            it.
        raw_neighbors: The two nearest training images, duplicates counted as neighbors.
        scores: float64 [Q], lower = more like a copy, whatever the rule (`diffmem.memorization.rules`): d1/d2, one
            minus a cosine, a distance, …
        near: bool [Q], no copies by the rule, but the second look found a training image that they resemble once it is
            aligned: to be looked at.
        duplicate_groups: Training images within the duplicate radius of each other.
        generated: The images audited; without their pixels where a `CopyDetector` did not keep them, or where there
            are vectors alone.
        training: The training images, likewise.
        rule: The rule.
        settings: features, rule, threshold, duplicates, duplicate_radius, flip, device, how neighbors were searched,
            and what the sets were.
        look: What the second look saw, or None. Through an index of features it looks at the images with the lowest
            scores alone.
        verification: What exact search said of images where the search may miss neighbors, and the strata that this
            stands for; None where it was exact.
        calibration: For rule="calibrated": what the holdout set says; else None.
        blind_spots: What the verdict does not cover, one sentence each.
        holdout: The same audit of real images that the model never saw; its ratio is the rule's false-alarm rate. None
            without.
        left_out: For a holdout: the images that are in the training set, which are excluded.
        warnings: Why the verdict must not be relied on, one sentence each; empty where nothing speaks against it.
        versions: Versions of the software that decides the numbers.

    Example:
        >>> import diffmem
        >>> digits = diffmem.load_images("builtin:digits")
        >>> result = diffmem.audit(digits.images[990:1010], digits.images[:1000])
        >>> print(result.rate)
        10 of 20: 50.0 % (95 % interval 29.9 % to 70.1 %)
        >>> result.sources[0].index, result.reliable
        (990, True)
    """

    memorized: np.ndarray
    raw_memorized: np.ndarray
    neighbors: Neighbors
    raw_neighbors: Neighbors
    scores: np.ndarray
    near: np.ndarray
    duplicate_groups: DuplicateGroups
    generated: ImageSet | UnkeptImages
    training: ImageSet | UnkeptImages
    rule: Rule
    settings: dict[str, Any]
    look: SecondLook | None = None
    verification: Verification | None = None
    calibration: Calibration | None = None
    blind_spots: tuple[str, ...] = ()
    holdout: Audit | None = None
    left_out: tuple[SeenImage, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=lambda: software_versions())

    @property
    def rate(self) -> CopyRate:
        """How many of the generated images are copies."""
        return CopyRate.of(self.memorized, self.verification)

    @property
    def near_count(self) -> int:
        """How many images are near: no copies by the rule, but to be looked at."""
        return int(self.near.sum())

    @property
    def verdicts(self) -> list[str]:
        """Of each image: "copy", "near" or "not a copy"."""
        pairs = zip(self.memorized.tolist(), self.near.tolist(), strict=True)
        return [COPY if copy else NEAR if near else NO_COPY for copy, near in pairs]

    @property
    def p_values(self) -> np.ndarray | None:
        """float64 [Q], for rule="calibrated": how likely an image that is not a copy has such a score
        (`diffmem.memorization.calibration`); else None."""
        return None if self.calibration is None else self.calibration.p_values(self.scores)

    @property
    def q_values(self) -> np.ndarray | None:
        """float64 [Q], for rule="calibrated": those of at most q are copies with an expected share q of false ones
        among them (Benjamini and Hochberg); else None."""
        p_values = self.p_values
        return None if p_values is None else false_discovery_rates(p_values)

    @property
    def score_threshold(self) -> float:
        """The score below which an image is a copy."""
        return self.rule.score_threshold(self.calibration)

    @property
    def raw_rate(self) -> CopyRate:
        """The same by the paper's rule."""
        return CopyRate.of(self.raw_memorized)

    @property
    def published_rate(self) -> CopyRate:
        """The same as the code published with the paper counts."""
        return CopyRate.of(self.published_memorized)

    @property
    def reliable(self) -> bool:
        """Whether nothing speaks against the verdict: a gate must not pass where this is False."""
        return not self.warnings

    @property
    def raw_count(self) -> int:
        """Number of copies by the paper's rule."""
        return self.raw_rate.count

    @property
    def raw_ratio(self) -> float:
        """Their share of the generated images."""
        return self.raw_rate.ratio

    @property
    def published_memorized(self) -> np.ndarray:
        """bool [Q], as the code published with the paper counts: not where d1 = d2 = 0. Of rules other than d1/d2 there
        is none such, and this is `raw_memorized`."""
        if not self.rule.published:
            return self.raw_memorized
        return published_rule(self.raw_neighbors.squared_distances, self.rule.threshold)

    @property
    def published_count(self) -> int:
        """Number of copies as the code published with the paper counts."""
        return self.published_rate.count

    @property
    def published_ratio(self) -> float:
        """Their share of the generated images."""
        return self.published_rate.ratio

    @property
    def training_size(self) -> int:
        """Number of training images."""
        return len(self.training)

    @property
    def mean_rms(self) -> float:
        """Mean over the generated images of the rms distance to the nearest training image."""
        return float(self.neighbors.rms[:, 0].mean())

    @property
    def distance_ratios(self) -> np.ndarray:
        """d1 / d2 per image, float64 [Q], for display: 0 for exact copies. The rule itself is decided in integers."""
        return self.neighbors.distance_ratios

    @property
    def duplicates(self) -> list[np.ndarray]:
        """Groups of duplicate training images, each a sorted array of indices, largest first."""
        return self.duplicate_groups.groups

    @property
    def sources(self) -> list[CopiedImage]:
        """The training images copied most often, most copied first."""
        copied, counts = np.unique(self.neighbors.indices[self.memorized, 0], return_counts=True)
        order = np.lexsort((copied, -counts))
        return [CopiedImage(int(copied[i]), self.training.name(int(copied[i])), int(counts[i])) for i in order]

    def to_dict(self) -> dict[str, Any]:
        """Everything above under the same names, in plain JSON types."""
        neighbors = self.neighbors
        return {
            "ratio": self.ratio,
            "count": self.count,
            "total": self.total,
            "interval": list(self.interval),
            **({} if self.verification is None else {"verification": self.verification.to_dict()}),
            "near_count": self.near_count,
            "blind_spots": list(self.blind_spots),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "raw_ratio": self.raw_ratio,
            "raw_count": self.raw_count,
            "published_ratio": self.published_ratio,
            "published_count": self.published_count,
            "warnings": list(self.warnings),
            "training_size": self.training_size,
            "mean_rms": self.mean_rms,
            "holdout": None if self.holdout is None else self.holdout.to_dict(),
            "left_out": [asdict(image) for image in self.left_out],
            "sources": [{"index": s.index, "name": s.name, "count": s.count} for s in self.sources],
            "duplicates": [group.tolist() for group in self.duplicates],
            "settings": self.settings,
            "versions": self.versions,
            "memorized": self.memorized.tolist(),
            "raw_memorized": self.raw_memorized.tolist(),
            "published_memorized": self.published_memorized.tolist(),
            "verdicts": self.verdicts,
            "scores": self.scores.tolist(),
            "p_values": None if self.calibration is None else self.p_values.tolist(),
            "q_values": None if self.calibration is None else self.q_values.tolist(),
            "second_look": None if self.look is None else self._look_to_dict(),
            "neighbors": {
                "indices": neighbors.indices.tolist(),
                "squared_distances": neighbors.squared_distances.tolist(),
                "distances": neighbors.distances.tolist(),
                "rms": neighbors.rms.tolist(),
                **({} if neighbors.mirrored is None else {"mirrored": neighbors.mirrored.tolist()}),
            },
        }

    def _look_to_dict(self) -> dict[str, Any]:
        """In plain JSON types; None where an image was not looked at."""
        values = {"residuals": self.look.residuals, "scores": self.look.scores}
        plain = {name: [None if x != x else x for x in each.tolist()] for name, each in values.items()}
        return {"indices": self.look.indices.tolist(), **plain}

    def summary(self) -> dict[str, Any]:
        """`to_dict` without what is said of each image; of long lists the first entries, and how many there are."""
        summary = {name: value for name, value in self.to_dict().items() if name not in _PER_IMAGE}
        holdout = None if self.holdout is None else self.holdout.summary()
        duplicates = {"groups": len(self.duplicates), "images": sum(map(len, self.duplicates))}
        return _shortened({**summary, "holdout": holdout, "duplicates": duplicates})

    def to_frame(self) -> pandas.DataFrame:
        """A row per generated image, with the columns of `samples.csv`.

        Returns:
            The table; names are as the images have them, not escaped as in the file.

        Raises:
            MissingExtraError: The package pandas is not installed.
        """
        return _report().frame(self)

    def gate(
        self, *, fail_above: float | None = None, require_below: float | None = None, max_copies: int | None = None
    ) -> Gate:
        """Whether these images pass the limits given; see `diffmem.memorization.decide_gate`.

        Example:
            >>> gate = result.gate(require_below=0.01)  # doctest: +SKIP
            >>> assert gate.passed, gate  # doctest: +SKIP
        """
        limits = {"fail_above": fail_above, "require_below": require_below, "max_copies": max_copies}
        gate = decide_gate(self.count, self.interval, **limits, warnings=self.warnings, verification=self.verification)
        share = require_below if require_below is not None else fail_above
        if gate.passed or self.calibration is None or share is None or share > self.rule.alarms:
            return gate
        return Gate(gate.state, (*gate.reasons, f"honest images would fail too: ask for alarms below {share:g}"))

    def _repr_html_(self) -> str:
        """What notebooks show: the verdict and the most certain copies."""
        return _report().render_summary(self)

    def save(self, folder: str | Path) -> Path:
        """Write `report.html`, `samples.csv` and `report.json` into `folder` and return the path of the report.

        The three appear together, when all are written. In `samples.csv` names that spreadsheets would take for
        formulas begin with an apostrophe, and invisible characters are escaped.

        Raises:
            InputError: That cannot be done.
        """
        return _report().write_report(self, folder)

    def __repr__(self) -> str:
        return f"<Audit: {self.verdict()}>"

    def missed(self) -> str:
        """What the search may have missed, as the end of a sentence; empty where that is nothing."""
        if self.verification is None or self.verification.complete:
            return ""
        low, high = self.verification.count_interval
        return f"; exact search would find {low:,} to {high:,}" if low < high else ""

    def verdict(self) -> str:
        """One sentence for a person."""
        near = f"; {self.near_count:,} more are near one and worth a look" if self.near_count else ""
        return (
            f"{self.count:,} of {self.total:,} images are copies of one of {self.training_size:,} training images: "
            f"{percent(self.ratio)} (95 % interval {percent_range(self.interval)}){near}{self.missed()}"
        )


def _report() -> ModuleType:
    """What writes results for people. It knows them, so that it is loaded when asked for."""
    from diffmem.memorization import report

    return report


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    """Plain JSON types with lists of at most `_SHOWN` entries; how many a longer one has is added under `…_total`."""
    short: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            short[name] = _shortened(value)
        elif isinstance(value, list) and len(value) > _SHOWN:
            short |= {name: value[:_SHOWN], f"{name}_total": len(value)}
        else:
            short[name] = value
    return short


def software_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "diffmem": diffmem.__version__,
        "torch": _torch_version(),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _torch_version() -> str:
    """That of PyTorch, without importing it."""
    torch = sys.modules.get("torch")
    return version("torch") if torch is None else torch.__version__
