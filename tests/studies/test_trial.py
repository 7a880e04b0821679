"""Names of trials, and the training sets that they stand for."""

from dataclasses import replace

import numpy as np
import pytest
from studies.tiny import TINY

from diffmem.data import DatasetSpec, load_images, write_npz
from diffmem.errors import InputError
from diffmem.studies import Setting, Trial


def test_keys_stay_what_they_are():
    """A key that changes orphans all that was ever computed under it."""
    assert Trial(TINY, 20).key == "9caf4aad958820f1"
    assert Trial(TINY, 20, at_least=None).key == Trial(TINY, 20).key


def test_a_length_is_the_same_however_it_is_written():
    one, other = (Trial(replace(TINY, length={"epochs": epochs}), 20) for epochs in (3000, 3000.0))
    assert one.key == other.key
    assert Trial(replace(TINY, length={"epochs": 2.5}), 20).key != one.key


def test_everything_that_decides_the_result_is_in_the_key():
    trials = [
        Trial(TINY, 20),
        Trial(TINY, 30),
        Trial(TINY, 20, repetition=1),
        Trial(TINY, 20, at_least=0.9),
        Trial(replace(TINY, samples=30), 20),
        Trial(replace(TINY, data=replace(TINY.data, labels="random:3")), 20),
        Trial(replace(TINY, training={**TINY.training, "lr": 2e-3}), 20),
    ]
    assert len({trial.key for trial in trials}) == len(trials)
    assert [Trial.from_json(trial.to_json()) for trial in trials] == trials


def contains(images, smaller) -> bool:
    rows = {image.tobytes() for image in images.images}
    return all(image.tobytes() in rows for image in smaller.images)


def of(source, **options) -> Setting:
    return Setting(DatasetSpec(source, **options), {"images": 1})


def test_sets_of_a_repetition_are_nested_and_repetitions_differ(tmp_path):
    labeled = of("builtin:digits")
    digits = load_images("builtin:digits")
    write_npz(replace(digits, labels=None), tmp_path / "plain.npz")
    for recipe in (labeled, of(tmp_path / "plain.npz")):
        for repetition in (0, 1):
            small, large = recipe.training_set(20, repetition), recipe.training_set(50, repetition)
            assert contains(large, small)
            assert small.labels is None
        assert not contains(recipe.training_set(50, 0), recipe.training_set(50, 1))
    assert labeled.limits() == (10, 1740)
    assert of(tmp_path / "plain.npz").limits() == (1, 1797)


def test_labels_make_the_model_conditional():
    for labels, classes in (("none", 0), ("true", 10), ("random:7", 7), ("unique", 20)):
        setting = replace(TINY, data=replace(TINY.data, labels=labels))
        images = setting.training_set(20)
        assert setting.config(images).denoiser.network.label_dim == classes
    ones = of("builtin:digits", only_class=1, labels="true").training_set(30)
    assert set(ones.labels) == {1}
    mixed = of("builtin:digits", resolution=8, color="grey", only_class=1, mix=("builtin:patches?n=99", 0.5, 1))
    first, second = mixed.training_set(20), replace(mixed, data=replace(mixed.data, mix=None)).training_set(20)
    assert (first.images != second.images).any(axis=(1, 2, 3)).sum() == 10


def test_occupied_classes_are_those_of_the_training_images():
    crowded = replace(
        TINY, data=replace(TINY.data, labels="random:50"), sampling={**TINY.sampling, "classes": "occupied"}
    )
    images = crowded.training_set(20, repetition=1)
    classes = crowded.sample_settings(images).classes
    assert classes == tuple(sorted(set(images.labels.tolist())))
    assert 1 < len(classes) <= 20
    assert crowded.config(images).denoiser.network.label_dim == 50
    assert Trial(crowded, 20).key != Trial(replace(crowded, sampling=TINY.sampling), 20).key
    plain = replace(TINY, sampling=crowded.sampling)
    assert plain.sample_settings(plain.training_set(20)).classes is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": {"images": 5, "epochs": 1}}, "exactly one of images=…, epochs=… and duration=…"),
        ({"length": {"steps": 5}}, "one of images, epochs, duration, not steps"),
        ({"training": {"learning_rate": 1}}, "no field learning_rate"),
        ({"sampling": {"precision": "bf16"}}, "no field precision"),
        ({"samples": 0}, "samples is 0"),
        ({"data": replace(TINY.data, size=20)}, "must not have a size: the size and repetition"),
    ],
)
def test_mistakes_are_named(change, words):
    with pytest.raises(InputError, match=words):
        replace(TINY, **change)


def test_a_setting_from_json_names_what_is_unknown():
    with pytest.raises(InputError, match="sample_count"):
        Setting.from_json({**TINY.to_json(), "sample_count": 5})
    with pytest.raises(InputError, match="no field quality"):
        Setting.from_json({**TINY.to_json(), "data": {"source": "builtin:digits", "quality": 5}})


def test_classes_are_asked_for_in_vain_where_there_are_none(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((9, 3, 5, 5), np.uint8))
    with pytest.raises(InputError, match="needs labels, but there are none"):
        of(tmp_path / "images.npy", only_class=7).training_set(4)
    with pytest.raises(InputError, match="no image has class 12"):
        of("builtin:digits", only_class=12).training_set(4)
