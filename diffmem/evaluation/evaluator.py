"""`evaluate`: the only place where images are sampled and judged."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from diffmem.errors import InputError
from diffmem.evaluation.detectors import check_shape
from diffmem.evaluation.seed_ranges import PROTOCOL_SEEDS, checked_seeds
from diffmem.evaluation.seed_store import SeedRecords, SeedStore
from diffmem.logs import logger
from diffmem.memorization import CopyDetector, CopyRate, Detection, ReportsRate, SequentialTest
from diffmem.memorization.plausibility import Collapse
from diffmem.models import as_denoiser, evaluating
from diffmem.progress import Progress, silent
from diffmem.sampling import SamplerConfig, is_compilable, is_compiled, sample_batches, worth_compiling
from diffmem.sampling.batches import in_precision
from diffmem.timing import measure

_log = logger(__name__)
STAGE = "sampling"


@dataclass(frozen=True, eq=False)
class Evaluation(ReportsRate):
    """What `evaluate` found, in the order of the seeds asked for: all of them, or those that it took to decide.

    Attributes:
        records: What is known about each image.
        population: How many images the share is about: the protocol's 10,000, or None for all that the model can make.
        new: How many images were sampled now; the others were in the store.
        seconds: What that took.
    """

    records: SeedRecords
    population: int | None = None
    new: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.records)

    @property
    def seeds(self) -> np.ndarray:
        """int64 [n]."""
        return self.records.seeds

    @property
    def images(self) -> np.ndarray:
        """The images that were kept, uint8 [m, C, H, W]."""
        return self.records.images

    @property
    def image_seeds(self) -> np.ndarray:
        """Their seeds, int64 [m]."""
        return self.records.image_seeds

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [n] or float32 [n, label_dim], where the denoiser has classes."""
        return self.records.labels

    @property
    def detection(self) -> Detection:
        """What the detector decided about each image."""
        if self.records.detection is None:
            raise InputError("detector: none was given, so copies were not counted")
        return self.records.detection

    @property
    def memorized(self) -> np.ndarray:
        """Which images are copies, bool [n]."""
        return self.detection.memorized

    @property
    def nearest(self) -> np.ndarray:
        """The nearest training image, int64 [n]."""
        return self.detection.neighbors.indices[:, 0]

    @property
    def ratios(self) -> np.ndarray:
        """d1/d2, float32 [n]."""
        return self.detection.neighbors.distance_ratios.astype(np.float32)

    @property
    def distances(self) -> np.ndarray:
        """To the nearest training image, root mean square in gray levels, float32 [n]."""
        return self.detection.neighbors.rms[:, 0].astype(np.float32)

    @property
    def rate(self) -> CopyRate:
        return self.detection.rate

    @property
    def collapse(self) -> Collapse:
        """How much the images are one and the same."""
        counts = np.unique(self.records.digests, return_counts=True)[1]
        return Collapse(len(self), float(self.records.constant.mean()), False, int(counts.max()), len(counts))

    def answer(self, test: SequentialTest) -> bool | None:
        """The answer of a test; None while it is open."""
        return test.answer(self.count, self.total, self.population)


