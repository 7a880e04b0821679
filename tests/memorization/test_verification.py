"""The interval that covers what a search may have missed: exact pieces, coverage, and the audit that carries it."""

import json
import pickle

import numpy as np
import pytest

import diffmem
from benchmarks.bench_verification import audited
from diffmem.memorization import CopyDetector, decide_gate
from diffmem.memorization.drawing import Drawn
from diffmem.memorization.statistics import wilson_interval
from diffmem.memorization.verification import Stratum, Verification, marked_interval
from diffmem.search import FaissIndex, TrainingIndex

OPEN_CALLED, OPEN_OTHER = (True, False, False, False), (False, False, False, False)


def test_the_interval_of_marked_images_is_the_exact_one():
    """Against every number of marked images, by scipy's distribution."""
    from scipy.stats import hypergeom

    rng = np.random.default_rng(0)
    for _ in range(60):
        total = int(rng.integers(1, 200))
        drawn = int(rng.integers(0, total + 1))
        found = int(rng.integers(0, drawn + 1))
        marked = np.arange(found, total - (drawn - found) + 1)
        low = marked[hypergeom.sf(found - 1, total, marked, drawn) > 0.025].min()
        high = marked[hypergeom.cdf(found, total, marked, drawn) > 0.025].max()
        assert marked_interval(found, drawn, total) == (low, max(low, high))


@pytest.mark.parametrize(
    ("copies", "missed", "alarms"),
    [(0.002, 0.3, 0.0), (0.002, 0.02, 0.01), (0.05, 0.02, 0.0), (0.05, 0.3, 0.01), (0.6, 0.1, 0.01)],
)
def test_the_interval_covers_the_share_of_copies(copies, missed, alarms):
    """At least 95 % of 400 audits of 2,000 images of which 400 are searched exactly, but for chance; the count of exact
    search likewise."""
    rng = np.random.default_rng(round(1e5 * (copies + missed + alarms)))
    images, budget, audits = 2000, 400, 400
    # Of the right verdicts half are settled.
    kinds = {
        (True, True, True): copies * (1 - missed) / 2, (True, False, True): copies * (1 - missed) / 2,
        (False, False, True): copies * missed, (True, False, False): (1 - copies) * alarms,
        (False, True, False): (1 - copies) * (1 - alarms) / 2, (False, False, False): (1 - copies) * (1 - alarms) / 2,
    }  # fmt: skip
    covered = counted = 0
    for _ in range(audits):
        drawn = rng.multinomial(images, list(kinds.values())).tolist()
        found, exact = audited(dict(zip(kinds, drawn, strict=True)), budget, rng)
        assert sum(each.verified for each in found.strata) <= budget
        low, high = found.interval()
        covered += low <= copies <= high
        counted += found.count_interval[0] <= exact <= found.count_interval[1]
        narrow = wilson_interval(round(found.estimate), images)
        assert low <= narrow[0] + 1e-4
        assert high >= narrow[1] - 1e-4
    slack = 3 * np.sqrt(0.95 * 0.05 / audits)
    assert covered / audits >= 0.95 - slack
    assert counted / audits >= 0.95 - slack


def test_what_is_settled_is_not_estimated():
    complete = Verification((Stratum(True, True, True, False, 30), Stratum(False, True, False, False, 470, 20)))
    assert complete.complete
    assert complete.interval() == wilson_interval(30, 500)
    assert complete.count_interval == (30, 30)
    # A bound that exact search contradicts proves nothing.
    wrong = Verification((Stratum(True, True, True, False, 30), Stratum(False, True, False, False, 470, 20, copies=1)))
    assert not wrong.complete
    assert wrong.count_interval[1] > 60
    assert Verification.of_dict(json.loads(json.dumps(wrong.to_dict()))) == wrong


def test_a_gate_says_where_recall_is_the_reason():
    found = Verification((Stratum(True, True, True, False, 20), Stratum(*OPEN_OTHER, 1980, 300, 0, 299, 298)))
    low, high = found.interval()
    assert wilson_interval(20, 2000)[1] < 0.018 < high

    def gate(**limits):
        return decide_gate(20, found.interval(), verification=found, **limits)

    assert gate(require_below=0.018).state == "undecided"
    assert "what the search may have missed" in str(gate(require_below=0.018))
    assert "audit more images" in str(gate(require_below=0.011))
    assert gate(require_below=0.05).passed
    assert gate(require_below=low / 2).state == "closed"
    assert gate(max_copies=19).state == "closed"
    assert gate(max_copies=21).state == "undecided"
    assert "exact search would find 20 to" in str(gate(max_copies=21))
    assert gate(max_copies=60).passed
    alarms = Verification((Stratum(*OPEN_CALLED, 200, 100, 90, 100, 90), Stratum(False, True, True, False, 800)))
    assert wilson_interval(180, 1000)[0] > 0.156 > alarms.interval()[0]
    closed = decide_gate(190, alarms.interval(), fail_above=0.156, verification=alarms)
    assert closed.state == "undecided"
    assert '"recall_second"' in closed.to_junit()


