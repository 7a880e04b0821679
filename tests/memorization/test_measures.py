"""`diffmem.measure` and `diffmem measure`: what is asked for is given, the rest says why not."""

import csv
import json
import sys

import numpy as np
import pytest
import torch

import diffmem
from diffmem.cli import cli, main
from diffmem.errors import InputError, MissingExtraError
from diffmem.memorization.criteria import CRITERIA, names
from diffmem.memorization.measures import bootstrap_means


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return diffmem.load_images("builtin:digits").images


@pytest.fixture(scope="module")
def everything(digits) -> diffmem.memorization.Measures:
    """All measures of images of which a third are copies."""
    generated = np.concatenate([digits[:50], digits[1000:1100]])
    return diffmem.measure(generated, digits[:500], digits[1100:1400])


def test_all(everything):
    expected = [name for criterion in CRITERIA.values() if "second" not in criterion.needs for name in criterion.values]
    assert list(everything.values) == expected
    assert list(everything.skipped) == ["disjoint_halves"]
    assert all(isinstance(value, float) for value in everything.values.values())
    assert set(everything.honest) == set(expected)
    assert everything["ratio"] == pytest.approx(1 / 3, abs=0.02)
    assert everything.honest["ratio"] == 0
    assert everything.honest["dcr_closer_to_training"] == 500 / 800
    assert everything.warnings == ()
    for name, (low, high) in everything.intervals.items():
        assert low <= everything[name] <= high, name
    assert {len(values) for values in everything.per_image.values()} == {150}
    # As many holdout images as generated ones stand for honest images.
    assert {len(values) for values in everything.honest_per_image.values()} == {150}


def test_ratio_is_that_of_the_audit(digits):
    training = np.concatenate([digits[:300], digits[:40]])
    generated = np.concatenate([digits[20:60] ^ 1, digits[30:35], digits[1000:1100]])
    audit = diffmem.audit(generated, training)
    found = diffmem.measure(generated, training, measures="ratio,ratio:published")
    assert found["ratio"] == audit.ratio > found["ratio_raw"] == audit.raw_ratio > audit.published_ratio
    assert found["ratio:published"] == audit.published_ratio
    assert found.per_image["memorized"].tolist() == audit.memorized.tolist()


def test_every_name_can_be_asked_for(digits):
    generated, training, holdout = digits[:100], digits[:200], digits[300:400]
    labels = tuple(np.zeros(len(each), int) for each in (training, holdout, generated))
    for name in names():
        found = diffmem.measure(generated, training, holdout, measures=[name], second=digits[40:140], cells=labels)
        assert name in found.values or any(each in found.values for each in CRITERIA[name].values), name
        assert not found.skipped
    for criterion in CRITERIA.values():  # and by each value's name
        found = diffmem.measure(
            generated, training, holdout, measures=list(criterion.values), second=digits[40:140], cells=labels
        )
        assert set(criterion.values) <= set(found.values)


def test_what_is_named_and_lacks_something_is_an_error(digits):
    for name, message in (
        ("c_t", "measures='c_t' needs real images that the model has not seen: pass holdout="),
        ("dcr_protection", "pass holdout="),
        ("disjoint_halves", "pass second="),
        ("authenticty", "not one of ratio, "),
        ("authenticity:peter", "there are: authenticity:dgm-eval, authenticity:fld, authenticity:alaa"),
        ("m3:fld", "there are: none"),
        ("", "no measure is named"),
    ):
        with pytest.raises(InputError, match=message):
            diffmem.measure(digits[:10], digits[:20], measures=name)
    vectors = digits.reshape(len(digits), -1)
    with pytest.raises(InputError, match="tile_max' needs images: these are vectors"):
        diffmem.measure(vectors[:10], vectors[:20], measures="tile_max")
    found = diffmem.measure(digits[:30], digits[:40], measures="authenticity:fld,all")  # all, and that one for sure
    assert {"authenticity:fld", "authenticity", "tile_max"} <= set(found.values)
    assert "c_t" in found.skipped
    with pytest.raises(InputError, match="measures='c_t' needs"):
        diffmem.measure(digits[:30], digits[:40], measures="all,c_t")
    found = diffmem.measure(vectors[:10], vectors[:20])
    assert {"tile_max", "c_t", "c_t_global", "dcr_protection", "disjoint_halves"} <= set(found.skipped)
    assert not found.honest


