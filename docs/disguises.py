"""Pictures and table of "What the rule sees, and what it does not": python docs/disguises.py

Real images (patches of scikit-learn's photographs) are disguised as a generator might copy them: brighter, noisier,
compressed, shifted, mirrored, cropped. Each disguise is audited at several strengths. Writes docs/images/disguises.png,
docs/images/strengths.svg and the table between the marks of docs/what-the-rule-sees.md.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import diffmem

DOCS = Path(__file__).parent
PAGE, SHEET, CURVES = DOCS / "what-the-rule-sees.md", DOCS / "images/disguises.png", DOCS / "images/strengths.svg"
BEGIN, END = "<!-- table: python docs/disguises.py -->", "<!-- end of table -->"
TRAINING, COPIED, UNSEEN = "builtin:patches?n=2000", 200, "builtin:patches?n=1000&seed=1"


def brighter(images: np.ndarray, levels: float) -> np.ndarray:
    return np.clip(images.astype(np.int16) + int(levels), 0, 255).astype(np.uint8)


def noisy(images: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image.transpose(1, 2, 0) if len(image) == 3 else image[0])


def pixels(opened: Image.Image) -> np.ndarray:
    values = np.asarray(opened)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def compressed(images: np.ndarray, quality: float) -> np.ndarray:
    def one(image: np.ndarray) -> np.ndarray:
        stream = io.BytesIO()
        picture(image).save(stream, "JPEG", quality=int(quality))
        return pixels(Image.open(stream))

    return np.stack([one(image) for image in images])


def shifted(images: np.ndarray, pixels: float) -> np.ndarray:
    """To the right; the left edge is repeated."""
    pixels = int(pixels)
    return np.pad(images, ((0, 0), (0, 0), (0, 0), (pixels, 0)), mode="edge")[..., : images.shape[-1]]


def mirrored(images: np.ndarray, _: float) -> np.ndarray:
    return np.ascontiguousarray(images[..., ::-1])


def cropped(images: np.ndarray, margin: float) -> np.ndarray:
    """`margin` pixels cut off at each side, the rest enlarged to the old size."""
    size, margin = images.shape[-1], int(margin)

    def one(image: np.ndarray) -> np.ndarray:
        inside = np.ascontiguousarray(image[:, margin : size - margin, margin : size - margin])
        return pixels(picture(inside).resize((size, size), Image.Resampling.LANCZOS))

    return np.stack([one(image) for image in images])


Disguise = Callable[[np.ndarray, float], np.ndarray]
# Name: disguise, its strengths, the one that the pictures show, how a strength is written.
DISGUISES: dict[str, tuple[Disguise, tuple[float, ...], int, str]] = {
    "brighter": (brighter, (5, 10, 20, 40), 10, "+{:g} gray levels"),
    "noise": (noisy, (5, 10, 20, 40), 10, "σ = {:g} gray levels"),
    "JPEG": (compressed, (90, 75, 50, 10), 50, "quality {:g}"),
    "shift": (shifted, (1, 2, 4, 8), 2, "{:g} px"),
    "crop": (cropped, (1, 2, 4, 8), 2, "{:g} px at each side"),
    "mirror": (mirrored, (1,), 1, ""),
}


def shares(training: diffmem.ImageSet, unseen: diffmem.ImageSet) -> dict[str, list[tuple[float, float]]]:
    """Of each disguise: (strength, share of the disguised copies that the rule counts)."""
    index, originals = diffmem.TrainingIndex(training), training.images[:COPIED]

    def share(images: np.ndarray, flip: bool = False) -> float:
        return diffmem.audit(images, training, index=index, flip=flip).ratio

    found = {"exact copy": [(0.0, share(originals))]}
    for name, (disguise, strengths, _, _) in DISGUISES.items():
        # Of small images there is nothing left beyond some strength.
        fitting = [s for s in strengths if name not in ("shift", "crop") or s <= originals.shape[-1] // 4]
        found[name] = [(strength, share(disguise(originals, strength))) for strength in fitting]
    found["mirror, with `--flip`"] = [(1, share(mirrored(originals, 1), flip=True))]
    found["no copy: unseen real images"] = [(0, diffmem.audit(unseen, training, index=index).ratio)]
    return found


def digit_shares() -> dict[str, list[tuple[float, float]]]:
    digits = diffmem.load_images("builtin:digits")
    return shares(digits.select(slice(0, 1000)), digits.select(slice(1000, None)))


def all_shares() -> dict[str, dict[str, list[tuple[float, float]]]]:
    return {
        "patches": shares(diffmem.load_images(TRAINING), diffmem.load_images(UNSEEN)),
        "digits": digit_shares(),
    }


def table(found: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    lines = [f"| disguise | strength | {' | '.join(found)} |", f"| --- | --- |{' --- |' * len(found)}"]
    first, *others = found.values()
    for name, points in first.items():
        unit = DISGUISES[name][3] if name in DISGUISES else ""
        for strength, share in points:
            same = [dict(each[name]).get(strength) for each in others]
            cells = " | ".join("" if value is None else f"{value:.1%}" for value in (share, *same))
            lines.append(f"| {name} | {unit.format(strength)} | {cells} |")
    return "\n".join(lines)


def sheet() -> None:
    """One image per row, one disguise per column, framed by the verdict."""
    from matplotlib.figure import Figure

    training = diffmem.load_images(TRAINING)
    index = diffmem.TrainingIndex(training)
    rows = [3, 12, 20, 31]
    columns: list[tuple[str, Disguise, float]] = [("training image", lambda images, _: images, 0)]
    for name, (disguise, _, strength, unit) in DISGUISES.items():
        columns.append((f"{name} {strength:g}" if unit else name, disguise, strength))
    figure = Figure(figsize=(9.8, 6.2), dpi=80, layout="constrained")
    axes = figure.subplots(len(rows), len(columns))
    for column, (name, disguise, strength) in enumerate(columns):
        images = disguise(training.images[:COPIED], strength)
        result = diffmem.audit(images, training, index=index)
        for line, row in enumerate(rows):
            axis, copy = axes[line, column], bool(result.memorized[row])
            color = "#777777" if column == 0 else "#a11111" if copy else "#2d6cb5"
            axis.imshow(images[row].transpose(1, 2, 0), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set(color=color, linewidth=3)
            if column:
                verdict = f"{'copy' if copy else 'not seen'}, {result.distance_ratios[row]:.2f}"
                axis.set_xlabel(verdict, color=color, fontsize=9)
            if line == 0:
                axis.set_title(name, fontsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    Image.open(stream).convert("RGB").quantize(128).save(SHEET, optimize=True)


def curves(found: dict[str, list[tuple[float, float]]]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "diffmem"}):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        names = [name for name, (_, strengths, _, _) in DISGUISES.items() if len(strengths) > 1]
        for axis, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
            strengths, values = zip(*found[name], strict=True)
            axis.bar([f"{strength:g}" for strength in strengths], [100 * value for value in values], color="#3866a8")
            axis.set_title(name, fontsize=10)
            axis.set_xlabel(DISGUISES[name][3].replace("{:g}", "").replace("+", "").strip(" σ="), fontsize=9)
            axis.set_ylim(0, 100)
            axis.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("copies counted, %")
        figure.savefig(CURVES, metadata={"Date": None})


def with_table(page: str, rows: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    found = all_shares()
    sheet()
    curves(found["patches"])
    PAGE.write_text(with_table(PAGE.read_text(), table(found)))
