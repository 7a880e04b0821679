"""`generate`: the images of many seeds, kept as they come, shared among ranks, written and audited."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import diffmem
from diffmem.atomic_io import check_output_file, output_lock
from diffmem.data import ImageSet, write_edm_zip, write_folder, write_npz
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.evaluation.resume_store import KeptBlocks
from diffmem.evaluation.running_audit import RunningAudit, sample_detector
from diffmem.evaluation.seed_ranges import checked_seeds, format_seeds
from diffmem.memorization import Audit
from diffmem.models import Denoiser, as_denoiser, checkpoint_path, evaluating, fingerprint, load
from diffmem.progress import Progress, silent
from diffmem.sampling import SamplerConfig, Samples, is_compilable, is_compiled, sample_batches, worth_compiling
from diffmem.sampling.batches import in_precision
from diffmem.timing import measure

if TYPE_CHECKING:
    from diffmem.data import ImageSource

STAGE = "sampling"


@dataclass(frozen=True, eq=False)
class Generated:
    """What `generate` made.

    Attributes:
        samples: All images, uint8 [n, C, H, W], with seeds and labels, in the order asked for.
        new: How many of them this run made (the others were kept by an earlier one).
        seconds: What these took.
        nfe: Number of function evaluations (of the network) per image.
        settings: Of the sampler.
        checkpoint: Where the denoiser came from, or what it is.
        fingerprint: The SHA-256 of what it is.
        out: Where the images were written to.
        audit: Of the images, where a training set was given.
    """

    samples: Samples
    new: int
    seconds: float
    nfe: int
    settings: SamplerConfig
    checkpoint: str
    fingerprint: str
    out: Path | None = None
    audit: Audit | None = None

    @property
    def images_per_second(self) -> float | None:
        """Of the images that this run made; None where it made none."""
        return self.new / self.seconds if self.new else None

    def to_dict(self) -> dict[str, Any]:
        """What was made and found, in plain JSON types, without the images."""
        return self._described(None if self.audit is None else self.audit.to_dict())

    def summary(self) -> dict[str, Any]:
        """`to_dict` without what the audit says of each image."""
        return self._described(None if self.audit is None else self.audit.summary())

    def _described(self, audit: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "seeds": format_seeds(self.samples.seeds.tolist()),
            "images": len(self.samples.seeds),
            "new": self.new,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "nfe": self.nfe,
            "settings": self.settings.to_json(),
            "checkpoint": {"path": self.checkpoint, "fingerprint": self.fingerprint},
            "out": None if self.out is None else str(self.out),
            "audit": audit,
        }


def generate(
    checkpoint: str | Path | torch.nn.Module | Callable[..., torch.Tensor],
    seeds: Sequence[int],
    *,
    out: str | Path | None = None,
    settings: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
    training: ImageSource | None = None,
    holdout: ImageSource | None = None,
    flip: bool = False,
    device: str = "auto",
    restart: bool = False,
    progress: Progress = silent,
) -> Generated | None:
    """The images of `seeds`, sampled from `checkpoint`, written to `out` and audited against `training`.

    An image depends on its seed, the checkpoint and the settings; the batch size and the number of ranks change it by
    rounding at most. In a `torch.distributed` process group the seeds are divided among the ranks, and the first rank
    writes and returns; the others return None. With `out`, finished batches are kept in `<out>.partial/` until all is
    written: a run that ended early resumes from there and ends with the same bytes.

    Args:
        checkpoint: A folder of `diffmem.models.save`, a run of `diffmem train` (its newest snapshot), or an EDM
            snapshot; or a denoiser on its own device: of `diffmem.models` or `diffmem.optimum`, or any module or
            function that `diffmem.models.as_denoiser` takes without being told more.
        seeds: Distinct whole numbers from 0 (0 … 9999 in the protocol).
        out: `.npz` (`images` uint8 [N, C, H, W], `seeds`, `labels` where there are any), `.zip` (EDM's layout), or a
            new folder (PNG, a sub-folder per 1000 seeds).
        settings: Of the sampler.
        training: Audit against these images, with a running estimate in the progress.
        holdout: See `diffmem.audit`.
        flip: See `diffmem.audit`.
        device: "cpu", "cuda", or "auto".
        restart: Forget what an earlier run has kept.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The images and their audit; None on ranks other than the first.

    Raises:
        InputError: What is given does not fit together (found before anything is sampled), the work folder is of
            another run (the message names the settings that differ), or images are not finite.

    Example:
        >>> from diffmem.models import as_denoiser
        >>> black = as_denoiser(lambda x, sigma: torch.full_like(x, -1), channels=1, resolution=8)
        >>> result = generate(black, range(4), training="builtin:digits")
        >>> result.samples.images.shape, int(result.samples.images.max()), result.audit.count
        (torch.Size([4, 1, 8, 8]), 0, 0)
    """
    with ExitStack() as stack:
        if out is not None and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            stack.enter_context(output_lock(out))
        return _generate(checkpoint, seeds, out, settings, training, holdout, flip, device, restart, progress)


def _generate(
    checkpoint: str | Path | torch.nn.Module | Callable[..., torch.Tensor],
    seeds: Sequence[int],
    out: str | Path | None,
    settings: SamplerConfig,
    training: ImageSource | None,
    holdout: ImageSource | None,
    flip: bool,
    device: str,
    restart: bool,
    progress: Progress,
) -> Generated | None:
    seeds = checked_seeds(seeds)
    if isinstance(checkpoint, (str, Path)):
        place = pick_device(device)
        checkpoint = checkpoint_path(checkpoint)
        denoiser, source = load(checkpoint, place), str(checkpoint)
    else:
        denoiser = as_denoiser(checkpoint)
        source, place = denoiser.summary(), next(denoiser.parameters()).device
    identifier = fingerprint(denoiser) if isinstance(denoiser, Denoiser) else denoiser.fingerprint
    with in_precision(denoiser, settings.precision):
        pass  # raises where the denoiser does not know it
    return _run(
        denoiser, source, identifier, place, seeds, out, settings, training, holdout, flip, restart, progress
    )  # fmt: skip


def _run(
    denoiser: torch.nn.Module,
    source: str,
    identifier: str,
    place: torch.device,
    seeds: list[int],
    out: str | Path | None,
    settings: SamplerConfig,
    training: ImageSource | None,
    holdout: ImageSource | None,
    flip: bool,
    restart: bool,
    progress: Progress,
) -> Generated | None:
    group = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    nfe = settings.plan(denoiser).nfe
    image_shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
    out = None if out is None else Path(out)
    if out is not None and rank == 0:
        _check_output(out, denoiser.channels)
    auditor = None
    if training is not None and rank == 0:
        auditor = RunningAudit(
            sample_detector(
                training, image_shape, place, holdout=holdout, flip=flip, keep_images=True, progress=progress
            )
        )

    share = _Share(denoiser, seeds, settings, rank, ranks, None if out is None else KeptBlocks(out))
    identity = {
        "checkpoint": identifier,
        "seeds": format_seeds(seeds),
        **settings.to_json(),
        "device": place.type,
        "diffmem": diffmem.__version__,
        "torch": torch.__version__,
    }
    compiled = [share.begin(identity, restart, nfe) if rank == 0 else None]
    if group:
        dist.broadcast_object_list(compiled)
    began = time.perf_counter()
    failure = None
    try:
        share.sample(compiled[0], auditor, progress)
    except InputError as error:
        if rank == 0:
            raise
        failure = error
    shares = _gathered((share.blocks, share.new, failure), rank, ranks)
    if shares is None:
        return None
    seconds = time.perf_counter() - began
    for *_, other_failure in shares:
        if other_failure is not None:
            raise other_failure
    blocks = {index: block for part, *_ in shares for index, block in part.items()}
    order = sorted(blocks)
    samples = _joined(blocks[index] for index in order)
    if out is not None:
        _write(samples, out, progress)
        share.kept.remove()
    result = None
    if auditor is not None:
        sizes = [(index, len(blocks[index].seeds)) for index in order]
        result = auditor.audit(_image_set(samples, str(out or source), named=True), sizes)
    return Generated(
        samples, sum(new for _, new, _ in shares), seconds, nfe, settings, source, identifier, out,
        result,
    )  # fmt: skip


class _Share:
    """The blocks (batches) of one rank: every `ranks`-th, so that a block is the same however many ranks there are."""

    def __init__(
        self,
        denoiser: torch.nn.Module,
        seeds: list[int],
        settings: SamplerConfig,
        rank: int,
        ranks: int,
        kept: KeptBlocks | None,
    ):
        self.denoiser, self.settings, self.ranks, self.kept = denoiser, settings, ranks, kept
        self.total = len(seeds)
        starts = range(0, len(seeds), settings.batch)
        self.seeds_of = {i: seeds[starts[i] : starts[i] + settings.batch] for i in range(rank, len(starts), ranks)}
        self.blocks: dict[int, Samples] = {}
        self.new = 0

    def begin(self, identity: dict[str, Any], restart: bool, nfe: int) -> bool:
        """Opens the work folder and returns whether this run's steps are compiled."""
        decided = None if self.kept is None else self.kept.begin(identity, restart)
        if decided is None:
            auto = self.settings.compile == "auto"
            decided = self._worth_compiling(nfe) if auto else self.settings.compile == "on"
            if self.kept is not None:
                self.kept.decide(identity, decided)
        return decided

    def _worth_compiling(self, nfe: int) -> bool:
        """Decided once for the whole run, by the time that one evaluation of the network takes: blocks made in two
        ways would differ by rounding, and a resumed run would depend on where it was interrupted."""
        if is_compiled(self.denoiser):
            return True
        if not is_compilable(self.denoiser):
            return False
        device = next(self.denoiser.parameters()).device
        size = min(self.settings.batch, self.total)
        x = torch.zeros(size, self.denoiser.channels, *[self.denoiser.resolution] * 2, device=device)
        precise = in_precision(self.denoiser, self.settings.precision)
        with torch.inference_mode(), evaluating(self.denoiser), _memory_errors(size), precise:
            each = measure(lambda: self.denoiser(x, 1.0).sum().item(), budget=1.0)
        return worth_compiling(self.denoiser, each, nfe * len(self.seeds_of))

    def sample(self, compiled: bool, auditor: RunningAudit | None, progress: Progress) -> None:
        """Fills `blocks` with what is kept and what is left to make; tells the progress of all ranks, as if they kept
        pace with this one."""
        done = 0
        if self.kept is not None:
            for index, seeds in self.seeds_of.items():
                if (block := self.kept.read(index, seeds)) is not None:
                    self.blocks[index] = block
                    done += len(seeds)
                    if auditor is not None:
                        auditor.add(index, block.images.numpy())
        progress(STAGE, min(done * self.ranks, self.total), self.total)
        left = {index: seeds for index, seeds in self.seeds_of.items() if index not in self.blocks}
        config = replace(self.settings, compile=compiled)
        # Only the last block may be smaller than a batch, so that batches are blocks.
        batches = sample_batches(self.denoiser, [seed for seeds in left.values() for seed in seeds], config=config)
        for index, seeds in left.items():
            with _memory_errors(len(seeds)):
                block = next(batches)
            if self.kept is not None:
                self.kept.write(index, block)
            self.blocks[index] = block
            self.new += len(seeds)
            done += len(seeds)
            stage = STAGE
            if auditor is not None:
                auditor.add(index, block.images.numpy())
                stage = f"{STAGE}: {auditor.so_far()}"
            progress(stage, min(done * self.ranks, self.total), self.total)


@contextmanager
def _memory_errors(batch: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(f"{batch} images at a time do not fit into the device's memory: use a smaller batch") from None


def _check_output(out: Path, channels: int) -> None:
    """Raises InputError where `_write` would fail after the work."""
    suffix = out.suffix.lower()
    if suffix not in (".npz", ".zip", ""):
        raise InputError(f"{out}: images are written as .npz, as .zip, or, without a suffix, as a folder")
    if suffix != ".npz" and channels not in (1, 3):
        raise InputError(f"{out}: PNG files hold 1 or 3 channels, these images have {channels}: write .npz")
    if suffix:
        check_output_file(out)
    if not suffix and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists already: choose another name, or empty it first")


def _write(samples: Samples, out: Path, progress: Progress) -> None:
    images, seeds = _image_set(samples, str(out)), samples.seeds.numpy()
    suffix = out.suffix.lower()
    if suffix == ".npz":
        write_npz(images, out, seeds, progress=progress)
    elif suffix == ".zip":
        write_edm_zip(images, out, progress=progress)
    else:
        write_folder(images, out, seeds, progress=progress)


def _image_set(samples: Samples, source: str, named: bool = False) -> ImageSet:
    names = [f"seed {seed}" for seed in samples.seeds.tolist()] if named else None
    labels = None if samples.labels is None else samples.labels.numpy()
    return ImageSet(samples.images.numpy(), names=names, labels=labels, source=source)


def _joined(blocks: Iterable[Samples]) -> Samples:
    images, seeds, labels = zip(*blocks, strict=True)
    return Samples(torch.cat(images), torch.cat(seeds), None if labels[0] is None else torch.cat(labels))


def _gathered(value: Any, rank: int, ranks: int) -> list[Any] | None:
    """Every rank's value on the first rank, None on the others."""
    if ranks == 1:
        return [value]
    values = [None] * ranks if rank == 0 else None
    dist.gather_object(value, values)
    return values