def evaluate(
    denoiser: Any,
    seeds: Sequence[int],
    sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
    detector: CopyDetector | None = None,
    store: SeedStore | None = None,
    stop: SequentialTest | Callable[[CopyRate], bool] | None = None,
    *,
    images: int | None = None,
    copies: int = 0,
    restart: bool = False,
    distributed: bool = False,
    stage: str = STAGE,
    progress: Progress = silent,
) -> Evaluation | None:
    """Samples the images of `seeds`, batch by batch and in order, and decides which are copies.

    Each image is sampled once and searched once: what `store` knows is taken from there, and what is new is added to it
    when its batch is done. An image depends on its seed, the denoiser and the sampler; batch size and number of ranks
    change it by rounding at most, and a batch holds the same seeds however many ranks there are.

    Args:
        denoiser: A denoiser of `diffmem.models` or `diffmem.optimum`, or a module that denoises, as for
            `sample_batches`.
        seeds: Distinct whole numbers from 0.
        sampler: How to sample. compile "auto" is decided once, before the first batch: a store that is temporary
            remembers it; with `stop`, which may end the run after a few batches, nothing is compiled.
        detector: Decides which images are copies; None: nobody asks.
        store: Remembers the images' records; None: nothing is remembered.
        stop: Ends sampling as soon as this test is answered, or this function of the rate so far is true; looked at
            before every batch. Where `seeds` are some of the protocol's, the answer is about its 10,000 images.
        images: Keep the first so many images; None: all.
        copies: Keep the first so many copies too.
        restart: Forget what the store knows.
        distributed: All ranks of the process group call this and share the seeds; the first one returns the
            evaluation, the others None. They need no detector: the first rank then judges their images.
        stage: What the progress is told, with the share of copies so far.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        What is known about the images; None on ranks other than the first.

    Raises:
        InputError: These do not fit together, images are not finite, or the store holds another run.

    Example:
        >>> from diffmem.memorization import CopyDetector
        >>> from diffmem.models import as_denoiser
        >>> black = as_denoiser(lambda x, sigma: torch.full_like(x, -1), channels=1, resolution=8)
        >>> print(evaluate(black, range(4), SamplerConfig(steps=2), CopyDetector("builtin:digits")).rate)
        0 of 4: 0 % (95 % interval 0 % to 49.0 %)
    """
    run = _Run(denoiser, checked_seeds(seeds), sampler, detector, store, stop, images, copies, distributed)
    run.begin(restart)
    began = time.perf_counter()
    run.sample(stage, progress)
    return run.result(time.perf_counter() - began)


def identity_of(
    fingerprint: str, sampler: SamplerConfig, detector: CopyDetector, device: torch.device
) -> dict[str, Any]:
    """What decides the record of an image beside its seed, in JSON types: the identity of a `SeedStore`.

    Args:
        fingerprint: The denoiser's.
        sampler: How to sample.
        detector: Decides which images are copies.
        device: Device of the denoiser.
    """
    return {"denoiser": fingerprint, **sampler.identity, **detector.identity, "device": device.type}


