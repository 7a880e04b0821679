"""A detector by another criterion decides as `diffmem.measure` does, whatever batches images come in."""

import pickle

import numpy as np
import pytest

import diffmem
from diffmem.errors import InputError
from diffmem.evaluation.detectors import sample_detector
from diffmem.memorization import CopyDetector, CriterionDetector, check_criterion, deciding_criteria
from diffmem.memorization.criteria import CRITERIA


@pytest.fixture(scope="module")
def digits():
    return diffmem.load_images("builtin:digits")


def noisy_copies(digits) -> np.ndarray:
    """Copies, blurred more and more, and images of their own."""
    noise = np.random.default_rng(0).normal(0, 1, (40, 1, 8, 8)) * np.linspace(0, 60, 40)[:, None, None, None]
    copies = np.clip(np.rint(digits.images[:40] + noise), 0, 255).astype(np.uint8)
    return np.concatenate([copies, digits.images[1000:1040]])


@pytest.mark.parametrize("name", deciding_criteria())
def test_verdicts_are_those_of_measure(digits, name):
    training, images = digits.select(slice(0, 500)), noisy_copies(digits)
    array, copy = CRITERIA[name].decides
    expected = diffmem.measure(images, training, measures=name).per_image[array] == copy
    assert 0 < expected.sum() < 80
    detector = CriterionDetector(training, name)
    parts = [detector.update(batch).memorized for batch in (images[:3], images[3:4], images[4:70], images[70:])]
    assert np.concatenate(parts).tolist() == expected.tolist()
    assert detector.compute().count == expected.sum()
    assert pickle.loads(pickle.dumps(detector)).judge(images).memorized.tolist() == expected.tolist()


def test_mirrored_copies(digits):
    training, mirrored = digits.select(slice(0, 500)), digits.images[:50, :, :, ::-1]
    straight, flipped = (CriterionDetector(training, "tile_max", flip=flip).judge(mirrored) for flip in (False, True))
    assert flipped.count == 50 > straight.count


def test_what_is_remembered_tells_criteria_apart(digits):
    by = [CriterionDetector(digits, name, second_look=False) for name in ("m3", "tile_max")]
    detectors = [CopyDetector(digits, second_look=False), *by]
    identities = [repr(sorted(each.identity.items())) for each in detectors]
    assert len(set(identities)) == 3
    assert type(sample_detector(digits, (1, 8, 8), "cpu", criterion="ratio")) is CopyDetector
    assert sample_detector(digits, (1, 8, 8), "cpu", criterion="m3").identity == detectors[1].identity


def test_criteria_that_decide_about_no_image():
    assert check_criterion(None) == "ratio"
    for name in ("c_t", "mifid", "beauty", "authenticity:fld"):
        with pytest.raises(InputError, match="take one of ratio, calibrated_l2, "):
            check_criterion(name)
