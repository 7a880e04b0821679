"""Copies as people meet them: each disguise at rising strength, in units of a 32×32 image's pixels and gray levels."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

Disguise = Callable[[np.ndarray], np.ndarray]  # images [n, C, H, W], uint8


def levels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def brighter(by: float) -> Disguise:
    return lambda images: levels(images.astype(np.float64) + by)


def contrast(factor: float) -> Disguise:
    return lambda images: levels((images.astype(np.float64) - 128) * factor + 128)


def tinted(by: float) -> Disguise:
    """Warmer: red up, blue down."""
    return lambda images: levels(images + by * np.linspace(1, -1, images.shape[1])[:, None, None])


def gray(images: np.ndarray) -> np.ndarray:
    weights = np.array([0.299, 0.587, 0.114]) if images.shape[1] == 3 else np.ones(images.shape[1]) / images.shape[1]
    mean = np.einsum("nchw,c->nhw", images.astype(np.float64), weights)
    return np.repeat(levels(mean)[:, None], images.shape[1], axis=1)


def noisy(deviation: float) -> Disguise:
    return lambda images: levels(images + np.random.default_rng(0).normal(0, deviation, images.shape))


def compressed(quality: int) -> Disguise:
    def one(image: np.ndarray) -> np.ndarray:
        stream = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(stream, "JPEG", quality=quality)
        return np.asarray(Image.open(stream)).transpose(2, 0, 1)

    return lambda images: np.stack([one(each) for each in images])


def shifted(pixels: float) -> Disguise:
    """Down and to the left, the border continued."""

    def shift(images: np.ndarray) -> np.ndarray:
        height = images.shape[2]
        by = round(pixels * height / 32)
        return np.pad(images, ((0, 0), (0, 0), (by, 0), (0, by)), mode="edge")[:, :, :height, by:]

    return shift


def mirrored(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[..., ::-1])


def cropped(pixels: float) -> Disguise:
    """So many pixels off each side, the rest enlarged to the old size."""

    def one(image: np.ndarray) -> np.ndarray:
        size = image.shape[1]
        by = round(pixels * size / 32)
        inside = Image.fromarray(np.ascontiguousarray(image[:, by : size - by, by : size - by].transpose(1, 2, 0)))
        return np.asarray(inside.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)

    return lambda images: np.stack([one(each) for each in images])


def stretched(factor: float) -> Disguise:
    """Wider by a factor, its sides cut off."""

    def one(image: np.ndarray) -> np.ndarray:
        size = image.shape[1]
        wide = Image.fromarray(image.transpose(1, 2, 0)).resize((round(size * factor), size), Image.Resampling.BICUBIC)
        left = (wide.width - size) // 2
        return np.asarray(wide)[:, left : left + size].transpose(2, 0, 1)

    return lambda images: np.stack([one(each) for each in images])


def rotated(degrees: float) -> Disguise:
    def one(image: np.ndarray) -> np.ndarray:
        edge = image.shape[1] // 2
        padded = np.pad(image, ((0, 0), (edge, edge), (edge, edge)), mode="edge")
        turned = Image.fromarray(padded.transpose(1, 2, 0)).rotate(degrees, Image.Resampling.BICUBIC)
        return np.asarray(turned)[edge:-edge, edge:-edge].transpose(2, 0, 1)

    return lambda images: np.stack([one(each) for each in images])


def covered(share: float) -> Disguise:
    """A black bar over the lower part, as captions are."""

    def cover(images: np.ndarray) -> np.ndarray:
        images = images.copy()
        images[:, :, images.shape[2] - round(share * images.shape[2]) :] = 0
        return images

    return cover


def blurred(pixels: float) -> Disguise:
    from scipy.ndimage import gaussian_filter

    return lambda images: levels(
        gaussian_filter(images.astype(np.float64), (0, 0, *[pixels * images.shape[2] / 32] * 2), mode="nearest")
    )


def after(*disguises: Disguise) -> Disguise:
    def all_of_them(images: np.ndarray) -> np.ndarray:
        for each in disguises:
            images = each(images)
        return images

    return all_of_them


# (disguise, strength, whether it is of everyday strength, function).
PLANTED: list[tuple[str, str, bool, Disguise]] = [
    ("none", "", True, lambda images: images),
    *[("brighter", f"+{by}", by <= 40, brighter(by)) for by in (20, 40, 80)],
    *[("contrast", f"×{factor}", factor >= 0.6, contrast(factor)) for factor in (0.8, 0.6, 0.3)],
    *[("tint", f"±{by}", by <= 30, tinted(by)) for by in (15, 30, 60)],
    ("gray", "", True, gray),
    *[("noise", f"σ = {by}", by <= 10, noisy(by)) for by in (5, 10, 20, 40)],
    *[("blur", f"σ = {by} px", by <= 0.5, blurred(by)) for by in (0.5, 1, 2)],
    *[("JPEG", f"quality {by}", by >= 50, compressed(by)) for by in (75, 50, 25, 10)],
    *[("shift", f"{by} px", by <= 2, shifted(by)) for by in (1, 2, 3, 4, 6)],
    ("mirror", "", True, mirrored),
    *[("crop", f"{by} px a side", by <= 2, cropped(by)) for by in (1, 2, 3, 4)],
    *[("stretch", f"×{by}", False, stretched(by)) for by in (1.1, 1.2, 1.3)],
    *[("rotation", f"{by}°", False, rotated(by)) for by in (2, 5, 10)],
    *[("covered", f"{by:.0%}", False, covered(by)) for by in (0.1, 0.2, 0.3)],
    ("mirror, +20, shift 2 px", "", True, after(mirrored, brighter(20), shifted(2))),
    ("crop 2 px, JPEG 50", "", True, after(cropped(2), compressed(50))),
    ("mirror, crop 1 px, ×0.8, noise 5", "", True, after(mirrored, cropped(1), contrast(0.8), noisy(5))),
    ("gray, shift 2 px, JPEG 75", "", True, after(gray, shifted(2), compressed(75))),
]
