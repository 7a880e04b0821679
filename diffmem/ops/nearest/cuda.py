"""Exact nearest training images on a CUDA device: torch tensors around the kernels of `csrc/nearest/nearest_cuda.cu`.

Work is enqueued on torch's current stream of the tensors' device and nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from diffmem.errors import InputError
from diffmem.ops.registry import build_info, native_module, native_unavailable

DEVICE_TYPE = "cuda"
LARGEST_K = 64  # kMaxNeighbors of csrc/nearest/nearest_cuda.h


@dataclass(frozen=True)
class CenteredImages:
    """Images prepared by `center` for `nearest_cuda`: make them once for a training set that is searched often.

    values: int8 [N, row], gray level − 128, rows padded with zeros to `row`, a multiple of 64.
    norms: int64 [N], the sums of the squares of `values`.
    dimension: d, the number of values of one image before padding.
    """

    values: torch.Tensor
    norms: torch.Tensor
    dimension: int

    def __len__(self) -> int:
        return len(self.values)


def center(images: torch.Tensor) -> CenteredImages:
    """The images with 128 subtracted, padded, and with their norms: what the int8 tensor cores need.

    images: uint8 [N, ...] on a CUDA device, contiguous.
    Raises InputError for another dtype, device or layout, RuntimeError where CUDA refuses the work.
    """
    return _center(images, "images")


def _center(images: torch.Tensor | CenteredImages, name: str) -> CenteredImages:
    if isinstance(images, CenteredImages):
        return images
    core = _core()
    _require(images, name, torch.uint8, at_least=2)
    n, d = len(images), _dimension(images)
    values = torch.empty((n, core.nearest_cuda_centered_row(d=d)), dtype=torch.int8, device=images.device)
    norms = torch.empty(n, dtype=torch.int64, device=images.device)
    with torch.cuda.device(images.device):
        core.nearest_cuda_center(
            images=images.data_ptr(),
            n=n,
            d=d,
            centered=values.data_ptr(),
            norms=norms.data_ptr(),
            stream=_stream(images),
        )
    return CenteredImages(values, norms, d)


def nearest_cuda(
    queries: torch.Tensor | CenteredImages, training: torch.Tensor | CenteredImages, k: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact squared distances int64 [Q, k] and indices int64 [Q, k] of the k nearest training images, nearest first.

    ‖x − y‖² = ‖x‖² + ‖y‖² − 2 x·y over all pairs, with exact integer products; equal distances go to the lower index.

    queries: uint8 [Q, ...] on a CUDA device, contiguous, or what `center` made of them.
    training: uint8 [N, ...] with as many values per image, on the same device, or what `center` made of them.
    k: 1 … min(64, N).
    Raises InputError for wrong dtypes, devices, layouts, sizes or k, RuntimeError where CUDA refuses the work.
    """
    core = _core()
    queries, training = _center(queries, "queries"), _center(training, "training")
    device = _same_device(queries.values, training.values)
    d = _same_dimension(queries.dimension, training.dimension)
    _check_k(core, k)
    if k > len(training):
        raise InputError(f"k = {k} neighbors were requested, but there are only {len(training)} training images")
    indices = torch.empty((len(queries), k), dtype=torch.int64, device=device)
    squared_distances = torch.empty_like(indices)
    with torch.cuda.device(device):
        size = core.nearest_cuda_search_workspace(queries=len(queries), n=len(training), d=d, k=k)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        core.nearest_cuda_search(
            query_images=queries.values.data_ptr(),
            query_norms=queries.norms.data_ptr(),
            queries=len(queries),
            training_images=training.values.data_ptr(),
            training_norms=training.norms.data_ptr(),
            n=len(training),
            d=d,
            k=k,
            workspace=workspace.data_ptr(),
            workspace_bytes=size,
            indices=indices.data_ptr(),
            squared_distances=squared_distances.data_ptr(),
            stream=_stream(indices),
        )
    return squared_distances, indices


