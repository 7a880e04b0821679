"""Tiles and balls against every pair written out; the bounds exclude no pair that they may not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmem.search import TrainingIndex, tiles
from diffmem.search.balls import count_in_balls
from diffmem.search.bounds import LowerBounds
from diffmem.search.cosines import largest_cosines
from diffmem.search.rows import as_rows
from diffmem.search.tiles import cut_tiles, nearest_by_tiles, squared_tile_maxima


def images(random, count: int, shape=(2, 6, 9), dtype=np.uint8, levels: int = 256) -> np.ndarray:
    return (random.integers(0, levels, (count, *shape)) * (255 // (levels - 1))).astype(dtype)


def tile_maxima(queries: np.ndarray, training: np.ndarray, tile: int) -> np.ndarray:
    """[Q, N], in float64: exact for these values."""
    found = np.zeros((len(queries), len(training)))
    for top in range(0, queries.shape[2], tile):
        for left in range(0, queries.shape[3], tile):
            x, y = (each[:, :, top : top + tile, left : left + tile].astype(float) for each in (queries, training))
            found = np.maximum(found, np.square(x[:, None] - y[None]).sum((2, 3, 4)))
    return found


@pytest.mark.parametrize("native", [True, False])
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.float32, np.float64]), st.integers(1, 9))
@settings(max_examples=30)
def test_nearest_by_tiles(native, seed, dtype, tile):
    """Few gray levels make ties, of which the lowest index is taken; tiles at the edges are narrower."""
    random = np.random.default_rng(seed)
    training, queries = images(random, 21, dtype=dtype, levels=2), images(random, 5, dtype=dtype, levels=2)
    training[[3, 11]] = training[17]
    queries[0] = training[17]
    guesses = random.integers(0, 21, (5, 2))
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(tiles, "native_module", lambda: None)
        squared, indices = nearest_by_tiles(queries, training, tile, guesses, TrainingIndex(training))
    expected = tile_maxima(queries, training, tile)
    assert squared.tolist() == expected.min(axis=1).tolist()
    assert indices.tolist() == expected.argmin(axis=1).tolist()
    assert squared.dtype == (np.int64 if dtype == np.uint8 else np.float64)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_nearest_by_tiles_with_bounds(dtype):
    """So many training images that the index has a code, and near copies among the queries."""
    random = np.random.default_rng(0)
    smooth = random.normal(0, 40, (1500, 3, 3, 3)).repeat(4, axis=2).repeat(4, axis=3)
    training = (smooth + random.normal(128, 6, (1500, 3, 12, 12))).clip(0, 255).astype(dtype)
    queries = (training[:60].astype(float) + random.normal(0, 9, (60, 3, 12, 12))).clip(0, 255).astype(dtype)
    queries[40:] = (queries[40:] + queries[:20]) / 2
    index = TrainingIndex(training)
    assert index.filtered is not None
    squared, indices = nearest_by_tiles(queries, training, 4, index.query(queries, 2).indices, index)
    expected = tile_maxima(queries, training, 4)
    assert squared == pytest.approx(expected.min(axis=1), rel=1e-12)
    assert indices.tolist() == expected.argmin(axis=1).tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("far", [False, True])
def test_bounds_keep_every_pair_within_the_distance(dtype, far):
    random = np.random.default_rng(1)
    smooth = random.integers(0, 256, (1100, 4)) @ random.integers(0, 30, (4, 70)) / 120
    training = (smooth + random.normal(0, 3, (1100, 70))).clip(0, 255).astype(dtype)
    queries = (training[:50].astype(float) + random.normal(0, 5, (50, 70))).clip(0, 255).astype(dtype)
    if far and dtype != np.uint8:
        queries[::7] *= 1e6  # beyond what the code reaches
    rows = as_rows(queries)
    bounds = LowerBounds(TrainingIndex(training), rows)
    squared = torch.from_numpy(np.square(queries[:, None].astype(float) - training[None].astype(float)).sum(-1))
    for place in (0, 3, 60):
        limits = squared.sort(dim=1).values[:, place]
        near = bounds.may_be_within(slice(0, 50), slice(0, 1100), limits)
        assert bool(near[squared <= limits[:, None]].all())
        limits = squared.sort(dim=0).values[place // 2]
        near = bounds.may_be_within(slice(0, 50), slice(0, 1100), None, limits)
        assert bool(near[squared <= limits].all())
    assert float(near.float().mean()) < 0.9, "it excludes something"


@pytest.mark.parametrize(("count", "dtype"), [(40, np.uint8), (40, np.float32), (1200, np.uint8), (1200, np.float64)])
def test_count_in_balls(count, dtype):
    """A point on the edge is outside; blocks of both sets are several."""
    random = np.random.default_rng(2)
    rows, queries = (torch.from_numpy(random.integers(0, 5, (n, 6)).astype(dtype)) for n in (count, 1030))
    kind = torch.int64 if dtype == np.uint8 else torch.float64
    row_radii, query_radii = (torch.from_numpy(random.integers(0, 12, n)).to(kind) for n in (count, 1030))
    found = count_in_balls(TrainingIndex(rows), rows, queries, row_radii, query_radii)
    squared = torch.cdist(queries.double(), rows.double()).square().round()
    assert found.of_queries.tolist() == (squared < row_radii).sum(1).tolist()
    assert found.of_rows.tolist() == (squared < row_radii).sum(0).tolist()
    assert found.in_queries.tolist() == (squared < query_radii[:, None]).sum(0).tolist()


def test_tiles_hold_all_values():
    values = np.arange(2 * 1 * 3 * 5).reshape(2, 1, 3, 5)
    cut = cut_tiles(values, 2)
    assert cut.shape == (2, 6, 4)
    assert cut[0].tolist() == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 0, 9, 0], [10, 11, 0, 0], [12, 13, 0, 0], [14, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_largest_cosines(dtype, signed, own):
    """In both directions, behind bounds that leave most pairs out: with dark images, images of zeros, opposite ones
    and duplicates among them."""
    random = np.random.default_rng(3)
    smooth = random.normal(0, 1, (1400, 3)) @ random.normal(0, 30, (3, 80))
    rows = smooth + random.normal(0, 2, (1400, 80)) + (0 if signed else 110)
    rows[:20] *= 0.02
    rows[20], rows[21] = 0, rows[22]
    if signed and dtype != np.uint8:
        rows[30:60] *= -1
    rows = (rows if signed and dtype != np.uint8 else rows.clip(0, 255)).astype(dtype)
    places = np.concatenate([np.arange(10, 70), random.integers(0, 1400, 40)])
    queries = rows[places] if own else (rows[places] + random.integers(0, 3, (100, 80))).astype(dtype)
    index = TrainingIndex(rows)
    assert index.filtered is not None
    table = []
    for query in queries.astype(float):
        lengths = np.linalg.norm(query) * np.linalg.norm(rows.astype(float), axis=1)
        table.append(np.divide(rows.astype(float) @ query, lengths, out=np.full(1400, -2.0), where=lengths > 0))
    table = np.array(table)
    if own:
        table[np.arange(100), places] = -2
    for absolute in (False, True):
        wanted = np.where(table < -1.5, -2, np.abs(table)) if absolute else table
        found = largest_cosines(
            index, *map(torch.from_numpy, (queries, rows)), own=places if own else None, absolute=absolute
        )
        assert found.of_queries == pytest.approx(wanted.max(axis=1), abs=1e-12)
        assert found.of_rows == pytest.approx(wanted.max(axis=0), abs=1e-12)
    few = TrainingIndex(rows[:200])  # without a code: all pairs
    found = largest_cosines(few, torch.from_numpy(queries), torch.from_numpy(rows[:200]))
    if not own:
        assert found.of_rows == pytest.approx(table[:, :200].max(axis=0), abs=1e-12)


def test_largest_cosines_compute_few_pairs(monkeypatch):
    random = np.random.default_rng(4)
    rows = (random.normal(0, 1, (4000, 8)) @ random.normal(0, 30, (8, 200)) + random.normal(128, 3, (4000, 200))).clip(
        0, 255
    )
    rows = torch.from_numpy(rows.astype(np.uint8))
    computed = []
    monkeypatch.setattr(
        "diffmem.search.cosines.squared_tile_maxima",
        lambda x, y, some, others: computed.append(len(some)) or squared_tile_maxima(x, y, some, others),
    )
    found = largest_cosines(TrainingIndex(rows), rows[:500].clone(), rows)
    assert found.of_queries == pytest.approx(1)
    assert sum(computed) < 0.05 * 500 * 4000