def some_patches(count):
    return diffmem.load_images(f"builtin:patches?n={count}", resize=8).images


def with_copies(training, others, seed=0):
    """Generated images: others, exact copies, and copies with noise about the threshold."""
    rng = np.random.default_rng(seed)
    noisy = training[:60].astype(np.int64) + rng.normal(0, 14, training[:60].shape).round().astype(np.int64)
    return np.concatenate([others, training[60:80], np.clip(noisy, 0, 255).astype(np.uint8)])


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "IVF16,Flat", "IVF16,PQ8x4", "PCA16,IVF16,Flat", "OPQ4,PQ4x4", "HNSW8"]
)
def test_what_was_not_looked_at_is_as_far_as_is_said(factory):
    """Against all distances: fewer images are nearer than the bound than were candidates, and no neighbor that is
    nearer was missed; verdicts that are settled are those of exact search."""
    pytest.importorskip("faiss", reason="FAISS is optional: pip install 'diffmem[faiss]'")
    patches = some_patches(900)
    training, images = patches[:800], with_copies(patches[:800], patches[800:])
    index = FaissIndex(training, factory, nprobe=2 if "IVF" in factory else None, candidates=4)
    found, exact = index.query(images, 2), TrainingIndex(training).query(images, 2)
    missed = exact.squared_distances < found.squared_distances
    assert not (missed & (exact.distances < found.unseen[:, None] * (1 - 1e-6))).any()
    apart = np.linalg.norm(images.reshape(len(images), 1, -1) - training.reshape(1, 800, -1).astype(float), axis=2)
    assert ((apart < found.unseen[:, None] * (1 - 1e-6)).sum(axis=1) <= 4).all()
    if factory in ("Flat", "SQ8"):
        assert (found.unseen >= found.distances[:, 0]).mean() > 0.8
    if factory == "HNSW8":
        assert not found.unseen.any()
    for options in ({}, {"rule": "similarity", "threshold": 20}, {"duplicate_radius": 6}, {"flip": True}):
        ours = CopyDetector(training, index=index, **options).judge(images)
        theirs = CopyDetector(training, **options).judge(images)
        assert (ours.memorized == theirs.memorized)[ours.settled].all(), options
        np.testing.assert_array_equal(
            ours.neighbors.squared_distances[ours.certified], theirs.neighbors.squared_distances[ours.certified]
        )


def test_an_audit_through_a_poor_index_covers_the_exact_one(tmp_path):
    pytest.importorskip("faiss", reason="FAISS is optional: pip install 'diffmem[faiss]'")
    patches = some_patches(1400)
    training, images = patches[:800], with_copies(patches[:800], patches[800:])
    exact = diffmem.audit(images, training)

    def poor():
        return FaissIndex(training, "PCA2,IVF32,PQ1x4", nprobe=1, candidates=2)

    some = diffmem.audit(images, training, index=poor(), verify=200)
    low, high = some.verification.count_interval
    assert low <= exact.count <= high
    assert low < high
    assert some.verification.verified == 200
    assert some.interval[0] <= exact.interval[0]
    assert exact.interval[1] <= some.interval[1]
    assert some.verification.recall_second < 0.95
    assert any("second nearest training images" in warning for warning in some.warnings)
    assert f"exact search would find {low:,} to {high:,}" in some.verdict()
    page = some.save(tmp_path / "poor").read_text()
    assert f"exact search would find {low:,} to {high:,} copies" in page
    saved = json.loads((tmp_path / "poor" / "report.json").read_text())
    assert Verification.of_dict(saved["verification"]) == some.verification
    assert saved["interval"] == list(some.interval)
    # Where all that is open is searched exactly, the audit is exact.
    every = diffmem.audit(images, training, index=poor(), verify=len(images))
    assert every.verification.complete
    assert (every.count, every.interval) == (exact.count, exact.interval)
    # Batches change nothing, whether images are kept or not.
    for keep in (False, True):
        detector = CopyDetector(training, index=poor(), verify=200, keep_images=keep)
        for start in range(0, len(images), 150):
            detector.update(images[start : start + 150])
        assert pickle.loads(pickle.dumps(detector)).compute().verification == some.verification
        assert detector.compute().verification == some.verification


def test_the_sample_is_random_in_every_stratum():
    drawn, strata = Drawn(50), np.zeros(4000, np.int64)
    images = np.zeros((4000, 1, 1, 1), np.uint8)
    for start in range(0, 4000, 300):
        part = slice(start, start + 300)
        drawn.add(start, strata[part], diffmem.load_images(images[part], layout="NCHW"), images[part])
    rows = drawn.chosen(strata)
    assert len(rows) == 50
    assert 1400 < rows.mean() < 2600