def decide_compile(denoiser: Any, sampler: SamplerConfig, images: int) -> SamplerConfig:
    """The sampler with compile "on" or "off" in place of "auto": by the time that one evaluation of the network takes,
    once for a run that samples so many images."""
    if sampler.compile != "auto":
        return sampler
    if is_compiled(denoiser):
        return replace(sampler, compile=True)
    if not images or not is_compilable(denoiser):
        return replace(sampler, compile=False)
    size = min(sampler.batch, images)
    device = next(denoiser.parameters()).device
    x = torch.zeros(size, denoiser.channels, *[denoiser.resolution] * 2, device=device)
    precise = in_precision(denoiser, sampler.precision)
    with torch.inference_mode(), evaluating(denoiser), _memory_errors(size), precise:
        each = measure(lambda: denoiser(x, 1.0).sum().item(), budget=1.0)
    evaluations = sampler.plan(denoiser).nfe * -(-images // sampler.batch)
    return replace(sampler, compile=worth_compiling(denoiser, each, evaluations))


@contextmanager
def _memory_errors(batch: int) -> Iterator[None]:
    """Says that a batch is too large where the device's memory is full."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(f"{batch} images per batch do not fit into the device's memory: use a smaller batch") from None


class _Ranks:
    """The ranks that share a run."""

    def __init__(self, distributed: bool) -> None:
        group = distributed and dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value on the first rank, None on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values

    def share(self, value: Any) -> Any:
        """The first rank's value on all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


class _Run:
    """One call of `evaluate`."""

    def __init__(
        self,
        denoiser: Any,
        seeds: list[int],
        sampler: SamplerConfig,
        detector: CopyDetector | None,
        store: SeedStore | None,
        stop: SequentialTest | Callable[[CopyRate], bool] | None,
        images: int | None,
        copies: int,
        distributed: bool,
    ):
        if isinstance(denoiser, torch.nn.Module) or not hasattr(denoiser, "label_dim"):
            denoiser = as_denoiser(denoiser)
        if detector is not None:
            check_shape(cast(Any, detector.training), (denoiser.channels, denoiser.resolution, denoiser.resolution))
        self.denoiser, self.seeds, self.sampler, self.detector = denoiser, seeds, sampler, detector
        self.store, self.stop, self.images, self.copies = store, stop, images, copies
        self.ranks = _Ranks(distributed)
        self.population = len(PROTOCOL_SEEDS) if set(seeds) <= set(PROTOCOL_SEEDS) else None
        self.asked = set(seeds)
        self.judged_by = None
        if detector is not None:
            self.judged_by = hashlib.sha256(json.dumps(detector.identity, sort_keys=True).encode()).hexdigest()
        self.known: list[SeedRecords] = []  # on the first rank
        self.waiting: list[SeedRecords] = []  # this rank's, until they are gathered
        self.done = self.new = 0
        self.kept_images = self.kept_copies = 0
        self.count = self.total = 0  # of the images asked for: copies, and all that were judged
        self.failure: InputError | None = None

    def begin(self, restart: bool) -> None:
        """Reads the store and deals out what is left."""
        left: list[int] = []
        sampler = self.sampler
        if self.ranks.rank == 0:
            if self.stop is not None and self.detector is None:
                raise InputError("stop: needs a detector to count copies")
            if self.store is not None:
                self.store.begin(restart)
                for stored in self.store.read(self.judged_by):
                    if (part := self._judged(stored)) is not None:
                        self._note_kept(part)
                        self._add(part)
            known = {seed for part in self.known for seed in part.seeds.tolist()}
            left = [] if self._decided() else [seed for seed in self.seeds if seed not in known]
            sampler = self._decide_compile(left)
        left, self.sampler, self.judging = self.ranks.share((left, sampler, self.detector is not None))
        self.done = len(self.seeds) - len(left)
        if self.store is not None and self.known:
            _log.info("%s: resumes with %d of %d images", self.store.folder, self.done, len(self.seeds))
        # Only the last batch may be smaller than the others, so that a run that resumes makes those it would have made.
        batches = [left[start : start + sampler.batch] for start in range(0, len(left), sampler.batch)]
        self.left = [seed for batch in batches[self.ranks.rank :: self.ranks.size] for seed in batch]

    def _decide_compile(self, left: list[int]) -> SamplerConfig:
        remembered = self.store if self.store is not None and self.store.temporary else None
        if remembered is not None and (compiled := remembered.compiled) is not None:
            return replace(self.sampler, compile=compiled)
        if self.stop is not None and self.sampler.compile == "auto" and not is_compiled(self.denoiser):
            decided = replace(self.sampler, compile=False)
        else:
            decided = decide_compile(self.denoiser, self.sampler, -(-len(left) // self.ranks.size))
        if remembered is not None:
            remembered.compiled = decided.compile == "on"
        return decided

    def sample(self, stage: str, progress: Progress) -> None:
        """Makes and judges the batches of this rank, and gathers those of all."""
        total = len(self.seeds)
        progress(stage, self.done, total)
        batches = iter(sample_batches(self.denoiser, self.left, config=self.sampler)) if self.left else iter(())
        while True:
            ended = True
            try:
                with _memory_errors(min(self.sampler.batch, total)):
                    made = next(batches, None)
                if made is not None:
                    ended = False
                    self._take(made)
                    # As if the other ranks kept pace with this one.
                    self.done = min(self.done + len(made.seeds) * self.ranks.size, total)
                    progress(stage if self.detector is None else f"{stage}: {self._so_far()}", self.done, total)
            except InputError as error:
                if self.ranks.rank == 0:
                    raise
                self.failure = error
            if self.stop is None and not ended:
                continue
            if self._gather(ended):
                return

    def _take(self, made: Any) -> None:
        images = made.images.numpy()
        detection = None if self.detector is None else self.detector.judge(images)
        labels = None if made.labels is None else made.labels.numpy()
        records = SeedRecords.of(made.seeds.numpy(), images, labels, detection)
        self.new += len(records)
        # Images that the first rank is to judge go there whole; it keeps what is to be kept.
        if detection is not None or not self.judging or self.images is None:
            records = self._trimmed(records)
            if self.store is not None:
                self.store.write(records, self.judged_by)
        self._count(records)
        self.waiting.append(records)

    def _gather(self, ended: bool) -> bool:
        """Brings the batches of all ranks to the first one; whether the run is over."""
        everybody = self.ranks.gather((self.waiting, self.new, ended, self.failure))
        self.waiting = []
        over = False
        if everybody is not None:
            self.failures = [failure for *_, failure in everybody if failure is not None]
            for rank, (parts, *_) in enumerate(everybody):
                for part in parts:
                    self._add(part, counted=rank == self.ranks.rank)
            self.new_in_all = sum(new for _, new, *_ in everybody)
            over = all(each for *_, each, _ in everybody) or bool(self.failures) or self._decided()
        return self.ranks.share(over)

    def _add(self, part: SeedRecords, counted: bool = False) -> None:
        """Takes records over on the first rank; judges those that were not."""
        if self.detector is not None and part.detection is None:
            judged = self._judged(part)
            assert judged is not None  # of this run
            part = judged
            if self.images is not None:
                part = self._trimmed(part)
                if self.store is not None:
                    self.store.write(part, self.judged_by)
            counted = False
        if not counted:
            self._count(part)
        self.known.append(part)

    def _judged(self, part: SeedRecords) -> SeedRecords | None:
        """The records with the detector's decisions; None where they are not known and the images are gone."""
        if self.detector is None:
            complete = self.images is not None or len(part.images) == len(part)
            return replace(part, detection=None) if complete else None
        if part.detection is not None and (self.images is not None or len(part.images) == len(part)):
            return part
        if len(part.images) < len(part):
            return None
        return replace(part, detection=self.detector.judge(part.images))

    def _trimmed(self, records: SeedRecords) -> SeedRecords:
        """The records of a batch, all of whose images are there, with those that are to be kept."""
        records = self._first(records, self.kept_images, self.kept_copies)
        self._note_kept(records)
        return records

    def _note_kept(self, part: SeedRecords) -> None:
        self.kept_images += len(part.images)
        if part.detection is not None and self.images is not None:
            self.kept_copies += int(part.detection.memorized[part.image_rows].sum())

    def _first(self, records: SeedRecords, images: int = 0, copies: int = 0) -> SeedRecords:
        """The records with the first images and copies that are to be kept, where so many are kept already."""
        if self.images is None:
            return records
        chosen = np.arange(len(records.images)) < self.images - images
        if records.detection is not None:
            memorized = records.detection.memorized[records.image_rows]
            chosen |= memorized & (np.cumsum(memorized) <= self.copies - copies)
        return records.keep(chosen)

    def _count(self, part: SeedRecords) -> None:
        if part.detection is not None:
            asked = np.array([seed in self.asked for seed in part.seeds.tolist()], bool)
            self.total += int(asked.sum())
            self.count += int(part.detection.memorized[asked].sum())

    def _decided(self) -> bool:
        if self.stop is None or not self.total:
            return False
        if isinstance(self.stop, SequentialTest):
            return self.stop.answer(self.count, self.total, self.population) is not None
        return bool(self.stop(CopyRate(self.count, self.total)))

    def _so_far(self) -> str:
        return f"{CopyRate(self.count, self.total).ratio:.1%} copies so far"

    def result(self, seconds: float) -> Evaluation | None:
        """What was found, on the first rank."""
        if self.ranks.rank:
            return None
        if self.failures:
            raise self.failures[0]
        if self.store is not None and not self.store.temporary and self.judged_by is not None:
            self.store.compact(self.judged_by)
        records = self._first(SeedRecords.join(self.known).select(self.seeds))
        return Evaluation(records, self.population, self.new_in_all, seconds)
