"""The measures equal the values that published code gives for the same inputs (tests/golden/criteria/expected.json)."""

import json
from pathlib import Path

import numpy as np
import pytest

import diffmem

GOLDEN = Path(__file__).parents[2] / "golden" / "criteria"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["values"]
SETS = ("training", "test", "generated")
MEASURES = [
    "authenticity", "authenticity:fld", "authenticity:dgm-eval", "c_t", "c_t_global", "c_t:dgm-eval", "c_t:fld",
    "mifid_distance", "mifid:torchmetrics", "top1_similarity", "nearest_distance", "distance_ratio", "calibrated_l2",
    "ratio",
]  # fmt: skip
FLOAT32 = 1e-7  # the rounding of code that computes in float32
FRECHET = 1e-6  # matrix roots of covariances that are not regular


def measured(name: str, measures=MEASURES, **options) -> diffmem.memorization.Measures:
    with np.load(GOLDEN / f"{name}.npz") as sets, np.load(GOLDEN / f"{name}.cells.npz") as cells:
        return diffmem.measure(
            sets["generated"], sets["training"], sets["test"], measures=measures, **options,
            cells=tuple(cells[each] for each in SETS),
        )  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_equal_to_published_code(name):
    expected, images = EXPECTED[name], name != "features_honest"
    found = measured(name, MEASURES + (["tile_max"] if images else []))
    exact = {
        "authenticity": expected["exact_authpct"] / 100,
        "c_t": expected["ct_fixed_cells"],
        "c_t_global": expected["ct_Zu_global"],
        "c_t:dgm-eval": expected["ct_dgm_seed0"],
        "c_t:fld": expected["ct_fld_seed0"],
        "mifid_distance_generated": expected["mifid_memorization_fake_to_real"],
        "mifid_distance_real": expected["mifid_memorization_real_to_fake"],
        "top1_similarity": expected["top1_cosine"]["mean"],
        "top1_similarity_above_0.5": expected["top1_cosine"]["share>0.5"],
        "nearest_distance": expected["dcr"]["mean"],
        "nearest_distance_min": expected["dcr"]["min"],
        "nearest_distance_p5": expected["dcr"]["p5"],
        "nearest_distance_median": expected["dcr"]["median"],
        "distance_ratio": expected["nndr"]["mean"],
        "ratio_raw": expected["nndr"]["share<1/3_raw"],
        "calibrated_l2": expected["carlini_calibrated_l2"]["share<1"],
        "calibrated_l2_mean": expected["carlini_calibrated_l2"]["mean"],
    }
    if images:
        tiles = expected["tile_max"]
        exact |= {"tile_max": tiles["mean"], "tile_max_median": tiles["median"]}
        exact |= {
            "tile_max_below_10": tiles["share<=rms 10"],
            "ratio": expected["diffmem_audit_for_reference"]["ratio"],
        }
        assert np.square(found.per_image["tile_max"][:5]) == pytest.approx(tiles["squared_first5"], rel=1e-12)
        assert found.per_image["tile_max_nearest"][:5].tolist() == tiles["nearest_first5"]
    for key, value in exact.items():
        assert found.values[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    rounded = {"authenticity:fld": expected["fld.AuthPct"], "authenticity:dgm-eval": expected["dgm.authpct"]}
    for key, value in rounded.items():
        assert found.values[key] == pytest.approx(value, rel=FLOAT32), key
    assert found.values["mifid:torchmetrics"] == pytest.approx(expected["mifid"], rel=FRECHET)
    first = expected["top1_cosine"]["first5"], expected["carlini_calibrated_l2"]["first5"]
    assert found.per_image["top1_similarity"][:5] == pytest.approx(first[0], rel=1e-9)
    assert found.per_image["calibrated_l2"][:5] == pytest.approx(first[1], rel=1e-9)


def test_cells_of_another_seed_are_those_of_the_published_code():
    found = measured("digits_honest", "c_t:dgm-eval", seed=1)
    assert found["c_t:dgm-eval"] == pytest.approx(EXPECTED["digits_honest"]["ct_dgm_seed1"], rel=1e-9)


def test_z_of_each_cell():
    per_cell = EXPECTED["digits_planted"]["ct_fixed_cells_per_cell"]
    found = measured("digits_planted", "c_t")
    assert found.notes == (f"c_t, cell by cell: {', '.join(f'{z:.2f}' for z in per_cell)}",)


def test_peers_distance_of_the_second_direction_is_ours_with_the_sets_exchanged():
    with np.load(GOLDEN / "features_honest.npz") as sets:
        ours = diffmem.measure(sets["generated"], sets["training"], measures="mifid_distance")
        exchanged = diffmem.measure(sets["training"], sets["generated"], measures="mifid_distance")
    assert ours["mifid_distance_real"] == pytest.approx(exchanged["mifid_distance_generated"], rel=1e-12)
