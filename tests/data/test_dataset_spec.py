"""DatasetSpec: the same images as by hand, JSON both ways, earlier names, refusals."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmem.data import DatasetSpec, Mix, class_balanced, derive, load_images, mixed, one_class, write_npz
from diffmem.data import read_data as read
from diffmem.errors import InputError

TENTHS = st.integers(-10, 10).map(lambda tenths: tenths / 10)
COUNTS = st.none() | st.integers(1, 2**40)
SPECS = st.builds(
    DatasetSpec,
    st.text(min_size=1),
    size=COUNTS,
    resolution=COUNTS,
    color=st.sampled_from([None, "gray", "grey", "rgb"]),
    limit=COUNTS,
    center_crop=st.booleans(),
    value_range=st.none() | st.tuples(TENTHS, TENTHS),
    alpha=st.sampled_from([None, "drop", "white"]),
    key=st.none() | st.text(),
    layout=st.sampled_from([None, "NCHW", "NHWC"]),
    skip_bad=st.booleans(),
    only_class=st.none() | st.integers(),
    classes=COUNTS,
    mix=st.none() | st.tuples(st.text(), TENTHS, st.integers()),
    labels=st.sampled_from([None, "none", "true", "random:3", "unique", "consecutive"]),
    label_seed=st.none() | st.integers(0, 2**40),
    seed=st.none() | st.integers(0, 2**40),
)


@settings(deadline=None, max_examples=50)
@given(SPECS, SPECS)
def test_json_both_ways(spec, other):
    there = DatasetSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert there == spec
    assert hash(there) == hash(spec)
    assert there.fingerprint == spec.fingerprint
    assert (spec == other) == (spec.fingerprint == other.fingerprint)


def test_every_way_to_ask_gives_the_images_made_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    write_npz(load_images(rng.integers(0, 256, (60, 3, 6, 8), np.uint8)), tmp_path / "a.npz")
    pixels = load_images(tmp_path / "a.npz", resize=4, color="gray", limit=50)
    spec = DatasetSpec(tmp_path / "a.npz", resolution=4, color="grey", limit=50)
    assert spec.reading() == spec
    assert spec.color == "gray"
    assert np.array_equal(load_images(spec).images, pixels.images)
    assert np.array_equal(load_images(replace(spec, size=7)).images, pixels.images[:7])
    assert load_images(replace(spec, size=7)).fingerprint == derive(pixels, size=7).images.fingerprint

    digits = load_images("builtin:digits")
    spec = DatasetSpec("builtin:digits", size=30, mix=("builtin:digits", 0.5, 3), labels="random:4", seed=5)
    by_hand = derive(mixed(class_balanced(digits, 30, 5), digits, 0.5, 3, 5), labels="random:4").images
    assert spec.load().fingerprint == by_hand.fingerprint
    assert spec.load(read=spec.reading().load()).fingerprint == by_hand.fingerprint
    assert spec.mix == Mix("builtin:digits", 0.5, 3)
    ones = replace(spec, only_class=1, mix=None, labels=None, seed=None)
    assert ones.load().fingerprint == one_class(digits, 1).select(slice(30)).fingerprint
    assert [step["operation"] for step in ones.derive().manifest["operations"]] == ["one_class", "class_balanced"]
    assert ones.limits() == (1, (digits.labels == 1).sum())
    assert replace(ones, only_class=None, classes=3).limits() == (3, 3 * 177)


def test_what_is_read_can_be_found_again(tmp_path, monkeypatch):
    write_npz(load_images("builtin:digits", limit=9), tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path)
    for data in ("a.npz", DatasetSpec("a.npz"), DatasetSpec("a.npz", size=3, mix=("a.npz", 0.0, 1))):
        try:
            images, spec = read(data)
        except InputError:  # three images of nine classes
            images, spec = None, data.absolute()
        assert spec.source == str(tmp_path / "a.npz")
        assert spec.mix in (None, (str(tmp_path / "a.npz"), 0.0, 1))
        assert images is None or images.fingerprint == load_images(spec).fingerprint
    assert read("builtin:digits")[1] == DatasetSpec("builtin:digits").absolute()
    assert read(load_images("a.npz"))[1] is None


def test_names_of_earlier_versions_are_read():
    recorded = {
        "path": "/a.zip", "size": 20, "resize": 8, "color": "grey", "alpha": None, "key": None, "layout": None,
        "skip_bad": False,
    }  # fmt: skip
    assert DatasetSpec.from_json(recorded) == DatasetSpec("/a.zip", 20, 8, "gray")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "needs a source"),
        ([], "must be a mapping of fields, not"),
        ({"source": 3}, "the source of a data set is a path or a name, not a int"),
        ({"source": "a", "quality": 3}, "has no field quality"),
        ({"source": "a", "size": 0}, "^size is 0, but must be a whole number of at least 1"),
        ({"source": "a", "size": True}, "^size is True, but must be"),
        ({"source": "a", "resolution": 8.5}, "^resolution is 8.5, but must be"),
        ({"source": "a", "color": "blue"}, "^color is 'blue', but must be gray or rgb"),
        ({"source": "a", "skip_bad": 1}, "^skip_bad is 1, but must be true or false"),
        ({"source": "a", "key": 1}, "^key is 1, but must be text"),
        ({"source": "a", "labels": "many"}, "labels must be true, consecutive"),
        ({"source": "a", "mix": ["b", 0.5]}, "^mix is .*, but must be"),
        ({"source": "a", "mix": [[], 0.5, 1]}, "^mix is .*, but must be"),
        ({"source": "a", "value_range": [1]}, "^value_range is .*, but must be two numbers"),
        ({"source": "a", "only_class": "1"}, "^only_class is '1', but must be"),
    ],
)
def test_mistakes_are_named(values, words):
    with pytest.raises(InputError, match=words):
        DatasetSpec.from_json(values)


def test_every_field_is_an_option_of_derive():
    import inspect

    names = {field.name for field in fields(DatasetSpec)}
    assert names == set(inspect.signature(derive).parameters) - {"progress"}
