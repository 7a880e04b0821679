"""Training sets derived from others: the subsets and labels whose influence on memorization the paper studies.

Every function returns a new `ImageSet` and is deterministic: the same arguments give the same pixels and labels on
every machine. Images stay in the order of their source. `derive` chains the functions and keeps a manifest of what was
done, which `diffmem dataset` writes into the archive. The factors are those of Gu et al., arXiv 2310.02664.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from diffmem import __version__
from diffmem.data.classes import class_indices
from diffmem.data.image_set import ImageSet
from diffmem.data.image_source import ImageSource
from diffmem.data.load import load_images
from diffmem.data.storage import allocate
from diffmem.data.write import write_images
from diffmem.errors import InputError
from diffmem.progress import Progress, silent

# The seed that gives the public code's sequence of random labels.
RANDOM_LABEL_SEED = 1024


def first_classes(images: ImageSet, classes: int) -> ImageSet:
    """The images of the `classes` lowest class indices that occur in `images`; labels stay as they are.

    Args:
        images: A set with class indices.
        classes: How many classes to take.

    Raises:
        InputError: There are not so many classes, or the labels are not class indices.
    """
    present = np.unique(class_indices(images, "telling classes apart", any_number=True))
    if not 1 <= classes <= len(present):
        raise InputError(f"{images.source}: {classes} classes cannot be taken: 1 to {len(present):,} are possible")
    return images.select(images.labels <= present[classes - 1])


def one_class(images: ImageSet, class_index: int) -> ImageSet:
    """The images of one class; labels stay as they are.

    Args:
        images: A set with class indices.
        class_index: The class.

    Raises:
        InputError: No image is of that class, or the labels are not class indices.
    """
    chosen = np.flatnonzero(class_indices(images, "a choice of classes", any_number=True) == class_index)
    if not len(chosen):
        raise InputError(f"{images.source}: no image has class {class_index}")
    return images.select(chosen)


def class_balanced(images: ImageSet, size: int, seed: int | None = None) -> ImageSet:
    """The class-balanced subset of `size` images: the first ⌊size / C⌋ of each of the C classes that occur, and as many
    more of the last class (the one of the highest index) as are missing.

    With the same seed, the subset is contained in every larger one whose size is a multiple of C, and in any other that
    takes no fewer images of the last class. (19 images of 10 classes hold 10 of the last class, 20 images hold 2.)

    Args:
        images: A set with class indices.
        size: How many images to take, at least C.
        seed: None takes the first images of each class; a seed takes the first ones in a random order of the set, for
            repetitions with other images of the same distribution.

    Raises:
        InputError: A class has too few images (the message names the largest possible size), there are fewer images
            than classes, or the labels are not class indices.

    Example:
        >>> digits = load_images("builtin:digits")
        >>> np.bincount(class_balanced(digits, 30).labels).tolist()
        [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    """
    labels = class_indices(images, "telling classes apart", any_number=True)
    present, counts = np.unique(labels, return_counts=True)
    share, remainder = divmod(size, len(present))
    if share < 1:
        raise InputError(f"{images.source}: size {size} is less than one image of each of {len(present):,} classes")
    wanted = np.full(len(present), share)
    wanted[-1] += remainder
    if (lacking := np.flatnonzero(wanted > counts)).size:
        fewest = counts.min()
        largest = fewest * len(present) + min(len(present) - 1, counts[-1] - fewest)
        first = lacking[0]
        raise InputError(
            f"{images.source}: size {size:,} needs {wanted[first]:,} images of class {present[first]}, there are only "
            f"{counts[first]:,}: the largest possible size is {largest:,}"
            + (f", and every smaller multiple of {len(present)} is possible" if size < largest else "")
        )
    order = _order(len(images), seed)
    labels = labels[order]
    rows = [order[labels == index][:count] for index, count in zip(present, wanted, strict=True)]
    return images.select(np.sort(np.concatenate(rows)))


def first_images(images: ImageSet, size: int, seed: int | None = None) -> ImageSet:
    """The first `size` images, or the first ones in a random order of the set that `seed` decides.

    Raises `InputError` where there are fewer.
    """
    if not 1 <= size <= len(images):
        raise InputError(f"{images.source}: holds {len(images):,} images: size must be at most {len(images)}")
    return images.select(np.sort(_order(len(images), seed)[:size]))


def has_classes(images: ImageSet) -> bool:
    """Whether the labels of `images` are class numbers."""
    return images.labels is not None and images.labels.ndim == 1


def subset(images: ImageSet, size: int, seed: int | None = None) -> ImageSet:
    """`class_balanced`, or `first_images` where the labels are not class numbers, which a note then says."""
    return class_balanced(images, size, seed) if has_classes(images) else _noted(first_images(images, size, seed), seed)


def _noted(images: ImageSet, seed: int | None) -> ImageSet:
    which = "the first" if seed is None else "random"
    note = f"{images.source}: there are no class numbers to balance by; the subset is {which} {len(images):,} images"
    return replace(images, notes=(*images.notes, note))


def random_labels(images: ImageSet, classes: int, seed: int = RANDOM_LABEL_SEED) -> ImageSet:
    """`images` with uninformative labels: one draw from 0 … `classes` − 1 per image, in order.

    The draws are Python's `random.Random(seed).randint(0, classes - 1)`, which with the default seed is the sequence of
    the paper's public code.

    Args:
        images: Any set; its own labels are replaced.
        classes: C, at least 1.
        seed: Seed of the sequence.

    Raises:
        InputError: `classes` is less than 1.
    """
    if classes < 1:
        raise InputError(f"random labels need at least 1 class, got {classes}")
    draw = random.Random(seed).randint
    return replace(images, labels=np.array([draw(0, classes - 1) for _ in range(len(images))], dtype=np.int64))


def unique_labels(images: ImageSet) -> ImageSet:
    """`images` with label i for image i.

    Args:
        images: Any set; its own labels are replaced.
    """
    return replace(images, labels=np.arange(len(images), dtype=np.int64))


def consecutive_labels(images: ImageSet) -> ImageSet:
    """`images` with their classes numbered 0 … C − 1, in the order of their present numbers."""
    labels = class_indices(images, "numbering classes", any_number=True)
    return replace(images, labels=np.unique(labels, return_inverse=True)[1].astype(np.int64))


def without_labels(images: ImageSet) -> ImageSet:
    """`images` without labels.

    Args:
        images: Any set.
    """
    return replace(images, labels=None)


def at_resolution(images: ImageSet, resolution: int) -> ImageSet:
    """`images` at `resolution`×`resolution` pixels: Lanczos with antialiasing, as `load_images(resize=…)` does it.

    Args:
        images: Any set.
        resolution: Height and width, in pixels.
    """
    return load_images(images, resize=resolution)


def mixed(images: ImageSet, other: ImageSet, share: float, class_index: int, seed: int | None = None) -> ImageSet:
    """`images` with the share α of its images of one class replaced by images of the same class from another set.

    Of the n images of the class, the last r = ⌊α·n + ½⌋ give their places, in order, to the first r of the other set.
    So a larger α keeps what a smaller one replaced; and without seeds, the mixture of a class-balanced subset is
    contained in that of a larger one that contains the subset.

    Args:
        images: A set with class indices.
        other: The same kind and size of images; its images labeled `class_index`, or all of them where it has no
            labels.
        share: α, 0 to 1.
        class_index: The class whose images are replaced.
        seed: "First" and "last" in a random order of each set, rather than in their own.

    Raises:
        InputError: The two sets do not fit each other, `images` lacks the class, or `other` has too few images (the
            message names the largest possible share).
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of replaced images must lie within 0 … 1, got {share}")
    if (images.image_shape, images.images.dtype) != (other.image_shape, other.images.dtype):
        this, that = (
            f"{each.images.dtype} {'×'.join(map(str, each.image_shape))} ({each.source})" for each in (images, other)
        )
        raise InputError(
            f"images of {this} and of {that} cannot be mixed: convert both to one size and color with"
            f" resize={images.image_shape[-1]} and color='rgb' or color='gray'"
        )
    order, other_order = _order(len(images), seed), _order(len(other), seed)
    rows = order[class_indices(images, "telling classes apart", any_number=True)[order] == class_index]
    if not len(rows):
        raise InputError(f"{images.source}: no image has class {class_index}")
    if other.labels is not None:
        other_order = other_order[
            class_indices(other, "telling classes apart", any_number=True)[other_order] == class_index
        ]
    count = int(share * len(rows) + 0.5)
    if count > len(other_order):
        most = f"the largest possible share is {len(other_order) / len(rows):.4g}"
        if not len(other_order):
            most = "without labels, all of its images would count as that class"
        raise InputError(
            f"{other.source}: {count:,} images of class {class_index} are needed,"
            f" there are {len(other_order):,}: {most}"
        )
    out, taken = np.sort(rows[len(rows) - count :]), np.sort(other_order[:count])
    pixels = allocate(images.images.shape, images.images.dtype)
    pixels[:] = images.images
    pixels[out] = other.images[taken]
    names = [images.name(row) for row in range(len(images))]
    for row, source in zip(out.tolist(), taken.tolist(), strict=True):
        names[row] = f"{_base_name(other)}/{other.name(source)}"
    return replace(
        images,
        images=pixels,
        names=names,
        source=f"{images.source} mixed with {other.source}",
        skipped=images.skipped + other.skipped,
        notes=images.notes + other.notes,
    )


class Mix(NamedTuple):
    """What `derive` mixes in: a share of the images of one class comes from another set.

    Attributes:
        other: Anything that `load_images` takes.
        share: α, 0 to 1.
        class_index: The class whose images are replaced.
    """

    other: ImageSource
    share: float
    class_index: int


class DerivedSet(NamedTuple):
    """A derived training set and how it was made.

    Attributes:
        images: The set.
        manifest: JSON-ready. `source` (base name, shape, fingerprint and the options it was read with), `operations`
            (the functions of this module, in order, with their arguments), `result` (shape, number of classes,
            fingerprint) and `diffmem` (version).
    """

    images: ImageSet
    manifest: dict[str, Any]

    def write(self, path: str | os.PathLike[str], progress: Progress = silent) -> None:
        """Write the images and the manifest by `write_images`: the same sources and arguments give the same bytes."""
        write_images(self.images, path, manifest=self.manifest, progress=progress)


def derive(
    source: ImageSource,
    *,
    limit: int | None = None,
    color: str | None = None,
    resolution: int | None = None,
    center_crop: bool = False,
    value_range: tuple[float, float] | None = None,
    alpha: str | None = None,
    key: str | None = None,
    layout: str | None = None,
    skip_bad: bool = False,
    only_class: int | None = None,
    classes: int | None = None,
    size: int | None = None,
    mix: Mix | None = None,
    labels: str | None = None,
    label_seed: int = RANDOM_LABEL_SEED,
    seed: int | None = None,
    progress: Progress = silent,
) -> DerivedSet:
    """The training set that the options make of `source`, with its manifest.

    The order is fixed, that of the arguments: `source` is read, its first `limit` images if given, in `color` and at
    `resolution`, so that every image is resampled once; then `one_class`, `first_classes`, `class_balanced` to `size`
    (`first_images` where the labels are not class numbers), `mixed`, and the labels. A mixture's other set is read in
    the same color and size. `DatasetSpec` holds a source that has a name and these options, as JSON too.

    Args:
        source: Anything that `load_images` takes.
        limit: As for `load_images`.
        color: As for `load_images`.
        resolution: Height and width, in pixels.
        center_crop: As for `load_images`.
        value_range: As for `load_images`.
        alpha: As for `load_images`; also of the mixture's other set.
        key: As for `load_images`; of the source alone.
        layout: As for `load_images`; of the source alone.
        skip_bad: As for `load_images`; also of the mixture's other set.
        only_class: Only the images of this class.
        classes: Only so many classes, the first ones.
        size: A class-balanced subset of so many images.
        mix: What to mix in.
        labels: None: those of the source, where it has some; "true": those of the source, which must have some;
            "consecutive": those of the source, its classes numbered 0 … C − 1; "none"; "random:C"; "unique".
        label_seed: Seed of random labels.
        seed: Seed of `class_balanced` and `mixed`; None takes first images.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The images and the manifest; its `write` stores both.

    Raises:
        InputError: As the functions do, and for other `labels`.

    Example:
        >>> made = derive("builtin:digits", size=20, labels="random:2")
        >>> [step["operation"] for step in made.manifest["operations"]]
        ['class_balanced', 'random_labels']
    """
    kind, label_classes = parse_labels(labels) if labels is not None else (None, None)
    options: dict[str, Any] = {"color": "grey" if color == "gray" else color, "resize": resolution}
    # Only where they are given, so that manifests of sets made without them stay as they are.
    given = {"center_crop": center_crop, "value_range": value_range, "alpha": alpha, "skip_bad": skip_bad}
    options |= {name: value for name, value in given.items() if value}
    own = {**options, **{name: value for name, value in (("key", key), ("layout", layout)) if value is not None}}
    images = load_images(source, limit=limit, **own, progress=progress)
    if kind == "true" and images.labels is None:
        class_indices(images, "labels='true'")
    manifest = {"source": {**_description(images), "name": _base_name(images), "options": {"limit": limit, **own}}}
    operations: list[dict[str, Any]] = []

    def apply(function: Callable[..., ImageSet], **arguments: Any) -> None:
        nonlocal images
        images = function(images, **arguments)
        if "other" in arguments:
            other = arguments["other"]
            arguments["other"] = {**_description(other), "name": _base_name(other), "options": options}
        operations.append({"operation": function.__name__, **arguments})

    if only_class is not None:
        apply(one_class, class_index=only_class)
    if classes is not None:
        apply(first_classes, classes=classes)
    if size is not None:
        if has_classes(images):
            apply(class_balanced, size=size, seed=seed)
        else:
            apply(first_images, size=size, seed=seed)
            images = _noted(images, seed)
    if mix is not None:
        other = load_images(mix.other, **options, progress=progress)
        apply(mixed, other=other, share=mix.share, class_index=mix.class_index, seed=seed)
    if kind == "random":
        apply(random_labels, classes=label_classes, seed=label_seed)
    elif kind == "unique":
        apply(unique_labels)
    elif kind == "consecutive":
        apply(consecutive_labels)
    elif kind == "none":
        apply(without_labels)
    return DerivedSet(
        images, {**manifest, "operations": operations, "result": _description(images), "diffmem": __version__}
    )


def parse_labels(text: str) -> tuple[str, int | None]:
    """The kind of labels and None, or ("random", C) for `random:C`; raises `InputError`."""
    kind, colon, classes = text.partition(":")
    if kind == "random" and classes.isascii() and classes.isdigit() and int(classes) >= 1:
        return kind, int(classes)
    if kind in ("true", "consecutive", "none", "unique") and not colon:
        return kind, None
    raise InputError(f"labels must be true, consecutive, none, unique or random:C with C at least 1, not {text!r}")


def _order(count: int, seed: int | None) -> np.ndarray:
    """The numbers below `count`, in an order that `seed` decides; without one, as they are."""
    return np.arange(count) if seed is None else np.array(random.Random(seed).sample(range(count), count))


def _base_name(images: ImageSet) -> str:
    """What the source is called, without the folders above it: the same files elsewhere give the same manifest."""
    return os.path.basename(os.path.abspath(images.source))


def _description(images: ImageSet) -> dict[str, Any]:
    return {
        "shape": list(images.images.shape),
        "dtype": str(images.images.dtype),
        "classes": None if images.labels is None else len(np.unique(images.labels, axis=0)),
        "fingerprint": images.fingerprint,
    }
