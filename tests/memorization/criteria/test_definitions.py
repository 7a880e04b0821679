"""Each measure equals its definition, written out as loops, on small sets full of ties, duplicates and zeros."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import diffmem
from diffmem.errors import InputError
from diffmem.memorization.criteria.c_t import z_score
from diffmem.memorization.criteria.tile_max import in_cliques

DTYPES = (np.uint8, np.float32, np.float64)


def sets(count: int, least: int = 2, most: int = 9):
    """`count` sets of vectors of two values from 0 to 3, of one dtype."""
    return st.sampled_from(DTYPES).flatmap(
        lambda dtype: st.tuples(
            *(
                st.integers(least, most).flatmap(
                    lambda n: arrays(np.uint8, (n, 2), elements=st.integers(0, 3)).map(lambda a: a.astype(dtype))
                )
                for _ in range(count)
            )
        )
    )


def squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.square(x[:, None].astype(np.int64) - y[None].astype(np.int64)).sum(-1)


def others(x: np.ndarray) -> np.ndarray:
    """Squared distances of all pairs, infinite to itself."""
    found = squared(x, x).astype(float)
    np.fill_diagonal(found, np.inf)
    return found


@settings(max_examples=20)
@given(sets(2))
def test_authenticity(drawn):
    generated, training = drawn
    to_training, within = squared(generated, training), others(training)
    nearest = to_training.argmin(axis=1)  # the first of equal ones
    expected = [within[r].min() < to_training[g, r] for g, r in enumerate(nearest)]
    found = diffmem.measure(generated, training, measures="authenticity,authenticity:fld,authenticity:dgm-eval")
    assert found.per_image["authentic"].tolist() == expected
    assert found["authenticity"] == np.mean(expected)
    assert found["authenticity:dgm-eval"] == 100 * np.mean(expected)
    assert found["authenticity:fld"] == 100 * np.mean(expected) - 50


@settings(max_examples=20)
@given(sets(2))
def test_authenticity_of_alaa(drawn):
    generated, training = drawn
    back = squared(training, generated)
    synthetic, to_synthetic = back.argmin(axis=1), back.min(axis=1)
    if synthetic.max() >= len(training):
        with pytest.raises(InputError, match="at most as many generated"):
            diffmem.measure(generated, training, measures="authenticity:alaa")
        return
    expected = np.mean(others(training).min(axis=1)[synthetic] < to_synthetic)
    assert diffmem.measure(generated, training, measures="authenticity:alaa")["authenticity:alaa"] == expected


@settings(max_examples=20)
@given(sets(2))
def test_distances(drawn):
    generated, training = drawn
    distances = np.sort(np.sqrt(squared(generated, training)), axis=1)
    d1, d2 = distances[:, 0], distances[:, 1]
    found = diffmem.measure(generated, training, measures="nearest_distance,distance_ratio,calibrated_l2,m3")
    assert found["nearest_distance"] == pytest.approx(d1.mean())
    assert found["distance_ratio"] == pytest.approx(
        np.mean([a / b if a > 0 else 0 for a, b in zip(d1, d2, strict=True)])
    )
    means = 0.5 * distances.mean(axis=1)  # fewer than 50 training images: all of them
    scores = [a / m if m > 0 else 0 for a, m in zip(d1, means, strict=True)]
    assert found.per_image["calibrated_l2"] == pytest.approx(scores)
    assert found["calibrated_l2"] == np.mean(found.per_image["calibrated_l2"] < 1)
    median = np.median(np.sqrt(others(training).min(axis=1)))
    assert found["m3_median"] == pytest.approx(median)
    assert found["m3"] == np.mean(d1 < found["m3_median"])


@settings(max_examples=20)
@given(sets(3))
def test_distance_against_the_holdout_set(drawn):
    generated, training, holdout = drawn
    closer = squared(generated, training).min(axis=1) < squared(generated, holdout).min(axis=1)
    found = diffmem.measure(generated, training, holdout, measures="dcr_protection")
    assert found["dcr_closer_to_training"] == closer.mean()
    assert found["dcr_protection"] == min(1, 2 * (1 - closer.mean()))
    assert found.honest["dcr_closer_to_training"] == len(training) / (len(training) + len(holdout))


@settings(max_examples=20)
@given(sets(3))
def test_z_score_counts_pairs(drawn):
    generated, training, holdout = drawn
    ours, theirs = squared(generated, training).min(axis=1), squared(holdout, training).min(axis=1)
    m, n = len(ours), len(theirs)
    u = sum((a > b) + (a == b) / 2 for a in ours for b in theirs)
    expected = (u - (n * m / 2 - 0.5)) / np.sqrt(n * m * (n + m + 1) / 12)
    assert z_score(ours, theirs)[0] == pytest.approx(expected)
    assert diffmem.measure(generated, training, holdout, measures="c_t_global")["c_t_global"] == pytest.approx(expected)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_c_t_weights_cells_by_the_holdout_images(seed):
    """Labels that are not 0 … k − 1, a cell of at most 20 generated images, and neighbors that lie in other cells."""
    random = np.random.default_rng(seed)
    generated, training, holdout = (random.integers(0, 6, (n, 2)).astype(np.uint8) for n in (70, 12, 15))
    cells = [
        np.array(labels) for labels in ([7, 9, 12] * 4, [7] * 4 + [9] * 5 + [12] * 6, [7] * 21 + [9] * 20 + [12] * 29)
    ]
    total = weight = 0.0
    for label in (7, 12):
        inside = training[cells[0] == label]
        ours = squared(generated[cells[2] == label], inside).min(axis=1)
        theirs = squared(holdout[cells[1] == label], inside).min(axis=1)
        total += len(theirs) * z_score(ours, theirs)[0]
        weight += len(theirs)
    found = diffmem.measure(generated, training, holdout, measures="c_t", cells=cells)
    assert found["c_t"] == pytest.approx(total / weight)


def test_cells_that_cannot_be_used():
    points = np.arange(60, dtype=np.float32).reshape(30, 2)
    labels = np.zeros(30, int)
    strange = np.array([0] * 29 + [5])
    for cells, message in (
        ((labels, labels, strange), "cell 5, which holds no training image"),
        ((strange, labels, labels), "cell 5 holds no holdout image"),
        ((labels, labels), "three arrays"),
        ((labels, labels, labels[:3]), "30 integers"),
        ("classes", "labels"),
    ):
        for measures in ("c_t", "all"):
            with pytest.raises(InputError, match=message):
                diffmem.measure(points, points, points, measures=measures, cells=cells)
    few = points[:20]  # no cell has more than 20
    with pytest.raises(InputError, match="more than 20"):
        diffmem.measure(few, points, points, measures="c_t", cells=(labels, labels, labels[:20]))


@settings(max_examples=20)
@given(sets(2), st.booleans())
def test_cosines(drawn, negative):
    generated, training = drawn
    if negative and generated.dtype != np.uint8:
        generated, training = generated - 2, training - 1

    def cosine(x, y):
        lengths = np.linalg.norm(x.astype(float)) * np.linalg.norm(y.astype(float))
        return float(x.astype(float) @ y.astype(float)) / lengths if lengths else None

    table = [[cosine(x, y) for y in training] for x in generated]
    if all(not x.any() for x in training):
        for name in ("top1_similarity", "mifid_distance"):
            with pytest.raises(InputError, match="vectors are zero"):
                diffmem.measure(generated, training, measures=name)
        return
    similarity = [max((c for c in row if c is not None), default=0) for row in table]
    found = diffmem.measure(generated, training, measures="top1_similarity")
    assert found.per_image["top1_similarity"] == pytest.approx(similarity, abs=1e-12)
    ours = [1 - max(abs(c) for c in row if c is not None) for row in table if any(c is not None for c in row)]
    theirs = [
        1 - max(abs(c) for c in column if c is not None)
        for column in zip(*table, strict=True)
        if any(c is not None for c in column)
    ]
    if not ours:
        with pytest.raises(InputError, match="vectors are zero"):
            diffmem.measure(generated, training, measures="mifid_distance")
        return
    found = diffmem.measure(generated, training, measures="mifid_distance")
    assert found["mifid_distance_generated"] == pytest.approx(np.mean(ours), abs=1e-12)
    assert found["mifid_distance_real"] == pytest.approx(np.mean(theirs), abs=1e-12)


def test_cosines_among_many_equal_directions():
    """More than the candidates point the same way; the background leaves each image itself out, not its duplicates."""
    training = np.concatenate([np.outer(np.arange(1, 101), [1, 2]), [[3, 1]]]).astype(np.float32)
    found = diffmem.measure(np.float32([[10, 20], [3, 1]]), training, measures="top1_similarity")
    assert found.per_image["top1_similarity"] == pytest.approx([1, 1], abs=1e-12)
    alone = (3 * 1 + 1 * 2) / np.sqrt(10 * 5)
    assert found["top1_similarity_background"] == pytest.approx((100 + alone) / 101, abs=1e-12)


@settings(max_examples=20)
@given(sets(2, least=6, most=12))
def test_precision_recall_density_coverage(drawn):
    generated, training = drawn
    k = 5
    real, ours = (np.sort(others(each), axis=1)[:, k - 1] for each in (training, generated))
    pairs = squared(training, generated)
    in_real, in_ours = pairs < real[:, None], pairs < ours[None]
    found = diffmem.measure(generated, training, measures="precision_recall")
    assert found["precision"] == in_real.any(axis=0).mean()
    assert found["recall"] == in_ours.any(axis=1).mean()
    assert found["density"] == pytest.approx(in_real.sum(axis=0).mean() / k)
    assert found["coverage"] == (pairs.min(axis=1) < real).mean()


@settings(max_examples=20)
@given(sets(2), st.integers(0, 12), st.integers(0, 12))
def test_three_phases(drawn, delta_m, delta_s):
    generated, training = (each.astype(np.float32) for each in drawn)
    delta_m, delta_s = np.sqrt([delta_m, delta_s]).tolist()  # distances that occur
    to_training, between = np.sqrt(squared(generated, training).min(axis=1)), np.sqrt(others(generated).min(axis=1))
    memorized = to_training <= delta_m
    spurious = ~memorized & (between <= delta_s)
    chosen = {"three_phases": {"delta_m": delta_m, "delta_s": delta_s}}
    found = diffmem.measure(generated, training, measures="three_phases", settings=chosen)
    shares = [found[f"three_phases_{phase}"] for phase in ("memorized", "spurious", "generalized")]
    assert shares == [memorized.mean(), spurious.mean(), (~memorized & ~spurious).mean()]


def test_phases_of_images_are_rms_on_values_to_1():
    training = np.zeros((2, 1, 2, 2), np.uint8)
    generated = np.stack([np.full((1, 2, 2), value, np.uint8) for value in (7, 8, 13, 100)])
    found = diffmem.measure(generated, training, measures="three_phases")  # 7.65 and 5.1 gray levels
    assert [found[f"three_phases_{phase}"] for phase in ("memorized", "spurious", "generalized")] == [0.25, 0.5, 0.25]


def test_disjoint_halves():
    random = np.random.default_rng(0)
    ours, theirs, half, other = (random.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8) for n in (5, 5, 7, 6))
    ours[0] = 9  # one value throughout: no direction

    def cosine(x, y):
        x, y = x.ravel() - x.mean(), y.ravel() - y.mean()
        return x @ y / np.sqrt((x @ x) * (y @ y)) if x.any() and y.any() else 0.0

    found = diffmem.measure(ours, half, measures="disjoint_halves", second=theirs, second_training=other)
    assert found["disjoint_halves"] == pytest.approx(np.mean([cosine(x, y) for x, y in zip(ours, theirs, strict=True)]))
    nearest = [
        max(max(cosine(x, t) for t in half) if x.std() else 0, max(cosine(y, t) for t in other))
        for x, y in zip(ours, theirs, strict=True)
    ]
    assert found["disjoint_halves_training"] == pytest.approx(np.mean(nearest), abs=1e-6)
    with pytest.raises(InputError, match="one image per latent"):
        diffmem.measure(ours, half, measures="disjoint_halves", second=theirs[:3])


def test_fid_of_known_gaussians():
    """FID of sets with known moments, a covariance of less than full rank among them, and M on both sides of eps."""
    corners = np.array([[1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]], np.float64)
    moved = 3 * corners + [10, 0, 5]
    found = diffmem.measure(moved, corners, measures="mifid,mifid_distance")
    variance = 4 / 3  # of each of the two coordinates, divided by n − 1
    assert found["fid"] == pytest.approx(125 + 2 * (np.sqrt(9 * variance) - np.sqrt(variance)) ** 2)
    assert found["mifid_distance_generated"] >= 0.1
    assert found["mifid"] == found["fid"]
    near = corners * [1, 1.5, 1]
    found = diffmem.measure(near, corners, measures="mifid,mifid_distance,mifid:kaggle")
    assert found["mifid"] == pytest.approx(found["fid"] / found["mifid_distance_generated"])
    assert found["mifid:kaggle"] == pytest.approx(found["fid"] / (found["mifid_distance_generated"] + 1e-14))
    same = diffmem.measure(corners, corners, measures="mifid:torchmetrics")
    assert same["mifid:torchmetrics"] == 0


@settings(max_examples=20)
@given(st.integers(2, 9), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_cliques(count, size, seed):
    from itertools import combinations

    random = np.random.default_rng(seed)
    edges = [pair for pair in combinations(range(count), 2) if random.random() < 0.6]
    expected = set()
    for members in combinations(range(count), size):
        if all(pair in edges for pair in combinations(members, 2)):
            expected |= set(members)
    assert set(np.flatnonzero(in_cliques(count, edges, size))) == expected


def test_cliques_of_repeated_images():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    images[:11] = images[0] ^ random.integers(0, 4, (11, 3, 8, 8), dtype=np.uint8)
    images[20:29] = images[20]  # nine: no clique of ten
    found = diffmem.measure(images, images[30:], measures="tile_max:cliques")
    assert found["tile_max:cliques"] == 11 / 40
    prompts = np.arange(40) % 2  # of one prompt there are only six
    cells = (np.zeros(10, int), None, prompts)
    assert diffmem.measure(images, images[30:], measures="tile_max:cliques", cells=cells)["tile_max:cliques"] == 0
