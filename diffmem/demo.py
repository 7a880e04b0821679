"""The demonstration: an audit whose answer is known, on scikit-learn's real handwritten digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffmem.data import ImageSet, load_images, write_edm_zip
from diffmem.memorization import Audit, audit
from diffmem.progress import Progress, silent

TRAINING, COPIES, SEED = 1000, 120, 0


def demo_sets() -> tuple[ImageSet, ImageSet, ImageSet]:
    """("Generated" images, training set, unseen digits).

    The digits are split at random into a training set, unseen ones kept for the false-alarm rate, and unseen ones that
    stand in for generated images, next to slightly disturbed training digits (a quarter of the pixels moved by one
    of the 16 grey levels of the scans). The names say which is which: `unseen-…` and `disturbed-…`.
    """
    digits = load_images("builtin:digits")
    random = np.random.default_rng(SEED)
    order = random.permutation(len(digits))
    training = digits.select(np.sort(order[:TRAINING]))
    rest = order[TRAINING:]
    unseen, stand_ins = digits.select(rest[: len(rest) // 2]), digits.select(rest[len(rest) // 2 :])

    copied = random.choice(TRAINING, COPIES, replace=False)
    noise = random.choice([-16, 0, 0, 0, 0, 0, 0, 16], (COPIES, *training.image_shape))
    disturbed = np.clip(training.images[copied].astype(np.int64) + noise, 0, 255).astype(np.uint8)
    names = [f"disturbed-{training.name(i)}" for i in copied] + [f"unseen-{name}" for name in stand_ins.names]
    mixture = ImageSet(
        np.concatenate([disturbed, stand_ins.images]),
        names,
        np.concatenate([training.labels[copied], stand_ins.labels]),
        source="a mixture of disturbed training digits and unseen digits",
    )
    return mixture, training, unseen


def run_demo(out: str | Path, progress: Progress = silent) -> tuple[Audit, Path]:
    """Audit the mixture, write the report and the three sets (as zips, to try the command line on) into `out`.

    Returns the audit and the path of the report.
    """
    out = Path(out)
    mixture, training, unseen = demo_sets()
    result = audit(mixture, training, holdout=unseen, progress=progress)
    report = result.save(out)
    for name, images in (("generated", mixture), ("training", training), ("unseen", unseen)):
        write_edm_zip(images, out / f"{name}.zip")
    return result, report
