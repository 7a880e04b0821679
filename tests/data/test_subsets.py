"""Derived training sets: the protocol's subsets and labels, nested, reproducible, and documented by their manifests."""

import json
import math
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffmem import __version__
from diffmem.data import (
    ImageSet,
    Mix,
    at_resolution,
    class_balanced,
    derive,
    first_classes,
    load_images,
    mixed,
    random_labels,
    unique_labels,
    without_labels,
    write_edm_zip,
)
from diffmem.data import subsets as module
from diffmem.data.classes import class_indices, label_dim, missing_classes
from diffmem.errors import InputError

# shared/golden/random_labels.json: the public code's labels for C = 10.
GOLDEN = [
    0, 7, 6, 5, 8, 1, 7, 8, 5, 5, 6, 1, 2, 6, 1, 6, 2, 6, 7, 7, 8, 5, 9, 9, 1, 0, 1, 1, 1, 5, 5, 0, 5, 4, 2, 2, 2, 6, 4,
    2,
]  # fmt: skip
SHARES = st.sampled_from([0, 0.1, 0.2, 0.25, 0.5, 0.8, 0.9, 1])
SEEDS = st.none() | st.integers(0, 3)


def labeled(labels, first=0, source="array") -> ImageSet:
    """Gray 2×2 images of which image i is numbered first + i in its pixels."""
    numbers = np.arange(first, first + len(labels))
    pixels = np.stack([numbers >> 8 & 255, numbers & 255, 0 * numbers, 0 * numbers], axis=1)
    return ImageSet(pixels.astype(np.uint8).reshape(-1, 1, 2, 2), labels=np.array(labels, np.int64), source=source)


def numbers(images: ImageSet) -> list[int]:
    """Which images of a `labeled` set these are."""
    pixels = images.images.astype(int).reshape(len(images), -1)
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


LABELS = st.lists(st.sampled_from([0, 1, 3, 7]), min_size=1, max_size=40)


@given(LABELS, st.integers(1, 45), SEEDS)
def test_class_balanced_takes_the_first_of_each_class(labels, size, seed):
    images = labeled(labels)
    classes = sorted(set(labels))

    def wanted(size):
        return [size // len(classes)] * (len(classes) - 1) + [size // len(classes) + size % len(classes)]

    def possible(size):
        return size >= len(classes) and all(n <= labels.count(c) for c, n in zip(classes, wanted(size), strict=True))

    if not possible(size):
        with pytest.raises(InputError) as error:
            class_balanced(images, size, seed)
        largest = max(filter(possible, range(len(labels) + 1)))
        assert size < len(classes) or f"largest possible size is {largest}" in str(error.value)
        class_balanced(images, largest, seed)
        return
    taken = numbers(class_balanced(images, size, seed))
    assert taken == sorted(taken)
    assert [sum(labels[i] == c for i in taken) for c in classes] == wanted(size)
    if seed is None:
        expected = [[i for i, label in enumerate(labels) if label == c] for c in classes]
        assert set(taken) == {i for rows, n in zip(expected, wanted(size), strict=True) for i in rows[:n]}


@given(LABELS, st.integers(1, 10), st.integers(1, 10), SHARES, SEEDS)
def test_smaller_subsets_lie_in_larger_ones(labels, small, large, share, seed):
    """Every larger multiple of C contains the smaller ones; without seeds, so do their mixtures."""
    images, classes = labeled(labels), len(set(labels))
    scarcest = min(map(labels.count, labels))
    one, two = (class_balanced(images, min(size, scarcest) * classes, seed) for size in sorted((small, large)))
    assert set(numbers(one)) <= set(numbers(two))
    if seed is not None:
        return
    other = labeled([labels[0]] * 40, first=1000)
    assert set(numbers(mixed(one, other, share, labels[0]))) <= set(numbers(mixed(two, other, share, labels[0])))


def test_a_seed_takes_other_images_the_same_everywhere():
    images = labeled([0, 1] * 6)
    taken = {seed: numbers(class_balanced(images, 6, seed)) for seed in (None, 0, 1)}
    assert taken == {None: [0, 1, 2, 3, 4, 5], 0: [0, 3, 4, 6, 7, 11], 1: [1, 2, 3, 4, 9, 10]}


def test_first_classes():
    images = labeled([7, 3, 3, 0, 7, 1])
    assert numbers(first_classes(images, 2)) == [3, 5]
    assert numbers(first_classes(images, 4)) == list(range(6))
    for classes in (0, 5):
        with pytest.raises(InputError, match="1 to 4 are possible"):
            first_classes(images, classes)


def test_labels():
    images = labeled([1] * 40)
    assert random_labels(images, 10).labels.tolist() == GOLDEN
    assert random_labels(images.select(slice(7)), 10).labels.tolist() == GOLDEN[:7]
    assert random_labels(images, 10, seed=1).labels.tolist() != GOLDEN
    assert set(random_labels(images, 1).labels.tolist()) == {0}
    many = random_labels(labeled([0] * 5000), 1000).labels
    assert 0 <= many.min() <= many.max() < 1000
    assert len(set(many.tolist())) > 950
    assert unique_labels(images).labels.tolist() == list(range(40))
    assert without_labels(images).labels is None
    assert images.labels.tolist() == [1] * 40
    assert {random_labels(images, 3).labels.dtype, unique_labels(images).labels.dtype} == {np.dtype(np.int64)}
    with pytest.raises(InputError, match="at least 1 class"):
        random_labels(images, 0)


def test_resolution_is_that_of_reading(tmp_path):
    images = ImageSet(np.random.default_rng(5).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))
    write_edm_zip(images, tmp_path / "a.zip")
    expected = [
        np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize((16, 16), Image.Resampling.LANCZOS))
        for image in images.images
    ]
    smaller = at_resolution(images, 16)
    np.testing.assert_array_equal(smaller.images, np.stack(expected).transpose(0, 3, 1, 2))
    assert smaller.fingerprint == load_images(tmp_path / "a.zip", resize=16).fingerprint


