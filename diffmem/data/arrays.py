"""Arrays of images: numpy arrays and torch tensors, `.npy`, `.npz`, `.pt` and `.safetensors` files.

Files are read without executing anything (see `diffmem.inert`), and no size is believed that the file does not have. An
`.npy` file stays mapped to memory; where its axes are NHWC, the images are a view with its axes permuted.
"""

from __future__ import annotations

import io
import math
import sys
import warnings
import zipfile
from collections.abc import Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from diffmem.data.containers import open_zip
from diffmem.data.labels import check_labels, or_note
from diffmem.data.storage import allocate
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing, short

_CHANNELS = (1, 3, 4)
# Images are not packed more closely than this, unless there is next to nothing on them; deflate's limit is 1,032.
MOST_DEFLATED, LARGE = 500, 2**30
_LONGEST_HEADER = 10_000  # bytes of an .npy file's header, as numpy allows
_BESIDE_IMAGES = ("labels", "names", "seeds")


class Arrays(NamedTuple):
    """What an array source holds: images NCHW (not yet checked for NaN), labels and names where it has usable ones,
    notes on what it could not use, and what `ImageSet.sheets` says."""

    images: np.ndarray
    labels: np.ndarray | None = None
    names: Sequence[str] | None = None
    notes: tuple[str, ...] = ()
    sheets: tuple[int, int] | None = None


def is_tensor(value: Any) -> bool:
    """Whether `value` is a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(value: Any, where: str = "tensor") -> np.ndarray:
    """A tensor (from any device; bfloat16 as float32) or array-like as a numpy array, without a copy where possible.

    Raises `InputError`, naming `where`, for tensors that are not plain arrays of numbers.
    """
    if not is_tensor(value):
        return np.asanyarray(value)
    import torch

    value = value.detach()
    if value.device.type == "meta":
        raise InputError(f"{where}: a tensor on the device meta, which holds no values")
    if value.layout != torch.strided or value.is_nested:
        raise InputError(f"{where}: a sparse or nested tensor: make it dense first (.to_dense())")
    if value.is_quantized:
        raise InputError(f"{where}: a quantized tensor: convert it first (.dequantize())")
    value = value.cpu().resolve_conj().resolve_neg()
    if value.dtype == torch.bfloat16:
        value = value.float()
    try:
        return value.numpy()
    except (TypeError, RuntimeError):
        raise InputError(f"{where}: {value.dtype} is not a NumPy dtype: convert it first (.float())") from None


def as_nchw(array: np.ndarray, layout: str | None, where: str, *, assume: str | None = None) -> np.ndarray:
    """`array` as images [N, C, H, W] of dtype uint8, float32 or float64; a view where possible.

    The channel axis is the one of length 1, 3 or 4. Where both ends fit or neither, `layout` ("NCHW" or "NHWC")
    decides, or what is laid down for the source (`assume`: NCHW for arrays in memory); else that is an error.
    [N, H, W] is gray. Half precision becomes float32. Raises `InputError` for anything that is not images.
    """
    if array.ndim == 2:
        raise InputError(
            f"{where}: shape {array.shape} is vectors, not images: search them with diffmem.search.TrainingIndex"
            " (or reshape them to [N, C, H, W])"
        )
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype.kind not in "uf" or array.dtype.newbyteorder("=") not in (np.uint8, np.float32, np.float64):
        raise InputError(f"{where}: images must be uint8 (0–255) or floats, got {array.dtype}: convert them first")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 3 and layout is None and array.shape[0] not in _CHANNELS and array.shape[2] not in _CHANNELS:
        return array[:, None]
    if array.ndim != 4:
        raise InputError(f"{where}: images must have 4 axes ([N, C, H, W] or [N, H, W, C]), got shape {array.shape}")
    if layout is None:
        fits = [name for name, length in zip(("NCHW", "NHWC"), array.shape[1::2], strict=True) if length in _CHANNELS]
        if len(fits) == 1:
            layout = fits[0]
        elif assume is not None:
            layout = assume
        else:
            problem = (
                "both axis 1 and axis 3 could be" if fits else "neither axis 1 nor axis 3 has the length 1, 3 or 4 of"
            )
            raise InputError(
                f"{where}: in shape {array.shape} {problem} the channels: pass layout='NCHW' or layout='NHWC'"
            )
    if layout == "NHWC":
        array = array.transpose(0, 3, 1, 2)
    # A mapped file stays as it lies; what is in memory anyway had better be contiguous.
    return array if isinstance(array, np.memmap) else np.ascontiguousarray(array)


def check_finite(images: np.ndarray, where: str) -> None:
    """Raises `InputError` where float images hold NaN or infinity: how many, and where the first one is."""
    if images.dtype == np.uint8:
        return
    count, first = 0, None
    rows = max(1, 2**22 // max(1, images[:1].size))
    for start in range(0, len(images), rows):
        bad = ~np.isfinite(images[start : start + rows])
        if bad.any():
            count += int(bad.sum())
            if first is None:
                row, *place = (int(axis) for axis in np.unravel_index(int(bad.argmax()), bad.shape))
                first = f"image {start + row} (channel {place[0]}, row {place[1]}, column {place[2]})"
    if count:
        raise InputError(
            f"{where}: {count:,} values are NaN or infinite, the first in {first}: fix or remove those images"
        )


def read_npy(path: Path, layout: str | None) -> Arrays:
    """The images in an `.npy` file, memory-mapped."""
    array = map_npy(path)
    with parsing(path, "a complete .npy array of numbers"):
        return Arrays(as_nchw(array, layout, str(path)))


def map_npy(path: Path) -> np.ndarray:
    """The array in an `.npy` file, memory-mapped; raises InputError where there is no plain, complete one."""
    with parsing(path, "a complete .npy array of numbers"):
        with open(path, "rb") as file:
            shape, fortran, dtype = read_npy_header(file)
            start = file.tell()
        size, there = _bytes_of(shape, dtype), path.stat().st_size - start
        if size > there:
            raise ValueError(
                f"shape {short(shape)} of {_dtype_name(dtype)} needs {size:,} bytes, but {there:,} are present"
            )
        if size == 0:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", start, shape, order="F" if fortran else "C")


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an `.npy` file; raises ValueError and others where there is no plain header.

    The header is read here, since numpy reads as many bytes as a file claims; parsing it is numpy's.
    """
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY" or len(magic) < 8 or magic[6] not in (1, 2, 3):
        raise ValueError("it does not start like an .npy file")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length:,} bytes")
    header = stream.read(length)
    if len(header) != length:
        raise ValueError("truncated in its header")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about headers that Python 2 wrote: what matters ends in an error
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(length.to_bytes(2, "little") + header))
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded")
    if not all(type(length) is int and 0 <= length < 2**62 for length in shape):
        raise ValueError(f"shape {short(shape)}")
    return shape, fortran, dtype


