"""The decision: which generated images are copies of training images, as they come (`CopyDetector`) or of a whole set
(`audit`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffmem.data import ImageSet, load_images
from diffmem.data.grid import rows_and_columns
from diffmem.data.grid import split_grid as cut_sheets
from diffmem.errors import InputError
from diffmem.html_report import percent
from diffmem.memorization.criteria import parse_threshold, ratio_rule
from diffmem.memorization.hidden import NEIGHBORS, hidden_copies, hidden_radii
from diffmem.memorization.inputs import check_sets, in_one_precision, value_ranges
from diffmem.memorization.plausibility import SetFigures, check_scale, suspicions
from diffmem.memorization.result import Audit, SeenImage, UnkeptImages
from diffmem.memorization.statistics import CopyRate, ReportsRate
from diffmem.progress import Progress, silent
from diffmem.search import (
    DistinctNeighbors,
    FaissIndex,
    FaissStats,
    Neighbors,
    SearchIndex,
    TrainingIndex,
    check_index,
    faiss_factory,
    find_duplicates,
)

if TYPE_CHECKING:
    from diffmem.data import ImageSource

LOOKED_AT = 16  # images at the beginning that may turn out to be sheets
LEAST_RECALL = 0.95  # of an approximate search, below which the verdict is not to be relied on


@dataclass(frozen=True)
class Detection(ReportsRate):
    """What was decided about some images. Per-image arrays follow their order.

    Attributes:
        memorized: bool [n], by the detector's rule.
        raw_memorized: bool [n], by the paper's rule, duplicates left in.
        neighbors: The nearest training image, and the nearest of those that are farther than the duplicate radius
            from it (duplicates left in, where the detector keeps them).
        raw_neighbors: The two nearest training images, duplicates left in.
        hidden: float64 [n], the least duplicate radius with which the rule counts an image that is a hidden copy
            (`diffmem.memorization.hidden`), else NaN.
        recall: What an index that may miss neighbors measured of itself, for each search and orientation.
    """

    memorized: np.ndarray
    raw_memorized: np.ndarray
    neighbors: Neighbors
    raw_neighbors: Neighbors
    hidden: np.ndarray
    recall: tuple[tuple[FaissStats, ...], ...] = ()

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
        return cls(
            np.concatenate([part.memorized for part in parts]),
            np.concatenate([part.raw_memorized for part in parts]),
            Neighbors.join([part.neighbors for part in parts]),
            Neighbors.join([part.raw_neighbors for part in parts]),
            np.concatenate([part.hidden for part in parts]),
            tuple(search for part in parts for search in part.recall),
        )

    def select(self, rows: np.ndarray) -> Detection:
        """The decisions about the images of `rows`."""
        taken = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "recall"}
        arrays = {
            name: values.select(rows) if isinstance(values, Neighbors) else values[rows]
            for name, values in taken.items()
        }
        return Detection(**arrays, recall=self.recall)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays by name, for a file; `from_arrays` reads them."""
        recall = [[asdict(stats) for stats in search] for search in self.recall]
        arrays = {"recall": np.array(json.dumps(recall))}
        for each in fields(self):
            values = getattr(self, each.name)
            if isinstance(values, Neighbors):
                parts = {f"{each.name}.{part.name}": getattr(values, part.name) for part in fields(values)}
                arrays |= {name: np.asarray(part) for name, part in parts.items() if part is not None}
            elif each.name != "recall":
                arrays[each.name] = values
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Detection:
        """The decisions that `to_arrays` gave; other names are left alone."""

        def neighbors(name: str) -> Neighbors:
            mirrored = arrays.get(f"{name}.mirrored")
            indices, squared = (arrays[f"{name}.{part}"] for part in ("indices", "squared_distances"))
            return Neighbors(indices, squared, int(arrays[f"{name}.dimension"]), mirrored)

        recall = json.loads(str(arrays["recall"]))
        return cls(
            arrays["memorized"],
            arrays["raw_memorized"],
            neighbors("neighbors"),
            neighbors("raw_neighbors"),
            arrays["hidden"],
            tuple(tuple(FaissStats(**stats) for stats in search) for search in recall),
        )