@given(
    labels=LABELS, share=SHARES, more=SHARES, other_labels=st.none() | LABELS, seed=SEEDS
)  # fmt: skip
def test_mixed_replaces_a_share_of_one_class(labels, share, more, other_labels, seed):
    images, index = labeled(labels, source="folder/a.zip"), labels[0]
    other = labeled(other_labels or [9] * 30, first=1000, source="folder/b.zip")
    fitting = [1000 + row for row, label in enumerate(other_labels or []) if label == index]
    if other_labels is None:
        other, fitting = without_labels(other), list(range(1000, 1030))
    count = math.floor(share * labels.count(index) + 0.5)
    if count > len(fitting):
        with pytest.raises(InputError, match=r"folder/b\.zip: .* images of class"):
            mixed(images, other, share, index, seed)
        return
    result = mixed(images, other, share, index, seed)
    after = numbers(result)
    replaced = [row for row, number in enumerate(after) if number != row]
    assert len(replaced) == count
    assert all(labels[row] == index for row in replaced)
    assert result.labels.tolist() == labels
    assert [result.name(row) for row in replaced] == [f"b.zip/#{after[row] - 1000}" for row in replaced]
    assert numbers(images) == list(range(len(labels)))
    taken = [after[row] for row in replaced]
    if seed is None:
        assert replaced == [row for row, label in enumerate(labels) if label == index][labels.count(index) - count :]
        assert taken == fitting[:count]
    else:
        assert taken == sorted(set(taken) & set(fitting))
    if share <= more and math.floor(more * labels.count(index) + 0.5) <= len(fitting):
        larger = numbers(mixed(images, other, more, index, seed))
        assert all(larger[row] != row for row in replaced)
        assert set(taken) <= set(larger)


def test_what_cannot_be_mixed():
    images, other = labeled([0, 0, 0, 1]), labeled([0, 2], source="b.zip")
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="share"):
            mixed(images, other, share, 0)
    with pytest.raises(InputError, match="no image has class 2"):
        mixed(images, other, 0.5, 2)
    with pytest.raises(InputError, match=r"b\.zip: 3 images of class 0 are needed, there are 1: .* share is 0\.3333"):
        mixed(images, other, 1, 0)
    with pytest.raises(InputError, match=r"class 1 are needed, there are 0: without labels"):
        mixed(images, other, 1, 1)
    with pytest.raises(InputError, match=r"1×2×2 .* 1×3×3 .*resize=2"):
        mixed(images, at_resolution(other, 3), 0.5, 0)


def test_labels_that_tell_no_classes():
    images = labeled([0, 1])
    vectors = ImageSet(images.images, labels=np.eye(2, dtype=np.float32) / 2)
    for bad, words in ((without_labels(images), "there are none"), (vectors, "are vectors of length 2")):
        for function in (first_classes, class_balanced):
            with pytest.raises(InputError, match=words):
                function(bad, 2)
    with pytest.raises(InputError, match="size 1 is less than one image of each of 2 classes"):
        class_balanced(images, 1)
    with pytest.raises(InputError, match=r"size 19 needs 10 images of class 9.*20, and every smaller multiple of 10"):
        class_balanced(labeled(list(range(10)) * 2), 19)


def files_of(path):
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {"": path.read_bytes()}