def test_images_vectors_and_tensors_give_the_same(digits):
    names = "authenticity,top1_similarity,precision_recall"
    images = digits[:100], digits[200:500], digits[500:600]
    expected = diffmem.measure(*images, measures=names)
    flat = tuple(each.reshape(len(each), -1) for each in images)
    for sets in (
        flat,
        tuple(each.astype(np.float32) for each in flat),
        tuple(each.astype(np.float16) for each in flat),  # gray levels of digits are multiples of 16 and exact there
        tuple(torch.from_numpy(each).double() for each in flat),
        (flat[0].astype(np.float64), flat[1].astype(np.float32), flat[2].astype(np.float32)),
    ):
        found = diffmem.measure(*sets, measures=names)
        assert found.values == pytest.approx(expected.values, rel=1e-12)
        assert found.honest == pytest.approx(expected.honest, rel=1e-12)


@pytest.mark.parametrize(
    ("generated", "training", "message"),
    [
        (np.full((3, 4), np.nan, np.float32), np.ones((5, 4), np.float32), "generated: 3 vectors hold NaN"),
        (np.ones((3, 4), np.float32), np.full((5, 4), np.inf, np.float32), "training: 5 vectors hold NaN, infinity"),
        (np.ones((3, 4), np.float32), np.ones((5, 3), np.float32), "4 values, training: of 3"),
        (np.ones((3, 4), np.uint8), np.ones((5, 4), np.float32), "uint8, others floats"),
        (np.ones((0, 4), np.float32), np.ones((5, 4), np.float32), "generated: no vectors"),
        (np.ones((3, 4), np.float32), np.ones((0, 4), np.float32), "training: no vectors"),
        (np.ones((3, 4), np.int64), np.ones((5, 4), np.int64), "must be float16, float32, float64 or uint8"),
        (np.ones((3, 4), np.float32), np.ones((5, 1, 2, 2), np.uint8), "generated holds vectors, training images"),
        (np.ones((3, 1, 2, 2), np.uint8), np.ones((5, 1, 2, 3), np.uint8), "resize="),
    ],
)
def test_bad_sets(generated, training, message):
    with pytest.raises(InputError, match=message):
        diffmem.measure(generated, training)


def test_tiny_and_degenerate_sets():
    """What cannot be computed of so little is left out with a reason; nothing else fails."""
    zeros = np.zeros((3, 8), np.float32)
    for sets in ((zeros[:1], zeros[:1]), (zeros, zeros), (zeros[:1], zeros + 1, zeros), (zeros + 1, zeros[:2])):
        found = diffmem.measure(*sets)
        assert found.skipped
        assert all(isinstance(value, float) for value in found.values.values())
        json.loads(found.to_json())
    one = diffmem.measure(zeros[:1], zeros[:1])
    assert {"ratio", "m3", "authenticity", "distance_ratio", "precision_recall", "mifid"} <= set(one.skipped)
    assert one["nearest_distance"] == 0


def test_features(digits, tmp_path):
    """Made here, read from files, or given beside images: the same vectors give the same numbers."""

    def half(images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=2).flatten(1)

    sets = {"generated": digits[:60], "training": digits[200:500]}
    vectors = {name: half(torch.from_numpy(images)).numpy() for name, images in sets.items()}
    expected = diffmem.measure(**vectors, measures="authenticity,top1_similarity,calibrated_l2").values
    for name, each in vectors.items():
        np.save(tmp_path / f"{name}.npy", each)
    files = {name: tmp_path / f"{name}.npy" for name in sets}
    for given, features in ((sets, half), (files, "precomputed"), (sets, files)):
        found = diffmem.measure(**given, measures="authenticity,top1_similarity,calibrated_l2", features=features)
        assert found.values == pytest.approx(expected, rel=1e-9)
    assert diffmem.measure(**sets, features=half).per_image["nearest_index"].shape == (60,)
    assert "tile_max" in diffmem.measure(**sets, features="hash").skipped
    for given, features, message in (
        (sets, {"generated": files["generated"]}, "vectors of the training images are missing"),
        (sets, {"generated": files["training"], "training": files["training"]}, "300 vectors of 60 generated images"),
        (vectors, "hash", "but these are vectors"),
        (sets, "beauty", "beauty"),
    ):
        with pytest.raises(InputError, match=message):
            diffmem.measure(**given, features=features)


def test_settings(digits):
    sets = digits[:50], digits[300:600]
    wide = diffmem.measure(*sets, measures="ratio", settings={"ratio": {"threshold": 1}})
    assert wide["ratio_raw"] > 0.9
    whole = diffmem.measure(*sets, measures="tile_max,nearest_distance", settings={"tile_max": {"tile": 8}})
    assert whole["tile_max"] == pytest.approx(whole["nearest_distance"])  # one tile
    for settings, message in (
        ({"tiles": {}}, "settings: 'tiles' is not one of"),
        ({"tile_max": {"tile": 0}}, "at least 1"),
        ({"ratio": {"threshold": 2}}, "threshold"),
    ):
        with pytest.raises(InputError, match=message):
            diffmem.measure(*sets, measures="ratio,tile_max", settings=settings)