def refine_cuda(
    queries: torch.Tensor, training: torch.Tensor, candidate_indices: torch.Tensor, offsets: torch.Tensor, k: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact squared distances int64 [Q, k] and indices int64 [Q, k] of each query's k nearest candidates.

    Nearest first; equal distances go to the lower index; a candidate listed twice counts once. Where a query has fewer
    than k candidates the rest is index −1 at distance 2⁶³ − 1.

    queries: uint8 [Q, ...], training: uint8 [N, ...], contiguous, on one CUDA device.
    candidate_indices: int64 [M], into `training`; those of query q are candidate_indices[offsets[q] : offsets[q + 1]].
        Indices outside 0 … N − 1 are skipped (looking for them here would wait for the device).
    offsets: int64 [Q + 1], ascending, from 0 to M (not checked, for the same reason).
    k: 1 … 64.
    Raises InputError for wrong dtypes, devices, layouts, sizes or k, RuntimeError where CUDA refuses the work.
    """
    core = _core()
    _require(queries, "queries", torch.uint8, at_least=2)
    _require(training, "training", torch.uint8, at_least=2)
    _require(candidate_indices, "candidate_indices", torch.int64)
    _require(offsets, "offsets", torch.int64)
    device = _same_device(queries, training, candidate_indices, offsets)
    d = _same_dimension(_dimension(queries), _dimension(training))
    if candidate_indices.ndim != 1 or offsets.shape != (len(queries) + 1,):
        raise InputError(
            f"candidate_indices must be [M] and offsets [{len(queries) + 1}] for {len(queries)} queries, "
            f"got {list(candidate_indices.shape)} and {list(offsets.shape)}"
        )
    _check_k(core, k)
    indices = torch.empty((len(queries), k), dtype=torch.int64, device=device)
    squared_distances = torch.empty_like(indices)
    with torch.cuda.device(device):
        core.nearest_cuda_refine(
            query_images=queries.data_ptr(),
            queries=len(queries),
            training_images=training.data_ptr(),
            n=len(training),
            d=d,
            candidates=candidate_indices.data_ptr(),
            offsets=offsets.data_ptr(),
            k=k,
            indices=indices.data_ptr(),
            squared_distances=squared_distances.data_ptr(),
            stream=_stream(indices),
        )
    return squared_distances, indices


@cache
def kernel_unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot search on `device`, or None: a small search is tried there, once, and compared.

    What a build cannot know is found out here: that it has no code for this GPU, or that the driver is too old for it.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (340, 100), dtype=torch.uint8, generator=generator)
    squared = (images[:40, None].long() - images[None, 40:].long()).square().sum(dim=2)
    expected, order = squared.sort(dim=1, stable=True)
    try:
        found, indices = nearest_cuda(images[:40].to(device), images[40:].to(device), 3)
        indices, found = indices.cpu(), found.cpu()
    except RuntimeError as error:
        return f"the kernel does not run on this GPU: {str(error).splitlines()[0]}"
    if not (torch.equal(indices, order[:, :3]) and torch.equal(found, expected[:, :3])):
        return "the kernel gives wrong answers on this GPU"
    return None


def unavailable(device_type: str) -> str | None:
    """Why the kernels cannot run on `device_type`, or None."""
    if device_type != "cuda":
        return "kernels for NVIDIA GPUs"
    reason = native_unavailable("cuda")
    if reason is None and torch.cuda.is_available():
        return kernel_unavailable(torch.device("cuda", torch.cuda.current_device()))
    return reason


def unfit(queries: torch.Tensor, training: torch.Tensor, k: int) -> str | None:
    """Why the kernels cannot take the arguments of `nearest`, or None."""
    if queries.dtype != torch.uint8:
        return f"it takes uint8 images, not {queries.dtype}"
    if k > LARGEST_K:
        return f"k is {k}, but must be at most {LARGEST_K}"
    return None


def nearest(queries: torch.Tensor, training: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances [Q, k] and indices [Q, k]; see `diffmem.ops.nearest.nearest`."""
    return nearest_cuda(queries.contiguous(), training.to(queries.device).contiguous(), k)


def _core():
    core = native_module()
    if core is None or not core.with_cuda:
        raise InputError(f"the CUDA search is not part of this installation: {build_info()['cuda_reason']}")
    return core


def _stream(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _require(tensor: torch.Tensor, name: str, dtype: torch.dtype, at_least: int = 1) -> None:
    if tensor.device.type != DEVICE_TYPE:
        raise InputError(f"{name} must be on a CUDA device, but it is on {tensor.device}: move it with .cuda()")
    if tensor.dtype != dtype:
        raise InputError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.ndim < at_least:
        raise InputError(f"{name} must have at least {at_least} axes, got shape {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise InputError(f"{name} must be contiguous: call .contiguous() first")


def _dimension(images: torch.Tensor) -> int:
    d = images[:0].flatten(1).shape[1]
    if d == 0:
        raise InputError(f"images must have at least one value, got shape {list(images.shape)}")
    return d


def _same_device(*tensors: torch.Tensor) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise InputError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    return devices.pop()


def _same_dimension(queries: int, training: int) -> int:
    if queries != training:
        raise InputError(f"queries have {queries} values per image, training images {training}: they must be equal")
    return queries


def _check_k(core, k: int) -> None:
    if not 1 <= k <= core.nearest_cuda_max_neighbors:
        raise InputError(f"k must be from 1 to {core.nearest_cuda_max_neighbors}, got {k}")
