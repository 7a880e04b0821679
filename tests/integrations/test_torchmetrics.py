"""The metrics are metrics of torchmetrics: their values are those of an audit, whatever is done to them."""

import pickle

import numpy as np
import pytest
import torch

import diffmem
from diffmem.errors import InputError

torchmetrics = pytest.importorskip("torchmetrics", reason="the extra torchmetrics is not installed")
from diffmem.integrations.torchmetrics import CopyDetection, MemorizationRatio  # noqa: E402

DIGITS = diffmem.load_images("builtin:digits")
TRAINING = DIGITS.select(slice(0, 600))
IMAGES = DIGITS.images[590:610]  # ten of them are training images


def test_the_value_is_that_of_an_audit_in_every_form_that_images_have():
    audit = diffmem.audit(IMAGES, TRAINING)
    floats = torch.from_numpy(IMAGES) / 255
    metric = MemorizationRatio(TRAINING)
    forms = {
        "uint8": torch.from_numpy(IMAGES), "array": IMAGES, "float32": floats, "float64": floats.double(),
        "strided": floats.to(memory_format=torch.channels_last), "other range": floats * 2 - 1,
    }  # fmt: skip
    for name, images in forms.items():
        metric = MemorizationRatio(metric.detector, value_range=(-1, 1) if name == "other range" else (0, 1))
        for start in range(0, 20, 7):
            metric.update(images[start : start + 7])
        assert metric.compute() == torch.tensor(audit.ratio, dtype=torch.float32), name
        assert metric.rate == audit.rate, name
    metric = MemorizationRatio(metric.detector)
    assert metric(floats[:10]) == audit.memorized[:10].mean()  # forward: of the batch
    assert metric(floats[10:]) == audit.memorized[10:].mean()
    assert metric.rate == audit.rate
    for precision in (torch.float16, torch.bfloat16):  # rounding moves gray levels by less than a copy's distance
        assert MemorizationRatio(metric.detector).judge(floats.to(precision)).memorized.tolist() == (
            audit.memorized.tolist()
        )


def test_in_a_collection_each_metric_keeps_its_own_counts():
    """A collection merges metrics whose states are equal after the first batch: here both have no copies then."""
    strict, loose = MemorizationRatio(TRAINING, threshold="1/1000"), MemorizationRatio(TRAINING, threshold="9/10")
    like_loose = CopyDetection(TRAINING, detector={"threshold": "9/10"})
    collection = torchmetrics.MetricCollection({"strict": strict, "loose": loose, "like": like_loose})
    unseen = torch.from_numpy(DIGITS.images[700:]) / 255
    alike = loose.judge(unseen).memorized
    none, some = unseen[~alike][:8], unseen[alike][:8]
    assert len(some) == 8
    collection.update(none)
    collection.update(some)
    values = {name: value.item() for name, value in collection.compute().items()}
    assert values == {"strict": 0.0, "loose": 0.5, "like": 0.5}
    assert sorted(map(sorted, collection.compute_groups.values())) == [["like", "loose"], ["strict"]]
    cloned = collection.clone(prefix="val_")
    assert cloned["loose"].detector is loose.detector  # the training set is not copied


def test_other_features_and_rules():
    vectors = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    metric = CopyDetection(vectors, detector={"features": "precomputed", "rule": "similarity", "threshold": 0.99})
    metric.update(torch.cat([vectors[:3] + 1e-4, -vectors[:5]]))
    assert (metric.rate.count, metric.rate.total) == (3, 8)
    named = CopyDetection(TRAINING, detector={"features": "hash", "rule": "similarity", "threshold": 10})
    named.update(torch.from_numpy(IMAGES) / 255)
    assert named.rate == diffmem.audit(IMAGES, TRAINING, features="hash", rule="similarity", threshold=10).rate


def test_merged_pickled_and_drawn(tmp_path):
    parts = [MemorizationRatio(TRAINING) for _ in range(2)]
    for metric, images in zip(parts, (IMAGES[:13], IMAGES[13:]), strict=True):
        metric.update(images)
    parts[0].merge_state(pickle.loads(pickle.dumps(parts[1])))
    assert parts[0].rate == diffmem.audit(IMAGES, TRAINING).rate
    again = pickle.loads(pickle.dumps(parts[0]))
    again.update(IMAGES)
    assert again.rate == diffmem.memorization.CopyRate(2 * parts[0].rate.count, 2 * parts[0].rate.total)
    figure, _ = again.plot()
    figure.savefig(tmp_path / "plot.png")
    with pytest.raises(InputError, match="different training sets or rules"):
        parts[0].merge_state(MemorizationRatio(TRAINING, threshold="1/2"))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_bad_input_is_one_line_and_leaves_the_counts(tmp_path):
    metric = MemorizationRatio(TRAINING)
    assert metric.compute().isnan()
    metric.reset()
    metric.update(IMAGES)
    before = metric.rate
    for images, said in (
        (torch.zeros(2, 1, 9, 9), "are 9x9, training images .* are 8x8"),
        (torch.zeros(2, 3, 8, 8), "color"),
        (torch.full((2, 1, 8, 8), -1.0), "value_range=\\(0, 1\\)"),
        (torch.full((2, 1, 8, 8), np.nan), "NaN"),
        (torch.zeros(0, 1, 8, 8), "no images in this batch"),
    ):
        with pytest.raises(InputError, match=said) as error:
            metric.update(images)
        assert "\n" not in str(error.value)
    assert metric.rate == before
    with pytest.raises(InputError, match="nowhere"):
        MemorizationRatio(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has its own rule"):
        MemorizationRatio(metric.detector, flip=True)
