"""The pictures of an audit's page: generated images, the training image nearest to each, aligned, and what differs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.data import ImageSet
from diffmem.data.adapt import adapt
from diffmem.data.decode import PixelOptions
from diffmem.indexes.originals import SECONDS
from diffmem.memorization.second_look import LEAST_SIDE
from diffmem.plotting import data_url
from diffmem.progress import silent

if TYPE_CHECKING:
    from diffmem.memorization.result import Audit

READ_AHEAD = 2**26  # bytes of training images that are read from the sources of an index at once
PICTURE_BUDGET = 3_600_000  # bytes of embedded pictures, so that the page stays below 5 MB whatever the images are


@dataclass(frozen=True)
class Triple:
    """One line of a gallery.

    Attributes:
        row: Row of the generated image.
        name: Its name.
        verdict: "copy", "near" or "not a copy".
        score: By the rule, and `p_value` of calibrated ones.
        look: Score of the second look where that is what made it near, else None.
        pictures: The image, the training image aligned to it, and the absolute difference, as data URLs.
        training_name: Name of the training image.
        how: How it was aligned, in words.
    """

    row: int
    name: str
    verdict: str
    score: float
    p_value: float | None
    look: float | None
    pictures: tuple[str, str, str]
    training_name: str
    how: str


def partner(audit: Audit, row: int) -> int:
    """The training image that a generated image is shown with."""
    return int(audit.look.indices[row] if audit.near[row] and audit.look else audit.neighbors.indices[row, 0])


def surest_first(audit: Audit) -> np.ndarray:
    """All rows, lowest score first."""
    return np.argsort(audit.scores, kind="stable")


def most_alike_near(audit: Audit, count: int) -> list[int]:
    """Rows of images that are near, those first that are most like a training image once aligned."""
    near = np.flatnonzero(audit.near)
    if audit.look is not None:
        near = near[np.argsort(audit.look.scores[near], kind="stable")]
    return near[:count].tolist()


def beside_threshold(audit: Audit, count: int) -> list[int]:
    """`count` rows on each side of the threshold, closest to it in the middle, without those that are near."""
    order = surest_first(audit)
    copies, others = order[audit.memorized[order]], order[~audit.memorized[order] & ~audit.near[order]]
    return [int(row) for row in (*copies[-count:], *others[:count])]


class Gallery:
    """Pictures as data URLs, until the budget of the page is spent; then there are none."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit
        self.verdicts, self.p_values = audit.verdicts, audit.p_values
        self.left = PICTURE_BUDGET
        self.encoded: dict[tuple[str, int], str] = {}
        self.known: dict[int, Triple | None] = {}
        self.scale = _float_scale(audit.training) if isinstance(audit.training, ImageSet) else (0.0, 255.0)
        # Images of an index of features are read from its sources, as long as that does not take too long.
        self.originals = getattr(audit.training, "originals", None)
        self._ends = time.monotonic() + SECONDS

    @property
    def missing(self) -> str:
        """Which training images could not be read from the sources of an index, as one sentence; or empty."""
        return "" if self.originals is None else self.originals.said()

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Training images that will be shown, most important first: each source is then opened once.

        Args:
            indices: In the training set.
        """
        if self.originals is not None and isinstance(self.audit.generated, ImageSet):
            self._read(list(dict.fromkeys(indices))[: max(64, READ_AHEAD // self.audit.generated.images[:1].nbytes)])

    def _read(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        assert self.originals is not None
        found: dict[int, np.ndarray] = self.originals.read(indices, self._ends)
        return found

    def generated(self, row: int) -> str | None:
        if not isinstance(self.audit.generated, ImageSet):
            return None  # they were not kept
        return self._picture("generated", self.audit.generated, row)

    def training(self, index: int) -> str | None:
        if not isinstance(self.audit.training, ImageSet) and self.originals is None:
            return None  # there are vectors alone
        return self._picture("training", self.audit.training, index)

    def triples(self, rows: list[int]) -> list[Triple]:
        """Of so many of the rows as the page has room for."""
        audit = self.audit
        if not isinstance(audit.generated, ImageSet):
            return []
        if not isinstance(audit.training, ImageSet) and self.originals is None:
            return []
        new = [row for row in rows if row not in self.known]
        for start in range(0, len(new), 64):
            self._make(new[start : start + 64])
        shown = []
        for triple in (self.known[row] for row in rows):
            if triple is None:
                continue  # its training image cannot be had
            size = sum(map(len, triple.pictures))
            if size > self.left:
                break  # the page is full
            self.left -= size
            shown.append(triple)
        return shown

    def _make(self, rows: list[int]) -> None:
        audit = self.audit
        indices = [partner(audit, row) for row in rows]
        if self.originals is None:
            training = audit.training.images[indices]
        else:
            self.known |= dict.fromkeys(rows)
            form = audit.generated.image_shape
            found = {index: _in_form(image, form) for index, image in self._read(indices).items()}
            pairs = [(row, index) for row, index in zip(rows, indices, strict=True) if index in found]
            if not pairs:
                return
            rows, indices = (list(each) for each in zip(*pairs, strict=True))
            training = np.stack([found[index] for index in indices])
        generated = audit.generated.images[rows]
        aligned, differences, words = _aligned(generated, training)
        for at, (row, index) in enumerate(zip(rows, indices, strict=True)):
            looked = audit.near[row] and audit.look is not None
            self.known[row] = Triple(
                row=row,
                name=audit.generated.name(row),
                verdict=self.verdicts[row],
                score=float(audit.scores[row]),
                p_value=None if self.p_values is None else float(self.p_values[row]),
                look=float(audit.look.scores[row]) if looked else None,
                pictures=(
                    self._encode(generated[at]), self._encode(aligned[at]), self._encode(differences[at], zero=True),
                ),
                training_name=audit.training.name(index),
                how=words[at],
            )  # fmt: skip

    def _picture(self, kind: str, images: Any, index: int) -> str | None:
        key = (kind, index)
        if key not in self.encoded:
            pixels = images.images[index] if isinstance(images, ImageSet) else self._read([index]).get(index)
            if pixels is None:
                return None
            url = self._encode(pixels)
            if len(url) > self.left:
                return None
            self.encoded[key] = url
        # A picture that is shown again is embedded again: its bytes count each time.
        if len(self.encoded[key]) > self.left:
            return None
        self.left -= len(self.encoded[key])
        return self.encoded[key]

    def _encode(self, image: np.ndarray, zero: bool = False) -> str:
        """zero: the image is a difference, and 0 is black."""
        if image.dtype != np.uint8:
            low, high = self.scale
            image = np.clip((image - (0 if zero else low)) / (high - low) * 255, 0, 255).round().astype(np.uint8)
        return data_url(image)


def _aligned(generated: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Training images brought to generated ones, what differs, and how that was done."""
    from diffmem.features.aligned import align_pairs

    if generated.shape != training.shape:
        training = _resized(training, generated.shape[2:])
    exact = (generated == training).all(axis=(1, 2, 3))
    if min(generated.shape[2:]) < LEAST_SIDE:
        return training, _difference(generated, training), ["as it is"] * len(generated)
    found = align_pairs(generated, training)
    aligned, differences = np.array(found.aligned_training), np.array(found.difference)
    plain = _difference(generated, training)
    # Pixels that agree better as they are need no alignment.
    straight = exact | (_energy(plain) <= _energy(differences))
    aligned[straight], differences[straight] = training[straight], plain[straight]
    words = ["as it is" if straight[at] else _in_words(found, at) for at in range(len(generated))]
    return aligned, differences, words


