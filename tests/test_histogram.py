"""Histograms as SVG: bars as high as the shares, ticks at round numbers, text that cannot leave its place."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmem.histogram import FILL, HEIGHT, WIDTH, Line, histogram, nice_ticks, tick_text


def bars(svg):
    """(left, right, height) of each bar, in points."""
    path = next(each for each in ElementTree.fromstring(svg) if each.get("fill") == FILL and each.get("d"))
    found = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)H([\d.]+)", path.get("d"))
    return np.array([[float(left), float(right), float(base) - float(top)] for left, base, top, right in found])


def texts(svg):
    return [each.text for each in ElementTree.fromstring(svg).iter() if each.text]


def test_bars_are_as_high_as_the_shares():
    values = np.array([0.1, 0.1, 0.3, 0.6, 0.6, 0.6, 0.95, 1.0])
    edges = np.array([0, 0.25, 0.5, 0.75, 1])
    left, right, height = bars(histogram(values, edges, "score")).T
    shares = np.histogram(values, edges)[0] / 8
    np.testing.assert_allclose(height / height.max(), shares / shares.max(), rtol=1e-2)
    np.testing.assert_allclose(np.diff(left), np.diff(left)[0], atol=0.02)
    np.testing.assert_allclose(right[:-1], left[1:])
    assert left.min() > 0
    assert right.max() < WIDTH
    assert height.max() < HEIGHT


def test_logarithmic_bars_grow_by_the_same_height_for_each_factor():
    values = np.repeat([0.5, 1.5, 2.5], [1, 10, 100])
    height = bars(histogram(values, np.arange(4), "score", log=True))[:, 2]
    np.testing.assert_allclose(height[1] - height[0], height[2] - height[1], rtol=1e-2)
    assert "share of images (log scale)" in texts(histogram(values, np.arange(4), "score", log=True))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [np.zeros(0), np.zeros(5), np.full(3, 99.0), np.array([np.nan, 0.5])])
def test_values_that_fill_no_bar(values, log):
    svg = histogram(values, np.linspace(0, 1, 3), "x", others=np.ones(2), others_name="unseen", log=log)
    assert "nan" not in svg
    assert "inf" not in svg
    ElementTree.fromstring(svg)


def test_names_are_text():
    line = Line(0.5, "threshold <1/3> & more")
    svg = histogram(np.ones(3), np.linspace(0, 1, 3), "<script>", line=line)
    assert "<script>" in texts(svg)
    assert "<script>" not in svg
    assert {"generated", "threshold <1/3> & more"} <= set(texts(svg))
    assert "generated" not in texts(histogram(np.ones(3), np.linspace(0, 1, 3), "x"))


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**9))
def test_ticks(low, width):
    low, width = low / 1000, width / 1000
    ticks = nice_ticks(low, low + width)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)
    mantissa = f"{ticks[1] - ticks[0]:.3e}".partition("e")[0]
    assert mantissa in ("1.000", "2.000", "2.500", "5.000")


def test_tick_texts():
    assert [tick_text(tick) for tick in (0.0, 0.1 + 0.2, 2500.0, 1e-5, -0.25, 3e7)] == [
        "0", "0.3", "2500", "1e-5", "-0.25", "3e7",
    ]  # fmt: skip