def _bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _dtype_name(dtype: np.dtype) -> str:
    return dtype.str if dtype.names is None else "records"


def read_npz(path: Path, key: str | None, layout: str | None) -> Arrays:
    """The images in an `.npz` file: `images` (NCHW) with `labels` and `names`, ADM's `arr_0` (NHWC) with `arr_1`, or a
    split of MedMNIST's (`train_images` with `train_labels`, …): "train" unless `key` says "val", "test" or "all"."""
    with parsing(path, "a complete .npz file"):
        with open_zip(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            split = (key or "train").removesuffix("_images")
            if "train_images" in names and (f"{split}_images" in names or key not in names):
                return _read_medmnist(archive, names, split, path)
            chosen = _pick(names, key, path)

            def member(name: str) -> np.ndarray | None:
                return npz_member(archive, name, path) if name in names else None

            assume = {"images": "NCHW", "arr_0": "NHWC"}.get(chosen)
            images = as_nchw(npz_member(archive, chosen, path), layout, f"{path}: {chosen}", assume=assume)
            beside = "arr_1" if chosen == "arr_0" else "labels"
            labels, notes = or_note(lambda: _labels_of(member(beside), images, path))
            try:
                written_names = member("names")
            except InputError as problem:
                written_names, notes = None, (*notes, f"names are ignored: {problem}")
        if written_names is not None and (written_names.dtype.kind != "U" or written_names.shape != (len(images),)):
            form = f"{written_names.dtype} {written_names.shape}"
            notes = (*notes, f"names are ignored: {path}: they must be {len(images):,} strings, not {form}")
            written_names = None
        return Arrays(images, labels, None if written_names is None else written_names.tolist(), notes)


def _read_medmnist(archive: zipfile.ZipFile, names: Sequence[str], key: str, path: Path) -> Arrays:
    there = [split for split in ("train", "val", "test") if f"{split}_images" in names]
    if key not in (*there, "all"):
        raise InputError(f"{path}: there is no split {key!r}: pick one with key=…: {', '.join(there)}, all")
    found: list[Arrays] = []
    for split in there if key == "all" else [key]:
        images = npz_member(archive, f"{split}_images", path)
        if images.ndim == 5 or (images.ndim == 4 and images.shape[3] not in _CHANNELS):
            raise InputError(f"{path}: {split}_images holds volumes {images.shape}: cut slices [N, H, W] of them first")
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2) if images.ndim == 4 else images
        images = as_nchw(images, "NCHW", f"{path}: {split}_images")

        def read_labels(split: str = split, images: np.ndarray = images) -> np.ndarray | None:
            if f"{split}_labels" not in names:
                return None
            return _labels_of(as_column(npz_member(archive, f"{split}_labels", path)), images, path)

        labels, notes = or_note(read_labels)
        found.append(Arrays(images, labels, [f"{split}-{index:06d}" for index in range(len(images))], notes))
    if len(found) == 1:
        return found[0]
    if len({each.images.shape[1:] for each in found}) > 1:
        raise InputError(f"{path}: its splits hold images of different shapes: take one of them with key=…")
    kept = [each.labels for each in found if each.labels is not None]
    alike = len(kept) == len(found) and len({(each.dtype, each.shape[1:]) for each in kept}) == 1
    return Arrays(
        np.concatenate([each.images for each in found]),
        np.concatenate(kept) if alike else None,
        [name for each in found for name in each.names or ()],
        tuple(note for each in found for note in each.notes),
    )


