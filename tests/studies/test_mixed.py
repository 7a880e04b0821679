"""The mixed model of statsmodels finds what the analysis finds."""

import math
from dataclasses import replace

import numpy as np
import pytest
from studies.test_findings import result
from studies.tiny import TINY

from diffmem.errors import InputError, MissingExtraError
from diffmem.studies import Question, Study, Trial, Variant
from diffmem.studies.analysis import logit_of, pooled
from diffmem.studies.mixed import mixed_model


def made(logits: np.ndarray) -> tuple[Study, dict]:
    """A study with a run for every [repetition, variant, size] that is a number."""
    variants = tuple(Variant(f"v{v}", replace(TINY, samples=1 + v)) for v in range(logits.shape[1]))
    sizes = tuple(range(20, 20 + logits.shape[2]))
    cells = {
        (variant.name, size): {
            r: result(Trial(variant.setting, size, r), round(10**6 / (1 + math.exp(-logit))), 10**6)
            for r, logit in enumerate(logits[:, v, s])
            if np.isfinite(logit)
        }
        for v, variant in enumerate(variants)
        for s, size in enumerate(sizes)
    }
    return Study("s", "S", "f", variants, sizes, questions=(Question("", "v0", "v1"),)), cells


def test_errors_are_those_of_the_analysis_where_all_runs_are_there():
    pytest.importorskip("statsmodels", reason="the extra studies is not installed")
    random = np.random.default_rng(0)
    logits = random.normal(0, 0.6, (5, 1, 1)) + random.normal(0, 0.25, (5, 4, 1))
    subject, cells = made(logits)
    weights = subject.contrast(subject.questions[0])
    ours = pooled(
        {name: {(name, 20): 1.0} for name in ("v0", "v1", "v2", "v3")}, {"v0": 1.0, "v1": -1.0, "v2": 0, "v3": 0},
        cells, logit_of,
    )  # fmt: skip
    model = mixed_model(cells)
    theirs = model.effect(weights, 12)
    assert (theirs.estimate, theirs.error) == pytest.approx((ours.estimate, ours.error), rel=1e-3)
    assert 0.2 < model.repetition < 1.2
    assert model.repetition_size is None
    # Sizes have something of their own in each repetition, and a run is missing.
    logits = logits + random.normal(0, 0.4, (5, 1, 3)) + random.normal(0, 0.2, (5, 4, 3))
    logits[4, 3, 2] = np.nan
    subject, cells = made(logits)
    model = mixed_model(cells)
    assert 0.15 < model.repetition_size < 0.8
    assert 0.15 < model.run < 0.5
    means = logits[:, 0].mean() - logits[:, 1].mean()
    assert model.effect(subject.contrast(subject.questions[0]), 12).estimate == pytest.approx(means, abs=0.05)


def test_too_few_runs_and_a_missing_extra_are_said(monkeypatch):
    _, cells = made(np.zeros((2, 2, 1)))
    monkeypatch.setitem(__import__("sys").modules, "statsmodels.regression.mixed_linear_model", None)
    with pytest.raises(MissingExtraError, match=r"statsmodels: pip install 'diffmem\[studies\]'"):
        mixed_model(cells)
    monkeypatch.undo()
    pytest.importorskip("statsmodels", reason="the extra studies is not installed")
    with pytest.raises(InputError, match="two repetitions or more"):
        mixed_model({place: {0: results[0]} for place, results in cells.items()})
