"""evaluate: every image is sampled once and searched once, whatever was known, interrupted or shared among ranks."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffmem
from diffmem.errors import InputError
from diffmem.evaluation import SeedRecords, SeedStore, evaluate, evaluator
from diffmem.integrity import sealed
from diffmem.memorization import CopyDetector, CopyRate, SequentialTest
from diffmem.models import as_denoiser
from diffmem.sampling import SamplerConfig, Samples
from diffmem.search import TrainingIndex

COUNT = 40
IMAGES, TRAINING = (np.random.default_rng(i).integers(0, 256, (COUNT, 1, 4, 4), dtype=np.uint8) for i in (0, 1))
TRAINING[:5] = IMAGES[3:8]  # those seeds are copies
DENOISER = as_denoiser(lambda x, sigma: x, channels=1, resolution=4, fingerprint="images by seed")


class Interruption(Exception):
    pass


@pytest.fixture
def sampled(monkeypatch):
    """Replaces the sampler by one that gives `IMAGES` by seed; the seeds that it was asked for. It is interrupted after
    `sampled.batches` batches of a call."""

    class Seeds(list):
        batches = None

    seeds = Seeds()

    def sample_batches(denoiser, asked, config):
        for number, start in enumerate(range(0, len(asked), config.batch)):
            if number == seeds.batches:
                raise Interruption
            chosen = list(asked[start : start + config.batch])
            seeds.extend(chosen)
            yield Samples(torch.from_numpy(IMAGES[chosen]), torch.tensor(chosen), torch.tensor(chosen) % 10)

    monkeypatch.setattr(evaluator, "sample_batches", sample_batches)
    return seeds


@pytest.fixture
def searched(monkeypatch):
    """How many images each query held."""
    counts, query = [], TrainingIndex.query

    def counted(self, images, k=2, **options):
        counts.append(len(images))
        return query(self, images, k, **options)

    monkeypatch.setattr(TrainingIndex, "query", counted)
    return counts


def identity(detector):
    return {"denoiser": "images by seed", **detector.identity}


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"duplicates": "keep"}, {"index": "flat"}], ids=str)
def test_decisions_there_and_back(options, tmp_path):
    """What a store reads is what the detector decided, to the last figure."""
    if "index" in options:
        pytest.importorskip("faiss", reason="the extra faiss is not installed")
    detector = CopyDetector(TRAINING, **options)
    found = detector.judge(IMAGES)
    store = SeedStore(tmp_path / "seeds", {})
    store.begin()
    store.write(SeedRecords.of(np.arange(COUNT), IMAGES, None, found), "ours")
    (read,) = store.read("ours")
    for name, values in found.to_arrays().items():
        np.testing.assert_array_equal(read.detection.to_arrays()[name], values, err_msg=name)
    audits = []
    for detection in (found, read.detection):
        detector.reset()
        detector.update(IMAGES, detection)
        audits.append(detector.compute().to_dict())
    assert audits[0] == audits[1]
    assert store.read("another")[0].detection is None


@pytest.mark.parametrize("temporary", [True, False])
def test_what_is_known_is_neither_sampled_nor_searched_again(temporary, tmp_path, sampled, searched):
    detector = CopyDetector(TRAINING, flip=True, keep_images=True)
    searched.clear()
    store = SeedStore(tmp_path / "seeds", identity(detector), temporary=temporary)
    sampler = SamplerConfig(batch=8)
    sampled.batches = 2
    with pytest.raises(Interruption):
        evaluate(DENOISER, range(COUNT), sampler, detector, store)
    sampled.batches = None
    found = evaluate(DENOISER, range(COUNT), sampler, detector, store)
    assert sampled == [*range(COUNT)]
    assert sum(searched) == 2 * COUNT  # as they are, and mirrored
    assert (found.count, found.total, found.new) == (5, COUNT, COUNT - 16)
    np.testing.assert_array_equal(found.images, IMAGES)
    np.testing.assert_array_equal(found.labels, np.arange(COUNT) % 10)
    detector.update(found.images, found.detection)
    assert detector.compute().to_dict() == diffmem.audit(IMAGES, TRAINING, flip=True).to_dict()
    assert len(list(store.folder.glob("block-*.npz"))) == (5 if temporary else 1)
    # Another detector decides about the images that are known.
    other = CopyDetector(TRAINING[5:])
    if temporary:
        assert evaluate(DENOISER, range(COUNT), sampler, other, store).count == 0
        assert sampled == [*range(COUNT)]
    else:
        with pytest.raises(InputError, match=r"another run: flip True \(now False\), training .*; finish that one"):
            evaluate(DENOISER, range(COUNT), sampler, other, SeedStore(store.folder, identity(other)))


@given(
    runs=st.lists(
        st.tuples(st.lists(st.integers(0, COUNT - 1), unique=True, min_size=1), st.integers(1, 9), st.integers(0, 4)),
        min_size=1, max_size=5,
    ),
    damage=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_order_of_runs(tmp_path_factory, runs, damage):
    """Runs over any seeds, with any batch, interrupted anywhere, a block damaged: the truth, and nothing twice."""
    folder = tmp_path_factory.mktemp("seeds")
    detector = DETECTOR
    known, sampled = set(), []

    def sample_batches(denoiser, asked, config):
        for number, start in enumerate(range(0, len(asked), config.batch)):
            if number == batches:
                raise Interruption
            chosen = list(asked[start : start + config.batch])
            sampled.extend(chosen)
            yield Samples(torch.from_numpy(IMAGES[chosen]), torch.tensor(chosen), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "sample_batches", sample_batches)
        store = SeedStore(folder / "store", identity(detector), temporary=True)
        for number, (seeds, batch, batches) in enumerate(runs):
            sampled.clear()
            expected = [seed for seed in seeds if seed not in known]
            interrupted = len(expected) > batch * batches
            try:
                found = evaluate(DENOISER, seeds, SamplerConfig(batch=batch), detector, store)
            except Interruption:
                assert interrupted
                expected = expected[: batch * batches]
            else:
                assert not interrupted
                assert found.seeds.tolist() == seeds
                assert found.memorized.tolist() == [3 <= seed < 8 for seed in seeds]
                np.testing.assert_array_equal(found.images, IMAGES[seeds])
                assert found.nearest[found.memorized].tolist() == [seed - 3 for seed in seeds if 3 <= seed < 8]
            assert sampled == expected
            known.update(sampled)
            blocks = sorted(store.folder.glob("block-*.npz"))
            if number == damage and blocks:
                with np.load(blocks[-1]) as stored:
                    known -= set(stored["seeds"].tolist())
                blocks[-1].write_bytes(blocks[-1].read_bytes()[:50])


DETECTOR = CopyDetector(TRAINING)


def test_first_images_and_first_copies(tmp_path, sampled):
    store = SeedStore(tmp_path / "seeds", identity(DETECTOR))
    few = {"sampler": SamplerConfig(batch=4), "detector": DETECTOR, "store": store}
    for seeds in (range(10), range(20)):
        found = evaluate(DENOISER, seeds, **few, images=2, copies=3)
        assert found.image_seeds.tolist() == [0, 1, 3, 4, 5]
        np.testing.assert_array_equal(found.images, IMAGES[found.image_seeds])
        assert found.records.image_rows.tolist() == [0, 1, 3, 4, 5]
    # All images are asked for, and most were not kept: those are made again.
    sampled.clear()
    assert len(evaluate(DENOISER, range(20), SamplerConfig(batch=4), DETECTOR, store).images) == 20
    assert sampled == [*range(20)]
    # Nobody judges: what is made is remembered all the same.
    plain = SeedStore(tmp_path / "plain", {})
    sampled.clear()
    for _ in range(2):
        found = evaluate(DENOISER, range(10), SamplerConfig(batch=4), store=plain, images=3)
        assert (found.image_seeds.tolist(), len(found)) == ([0, 1, 2], 10)
    assert sampled == [*range(10)]


def test_stop(tmp_path, sampled):
    sampler = SamplerConfig(batch=4)
    found = evaluate(DENOISER, range(COUNT), sampler, DETECTOR, stop=lambda rate: rate.count >= 2)
    assert sampled == [*range(8)] == found.seeds.tolist()
    sampled.clear()
    test = SequentialTest(0.9)
    found = evaluate(DENOISER, range(10, COUNT), sampler, DETECTOR, stop=test)
    assert found.answer(test) is False
    assert 0 < len(sampled) < 30
    # What is known can decide before anything is sampled.
    store = SeedStore(tmp_path / "seeds", identity(DETECTOR))
    evaluate(DENOISER, range(8), sampler, DETECTOR, store, images=0)
    sampled.clear()
    found = evaluate(DENOISER, range(COUNT), sampler, DETECTOR, store, lambda rate: rate.count == 5, images=0)
    assert (sampled, found.rate) == ([], CopyRate(5, 8))
    # Images that were asked for before, but are not now, decide nothing.
    found = evaluate(DENOISER, range(8, 16), sampler, DETECTOR, store, lambda rate: rate.total >= 4, images=0)
    assert found.seeds.tolist() == [8, 9, 10, 11]
    with pytest.raises(InputError, match="stop: needs a detector"):
        evaluate(DENOISER, [0], stop=test)


class FakeRanks:
    """Ranks in threads."""

    def __init__(self, size):
        self.size, self.barrier, self.values, self.shared = size, threading.Barrier(size), [None] * size, None
        self.here = threading.local()

    @property
    def rank(self):
        return self.here.rank

    def gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait(20)
        values = list(self.values) if self.rank == 0 else None
        self.barrier.wait(20)
        return values

    def share(self, value):
        if self.rank == 0:
            self.shared = value
        self.barrier.wait(20)
        value = self.shared
        self.barrier.wait(20)
        return value


@pytest.mark.parametrize("detectors", ["all", "first"])
@pytest.mark.parametrize("stop", [None, lambda rate: rate.total >= 24])
@pytest.mark.parametrize("size", [1, 3])
def test_ranks_share_the_seeds(detectors, stop, size, tmp_path, sampled, searched, monkeypatch):
    ranks = FakeRanks(size)
    monkeypatch.setattr(evaluator, "_Ranks", lambda distributed: ranks)
    searched.clear()
    store = SeedStore(tmp_path / "seeds", identity(DETECTOR))
    results = [None] * size

    def run(rank):
        ranks.here.rank = rank
        detector = DETECTOR if detectors == "all" or rank == 0 else None
        results[rank] = evaluate(
            DENOISER, range(COUNT), SamplerConfig(batch=4, compile="off"), detector, store, stop, images=0, copies=9
        )  # fmt: skip

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    found = results[0]
    assert results[1:] == [None] * (size - 1)
    total = COUNT if stop is None else 24
    assert found.seeds.tolist() == sorted(sampled) == [*range(total)]
    assert (found.count, found.new, sum(searched)) == (5, total, total)
    assert found.image_seeds.tolist() == [3, 4, 5, 6, 7]
    # All of it is known afterwards, whoever made it.
    assert sum(len(part) for part in store.read(None)) == total


def test_several_writers_of_one_store(tmp_path, sampled):
    """Each finds the truth whatever the others write or join meanwhile, and nothing of it is lost."""
    failures = []

    def run(number):
        chance = np.random.default_rng(number)
        try:
            for _ in range(6):
                low, high = sorted(chance.choice(COUNT + 1, 2, replace=False).tolist())
                batch = int(chance.integers(1, 9))
                store = SeedStore(tmp_path / "seeds", identity(DETECTOR))
                found = evaluate(
                    DENOISER, range(low, high), SamplerConfig(batch=batch, compile="off"), DETECTOR, store, images=0
                )  # fmt: skip
                assert found.seeds.tolist() == [*range(low, high)]
                assert found.memorized.tolist() == [3 <= seed < 8 for seed in range(low, high)]
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    store = SeedStore(tmp_path / "seeds", identity(DETECTOR))
    known = {seed for part in store.read() for seed in part.seeds.tolist()}
    assert known == set(sampled)
    assert [path.name for path in tmp_path.iterdir()] == ["seeds"]


def test_folders_that_are_none(tmp_path, sampled):
    ours = SeedStore(tmp_path / "seeds", {"solver": "heun"})
    ours.folder.mkdir()
    (ours.folder / "run.json").write_text(json.dumps(sealed({"identity": {}, "compiled": None})))
    for store, way_out in (
        (ours, "delete .*seeds, and its images are sampled again"),
        (SeedStore(ours.folder, {}, temporary=True), "start over with restart=True"),
    ):
        with pytest.raises(InputError, match=f"written by an older version of diffmem: {way_out}"):
            evaluate(DENOISER, [0], store=store)
    assert evaluate(DENOISER, [0], store=ours, restart=True).new == 1
    with pytest.raises(InputError, match="not part of a run"):
        evaluate(DENOISER, [0], store=SeedStore(tmp_path, {}))
    with pytest.raises(InputError, match="detector: none was given"):
        evaluate(DENOISER, [0]).rate  # noqa: B018
    with pytest.raises(InputError, match="3x4x4, but this network generates 1x4x4"):
        evaluate(DENOISER, [0], detector=CopyDetector(np.concatenate([TRAINING, IMAGES, IMAGES], axis=1)))
    assert sampled == [0, 0]