def _energy(images: np.ndarray) -> np.ndarray:
    return np.square(images.astype(np.float64)).sum(axis=(1, 2, 3))


def _in_words(found: Any, at: int) -> str:
    parts = ["mirrored"] if found.mirrored[at] else []
    if abs(found.scale[at] - 1) > 0.01:
        parts.append(
            f"enlarged {found.scale[at]:.2f} times" if found.scale[at] > 1 else f"reduced {found.scale[at]:.2f} times"
        )
    down, right = (float(value) for value in found.shift[at])
    moves = [f"{abs(down):.2g} px {'down' if down > 0 else 'up'}"] if abs(down) >= 0.5 else []
    moves += [f"{abs(right):.2g} px {'right' if right > 0 else 'left'}"] if abs(right) >= 0.5 else []
    if moves:
        parts.append("moved " + " and ".join(moves))
    if (np.abs(found.gain[at] - 1) > 0.1).any() or (np.abs(found.offset[at]) > 8).any():
        parts.append("recolored" if len(found.gain[at]) > 1 else "brightness changed")
    return ", ".join(parts) or "as it is"


def _difference(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    if some.dtype == np.uint8:
        return np.maximum(some, others) - np.minimum(some, others)
    return np.abs(some - others)


def _resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import torch

    values = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(images)).float(), tuple(size), mode="bilinear", antialias=True, align_corners=False
    ).numpy()
    return np.clip(np.round(values), 0, 255).astype(np.uint8) if images.dtype == np.uint8 else values


def _in_form(image: np.ndarray, form: Sequence[int]) -> np.ndarray:
    """A training image [C, H, W] of bytes with the channels and the size of the generated ones."""
    if len(image) != form[0]:
        colors = image[:1] if len(image) < 3 else image[:3]
        options = PixelOptions(color="grey" if form[0] < 3 else "rgb")
        image = adapt(colors[None], options, "a training image", silent)[0]
        image = np.concatenate([image, np.full_like(image[:1], 255)])[: form[0]]  # alpha
    return image if image.shape[1:] == tuple(form[1:]) else _resized(image[None], (form[1], form[2]))[0]


def _float_scale(training: ImageSet) -> tuple[float, float]:
    """The values shown as black and white, for float images: [0, 1] or [-1, 1] where they fit, else their own range."""
    if training.images.dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(training.images.min()), float(training.images.max())
    for candidate in ((0.0, 1.0), (-1.0, 1.0)):
        if candidate[0] <= low and high <= candidate[1]:
            return candidate
    return low, max(high, low + 1e-12)
