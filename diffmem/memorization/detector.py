"""The decision: which generated images are copies of training images, as they come (`CopyDetector`) or of a whole set
(`audit`)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffmem.data import ImageSet, load_images
from diffmem.data.grid import rows_and_columns
from diffmem.data.grid import split_grid as cut_sheets
from diffmem.errors import InputError
from diffmem.features import FeatureSet, check_comparable, extract, load_features
from diffmem.indexes import IndexFolder
from diffmem.logs import logger
from diffmem.memorization.blind_spots import blind_spots
from diffmem.memorization.calibration import Calibration
from diffmem.memorization.compared import ALIGNED, Compared, Features
from diffmem.memorization.drawing import Drawn, check_verifying, missed, strata_of, verification_of
from diffmem.memorization.hidden import hidden_copies, hidden_radii
from diffmem.memorization.indexed import (
    FolderMatching,
    compared_of_folder,
    figures_of,
    folder_of,
    in_folder,
    training_of,
)
from diffmem.memorization.inputs import check_sets, in_one_precision, value_ranges
from diffmem.memorization.matching import RECALL, AlignedMatching, Matches, Matching, RowMatching
from diffmem.memorization.plausibility import SetFigures, check_scale, suspicions
from diffmem.memorization.result import Audit, SeenImage, UnkeptImages
from diffmem.memorization.rules import Rule
from diffmem.memorization.second_look import (
    LEAST_SIDE,
    SUSPECTS,
    NearRule,
    SecondLook,
    look_again,
    look_at_originals,
)
from diffmem.memorization.statistics import CopyRate, ReportsRate
from diffmem.memorization.verification import VERIFIED, Verification
from diffmem.progress import Progress, silent
from diffmem.search import Neighbors, SearchIndex, Views
from diffmem.search.rows import as_rows, fingerprint, mirror

if TYPE_CHECKING:
    from diffmem.data import ImageSource

_log = logger(__name__)
Index = SearchIndex | IndexFolder | str | os.PathLike[str] | None
LOOKED_AT = 16  # images at the beginning that may turn out to be sheets
MOST_TWINS = 0.1  # share of a holdout set that may be training images in disguise before that is remarkable


@dataclass(frozen=True)
class Detection(ReportsRate):
    """What was decided about some images. Per-image arrays follow their order.

    Attributes:
        memorized: bool [n], by the detector's rule.
        raw_memorized: bool [n], by the same rule, duplicates counted as neighbors (the paper's).
        neighbors: The nearest training image, and the nearest of those that are farther than the duplicate radius
            from it (duplicates counted as neighbors, where the detector keeps them).
        raw_neighbors: The two nearest training images, duplicates counted as neighbors.
        hidden: float64 [n], the least duplicate radius with which the rule counts an image that is a hidden copy
            (`diffmem.memorization.hidden`), else NaN.
        scores: float64 [n], lower = more like a copy.
        near: bool [n], no copies by the rule, but to be looked at; all False without the second look.
        settled: bool [n], of which images exact search is proven to give the same verdict; all of them where the search
            was exact.
        certified: bool [n], of which the neighbors are proven to be the true ones.
        look: What the second look saw, or None.
        candidates: int64 [n, k], the nearest training images, where `CopyDetector.compute` reads those of some images
            for the second look; else None.
    """

    memorized: np.ndarray
    raw_memorized: np.ndarray
    neighbors: Neighbors
    raw_neighbors: Neighbors
    hidden: np.ndarray
    scores: np.ndarray
    near: np.ndarray
    settled: np.ndarray
    certified: np.ndarray
    look: SecondLook | None = None
    candidates: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.memorized)

    @property
    def rate(self) -> CopyRate:
        """How many of the images are copies."""
        return CopyRate.of(self.memorized)

    @classmethod
    def join(cls, parts: Sequence[Detection]) -> Detection:
        """The decisions about several batches of images as one."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], np.ndarray):
                return np.concatenate(values)
            return None if values[0] is None else type(values[0]).join(values)

        return cls(**{each.name: joined(each.name) for each in fields(cls)})

    def select(self, rows: np.ndarray) -> Detection:
        """The decisions about the images of `rows`."""

        def taken(values: Any) -> Any:
            return values[rows] if values is None or isinstance(values, np.ndarray) else values.select(rows)

        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return Detection(**{name: None if each is None else taken(each) for name, each in values.items()})

    def replaced(self, rows: np.ndarray, others: Detection) -> Detection:
        """The same with other decisions about the images of `rows`."""
        order = np.arange(len(self))
        order[rows] = len(self) + np.arange(len(rows))
        return Detection.join([self, others]).select(order)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays by name, for a file; `from_arrays` reads them."""
        arrays: dict[str, np.ndarray] = {}
        for each in fields(self):
            values = getattr(self, each.name)
            if isinstance(values, (Neighbors, SecondLook)):
                parts = {f"{each.name}.{part.name}": getattr(values, part.name) for part in fields(values)}
                arrays |= {name: np.asarray(part) for name, part in parts.items() if part is not None}
            elif isinstance(values, np.ndarray):
                arrays[each.name] = values
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Detection:
        """The decisions that `to_arrays` gave; other names are left alone."""

        def neighbors(name: str) -> Neighbors:
            mirrored = arrays.get(f"{name}.mirrored")
            indices, squared = (arrays[f"{name}.{part}"] for part in ("indices", "squared_distances"))
            return Neighbors(indices, squared, int(arrays[f"{name}.dimension"]), mirrored, arrays.get(f"{name}.unseen"))

        look = [f"look.{each.name}" for each in fields(SecondLook)]
        return cls(
            arrays["memorized"],
            arrays["raw_memorized"],
            neighbors("neighbors"),
            neighbors("raw_neighbors"),
            arrays["hidden"],
            arrays["scores"],
            arrays["near"],
            # Stores written before know exact searches alone.
            arrays.get("settled", np.ones(len(arrays["memorized"]), bool)),
            arrays.get("certified", np.ones(len(arrays["memorized"]), bool)),
            SecondLook(*(arrays[name] for name in look)) if look[0] in arrays else None,
            arrays.get("candidates"),
        )


class CopyDetector(ReportsRate):
    """Finds copies of training images among generated images that come batch by batch.

    It holds all that decides a verdict: the training set's index and duplicates, features, rule and mirroring. By
    default an image is a copy where d1/d2, the distances of its pixels to those of the nearest and the second nearest
    training image, is below the threshold (see `diffmem.memorization.rules` for the others). Each image is searched
    once. `compute` is the `diffmem.audit` of all images so far, whatever batches they came in. Where the index may miss
    neighbors, `compute` searches some of the images exactly (`diffmem.memorization.verification`), of which up to twice
    `verify` are kept until then; how widely such an index searches is chosen by the first batch. A detector can be
    pickled; a progress callback does not travel with it.

    Args:
        training: The training images: anything that `diffmem.load_images` reads, or an index folder; None: `index`
            holds them.
        features: What is compared; see `diffmem.audit`. Of "precomputed" ones, `training` and all that is judged are
            vectors; of a mapping, its entries "training" and "holdout" are the vectors of these images.
        rule: "ratio", "similarity" or "calibrated"; see `diffmem.audit`.
        threshold: Threshold of the rule; on d1/d2, such as 1/3 (the paper's), "1/3" or Fraction(1, 3).
        alarms: For rule="calibrated".
        duplicates: "collapse" takes the second neighbor among the training images that are farther than the duplicate
            radius from the first; "keep" is the paper's rule, to which a copy of a duplicated training image stays
            unseen.
        duplicate_radius: Training images within this distance are duplicates: root mean square per value, gray levels
            for uint8 images; 0: identical images.
        flip: Whether mirrored generated images are compared too, for models trained with horizontal flips.
        holdout: Real images that the model has not seen; see `diffmem.audit`. They are audited at once.
        index: An index of the training set made before, a folder of `diffmem index build`, or a name; see
            `diffmem.audit`.
        exact: Whether an index folder is searched exactly, though it has codes.
        verify: Of an index that may miss neighbors: how many images are searched exactly; see `diffmem.audit`.
        recall: Of such an index: the share of neighbors that it is to find; see `diffmem.audit`.
        device: "cpu", "cuda", or "auto".
        value_range: The values of black and white in sets of floats; see `diffmem.audit`.
        second_look: Whether images that are not copies are aligned with their nearest training images; see
            `diffmem.audit`.
        feature_cache: Whether features of networks are kept beside their sources.
        keep_images: Whether the generated images are kept, for the pictures of the report and the set's fingerprint.
            Without, the memory needed does not depend on their size: about 200 bytes per image.
        progress: A callback (`diffmem.progress`), or None.

    Raises:
        InputError: As `diffmem.audit` does, for all that concerns training and holdout set.

    Example:
        >>> import diffmem
        >>> digits = diffmem.load_images("builtin:digits")
        >>> detector = CopyDetector(digits.select(slice(0, 1000)))
        >>> for batch in (digits.images[990:1010], digits.images[1010:1050]):
        ...     found = detector.update(batch)
        >>> detector.count, detector.total, detector.compute().count
        (10, 60, 10)
    """

    def __init__(
        self,
        training: ImageSource | None = None,
        *,
        features: Features = "pixels",
        rule: Literal["ratio", "similarity", "calibrated"] = "ratio",
        threshold: float | str | Fraction | None = None,
        alarms: float | None = None,
        duplicates: Literal["collapse", "keep"] = "collapse",
        duplicate_radius: float = 0,
        flip: bool = False,
        holdout: ImageSource | None = None,
        index: Index = None,
        exact: bool = False,
        verify: int = VERIFIED,
        recall: float = RECALL,
        device: str = "auto",
        value_range: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
        second_look: bool = True,
        feature_cache: bool = True,
        keep_images: bool = False,
        progress: Progress | None = None,
    ):
        self.verify, self.recall = check_verifying(verify, recall)
        self.duplicates, self.duplicate_radius, self.flip = duplicates, duplicate_radius, flip
        self.keep_images, self.feature_cache, self.progress = keep_images, feature_cache, progress or silent
        self._folder = folder_of(index, training)
        training = None if self._folder is not None else training
        self._exactly_asked = exact
        if self._folder is not None:
            features = compared_of_folder(self._folder, features, device)
        self.compared = features if isinstance(features, Compared) else Compared.of(features, device)
        ranges = value_ranges(value_range)
        self.value_range = ranges.get("generated")

        def read(source: ImageSource, which: str) -> ImageSet | FeatureSet:
            if self.compared.vectors_only:
                return load_features(source)
            return load_images(source, value_range=ranges.get(which), progress=self.progress)

        asked = rule, threshold, alarms, duplicates, holdout is not None
        if not self.compared.vectors_only:  # what is wrong with a rule is said before anything is read
            self.rule = check_rule(self.compared, *asked)
        training = training_of(self._folder) if self._folder is not None else read(training, "training")
        unseen = None if holdout is None else read(holdout, "holdout")
        if self._folder is not None:
            self.rule = check_rule(self.compared, *asked)
            if flip and self.compared.vectors_only:
                raise InputError("flip=True mirrors images, and the index holds vectors: remove it")
            if unseen is not None and isinstance(training, ImageSet):
                check_sets(unseen, training, "holdout", sizes=self.compared.one_size)
        elif isinstance(training, FeatureSet):
            if flip:
                raise InputError("flip=True mirrors images, and precomputed features cannot be mirrored: remove it")
            self.compared = replace(self.compared, metric=training.metric)
            self.rule = check_rule(self.compared, *asked)
        elif unseen is not None:
            training, unseen = in_one_precision(training, unseen)
            check_sets(unseen, training, "holdout", sizes=self.compared.one_size)
        if flip and self.compared.given:
            raise InputError("flip=True mirrors images, and the features given with them cannot be mirrored: remove it")
        self.second_look = (
            second_look and isinstance(training, ImageSet) and min(training.image_shape[1:]) >= LEAST_SIDE
        )
        # Of an index of features, training images have to be read for it: `compute` looks at some of the images.
        self._looks_later = second_look and self.keep_images and getattr(training, "originals", None) is not None
        self._asked = index, device
        self._prepare(training, unseen)
        self.reset()

    @property
    def threshold(self) -> Fraction | float:
        """Of the rule; of "calibrated", the score below which an image is a copy."""
        return self.rule.threshold if self.rule.threshold is not None else self.calibration.threshold

    @property
    def score_threshold(self) -> float:
        """The score below which an image is a copy."""
        return self.rule.score_threshold(self.calibration)

    @property
    def index(self) -> SearchIndex | None:
        """The index of the training set, or None where it is searched in another way."""
        return self._matching.index

    def _prepare(self, training: ImageSet | FeatureSet, unseen: ImageSet | FeatureSet | None) -> None:
        """Index and duplicates of the training set, and the audit of the holdout set."""
        if len(training) == 0:
            raise InputError(f"the training set ({training.source}) is empty")
        images = isinstance(training, ImageSet)
        self.training = UnkeptImages.of(training) if isinstance(training, FeatureSet) else training
        self._unseen = unseen
        index, device = self._asked
        self._vectors = None if self._folder is not None else self._vectors_of(training, "training")
        if self._folder is not None:
            self._matching: Matching = FolderMatching(
                self._folder, self._exactly_asked, device, self.duplicates, self.duplicate_radius, self.flip,
                self.progress, self.recall,
            )  # fmt: skip
        elif self.compared.name == ALIGNED:
            if index not in (None, "exact"):
                raise InputError("features='aligned' has its own search: remove index=…")
            self._matching = AlignedMatching(training, self.progress)
        else:
            rows = training if self._vectors is None else self._vectors
            self._matching = RowMatching(
                rows, index, device, self.duplicates, self.duplicate_radius, self.flip, self.progress, self.recall
            )
        self.duplicate_groups = self._matching.groups
        if self._folder is not None:
            self._training_figures = figures_of(self._folder)
        else:
            self._training_figures = SetFigures.of(training.images) if images else None
        shape, dtype, content, network = self._form(training)
        self.settings = {
            "features": self.rule.features,
            "metric": self.rule.metric,
            "network": network,
            "rule": self.rule.name,
            "threshold": str(self.rule.threshold) if isinstance(self.rule.threshold, Fraction) else self.rule.threshold,
            "alarms": self.rule.alarms if self.rule.name == "calibrated" else None,
            "duplicates": self.duplicates,
            "duplicate_radius": float(self.duplicate_radius),
            "flip": self.flip,
            "second_look": self.second_look,
            "device": self._matching.device,
            "training": _describe(self.training, shape, dtype, content),
        }
        if self._folder is not None:  # the groups of duplicates that it lists
            self.settings["listed_radius"] = float(self._folder.duplicates.radius)
        self.calibration: Calibration | None = None
        self._near = NearRule.of_size(*training.image_shape[1:]) if images else NearRule(0.0, 0.0)
        self.holdout = None if unseen is None else self._judge_holdout(unseen)

    def _form(self, training: Any) -> tuple[tuple[int, ...], np.dtype, str, str | None]:
        """Shape, dtype and fingerprint of the training set, and the network that made its vectors."""
        network = self._vectors.fingerprint if self._vectors is not None else None
        if isinstance(training, ImageSet):
            return training.images.shape, training.images.dtype, training.fingerprint, network
        if self._folder is not None:
            shape = len(self._folder), self._folder.dimension
            return shape, self._folder.dtype, self._folder.fingerprint, self._folder.features.fingerprint
        return training.vectors.shape, training.vectors.dtype, fingerprint(as_rows(training.rows)), network

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the verdict of an image, in JSON types: the same for detectors that agree about every image."""
        rule = {name: value for name, value in self.settings.items() if name not in ("device", "training")}
        index = getattr(self.index, "factory", "exact")
        learned = None if self.calibration is None else self.calibration.to_dict()
        near = self._near.threshold if self.second_look else None
        training = self.settings["training"]["fingerprint"]
        return {**rule, "calibration": learned, "near": near, "index": index, "training": training}

    def reset(self) -> None:
        """Forgets the generated images; training set, index and the audit of the holdout set stay."""
        self._detections: list[Detection] = []
        self._drawn = Drawn(self.verify)
        self._verified: tuple[np.ndarray, Detection] | None = None
        self._sets: list[ImageSet | UnkeptImages] = []
        self._figures = SetFigures(count_identical=True)
        self._first: list[np.ndarray] = []
        self._sheets: tuple[int, int] | None = None

    @property
    def rate(self) -> CopyRate:
        """How many of the images so far are copies."""
        return CopyRate(sum(each.count for each in self._detections), sum(map(len, self._detections)))

    def judge(self, images: ImageSource, *, vectors: Any = None) -> Detection:
        """Decides about some images without adding them to those that `compute` audits.

        Args:
            images: As for `update`.
            vectors: As for `update`.

        Raises:
            InputError: They do not fit the training images.
        """
        return self._judge(self._fitting(images), vectors)

    def update(self, images: ImageSource, detection: Detection | None = None, *, vectors: Any = None) -> Detection:
        """Adds images and decides about them.

        Args:
            images: A batch of generated images: an array [n, C, H, W], a tensor, an `ImageSet`, or anything else that
                `diffmem.load_images` reads; uint8, or floats where the training images are floats (or `value_range`
                is given). Of "precomputed" features, their vectors: an array [n, d], or what
                `diffmem.features.load_features` reads.
            detection: What `judge` decided about these images, if it was asked: they are not searched again.
            vectors: Vectors of these images, where the detector has got those of the training images beside the images.

        Returns:
            What was decided about these images.

        Raises:
            InputError: They do not fit the training images, or the decision does not fit them.
        """
        own = isinstance(images, ImageSet)
        images = self._fitting(images)
        rows = None
        if detection is None:
            rows = self._rows_of(images, "generated", vectors)
            detection = self._decide(images, self._matching.match(rows))
        elif len(detection) != len(images):
            raise InputError(f"detection is of {len(detection):,} images, but {len(images):,} are given")
        start = sum(map(len, self._detections))
        if self._matching.approximate and not (detection.settled & detection.certified).all():
            if rows is None:
                rows = self._rows_of(images, "generated", vectors)
            self._drawn.add(start, strata_of(detection, self.score_threshold), images, rows)
        if isinstance(images, FeatureSet):
            self._sets.append(UnkeptImages.of(images))
            self._detections.append(detection)
            return detection
        if self.keep_images and not own:  # the caller's array may be written to later
            images = replace(images, images=images.images.copy())
        if (left := LOOKED_AT - self._figures.total) > 0:
            self._first.append(np.array(images.images[:left]))
        self._sheets = self._sheets or images.sheets
        self._figures.add(images.images)
        self._detections.append(detection)
        self._sets.append(images if self.keep_images else UnkeptImages.of(images))
        return detection

    def compute(self) -> Audit:
        """The audit of all images so far.

        Raises:
            InputError: There are none, or they look to be on another scale than the training images.
        """
        if not self._detections:
            raise InputError("no generated images to audit: call update() before compute()")
        found = Detection.join(self._detections)
        self._detections = [found]
        generated = _joined(self._sets)
        self._sets = [generated]
        joined, checked = self._verify(found)
        more: dict[str, Any] = {"holdout": self.holdout, "verification": checked}
        if self._training_figures is None:
            joined = self._look_at_suspects(generated, joined)
            return self._audit(generated, joined, None, "generated", **more)
        sheets = self._suspected_sheets()
        return self._audit(generated, joined, self._figures, "generated", warnings=sheets, **more)

    def _look_at_suspects(self, images: ImageSet | UnkeptImages, found: Detection) -> Detection:
        """The same with a second look at those images that are most like copies without being ones."""
        if not self._looks_later or not isinstance(images, ImageSet) or images.images.dtype != np.uint8:
            return found
        size = images.image_shape[1:]
        suspects = np.argsort(found.scores, kind="stable")
        suspects = suspects[~found.memorized[suspects]][:SUSPECTS]
        originals = self.training.originals
        if min(size) < LEAST_SIDE or len(suspects) == 0 or found.candidates is None or originals is None:
            return found
        look = look_at_originals(images.images, originals, found.candidates, suspects, self.progress)
        if look is None:
            return found
        return replace(found, look=look, near=~found.memorized & NearRule.of_size(*size).near(look))

    def _verify(self, found: Detection) -> tuple[Detection, Verification | None]:
        """What exact search says of some of the images so far, and what that says of the others; None where the search
        was exact."""
        if not self._matching.approximate:
            return found, None
        strata = strata_of(found, self.score_threshold)
        rows = self._drawn.chosen(strata)
        known, decided = (np.empty(0, np.int64), found.select(np.empty(0, np.int64)))
        if self._verified is not None:
            known, decided = self._verified
        new = np.setdiff1d(rows, known)
        if len(new):
            exactly = self._decide(*self._exactly(self._drawn, new))
            known, decided = np.concatenate([known, new]), Detection.join([decided, exactly])
            self._verified = known, decided
        order = np.argsort(known, kind="stable")
        truth = decided.select(order[np.searchsorted(known[order], rows)])
        return found.replaced(rows, truth), verification_of(found, strata, rows, truth)

    def _suspected_sheets(self) -> tuple[str, ...]:
        """The warning where the images, though brought to the training images' size, look like sheets of many."""
        sheets = self._sheets or rows_and_columns(np.concatenate(self._first))
        if sheets is None or sheets == (self.training.sheets or rows_and_columns(self.training.images[:LOOKED_AT])):
            return ()
        return (
            f"the images look like sheets of {sheets[0]}x{sheets[1]} images in a grid, which hide every copy on them: "
            "do not resize them, and cut them apart with split_grid=True.",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "progress": silent}

    def _fitting(self, images: ImageSource) -> ImageSet | FeatureSet:
        """The images as a set that fits the training set."""
        if self.compared.vectors_only:
            vectors = load_features(images)
            if self._folder is None:
                check_comparable(vectors, self._vectors, "generated")
            return vectors
        if isinstance(self.training, UnkeptImages):  # an index of features
            assert self._folder is not None
            shape = self._folder.image_shape
            layout = "NCHW" if tuple(getattr(images, "shape", ()))[1:] == shape else None
            images = load_images(images, layout=layout, value_range=self.value_range, progress=self.progress)
            if self.compared.one_size and images.image_shape != shape:
                raise InputError(
                    f"generated images ({images.source}) are {images.image_shape}, those of the index {shape} "
                    "(C, H, W): bring them to one size with resize=…"
                )
            return images
        # An array that looks like the training images is what it looks like, whatever its layout could be.
        layout = "NCHW" if tuple(getattr(images, "shape", ()))[1:] == self.training.image_shape else None
        images = load_images(images, layout=layout, value_range=self.value_range, progress=self.progress)
        training, images = in_one_precision(self.training, images)
        check_sets(images, training, "generated", sizes=self.compared.one_size)
        if training is not self.training:
            if self._detections:
                raise InputError("images are float64, earlier ones were float32: use one dtype for all")
            before = dict(self.__dict__)
            try:
                self._prepare(*in_one_precision(training, self._unseen))
            except BaseException:  # such as an index of float32 images: nothing has changed then
                self.__dict__ = before
                raise
        return images

    def _vectors_of(self, images: ImageSet | FeatureSet, which: str, vectors: Any = None) -> FeatureSet | None:
        """The vectors that are compared; None where it is the images themselves."""
        if isinstance(images, FeatureSet):
            return images
        if self.compared.maker is not None:
            return extract(images, self.compared.maker, cache=self.feature_cache, progress=self.progress)
        return self.compared.beside(which, images, vectors)

    def _judge(self, images: ImageSet | FeatureSet, vectors: Any = None) -> Detection:
        return self._decide(images, self._matching.match(self._rows_of(images, "generated", vectors)))

    def _rows_of(self, images: ImageSet | FeatureSet, which: str, vectors: Any = None) -> np.ndarray | Views:
        """What is compared with the training images."""
        found = self._vectors_of(images, which, vectors)
        if found is None:
            return images.images
        if self._folder is None:
            check_comparable(found, self._vectors, which)

        def rows(vectors: FeatureSet) -> np.ndarray:
            return vectors.rows if self._folder is None else self._folder.rows_of(vectors)

        mirrored = None
        if self.flip:
            turned = replace(images, images=mirror(images.images), source="array")
            mirrored = rows(self._vectors_of(turned, which))
        return Views(rows(found), mirrored)

    def _decide(self, images: ImageSet | FeatureSet, found: Matches, look: SecondLook | None = None) -> Detection:
        rule = self.rule
        scores = rule.scores(found, found.neighbors)
        memorized = rule.copies(scores, found.neighbors, self.calibration)
        raw = rule.copies(rule.scores(found, found.raw), found.raw, self.calibration)
        hidden = np.full(len(scores), np.nan)
        if rule.name == "ratio" and self.duplicates == "collapse" and self._matching.search is not None:
            hidden = hidden_radii(self._matching.search, found.nearest, memorized, rule.threshold)
        if look is None:
            look = self._look(images, found, ~memorized)
        near = np.zeros(len(scores), bool) if look is None else ~memorized & self._near.near(look)
        identical = self.duplicates == "keep" or self.duplicate_radius == 0
        settled = rule.settled(found.neighbors, scores, memorized, self.calibration, identical=identical)
        unseen = found.neighbors.unseen
        certified = np.ones(len(scores), bool) if unseen is None else found.neighbors.distances[:, 1] <= unseen
        candidates = found.nearest.indices if self._looks_later else None
        return Detection(
            memorized, raw, found.neighbors, found.raw, hidden, scores, near, settled, certified, look, candidates
        )  # fmt: skip

    def _look(self, images: ImageSet | FeatureSet, found: Matches, wanted: np.ndarray) -> SecondLook | None:
        """What the second look sees of the images that are `wanted`."""
        if not self.second_look:
            return None
        if found.scores is not None:  # of aligned images, the first look is as good
            return SecondLook(found.nearest.indices[:, 0], found.nearest.distances[:, 0], found.scores)
        return look_again(images.images, self.training.images, found.nearest.indices, wanted, self.progress)

    def _judge_holdout(self, unseen: ImageSet | FeatureSet) -> Audit:
        # A threshold is learned from exact distances; then the alarms are those of exact search.
        rows = self._rows_of(unseen, "holdout")
        found = self._matching.match(rows, exactly=self.rule.name == "calibrated")
        originals = self._in_training(unseen, found)
        identical = originals >= 0
        seen = identical
        residuals = np.where(seen, 0.0, np.nan)
        look = self._look(unseen, found, ~seen)
        if look is not None and self.rule.name == "calibrated":
            # Images of the training set, moved or recolored, would set the threshold.
            twins = ~seen & self._near.twins(look)
            originals, residuals = np.where(twins, look.indices, originals), np.where(twins, look.residuals, residuals)
            seen = identical | twins
        kept = np.flatnonzero(~seen)
        if len(kept) == 0:
            raise InputError(
                f"holdout: all {len(unseen):,} images ({unseen.source}) are in the training set "
                f"({self.training.source}): give real images that the model has not seen"
            )
        left_out = tuple(
            SeenImage(
                int(row), unseen.name(int(row)), int(originals[row]), self.training.name(int(originals[row])),
                bool(identical[row]), float(residuals[row]),
            )
            for row in np.flatnonzero(seen)
        )  # fmt: skip
        if self.rule.name == "calibrated":
            try:
                self.calibration = Calibration(self.rule.scores(found, found.neighbors)[kept], self.rule.alarms)
            except InputError as error:
                out = (
                    f" ({len(left_out):,} of {len(unseen):,} are training images and were excluded)" if left_out else ""
                )
                raise InputError(f"{error}{out}") from None
            if look is not None:
                self._near = self._near.calibrated(look.scores[kept], self.rule.alarms)
        detection = self._decide(unseen, found, look).select(kept)
        checked = None
        if self._matching.approximate and self.rule.name != "calibrated":
            strata = strata_of(detection, self.score_threshold)
            drawn = Drawn(self.verify)
            drawn.add(0, strata, unseen.select(kept), rows[kept])
            chosen = drawn.chosen(strata)
            truth = detection.select(chosen)
            if len(chosen):
                truth = self._decide(*self._exactly(drawn, chosen))
            checked = verification_of(detection, strata, chosen, truth)
            detection = detection.replaced(chosen, truth)
        images = unseen.select(kept) if left_out else unseen
        figures = None
        if isinstance(images, ImageSet) and self._training_figures is not None:
            figures = SetFigures.of(images.images, count_identical=True)
        images = UnkeptImages.of(images) if isinstance(images, FeatureSet) else images
        doubts = _doubtful_twins(int((seen & ~identical).sum()), len(unseen))
        return self._audit(
            images, detection, figures, "holdout", warnings=doubts, left_out=left_out, verification=checked
        )

    def _exactly(self, drawn: Drawn, rows: np.ndarray) -> tuple[ImageSet | FeatureSet, Matches]:
        """Some of the images drawn, and what exact search finds."""
        images, views = drawn.take(rows)
        return images, self._matching.match(views, exactly=True)

    def _in_training(self, images: ImageSet | FeatureSet, found: Matches) -> np.ndarray:
        """int64 [n], the training image that an image is, pixel for pixel (or mirrored, with `flip`); −1: none."""
        if isinstance(images, FeatureSet) or self.compared.name == "pixels":
            return np.where(found.raw.squared_distances[:, 0] == 0, found.raw.indices[:, 0], -1)
        first: dict[bytes, int] = {}
        if self._folder is None:
            for row, image in enumerate(self.training.images):
                first.setdefault(hashlib.sha256(np.ascontiguousarray(image).data).digest(), row)

        def of(images: np.ndarray) -> np.ndarray:
            if self._folder is not None:
                return in_folder(self._folder, images)
            keys = (hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images)
            return np.fromiter((first.get(key, -1) for key in keys), np.int64, len(images))

        straight = of(images.images)
        return np.where(straight < 0, of(mirror(images.images)), straight) if self.flip else straight

    def _audit(
        self, images: ImageSet | UnkeptImages, detection: Detection, figures: SetFigures | None, what: str,
        warnings: tuple[str, ...] = (), verification: Verification | None = None, **others: Any,
    ) -> Audit:  # fmt: skip
        if figures is not None:
            sources = (images.source, self.training.source)
            share = float(detection.raw_memorized.mean())
            check_scale(figures, self._training_figures, what, sources, copies=share)
            warnings = (*warnings, *suspicions(figures, self._training_figures))
        found = self._matching.describe()
        if verification is not None:
            found |= {"target_recall": self.recall, **verification.to_dict()}
            warnings = (*warnings, *missed(found))
        warnings = (*warnings, *hidden_copies(detection.hidden))
        for warning in warnings:
            _log.warning("%s: %s", images.source, warning)
        if figures is not None and isinstance(images, ImageSet):
            shape, dtype = images.images.shape, figures.dtype
        elif figures is not None:
            shape, dtype = (figures.total, *self.training.image_shape), figures.dtype
        elif self._folder is not None:
            shape, dtype = (len(images), self._folder.dimension), self._folder.dtype
        else:
            shape, dtype = (len(images), self._vectors.dimension), self._vectors.vectors.dtype
        content = images.fingerprint if isinstance(images, ImageSet) else None
        described = _describe(images, shape, dtype, content)
        looked, settings = None, {**self.settings, "generated": described, "search": found}
        if self._looks_later and detection.look is not None:
            looked = int(np.count_nonzero(~np.isnan(detection.look.scores)))
            settings |= {"second_look": True, "looked_at": looked}
        return Audit(
            memorized=detection.memorized,
            raw_memorized=detection.raw_memorized,
            neighbors=detection.neighbors,
            raw_neighbors=detection.raw_neighbors,
            scores=detection.scores,
            near=detection.near,
            look=detection.look,
            rule=self.rule,
            calibration=self.calibration,
            blind_spots=blind_spots(self.rule, flip=self.flip, looked=detection.look is not None, of=looked),
            duplicate_groups=self.duplicate_groups,
            generated=images,
            training=self.training,
            settings=settings,
            verification=verification,
            warnings=warnings,
            **others,
        )


def audit(
    generated: ImageSource,
    training: ImageSource | None = None,
    *,
    features: Features = "pixels",
    rule: Literal["ratio", "similarity", "calibrated"] = "ratio",
    threshold: float | str | Fraction | None = None,
    alarms: float | None = None,
    duplicates: Literal["collapse", "keep"] = "collapse",
    duplicate_radius: float = 0,
    holdout: ImageSource | None = None,
    flip: bool = False,
    device: str = "auto",
    index: Index = None,
    exact: bool = False,
    verify: int = VERIFIED,
    recall: float = RECALL,
    split_grid: bool = False,
    value_range: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
    second_look: bool = True,
    feature_cache: bool = True,
    progress: Progress | None = None,
) -> Audit:
    """Which generated images are copies of training images; by default by the nearest / second-nearest rule on pixels.

    `CopyDetector` does the same for images that come batch by batch.

    Args:
        generated: The images to audit: anything that `diffmem.load_images` reads, such as a path, an array
            [N, C, H, W], a tensor or an `ImageSet`.
        training: The training images, likewise; None where `index` is a folder that holds them. All sets must agree in
            channels and dtype, and in size unless the features bring images to one.
        features: What is compared: "pixels"; "aligned", pixels after brightness, contrast, color, shift, mirroring and
            small crops have been removed, without a network; "hash", "sscd", "dinov2", "clip", "timm:NAME",
            "torchscript:PATH", "onnx:PATH", a function or an extractor (`diffmem.features.extractor`); "precomputed",
            where all sets are vectors that `diffmem.features.load_features` reads; or the vectors of these images as
            {"generated": …, "training": …, "holdout": …}.
        rule: "ratio": d1/d2 below the threshold, the paper's; "similarity": a cosine above it, or a distance below it;
            "calibrated": the score is lower than the share `alarms` of the holdout images' scores lets expect
            (`diffmem.memorization.rules`).
        threshold: Threshold of the rule: on d1/d2 1/3 by default, the paper's.
        alarms: For rule="calibrated": the share of images that are not copies about which it may be wrong, 0.01 by
            default.
        duplicates: "collapse" takes the second neighbor among the training images that are farther than the duplicate
            radius from the first; "keep" is the paper's rule, to which a copy of a duplicated training image stays
            unseen. `Audit.raw_ratio` is always the latter.
        duplicate_radius: Training images within this distance (rms per value, gray levels for uint8) are duplicates;
            0: identical images.
        holdout: Real images that the model has not seen; their share of "copies" is the rule's false-alarm rate.
            Those that are in the training set, pixel for pixel (or mirrored, with `flip`), are left out and named in
            the holdout's `left_out`; with rule="calibrated" also those that are a training image moved or recolored.
        flip: Compare mirrored generated images too (for models trained with horizontal flips).
        device: "cpu", "cuda", or "auto".
        index: The folder that `diffmem index build` made of the training set, its path or what `diffmem.open_index`
            gives, in place of `training`: images are compared by the features that it holds. Or an index of the
            training set made before (`TrainingIndex`, `ShardedIndex`, `FaissIndex`), or a name:
            "exact", the default, a new `TrainingIndex`; "flat", "ivf", "ivf1024", "hnsw" or a factory string of FAISS,
            a new `FaissIndex`, which may miss neighbors: the interval covers that (`Audit.verification`). An index of
            other images, or of another order, is refused.
        exact: Whether an index folder is searched exactly, though it has codes.
        verify: Of an index that may miss neighbors: how many images are searched exactly, too. What exact search says
            of them is their verdict, and what it says of them as a sample widens the interval of the share of copies
            (`diffmem.memorization.verification`); where all whose verdict is open are searched exactly, the audit is
            exact.
        recall: Of such an index, where it is not fixed how widely it searches: the share of the nearest and second
            nearest training images that it is to find, by which the number of lists and of candidates is chosen on a
            sample of the images.
        split_grid: The generated images are sheets of images in a grid, to be cut into images of the training images'
            size.
        value_range: The values of black and white in sets of floats, such as (-1, 1) or (0, 1), which become gray
            levels (see `load_images`); or one for each, {"generated": (-1, 1), "training": (0, 1)}. Without it floats
            are compared as they are, and refused where they look to be on different scales.
        second_look: Whether images that are not copies by the rule are aligned with their nearest training images:
            those that then resemble one are "near", to be looked at (`Audit.verdicts`). Through an index of features
            the 256 with the lowest scores are, whose nearest training images are read from the index's sources.
        feature_cache: Whether features of networks are kept beside their sources (`diffmem.features.extract`).
        progress: A callback (`diffmem.progress`), or None.

    Returns:
        Which images are copies, how many, and how sure that is.

    Raises:
        InputError: (a ValueError) Empty sets, sets that do not fit together, values that are not finite, fewer than
            two distinct training images, and a holdout set without an image that is not in the training set, or too
            small for the share of alarms.

    Example:
        >>> import diffmem
        >>> digits = diffmem.load_images("builtin:digits")
        >>> diffmem.audit(digits.images[990:1010], digits.images[:1000]).count
        10
    """
    folder = folder_of(index, training)
    compared = Compared.of(features, device) if folder is None else compared_of_folder(folder, features, device)
    detecting: dict[str, Any] = {
        "features": compared, "rule": rule, "threshold": threshold, "alarms": alarms, "duplicates": duplicates,
        "duplicate_radius": duplicate_radius, "flip": flip, "index": index, "device": device, "verify": verify,
        "recall": recall, "exact": exact,
        "second_look": second_look, "feature_cache": feature_cache, "keep_images": True, "progress": progress,
    }  # fmt: skip
    if compared.vectors_only:
        if split_grid or value_range is not None:
            raise InputError("precomputed features are not images: remove split_grid=… and value_range=…")
        if folder is not None:
            detecting["index"], training = folder, None
        detector = CopyDetector(training, holdout=holdout, **detecting)
        detector.update(generated)
        return detector.compute()
    if folder is not None:
        detecting["index"] = folder
    check_rule(compared, rule, threshold, alarms, duplicates, holdout is not None)
    ranges = value_ranges(value_range)

    def load(source: ImageSource, name: str) -> ImageSet:
        return load_images(source, value_range=ranges.get(name), progress=progress)

    generated = load(generated, "generated")
    if folder is not None:
        training = training_of(folder)
    else:
        training = load(training, "training")
    unseen = None if holdout is None else load(holdout, "holdout")
    if split_grid:
        generated = cut_sheets(generated, training.image_shape[1:] if folder is None else folder.image_shape[1:])
    if isinstance(training, ImageSet):
        training, generated, unseen = in_one_precision(training, generated, unseen)
        check_sets(generated, training, "generated", sizes=compared.one_size)
    compared.beside("generated", generated)
    detector = CopyDetector(None if folder is not None else training, holdout=unseen, **detecting)
    detector.update(generated)
    return detector.compute()


def check_rule(
    compared: Compared, rule: str, threshold: Any, alarms: float | None, duplicates: str, holdout: bool
) -> Rule:
    """The rule that is asked for. Raises InputError where there is no such rule."""
    if duplicates not in ("collapse", "keep"):
        raise InputError(f'duplicates must be "collapse" or "keep", got {duplicates!r}')
    return Rule.of(rule, compared.name, compared.metric, threshold, alarms, holdout)


def _doubtful_twins(twins: int, total: int) -> tuple[str, ...]:
    """The warning where so many holdout images were taken for training images that some may be none."""
    if twins <= MOST_TWINS * total:
        return ()
    return (
        f"{twins:,} of {total:,} holdout images resemble a training image once they are aligned, and do not "
        "calibrate: where they are not copies, the rule raises more alarms than were asked for; look at them, or "
        "calibrate with second_look=False",
    )


def _describe(
    images: ImageSet | UnkeptImages, shape: tuple[int, ...], dtype: np.dtype, fingerprint: str | None
) -> dict[str, Any]:
    return {
        "source": images.source,
        "images": shape[0],
        "shape": list(shape[1:]),
        "dtype": str(dtype),
        "skipped": [{"name": s.name, "reason": s.reason} for s in images.skipped],
        "fingerprint": fingerprint,
    }


def _joined(sets: Sequence[ImageSet | UnkeptImages]) -> ImageSet | UnkeptImages:
    """The sets as one."""
    if len(sets) == 1:
        return sets[0]
    names = None
    if any(each.names is not None for each in sets):
        starts = np.cumsum([0, *map(len, sets)])
        names = [
            f"#{start + row}" if each.names is None else each.names[row]
            for start, each in zip(starts.tolist(), sets, strict=False)
            for row in range(len(each))
        ]
    sources = list(dict.fromkeys(each.source for each in sets))
    shared = {
        "names": names,
        "source": sources[0] if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more",
        "skipped": tuple(skipped for each in sets for skipped in each.skipped),
    }
    if not all(isinstance(each, ImageSet) for each in sets):
        return UnkeptImages(total=sum(map(len, sets)), **shared)
    labels = None
    shapes = {None if each.labels is None else (each.labels.shape[1:], each.labels.dtype) for each in sets}
    if len(shapes) == 1 and None not in shapes:
        labels = np.concatenate([each.labels for each in sets])
    notes = tuple(dict.fromkeys(note for each in sets for note in each.notes))
    return ImageSet(np.concatenate([each.images for each in sets]), labels=labels, notes=notes, **shared)