def test_holdout_images_that_are_training_images_are_warned_of(digits):
    found = diffmem.measure(digits[:20], digits[:100], digits[90:150], measures="m3")
    assert "10 of 60 holdout images are training images" in found.warnings[0]


def test_mifid_of_many_values_is_left_out_unless_named(monkeypatch):
    monkeypatch.setattr("diffmem.memorization.measures.LARGEST", 74)
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 5, 5), dtype=np.uint8)
    assert "75 values" in diffmem.measure(images[:6], images).skipped["mifid"]
    assert "mifid" in diffmem.measure(images[:6], images, measures="mifid").values


def test_bootstrap_covers_the_mean():
    """Of 200 samples with mean 0, some 5 % have an interval that misses it."""
    random = np.random.default_rng(0)
    samples = random.normal(size=(60, 200))
    intervals = bootstrap_means({str(column): samples[:, column] for column in range(200)})
    missed = sum(not low <= 0 <= high for low, high in intervals.values())
    assert 3 <= missed <= 22
    values = np.array([1.0, np.nan, 3.0])
    assert bootstrap_means({"a": values, "b": np.array([2.0, 2, 2])})["b"] == (2, 2)
    assert np.isnan(bootstrap_means({"a": np.full(3, np.nan)})["a"]).all()


def test_frame_and_columns(everything, monkeypatch):
    pandas = pytest.importorskip("pandas", reason="data frames need pandas")
    table = everything.to_frame()
    assert table.loc["authenticity", "value"] == everything["authenticity"]
    assert table.loc["c_t", "better"] == "zero"
    assert list(table.index) == list(everything.values)
    images = everything.to_frame(per_image=True)
    assert isinstance(images, pandas.DataFrame)
    assert images["memorized"].sum() == round(everything["ratio"] * 150)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"diffmem\[pandas\]"):
        everything.to_frame()
    assert everything.columns()["name"] == list(everything.values)


def test_saved_files_hold_the_same_numbers(everything, tmp_path):
    page = everything.save(tmp_path / "out")
    folder = page.parent
    assert sorted(path.name for path in folder.iterdir()) == [
        "images.csv", "measures.csv", "measures.html", "measures.json",
    ]  # fmt: skip
    saved = json.loads((folder / "measures.json").read_text())
    assert saved["values"] == everything.values
    with open(folder / "measures.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name: float(row["value"]) for name, row in rows.items()} == everything.values
    with open(folder / "images.csv", newline="") as file:
        images = list(csv.DictReader(file))
    assert sum(int(row["memorized"]) for row in images) == everything.per_image["memorized"].sum()
    html = page.read_text()
    assert all(name in html for name in everything.values)
    assert html.count("<figure>") == 24
    assert "disjoint_halves" in html
    assert "authenticity" in everything._repr_html_()


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return exit.value.code, out, err


def test_command_line(capsys, tmp_path, digits):
    np.save(tmp_path / "generated.npy", digits[:40])
    np.save(tmp_path / "vectors.npy", digits[:40].reshape(40, -1).astype(np.float32))
    sets = tmp_path / "generated.npy", "builtin:digits"
    code, out, err = run(
        capsys, "measure", *sets, "--holdout", "builtin:digits", "--out", tmp_path / "out", "--limit", 30
    )
    assert (code, err) == (0, "")
    assert "authenticity" in out
    assert "not computed: disjoint_halves" in out
    assert "--second SOURCE" in out
    assert "holdout images are training images" in out
    assert (tmp_path / "out" / "measures.html").exists()
    code, out, _ = run(capsys, "measure", *sets, "--measures", "authenticity,authenticity:fld", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["values"] == {"authenticity": 0.0, "authenticity:fld": -50.0}
    assert found["settings"]["generated"]["images"] == 40
    code, _, err = run(capsys, "measure", *sets, "--measures", "authenticity", "--out", tmp_path / "no holdout")
    assert (code, err) == (0, "")
    assert "No holdout set was given" in (tmp_path / "no holdout" / "measures.html").read_text()
    code, _, err = run(capsys, "measure", *sets, "--measures", "c_t")
    assert code == 1
    assert "pass --holdout SOURCE" in err
    code, _, err = run(capsys, "measure", *sets, "--measures", "beauty")
    assert code == 1
    assert "--measures beauty is not one of ratio" in err
    code, out, _ = run(
        capsys, "measure", *sets, "--holdout", "builtin:digits", "--measures", "c_t", "--cells", "labels"
    )
    assert code == 1  # the .npy file has no labels
    code, out, _ = run(capsys, "measure", "--list")
    assert code == 0
    assert all(f"{name}:" in out for name in names())
    assert "measure" in cli.commands
