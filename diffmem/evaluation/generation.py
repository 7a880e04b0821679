"""`generate`: the images of many seeds in one file, audited as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import diffmem
from diffmem.atomic_io import check_output_file, output_lock, output_path
from diffmem.data import ImageSet, write_edm_zip, write_folder, write_npz
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.evaluation.detectors import sample_detector
from diffmem.evaluation.evaluator import evaluate
from diffmem.evaluation.seed_ranges import checked_seeds, format_seeds
from diffmem.evaluation.seed_store import SeedStore
from diffmem.memorization import Audit
from diffmem.models import Denoiser, WrappedDenoiser, as_denoiser, checkpoint_path, fingerprint, load
from diffmem.progress import Progress, silent
from diffmem.sampling import SamplerConfig, Samples
from diffmem.sampling.batches import in_precision

if TYPE_CHECKING:
    from diffmem.data import ImageSource


@dataclass(frozen=True, eq=False)
class Generated:
    """What `generate` made.

    Attributes:
        samples: All images, uint8 [n, C, H, W], with seeds and labels, in the order asked for.
        new: How many of them this run made (the others were kept by an earlier one).
        seconds: What these took.
        nfe: Number of function evaluations (of the network) per image.
        sampler: The sampler and its settings.
        checkpoint: Where the denoiser came from, or what it is.
        fingerprint: The SHA-256 of what it is.
        out: Where the images were written to.
        audit: Audit of the images, where a training set was given.
    """

    samples: Samples
    new: int
    seconds: float
    nfe: int
    sampler: SamplerConfig
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
            "settings": self.sampler.to_json(),
            "checkpoint": {"path": self.checkpoint, "fingerprint": self.fingerprint},
            "out": None if self.out is None else str(self.out),
            "audit": audit,
        }


def generate(
    checkpoint: str | Path | torch.nn.Module | Callable[..., torch.Tensor],
    seeds: Sequence[int],
    *,
    out: str | Path | None = None,
    sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
    training: ImageSource | None = None,
    holdout: ImageSource | None = None,
    flip: bool = False,
    device: str = "auto",
    restart: bool = False,
    progress: Progress = silent,
) -> Generated | None:
    """The images of `seeds`, sampled from `checkpoint`, written to `out` and audited against `training`.

    An image depends on its seed, the checkpoint and the sampler; the batch size and the number of ranks change it by
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
        sampler: The sampler and its settings.
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
        return _generate(checkpoint, seeds, out, sampler, training, holdout, flip, device, restart, progress)


def work_folder(out: Path) -> Path:
    """Where the finished batches of a run that ends in `out` are kept.

    Args:
        out: The output.
    """
    out = output_path(out)
    return out.with_name(f"{out.name}.partial")


def _generate(
    checkpoint: str | Path | torch.nn.Module | Callable[..., torch.Tensor],
    seeds: Sequence[int],
    out: str | Path | None,
    sampler: SamplerConfig,
    training: ImageSource | None,
    holdout: ImageSource | None,
    flip: bool,
    device: str,
    restart: bool,
    progress: Progress,
) -> Generated | None:
    seeds, out = checked_seeds(seeds), None if out is None else Path(out)
    if isinstance(checkpoint, (str, Path)):
        place = pick_device(device)
        checkpoint = checkpoint_path(checkpoint)
        denoiser: Denoiser | WrappedDenoiser = load(checkpoint, place)
        source = str(checkpoint)
    else:
        denoiser = as_denoiser(checkpoint)
        source, place = denoiser.summary(), next(denoiser.parameters()).device
    identifier = fingerprint(denoiser) if isinstance(denoiser, Denoiser) else denoiser.fingerprint
    with in_precision(denoiser, sampler.precision):
        pass  # raises where the denoiser does not know it
    nfe = sampler.plan(denoiser).nfe
    first = not (dist.is_available() and dist.is_initialized() and dist.get_rank())
    if out is not None and first:
        _check_output(out, denoiser.channels)
    detector = None
    if training is not None and first:
        shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
        detector = sample_detector(
            training, shape, place, holdout=holdout, flip=flip, keep_images=True, progress=progress
        )  # fmt: skip
    store = None
    if out is not None:
        identity = {
            "checkpoint": identifier,
            "seeds": format_seeds(seeds),
            **sampler.to_json(),
            "device": place.type,
            "diffmem": diffmem.__version__,
            "torch": torch.__version__,
        }
        store = SeedStore(work_folder(out), identity, temporary=True)
    found = evaluate(
        denoiser, seeds, sampler, detector, store, restart=restart, distributed=True, progress=progress
    )  # fmt: skip
    if found is None:
        return None
    samples = Samples(
        torch.from_numpy(found.images), torch.from_numpy(found.seeds),
        None if found.labels is None else torch.from_numpy(found.labels),
    )  # fmt: skip
    if store is not None:
        assert out is not None  # where there is a store
        _write(samples, out, progress)
        store.remove()
    audit = None
    if detector is not None:
        detector.update(_image_set(samples, str(out or source), named=True), found.detection)
        audit = detector.compute()
    return Generated(samples, found.new, found.seconds, nfe, sampler, source, identifier, out, audit)


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