class CopyDetector(ReportsRate):
    """Finds copies of training images among generated images that come batch by batch.

    It holds all that decides a verdict: the training set's index and duplicates, threshold and mirroring. An image is
    a copy where d1/d2, the distances to the nearest and the second nearest training image, is below the threshold (see
    `diffmem.memorization.criteria`). Each image is searched once. `compute` is the `diffmem.audit` of all images so
    far, whatever batches they came in; only the recall of an index that may miss neighbors is measured batch by batch.
    A detector can be pickled; a progress callback does not travel with it.

    Args:
        training: The training images: anything that `diffmem.load_images` reads.
        threshold: On d1/d2, such as 1/3 (the paper's), "1/3" or Fraction(1, 3).
        duplicates: "collapse" takes the second neighbor among the training images that are farther than the duplicate
            radius from the first; "keep" is the paper's rule, to which a copy of a duplicated training image stays
            unseen.
        duplicate_radius: Training images within this distance are duplicates: root mean square per value, gray levels
            for uint8 images; 0: identical images.
        flip: Whether mirrored generated images are compared too, for models trained with horizontal flips.
        holdout: Real images that the model has not seen; see `diffmem.audit`. They are audited at once.
        index: An index of the training set made before, or a name; see `diffmem.audit`.
        device: "cpu", "cuda", or "auto".
        value_range: The values of black and white in sets of floats; see `diffmem.audit`.
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
        training: ImageSource,
        *,
        threshold: float | str | Fraction = 1 / 3,
        duplicates: Literal["collapse", "keep"] = "collapse",
        duplicate_radius: float = 0,
        flip: bool = False,
        holdout: ImageSource | None = None,
        index: SearchIndex | str | None = None,
        device: str = "auto",
        value_range: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
        keep_images: bool = False,
        progress: Progress | None = None,
    ):
        self.threshold = check_rule(threshold, duplicates)
        self.duplicates, self.duplicate_radius, self.flip = duplicates, duplicate_radius, flip
        self.keep_images, self.progress = keep_images, progress or silent
        ranges = value_ranges(value_range)
        self.value_range = ranges.get("generated")
        training = load_images(training, value_range=ranges.get("training"), progress=self.progress)
        unseen = None
        if holdout is not None:
            unseen = load_images(holdout, value_range=ranges.get("holdout"), progress=self.progress)
            training, unseen = in_one_precision(training, unseen)
            check_sets(unseen, training, "holdout")
        self._asked = index, device
        self._prepare(training, unseen)
        self.reset()

    def _prepare(self, training: ImageSet, unseen: ImageSet | None) -> None:
        """Index and duplicates of the training set, and the audit of the holdout set."""
        if len(training) == 0:
            raise InputError(f"the training set ({training.source}) is empty")
        self.training, self._unseen = training, unseen
        index, device = self._asked
        if index is None or index == "exact":
            index = TrainingIndex(training, device=device)
        elif isinstance(index, str):
            factory = faiss_factory(index, len(training))
            index = FaissIndex(training, factory, device=device, progress=self.progress)
        else:
            check_index(index, training)
        self.index = index
        exact = None if self.duplicate_radius == 0 or isinstance(index, FaissIndex) else index
        self.duplicate_groups = find_duplicates(
            training.images, self.duplicate_radius, flip=self.flip, index=exact, progress=self.progress
        )
        if self.duplicate_groups.distinct < 2:
            raise InputError(
                f"the rule needs at least two distinct training images; {training.source} holds {len(training)} "
                f"image(s), {self.duplicate_groups.distinct} distinct"
            )
        self._search = self._new_search()
        self._training_figures = SetFigures.of(training.images)
        self.settings = {
            "threshold": str(self.threshold),
            "duplicates": self.duplicates,
            "duplicate_radius": float(self.duplicate_radius),
            "flip": self.flip,
            "device": str(index.device),
            "training": _describe(training, training.images.shape, training.images.dtype, training.fingerprint),
        }
        self.holdout = None if unseen is None else self._judge_holdout(unseen)

    def _new_search(self) -> DistinctNeighbors:
        return DistinctNeighbors(
            self.index,
            self.training.images,
            self.duplicate_groups,
            radius=self.duplicate_radius,
            flip=self.flip,
            progress=self.progress,
        )

    def reset(self) -> None:
        """Forgets the generated images; training set, index and the audit of the holdout set stay."""
        self._detections: list[Detection] = []
        self._sets: list[ImageSet | UnkeptImages] = []
        self._figures = SetFigures(count_identical=True)
        self._first: list[np.ndarray] = []
        self._sheets: tuple[int, int] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the verdict of an image, in JSON types: the same for detectors that agree about every image."""
        rule = {name: value for name, value in self.settings.items() if name not in ("device", "training")}
        index = getattr(self.index, "factory", "exact")
        return {**rule, "index": index, "training": self.training.fingerprint}

    @property
    def rate(self) -> CopyRate:
        """How many of the images so far are copies."""
        return CopyRate(sum(each.count for each in self._detections), self._figures.total)

    def judge(self, images: ImageSource) -> Detection:
        """Decides about some images without adding them to those that `compute` audits.

        Args:
            images: As for `update`.

        Raises:
            InputError: They do not fit the training images.
        """
        return self._judge(self._fitting(images).images)

    def update(self, images: ImageSource, detection: Detection | None = None) -> Detection:
        """Adds images and decides about them.

        Args:
            images: A batch of generated images: an array [n, C, H, W], a tensor, an `ImageSet`, or anything else that
                `diffmem.load_images` reads; uint8, or floats where the training images are floats (or `value_range`
                is given).
            detection: What `judge` decided about these images, if it was asked: they are not searched again.

        Returns:
            What was decided about these images.

        Raises:
            InputError: They do not fit the training images, or the decision does not fit them.
        """
        own = isinstance(images, ImageSet)
        images = self._fitting(images)
        if detection is None:
            detection = self._judge(images.images)
        elif len(detection) != len(images):
            raise InputError(f"detection decides about {len(detection):,} images, given with {len(images):,}")
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
            raise InputError("there are no generated images to audit: update() comes before compute()")
        joined = Detection.join(self._detections)
        self._detections = [joined]
        generated = _joined(self._sets)
        self._sets = [generated]
        sheets = self._suspected_sheets()
        return self._audit(generated, joined, self._figures, "generated", warnings=sheets, holdout=self.holdout)

    def _suspected_sheets(self) -> tuple[str, ...]:
        """The warning where the images, though brought to the training images' size, look like sheets of many."""
        sheets = self._sheets or rows_and_columns(np.concatenate(self._first))
        if sheets is None or sheets == (self.training.sheets or rows_and_columns(self.training.images[:LOOKED_AT])):
            return ()
        return (
            f"the images look like sheets of {sheets[0]}x{sheets[1]} images in a grid, which hide every copy on them: "
            "leave them at their size and cut them apart with split_grid=True.",
        )

    def __getstate__(self) -> dict[str, Any]:
        # The search holds the training images once more.
        return {**self.__dict__, "progress": silent, "_search": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._search = self._new_search()

    def _fitting(self, images: ImageSource) -> ImageSet:
        """The images as a set that fits the training set."""
        # An array that looks like the training images is what it looks like, whatever its layout could be.
        layout = "NCHW" if tuple(getattr(images, "shape", ()))[1:] == self.training.image_shape else None
        images = load_images(images, layout=layout, value_range=self.value_range, progress=self.progress)
        training, images = in_one_precision(self.training, images)
        check_sets(images, training, "generated")
        if training is not self.training:
            if self._detections:
                raise InputError("images are float64, those before were float32: give all in one precision")
            before = dict(self.__dict__)
            try:
                self._prepare(*in_one_precision(training, self._unseen))
            except BaseException:  # such as an index of float32 images: nothing has changed then
                self.__dict__ = before
                raise
        return images

    def _judge(self, images: np.ndarray) -> Detection:
        search, collapse = self._search, self.duplicates == "collapse"
        # More than the rule's two: copies of images that the training set holds in several versions show there.
        nearest = search.nearest(images, min(NEIGHBORS, len(self.training)) if collapse else 2)
        recall = (search.recall,) if isinstance(self.index, FaissIndex) else ()
        raw = nearest.first(2)
        raw_memorized = ratio_rule(raw.squared_distances, self.threshold)
        if not collapse:
            return Detection(raw_memorized, raw_memorized, raw, raw, np.full(len(images), np.nan), recall)
        chosen = search.outside_duplicates(images, raw)
        memorized = ratio_rule(chosen.squared_distances, self.threshold)
        hidden = hidden_radii(search, nearest, memorized, self.threshold)
        return Detection(memorized, raw_memorized, chosen, raw.copy(), hidden, recall)

    def _judge_holdout(self, unseen: ImageSet) -> Audit:
        detection = self._judge(unseen.images)
        kept, detection, left_out = _without_seen(unseen, detection, self.training)
        figures = SetFigures.of(kept.images, count_identical=True)
        return self._audit(kept, detection, figures, "holdout", left_out=left_out)

    def _audit(
        self, images: ImageSet | UnkeptImages, detection: Detection, figures: SetFigures, what: str,
        warnings: tuple[str, ...] = (), **others: Any,
    ) -> Audit:  # fmt: skip
        sources = (images.source, self.training.source)
        share = float(detection.raw_memorized.mean())
        check_scale(figures, self._training_figures, what, sources, copies=share)
        found = _describe_search(self.index, detection.recall)
        warnings = (
            *warnings,
            *suspicions(figures, self._training_figures),
            *_missed(found),
            *hidden_copies(detection.hidden),
        )
        shape = (figures.total, *self.training.image_shape)
        fingerprint = images.fingerprint if isinstance(images, ImageSet) else None
        described = _describe(images, shape, figures.dtype, fingerprint)
        return Audit(
            memorized=detection.memorized,
            raw_memorized=detection.raw_memorized,
            neighbors=detection.neighbors,
            raw_neighbors=detection.raw_neighbors,
            duplicate_groups=self.duplicate_groups,
            generated=images,
            training=self.training,
            settings={**self.settings, "generated": described, "search": found},
            warnings=warnings,
            **others,
        )


def audit(
    generated: ImageSource,
    training: ImageSource,
    *,
    threshold: float | str | Fraction = 1 / 3,
    duplicates: Literal["collapse", "keep"] = "collapse",
    duplicate_radius: float = 0,
    holdout: ImageSource | None = None,
    flip: bool = False,
    device: str = "auto",
    index: SearchIndex | str | None = None,
    split_grid: bool = False,
    value_range: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Which generated images are copies of training images, by the nearest / second-nearest rule.

    `CopyDetector` does the same for images that come batch by batch.

    Args:
        generated: The images to audit: anything that `diffmem.load_images` reads, such as a path, an array
            [N, C, H, W], a tensor or an `ImageSet`.
        training: The training images, likewise. All sets must agree in size, channels and dtype.
        threshold: On d1/d2 (see `diffmem.memorization.criteria`); 1/3 in the paper.
        duplicates: "collapse" takes the second neighbor among the training images that are farther than the duplicate
            radius from the first; "keep" is the paper's rule, to which a copy of a duplicated training image stays
            unseen. `Audit.raw_ratio` is always the latter.
        duplicate_radius: Training images within this distance (rms per value, gray levels for uint8) are duplicates;
            0: identical images.
        holdout: Real images that the model has not seen; their share of "copies" is the rule's false-alarm rate.
            Those that are in the training set, pixel for pixel (or mirrored, with `flip`), are left out and named in
            the holdout's `left_out`.
        flip: Compare mirrored generated images too (for models trained with horizontal flips).
        device: "cpu", "cuda", or "auto".
        index: An index of the training set made before (`TrainingIndex`, `ShardedIndex`, `FaissIndex`), or a name:
            "exact", the default, a new `TrainingIndex`; "flat", "ivf", "ivf1024", "hnsw" or a factory string of FAISS,
            a new `FaissIndex`, which may miss neighbors: how many is measured on a sample and is in
            `settings["search"]`. An index of other images, or of another order, is refused.
        split_grid: The generated images are sheets of images in a grid, to be cut into images of the training images'
            size.
        value_range: The values of black and white in sets of floats, such as (-1, 1) or (0, 1), which become gray
            levels (see `load_images`); or one for each, {"generated": (-1, 1), "training": (0, 1)}. Without it floats
            are compared as they are, and refused where they look to be on different scales.
        progress: A callback (`diffmem.progress`), or None.

    Returns:
        Which images are copies, how many, and how sure that is.

    Raises:
        InputError: (a ValueError) Empty sets, sets that do not fit together, values that are not finite, fewer than
            two distinct training images, and a holdout set without an image that is not in the training set.

    Example:
        >>> import diffmem
        >>> digits = diffmem.load_images("builtin:digits")
        >>> diffmem.audit(digits.images[990:1010], digits.images[:1000]).count
        10
    """
    check_rule(threshold, duplicates)
    ranges = value_ranges(value_range)

    def load(source: ImageSource, name: str) -> ImageSet:
        return load_images(source, value_range=ranges.get(name), progress=progress)

    training, generated = load(training, "training"), load(generated, "generated")
    unseen = None if holdout is None else load(holdout, "holdout")
    if split_grid:
        generated = cut_sheets(generated, training.image_shape[1:])
    training, generated, unseen = in_one_precision(training, generated, unseen)
    check_sets(generated, training, "generated")
    detector = CopyDetector(
        training, threshold=threshold, duplicates=duplicates, duplicate_radius=duplicate_radius, flip=flip,
        holdout=unseen, index=index, device=device, keep_images=True, progress=progress,
    )  # fmt: skip
    detector.update(generated)
    return detector.compute()


def check_rule(threshold: float | str | Fraction, duplicates: str) -> Fraction:
    """The threshold as a fraction. Raises InputError where there is no such rule."""
    exact = parse_threshold(threshold)
    if duplicates not in ("collapse", "keep"):
        raise InputError(f'duplicates must be "collapse" or "keep", got {duplicates!r}')
    return exact


def _without_seen(
    holdout: ImageSet, detection: Detection, training: ImageSet
) -> tuple[ImageSet, Detection, tuple[SeenImage, ...]]:
    """The holdout images that are not in the training set, what was decided about them, and those that are."""
    nearest = detection.raw_neighbors
    seen = nearest.squared_distances[:, 0] == 0
    if seen.all():
        raise InputError(
            f"holdout: all {len(holdout):,} images ({holdout.source}) are images of the training set "
            f"({training.source}): give real images that the model has not seen"
        )
    if not seen.any():
        return holdout, detection, ()
    left_out = tuple(
        SeenImage(int(row), holdout.name(int(row)), int(column), training.name(int(column)))
        for row, column in zip(np.flatnonzero(seen), nearest.indices[seen, 0], strict=True)
    )
    return holdout.select(np.flatnonzero(~seen)), detection.select(np.flatnonzero(~seen)), left_out


def _describe_search(index: SearchIndex, recall: Sequence[tuple[FaissStats, ...]]) -> dict[str, Any]:
    """How the neighbors were found, and what share of them where some may have been missed: over all searches, in the
    orientation where it is least."""
    if not isinstance(index, FaissIndex):
        return {"method": "exact"}
    samples = [[stats.sample for stats in orientation] for orientation in zip(*recall, strict=True)]

    def share(name: str) -> float:
        found = [
            sum(round(getattr(stats, name) * stats.sample) for stats in orientation)
            for orientation in zip(*recall, strict=True)
        ]
        return min(count / sum(sample) for count, sample in zip(found, samples, strict=True))

    return {
        "method": "faiss",
        "index": index.factory,
        "recall_nearest": share("recall_nearest"),
        "recall_second": share("recall_second"),
        "recall_sample": min(map(sum, samples)),
    }


def _missed(search: dict[str, Any]) -> tuple[str, ...]:
    """The warning where so many neighbors were missed that the verdict hangs on it."""
    if search["method"] == "exact" or min(search["recall_nearest"], search["recall_second"]) >= LEAST_RECALL:
        return ()
    return (
        f"FAISS ({search['index']}) found {percent(search['recall_nearest'])} of the nearest and "
        f"{percent(search['recall_second'])} of the second nearest training images ({search['recall_sample']:,} "
        "images searched exactly): a missed nearest image hides a copy, a missed second one makes a false alarm; "
        "search exactly, or with an index that looks farther",
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
