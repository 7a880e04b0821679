"""Gates: passed where it is shown, closed where the contrary is, undecided between or where the audit is in doubt."""

import dataclasses
import math
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffmem
from diffmem.errors import InputError
from diffmem.memorization import decide_gate, wilson_interval

INTERVAL = (0.1, 0.3)


@pytest.mark.parametrize(
    ("limits", "state"),
    [
        ({"fail_above": 0.05}, "closed"),
        ({"fail_above": 0.1}, "passed"),
        ({"fail_above": 0.2}, "passed"),
        ({"require_below": 0.1}, "closed"),
        ({"require_below": 0.2}, "undecided"),
        ({"require_below": 0.3}, "undecided"),
        ({"require_below": 0.31}, "passed"),
        ({"max_copies": 20}, "passed"),
        ({"max_copies": 19}, "closed"),
        ({"max_copies": 0, "require_below": 0.2}, "closed"),
        ({"max_copies": 20, "require_below": 0.2, "fail_above": 0.5}, "undecided"),
    ],
)
def test_limits(limits, state):
    gate = decide_gate(20, INTERVAL, **limits)
    assert gate.state == state
    assert gate.status == {"passed": 0, "closed": 3, "undecided": 4}[state]
    assert gate.passed == (not gate.reasons)
    doubtful = decide_gate(20, INTERVAL, **limits, warnings=["all images are black"])
    assert doubtful.state == ("closed" if state == "closed" else "undecided")
    assert "all images are black" in str(doubtful)


def test_junit_has_a_case_per_limit(tmp_path):
    warning = "all images <are> black \x1b[31m & \u202eso"
    gate = decide_gate(20, INTERVAL, require_below=0.2, max_copies=3, fail_above=0.5, warnings=[warning])
    gate.save_junit(tmp_path / "gate.xml", "release")
    suite = ElementTree.parse(tmp_path / "gate.xml").getroot()[0]
    assert [suite.get(name) for name in ("name", "tests", "failures", "errors")] == ["release", "4", "1", "2"]
    told = {case.get("name"): [each.tag for each in case] for case in suite.iter("testcase")}
    assert told == {
        "require below 20 %": ["error"], "at most 3 copies": ["failure"], "fail above 50 %": [], "warning 1": ["error"]
    }  # fmt: skip
    assert suite.find(".//failure").get("message") == "20 copies exceed the limit of 3"
    assert {each.get("name"): float(each.get("value")) for each in suite.iter("property")} == {
        "count": 20, "low": 0.1, "high": 0.3
    }  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "no limit"), ({"fail_above": 1.2}, "fail_above"), ({"require_below": math.nan}, "require_below"),
        ({"max_copies": -1}, "max_copies"),
    ],
)  # fmt: skip
def test_limits_that_are_none(limits, words):
    with pytest.raises(InputError, match=words):
        decide_gate(20, INTERVAL, **limits)


@given(
    st.integers(0, 200),
    st.integers(1, 200),
    st.floats(0, 1, allow_subnormal=False),
    st.floats(0, 1, allow_subnormal=False),
)
def test_lower_limits_are_harder_to_keep(count, total, one, other):
    count = min(count, total)
    order = ["passed", "undecided", "closed"]
    for name in ("fail_above", "require_below"):
        low, high = (
            decide_gate(count, wilson_interval(count, total), **{name: limit}).state for limit in sorted((one, other))
        )
        assert order.index(low) >= order.index(high)


def test_audits_have_gates_frames_and_summaries():
    images = np.random.default_rng(0).integers(0, 256, (400, 1, 4, 4), dtype=np.uint8)
    result = diffmem.audit(images, images[:300], flip=True)
    assert result.gate(max_copies=300).passed
    assert result.gate(max_copies=299).state == "closed"
    assert dataclasses.replace(result, warnings=("doubtful",)).gate(max_copies=300).state == "undecided"
    summary = result.summary()
    assert len(str(summary)) < 5000
    assert summary["sources_total"] == 300
    assert {name: summary[name] for name in ("count", "total")} == {"count": 300, "total": 400}
    assert "300 of 400" in result._repr_html_()


def test_frames(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas", reason="the extra pandas is not installed")
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    result = diffmem.audit(images, images[:30], flip=True)
    frame = result.to_frame()
    result.save(tmp_path)
    stored = pandas.read_csv(tmp_path / "samples.csv")
    assert list(frame) == list(stored)
    assert frame["memorized"].sum() == 30
    assert np.array_equal(frame["nearest_squared_distance"], stored["nearest_squared_distance"])
    assert np.allclose(frame["d1_over_d2"], stored["d1_over_d2"], atol=1e-6)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"diffmem\[pandas\]"):
        result.to_frame()