def as_column(labels: np.ndarray) -> np.ndarray:
    """Labels [N, 1, …, 1], as some data sets hold them, as [N]."""
    return labels.reshape(len(labels)) if labels.ndim > 1 and labels.size == len(labels) else labels


def _labels_of(labels: np.ndarray | None, images: np.ndarray, path: Path) -> np.ndarray | None:
    return None if labels is None else check_labels(labels, len(images), str(path))


def npz_member(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """One array, unpacked straight to where it will lie; its header is not believed before the sizes agree."""
    with parsing(f"{path}: {name}", "a readable array"):
        entry = archive.getinfo(f"{name}.npy")
        with archive.open(entry) as stream:
            shape, fortran, dtype = read_npy_header(stream)
            size, there = _bytes_of(shape, dtype), entry.file_size - stream.tell()
            if there != size:
                raise ValueError(
                    f"shape {short(shape)} of {_dtype_name(dtype)} needs {size:,} bytes, but {there:,} are present"
                )
            if size > LARGE and size > MOST_DEFLATED * entry.compress_size:
                raise ValueError(
                    f"its {size / 1e9:.1f} GB are compressed into {entry.compress_size / 1e6:.1f} MB, as in a zip bomb"
                )
            array = allocate(shape[::-1] if fortran else shape, dtype)
            if size:
                view = array.reshape(-1).view(np.uint8).data
                done = 0
                while done < size and (got := cast(BufferedIOBase, stream).readinto(view[done : done + 2**24])):
                    done += got
                if done != size:
                    raise ValueError("it is shorter than it declares")
            if stream.read(1):  # also makes zipfile compare the checksum
                raise ValueError("it is longer than it declares")
        return array.T if fortran else array


def read_pt(path: Path, key: str | None, layout: str | None) -> Arrays:
    """The images in a file that `torch.save` wrote: a tensor, a dict of tensors, or a pair (images, labels)."""
    from diffmem.inert.pickles import Damaged, input_error
    from diffmem.inert.torch_files import TensorRecord, read_torch_file

    advice = "save a tensor, or a dict of tensors 'images' and 'labels'"
    content = read_torch_file(path, "torch file", advice)
    with parsing(path, "a complete torch file", advice):
        if isinstance(content, (tuple, list)) and len(content) == 2:
            content = dict(zip(("images", "labels"), content, strict=True))
        elif isinstance(content, TensorRecord):
            content = {"images": content}
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise InputError(f"{path}: holds a {kind}, not a tensor or a dict of tensors: {advice}")
        records = {str(name): value for name, value in content.items() if isinstance(value, TensorRecord)}
        wanted = {_pick(list(records), key, path), "labels"} & set(records)
        try:
            tensors = {name: records[name].to_tensor() for name in wanted}
        except Damaged as error:
            raise input_error(path, error, "torch file", advice) from None
        return _from_tensors(tensors, key, layout, path)


def read_safetensors(path: Path, key: str | None, layout: str | None) -> Arrays:
    """The images in a `.safetensors` file: its tensor `images`, the only one, or the one named `key`."""
    from safetensors import safe_open

    with parsing(path, "a complete safetensors file"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            wanted = {_pick(names, key, path), "labels"} & set(names)
            tensors = {name: file.get_tensor(name) for name in wanted}
        return _from_tensors(tensors, key, layout, path)


def _from_tensors(tensors: dict[str, Any], key: str | None, layout: str | None, path: Path) -> Arrays:
    chosen = _pick(list(tensors), key, path)
    array = to_numpy(tensors[chosen], f"{path}: {chosen}")
    array.flags.writeable = False  # it may lie in the file
    images = as_nchw(array, layout, f"{path}: {chosen}", assume="NCHW" if chosen == "images" else None)
    given = tensors.get("labels") if chosen != "labels" else None

    def read_labels() -> np.ndarray | None:
        return None if given is None else _labels_of(to_numpy(given, f"{path}: labels"), images, path)

    labels, notes = or_note(read_labels)
    return Arrays(images, labels, notes=notes)


def _pick(names: Sequence[str], key: str | None, path: Path) -> str:
    """Which of the arrays `names` holds the images."""
    if key is not None:
        candidates = [key] if key in names else []
    else:
        candidates = [name for name in ("images", "arr_0") if name in names][:1]
        candidates = candidates or [name for name in names if name not in _BESIDE_IMAGES]
    if len(candidates) != 1:
        problem = "no array" if not names else f"pick the array of images with key=…: {listed(names)}"
        raise InputError(f"{path}: {problem}" + ("" if key is None else f" (there is no {key!r})"))
    return candidates[0]


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(name[:80] for name in names[:20]) + more
