"""The cost of an index: what the model multiplies, and the command that prints it."""

import json
import math

import pytest
from command_line import run

from diffmem.errors import InputError
from diffmem.indexes.cost import MEASURED, Machines, Rates, cost_of_index, duration_text

RATES = Rates(
    decode=100, features={"net": 10, "precomputed": math.inf}, codes=1000, pairs=1e6, flat_pairs=5e5, pixel_codes=50,
    pixel_pairs=1e5, efficiency=0.5,
)  # fmt: skip
TWO = Machines(
    count=2, cores=4, gpus=0, memory=1e9, bandwidth=1e6, price_core_hour=1, price_gpu_hour=10, price_gb_month=3
)


def test_counts_and_rates():
    cost = cost_of_index(8000, "net", TWO, dimension=512, image_bytes=1000, generated=100, rates=RATES)
    # Eight cores at half their speed do the work of four.
    assert cost.stages == pytest.approx({"read": 4, "decode": 20, "features": 200, "codes": 2})
    assert cost.build_seconds == pytest.approx(222)
    assert cost.build_price == pytest.approx(222 / 3600 * 8)
    assert cost.core_hours == pytest.approx(222 * 4 / 3600)
    assert (cost.vectors, cost.codes) == (8000 * 1024, 8000 * (512 + 24))
    assert cost.audit_seconds == pytest.approx(8000 * 100 / 1e6 / 4)
    assert cost.storage_price == pytest.approx(cost.disk / 1e9 * 3)
    assert cost.cached == 1


def test_gpus_take_the_features_and_reading_goes_on_beside():
    gpus = Machines(**{**TWO.__dict__, "gpus": 1})
    cost = cost_of_index(8000, "net", gpus, dimension=512, image_bytes=1e6, images_per_second=1000, rates=RATES)
    assert cost.stages["features"] == pytest.approx(4)
    assert cost.build_seconds == pytest.approx(4000)  # what reading takes
    assert cost.gpu_hours == pytest.approx(8 / 3600)
    assert cost.build_price == pytest.approx(4000 / 3600 * 2 * (4 + 10))


def test_codes_beyond_memory_are_read_for_every_pass():
    small = Machines(**{**TWO.__dict__, "memory": 1e5})
    options = {"dimension": 512, "rates": RATES, "generated": 5000}
    cost = cost_of_index(100_000, "precomputed", small, **options)
    assert cost.cached == pytest.approx(0.8 * 2e5 / cost.codes)
    assert cost.audit_seconds == pytest.approx(max(125, 2 * cost.codes * (1 - cost.cached) / 2e6))
    assert cost_of_index(100_000, "precomputed", small, flat=True, **options).audit_seconds >= 250


@pytest.mark.parametrize("name", ["pixels", "precomputed", "sscd", "clip", "dinov2"])
def test_cost_grows_with_the_images(name):
    some, more = (cost_of_index(n, name) for n in (10**8, 10**10))
    for part in ("build_seconds", "audit_seconds", "disk", "build_price", "storage_price"):
        assert getattr(more, part) >= 99 * getattr(some, part) > 0
    assert MEASURED.efficiency <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images is 0, but must be a number above 0"),
        ({"features": "other"}, "no rate is known of 'other'"),
        ({"features": "other", "images_per_second": 5}, "how many values vectors of 'other' have is not known"),
        ({"machines": Machines(gpus=1)}, "no rate was measured on a GPU"),
        ({"machines": Machines(bandwidth=0)}, "bandwidth is 0, but must be"),
        ({"dtype": "float8"}, "dtype must be one of float16"),
        ({"features": "pixels", "flat": True}, "pixels have leading components"),
    ],
)
def test_what_cannot_be_planned(options, message):
    with pytest.raises(InputError, match=message):
        cost_of_index(**{"images": 1000, "features": "sscd", **options})


def test_words():
    found = [duration_text(s) for s in (0.5, 42, 90, 3600 * 5, 3600 * 24 * 3, 3600 * 24 * 400)]
    assert found == ["0.5 s", "42 s", "1.5 min", "5 h", "3 days", "400 days"]


def test_the_command():
    done = run("index", "plan", "1e9", "--features", "sscd", "--machines", "100")
    assert done.returncode == 0, done.stderr
    for line in ("1,000,000,000 images, sscd; 100 machines of 16 cores", "build", "audit", "disk", "This rests on"):
        assert line in done.stdout
    about = json.loads(run("index", "plan", "1e9", "--features", "sscd", "--machines", "100", "--json").stdout)
    assert about["disk"] == about["vectors"] + about["codes"] + about["rows"]
    failed = run("index", "plan", "1e9", "--features", "sscd", "--gpus", "8")
    assert failed.returncode != 0
    assert "--images-per-second" in failed.stderr
    assert "--machine-memory" in run("index", "plan", "1e9", "--machine-memory", "0").stderr
    assert "'many' is not a whole number" in run("index", "plan", "many").stderr