def manifest_of(path):
    if path.is_dir():
        return json.loads((path / "manifest.json").read_bytes())
    if path.suffix == ".npz":
        with np.load(path) as content:
            return json.loads(content["manifest.json"])
    with zipfile.ZipFile(path) as archive:
        assert "labels" in json.loads(archive.read("dataset.json"))
        return json.loads(archive.read("manifest.json"))


@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a"])
def test_written_sets_are_reproducible_and_say_how_they_were_made(tmp_path, name):
    mixture = load_images("builtin:digits").select(slice(1000, 1400))
    (tmp_path / "other").mkdir()
    for folder in (tmp_path / "other", tmp_path):  # the same source in another place
        write_edm_zip(mixture, folder / "mixture.zip")
        derived = derive(
            "builtin:digits", limit=900, resolution=6, classes=4, size=102,
            mix=Mix(folder / "mixture.zip", 0.5, 2), labels="random:7", seed=3,
        )  # fmt: skip
        derived.write(folder / name)
    assert files_of(tmp_path / name) == files_of(tmp_path / "other" / name)
    read = load_images(tmp_path / name)
    assert read.images.shape == (102, 1, 6, 6)
    np.testing.assert_array_equal(read.labels, derived.images.labels)
    manifest = manifest_of(tmp_path / name)
    assert manifest == derived.manifest
    assert manifest["result"] == {
        "shape": [102, 1, 6, 6], "dtype": "uint8", "classes": 7, "fingerprint": read.fingerprint,
    }  # fmt: skip
    assert manifest["diffmem"] == __version__

    # The manifest is enough to make the set again.
    def source(metadata):
        place = metadata["name"] if metadata["name"].startswith("builtin:") else tmp_path / metadata["name"]
        images = load_images(place, **metadata["options"])
        assert images.fingerprint == metadata["fingerprint"]
        return images

    again = source(manifest["source"])
    for operation in manifest["operations"]:
        if "other" in operation:
            operation["other"] = source(operation["other"])
        again = getattr(module, operation.pop("operation"))(again, **operation)
    assert again.fingerprint == read.fingerprint


def test_archives_carry_no_dates(tmp_path):
    for name in ("a.zip", "a.npz"):
        derive("builtin:digits", size=10).write(tmp_path / name)
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_labels_of_derived_sets():
    for labels, expected in (("true", [0, 1, 2]), ("none", None), ("unique", [0, 1, 2]), ("random:10", GOLDEN[:3])):
        found = derive(labeled([0, 1, 2]), labels=labels).images.labels
        assert (found if found is None else found.tolist()) == expected
    for labels in ("", "some", "random", "random:", "random:0", "random:-1", "random:1.5", "none:1", "true:"):
        with pytest.raises(InputError, match="labels must be true, consecutive, none"):
            derive(labeled([0]), labels=labels)
    with pytest.raises(InputError, match="labels='true' needs labels, but there are none"):
        derive(without_labels(labeled([0])), labels="true")
    assert derive(without_labels(labeled([0]))).images.labels is None
    assert derive(labeled([7, -3, 2**40, 7]), labels="consecutive").images.labels.tolist() == [1, 0, 2, 1]


def test_subsets_without_class_numbers():
    images = labeled([0, 1, 2, 3])
    for labels in (None, np.full((4, 2), 0.5, np.float32)):
        derived = derive(ImageSet(images.images, labels=labels), size=3)
        np.testing.assert_array_equal(derived.images.images, images.images[:3])
        assert [operation["operation"] for operation in derived.manifest["operations"]] == ["first_images"]
        assert derived.images.notes == (
            "array: there are no class numbers to balance by; the subset is the first 3 images",
        )
        with pytest.raises(InputError, match="holds 4 images: size must be at most 4"):
            derive(ImageSet(images.images, labels=labels), size=5)
    one_hot = ImageSet(images.images, labels=np.eye(2)[[1, 1, 0, 0]])
    np.testing.assert_array_equal(derive(one_hot, size=2).images.images, images.images[[0, 2]])


def test_what_class_numbers_must_be():
    images = labeled([0, 2, 2])
    assert label_dim(images, "x") == 3
    assert missing_classes(images.labels) == "1 of the class numbers 0 to 2 do not occur (the first: 1)"
    assert missing_classes(np.array([1, 0, 2])) is None
    for labels, says in (([0, -1, 3], "1 are negative .the first: -1 of #1"), ([0, 10**12, 1], "1000000000000")):
        with pytest.raises(InputError, match=says):
            label_dim(labeled(labels), "x")
        with pytest.raises(InputError, match="labels='consecutive'"):
            class_indices(labeled(labels), "x")
