"""Histograms of shares as SVG, written directly: importing matplotlib and drawing two of them takes a second, which is
a sixth of auditing 10,000 images against 50,000."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 446.4, 208.8  # points: the figures of `diffmem.plotting`
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 10.0, 8.0, 38.0
_TICKS = 6
_LETTER = 4.9  # width of a letter of 9 points, about
FILL, OUTLINE, LINE = "#3866a8", "#c2571a", "#a11"


class Line(NamedTuple):
    """A vertical line at `value`, and what it is called."""

    value: float
    name: str


def histogram(
    values: np.ndarray,
    edges: np.ndarray,
    label: str,
    *,
    name: str = "generated",
    others: np.ndarray | None = None,
    others_name: str = "",
    line: Line | None = None,
    log: bool = False,
) -> str:
    """A histogram as SVG to be embedded in a page: the share of the values in each bin.

    Args:
        values: [n] numbers, drawn as filled bars. Those outside the edges are not drawn, but count.
        edges: [bins + 1], ascending; the last bin holds its right edge.
        label: What the numbers are.
        name: What the values are called in the legend, which is drawn where there is more than one thing to name.
        others: Further numbers, drawn as an outline, or None.
        others_name: What those are called.
        line: Drawn across the bars, or None.
        log: Whether shares are on a logarithmic scale.
    """
    ours = _shares(values, edges)
    theirs = None if others is None else _shares(others, edges)
    drawn = ours if theirs is None else np.concatenate([ours, theirs])
    if log:
        positive = drawn[drawn > 0]
        low, high = (positive.min() / 2, positive.max() * 1.6) if len(positive) else (0.1, 1.0)
        ticks = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        ticks = [tick for tick in ticks if low <= tick <= high]
    else:
        low, high = 0.0, float(drawn.max()) * 1.05 or 1.0
        ticks = nice_ticks(low, high)

    def across(value: float) -> float:
        return _LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - _LEFT - _RIGHT)

    def up(share: float) -> float:
        if log:
            share, start, end = (math.log(max(each, low)) for each in (share, low, high))
        else:
            start, end = low, high
        return HEIGHT - _BOTTOM - (share - start) / (end - start) * (HEIGHT - _TOP - _BOTTOM)

    base = HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" '
        f'width="{WIDTH:g}pt" height="{HEIGHT:g}pt" role="img" font-family="sans-serif" font-size="9">'
    ]
    bars = "".join(
        f"M{across(left):.2f} {base:.2f}V{up(share):.2f}H{across(right):.2f}V{base:.2f}z"
        for left, right, share in zip(edges, edges[1:], ours, strict=False)
        if share > 0
    )
    parts.append(f'<path d="{bars}" fill="{FILL}"/>')
    if theirs is not None:
        steps = "".join(f"V{up(share):.2f}H{across(edge):.2f}" for share, edge in zip(theirs, edges[1:], strict=True))
        path = f"M{across(edges[0]):.2f} {base:.2f}{steps}V{base:.2f}"
        parts.append(f'<path d="{path}" fill="none" stroke="{OUTLINE}" stroke-width="1.4"/>')
    if line is not None:
        parts.append(
            f'<path d="M{across(line.value):.2f} {base:.2f}V{_TOP:.2f}" stroke="{LINE}" stroke-dasharray="3.7 1.6"/>'
        )
    parts.append(
        f'<path d="M{_LEFT:.2f} {_TOP:.2f}V{base:.2f}H{WIDTH - _RIGHT:.2f}" fill="none" stroke="#000" '
        'stroke-width=".8"/>'
    )
    for tick in nice_ticks(float(edges[0]), float(edges[-1])):
        x = across(tick)
        parts.append(f'<path d="M{x:.2f} {base:.2f}v3.5" stroke="#000" stroke-width=".8"/>')
        parts.append(_text(x, base + 13, tick_text(tick), "middle"))
    for tick in ticks:
        y = up(tick)
        parts.append(f'<path d="M{_LEFT:.2f} {y:.2f}h-3.5" stroke="#000" stroke-width=".8"/>')
        parts.append(_text(_LEFT - 6, y + 3, tick_text(tick), "end"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, label, "middle"))
    y = (_TOP + base) / 2
    share = "share of images" + (" (log scale)" if log else "")
    parts.append(f'<text x="11" y="{y:.2f}" text-anchor="middle" transform="rotate(-90 11 {y:.2f})">{share}</text>')
    entries = [(FILL, name)]
    entries += [] if theirs is None else [(OUTLINE, others_name)]
    entries += [] if line is None else [(LINE, line.name)]
    if len(entries) > 1:
        parts.append(_legend(entries, ours if theirs is None else np.maximum(ours, theirs)))
    return "".join([*parts, "</svg>"])


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, edges)[0] / max(1, len(values))


def _legend(entries: Sequence[tuple[str, str]], shares: np.ndarray) -> str:
    """In the upper corner that has the lower bars."""
    wide = 22 + _LETTER * max(len(name) for _, name in entries)
    under = max(1, round(len(shares) * wide / (WIDTH - _LEFT - _RIGHT)))
    x = _LEFT + 8 if shares[:under].max() < shares[-under:].max() else WIDTH - _RIGHT - wide
    drawn = []
    for place, (color, name) in enumerate(entries):
        y = _TOP + 10 + 13 * place
        if color == FILL:
            drawn.append(f'<rect x="{x:.2f}" y="{y - 6:.2f}" width="16" height="6.5" fill="{color}"/>')
        else:
            dashes = ' stroke-dasharray="3.7 1.6"' if color == LINE else ""
            drawn.append(f'<path d="M{x:.2f} {y - 3:.2f}h16" stroke="{color}" stroke-width="1.4"{dashes}/>')
        drawn.append(_text(x + 20, y, name, "start"))
    return "".join(drawn)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, at most `_TICKS` + 1 of them, evenly spaced: steps of 1, 2, 2.5 or 5 times a
    power of ten."""
    width = high - low
    if not width > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(width / _TICKS))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * _TICKS >= width * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_text(tick: float) -> str:
    """A tick as the axis writes it."""
    if tick and not 1e-4 <= abs(tick) < 1e6:
        mantissa, _, exponent = f"{tick:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{tick:.6g}"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{html.escape(text)}</text>'
