"""The decay of the EMA weights: golden values of the four rules, and their limits."""

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


@pytest.mark.parametrize("rule", ["by-size", "compensated", "target"])
def test_the_published_code_floors_the_half_life_to_whole_thousands(rule):
    """By hand, as the public loop computes it: int(500·N/50000) kimg."""
    target = 0.99 if rule == "target" else None
    paper, published = EMA(rule, target=target), EMA(rule, target=target, protocol="published")
    assert EMA(rule, target=target) == paper  # the default
    seen, batch, constant = 10**8, 512, 0.5 ** (512 / 500_000)
    for size in (1, 50, 99, 100, 199, 200, 250, 299, 1000, 5000, 5050, 50_000):
        halflife = int(500 * size / 50_000) * 1000
        expected = {
            "by-size": lambda h: 0.5 ** (batch / h),
            "compensated": lambda h, n=size: 0.5 ** (512 * n / (50_000 * h)),
            "target": lambda h, n=size: 0.99 / constant * 0.5 ** (batch * n / (50_000 * h)),
        }[rule]
        beta = published.beta(seen, batch, size)
        assert beta == pytest.approx(expected(halflife) if halflife else 0.0, rel=1e-12)
        assert published.full_halflife(size) == halflife
        assert paper.full_halflife(size) == 10 * size
        if size % 100 == 0:
            assert beta == paper.beta(seen, batch, size)
    assert published.beta(seen, batch, 99) == 0.0 < paper.beta(seen, batch, 99)
    # While few images are seen, the ramp-up decides, floored or not.
    assert published.beta(1000, batch, 250) == paper.beta(1000, batch, 250)


def test_the_rule_in_words_says_which_protocol_it_follows():
    assert "half-life 2,500 images at N = 250, as in the paper" in EMA().describe(250)
    assert "half-life 2,000 images at N = 250, floored" in EMA(protocol="published").describe(250)
    assert "none below N = 100" in EMA(protocol="published").describe(99)
    assert EMA("constant", protocol="published").describe(99) == EMA("constant").describe(99)


def test_targets_of_the_paper_are_reached():
    for target in (0.99929, 0.999, 0.5, 0.1, 0.0):
        assert EMA("target", target=target).beta(10**9, 512, 5000) == pytest.approx(target, abs=1e-12)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="rule is 'fast', but must be one of by-size"):
        EMA("fast")
    with pytest.raises(InputError, match="protocol is 'code', but must be one of paper, published"):
        EMA(protocol="code")
    with pytest.raises(InputError, match=r"target is 0\.9, but must go with rule=.target."):
        EMA("constant", target=0.9)
    with pytest.raises(InputError, match="needs target=…"):
        EMA("target")
