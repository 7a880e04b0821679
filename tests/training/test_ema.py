"""The decay of the averaged weights: golden values of the four rules, and their limits."""

import json
from pathlib import Path

import pytest

from diffmem.errors import InputError
from diffmem.training import EMA

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ema_betas.json").read_text())
RULES = {
    "by_data_size": EMA("by-size"),
    "compensated": EMA(),
    "constant": EMA("constant"),
    "final_0_99": EMA("target", target=0.99),
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"N{case['dataset_size']}-{case['images_seen']}")
def test_golden(case):
    for name, rule in RULES.items():
        beta = rule.beta(case["images_seen"], case["batch"], case["dataset_size"])
        assert beta == pytest.approx(case[name], rel=1e-12), name


def test_targets_of_the_paper_are_reached():
    for target in (0.99929, 0.999, 0.5, 0.1, 0.0):
        assert EMA("target", target=target).beta(10**9, 512, 5000) == pytest.approx(target, abs=1e-12)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="choose from by-size"):
        EMA("fast")
    with pytest.raises(InputError, match="a target belongs to"):
        EMA("constant", target=0.9)
    with pytest.raises(InputError, match="a target belongs to"):
        EMA("target")
