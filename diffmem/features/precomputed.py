"""Vectors that were computed elsewhere, in the files in which people keep them.

Nothing in a file is executed (see `diffmem.inert`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data.arrays import is_tensor, listed, map_npy, npz_member, to_numpy
from diffmem.data.containers import open_zip
from diffmem.data.storage import allocate
from diffmem.errors import InputError, MissingExtraError
from diffmem.features.feature_set import METRICS, UNIT, FeatureSet, Metric, check_metric
from diffmem.inert.boundary import parsing
from diffmem.integrity import arrays_sha256, unsealed

_FEATURES = ("features", "embeddings", "embedding", "img_emb", "image_embeddings", "vectors", "feats", "arr_0")
_NAMES = ("image_path", "name", "names", "path", "filename", "file_name", "key", "image_id", "id", "url")
_READ = (
    ".npy, .npz, .safetensors, .pt, .parquet, or a folder of clip-retrieval's (img_emb) or of .npy or .parquet parts"
)


def load_features(source: Any, *, key: str | None = None, metric: Metric | None = None) -> FeatureSet:
    """Vectors that were computed elsewhere.

    Args:
        source: A file: `.npy`; `.npz` and `.safetensors` (one array of vectors, or the one named `key`; `video_ids`
            and `timestamps` beside it, as in VSC's files, become names); `.pt`; `.parquet` (a column of lists); or a
            folder: `img_emb/img_emb_*.npy` beside `metadata/*.parquet` (clip-retrieval), or parts `*.npy` or
            `*.parquet`. Or an array or tensor [N, d], or a `FeatureSet`.
        key: Which array or column holds the vectors.
        metric: How two vectors are compared; default "cosine" for floats, "hamming" for bits, "euclidean" for other
            uint8, or what the file says.

    Raises:
        InputError: The file is damaged or holds no vectors, or several arrays that could be, or some vectors of length
            1 among others that are longer or shorter.
        MissingExtraError: `.parquet` without the package pyarrow.

    Example:
        >>> load_features(np.eye(3, dtype=np.float16)).metric
        'cosine'
    """
    if metric is not None:
        check_metric(metric)
    if isinstance(source, FeatureSet):
        return source if metric in (None, source.metric) else replace(source, metric=metric)
    if isinstance(source, np.ndarray) or is_tensor(source):
        where = "array" if isinstance(source, np.ndarray) else "tensor"
        return _checked(to_numpy(source), None, where, metric)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"cannot read features from an object of type {type(source).__name__}: give {_READ}")
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    notes: tuple[str, ...] = ()
    if path.is_dir():
        vectors, names, notes = _read_folder(path, key)
    elif path.suffix.lower() == ".safetensors" and _is_own(path):
        found, _ = read_own(path)
        return found if metric in (None, found.metric) else replace(found, metric=metric)
    else:
        readers = {
            ".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors, ".pt": _read_pt,
            ".pth": _read_pt, ".parquet": _read_parquet,
        }  # fmt: skip
        if path.suffix.lower() not in readers:
            raise InputError(f"{path}: unsupported file type for features: give {_READ}")
        vectors, names, notes = readers[path.suffix.lower()](path, key)
    return _checked(vectors, names, str(path), metric, notes)


def _checked(
    vectors: np.ndarray, names: Sequence[str] | None, source: str, metric: Metric | None, notes: tuple[str, ...] = ()
) -> FeatureSet:
    vectors = vectors.astype(np.uint8) if vectors.dtype == np.bool_ else vectors
    if vectors.ndim > 2 and vectors[:1].size == max(vectors.shape[1:]):  # [N, 1, d], [N, d, 1, 1]
        vectors = vectors.reshape(len(vectors), -1)
    if vectors.dtype.kind == "f" and not vectors.dtype.isnative:
        vectors = vectors.astype(vectors.dtype.newbyteorder("="))
    bits = vectors.dtype == np.uint8 and vectors.size > 0 and vectors.max() <= 1
    asked = metric is not None
    if metric is None:
        metric = "cosine" if vectors.dtype != np.uint8 else "hamming" if bits else "euclidean"
    found = FeatureSet(vectors, metric, names=names, source=source, notes=notes)
    if vectors.dtype != np.uint8 and metric == "cosine" and not found.unit:
        near = np.abs(found.lengths - 1) <= UNIT
        low, high = float(found.lengths.min()), float(found.lengths.max())
        if near.mean() > 0.5 and not asked:
            wrong = int(np.argmin(near))
            raise InputError(
                f"{source}: {int((~near).sum()):,} of {len(near):,} vectors do not have the length 1 of the others "
                f"({low:.4g} to {high:.4g}, the first is number {wrong}): they are damaged or were computed in another "
                "way (metric='cosine' compares them anyway)"
            )
        note = f"{source}: vectors of length {low:.4g} to {high:.4g}, not 1, are compared by the cosine"
        found = replace(found, notes=(*notes, note))
    return found


def _read_npy(path: Path, key: str | None) -> tuple[np.ndarray, None, tuple[str, ...]]:
    return map_npy(path), None, ()


def _read_npz(path: Path, key: str | None) -> tuple[np.ndarray, list[str] | None, tuple[str, ...]]:
    with parsing(path, "a complete .npz file"), open_zip(path) as archive:
        members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        chosen = _pick(members, key, path)
        vectors = npz_member(archive, chosen, path)
        notes: tuple[str, ...] = ()
        names = None
        for beside in ("video_ids", *_NAMES):
            if beside not in members or beside == chosen:
                continue
            try:
                names = [str(value) for value in npz_member(archive, beside, path).ravel()]
                if beside == "video_ids" and "timestamps" in members:
                    times = npz_member(archive, "timestamps", path).reshape(len(names), -1)
                    names = [f"{name}@{'-'.join(f'{t:g}' for t in at)}" for name, at in zip(names, times, strict=True)]
            except (InputError, ValueError) as problem:
                names, notes = None, (f"names are ignored: {problem}",)
            break
    return vectors, _fitting(names, vectors), notes


def _read_safetensors(path: Path, key: str | None) -> tuple[np.ndarray, None, tuple[str, ...]]:
    from safetensors import safe_open

    with parsing(path, "a complete safetensors file"), safe_open(path, framework="pt") as file:
        chosen = _pick(list(file.keys()), key, path)
        return to_numpy(file.get_tensor(chosen), f"{path}: {chosen}"), None, ()


def _read_pt(path: Path, key: str | None) -> tuple[np.ndarray, None, tuple[str, ...]]:
    from diffmem.inert.pickles import Damaged, input_error
    from diffmem.inert.torch_files import TensorRecord, read_torch_file

    advice = "save a tensor [N, d], or a dict of tensors"
    content = read_torch_file(path, "torch file", advice)
    if isinstance(content, TensorRecord):
        content = {"features": content}
    items = content.items() if isinstance(content, dict) else ()
    records = {str(name): value for name, value in items if isinstance(value, TensorRecord)}
    with parsing(path, "a complete torch file", advice):
        chosen = _pick(list(records), key, path)
        try:
            return to_numpy(records[chosen].to_tensor(), f"{path}: {chosen}"), None, ()
        except Damaged as error:
            raise input_error(path, error, "torch file", advice) from None


def _read_parquet(path: Path, key: str | None) -> tuple[np.ndarray, list[str] | None, tuple[str, ...]]:
    pyarrow, parquet = _pyarrow(path)
    with parsing(path, "a complete parquet file"):
        schema = parquet.read_schema(path)
        chosen = vector_column(schema, key, path)
        beside = name_column(schema, chosen)
        table = parquet.read_table(path, columns=[chosen] if beside is None else [chosen, beside])
        column = table.column(chosen).combine_chunks()
        if column.null_count:
            raise InputError(f"{path}: {column.null_count:,} rows of column {chosen} are empty: remove them")
        values = column.flatten().to_numpy(zero_copy_only=False)
        if len(column) == 0 or len(values) % len(column) or not _equal_lists(column, pyarrow):
            raise InputError(f"{path}: the lists in column {chosen} are not all of the same length")
        names = None if beside is None else [str(value) for value in table.column(beside).to_pylist()]
        return values.reshape(len(column), -1), names, ()


def vector_column(columns: Any, key: str | None, where: object, what: str = "column of lists of numbers") -> str:
    """Which column of a parquet file's schema, or which of the arrays so named, holds the vectors; raises
    InputError where none does, or several could."""
    if isinstance(columns, list):
        return _pick(columns, key, where, what)
    import pyarrow

    lists = [
        field.name for field in columns
        if isinstance(field.type, (pyarrow.ListType, pyarrow.LargeListType, pyarrow.FixedSizeListType))
        and (pyarrow.types.is_floating(field.type.value_type) or field.type.value_type == pyarrow.uint8())
    ]  # fmt: skip
    return _pick(lists, key, where, what)


def name_column(schema: Any, beside: str) -> str | None:
    """The column that names the images, other than `beside`; None where there is none."""
    return next((name for name in _NAMES if name in schema.names and name != beside), None)


def _equal_lists(column: Any, pyarrow: Any) -> bool:
    import pyarrow.compute  # type: ignore[no-redef]

    lengths = pyarrow.compute.list_value_length(column)
    return pyarrow.compute.min(lengths) == pyarrow.compute.max(lengths)


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet", f"{path}: reading parquet files") from None
    return pyarrow, pyarrow.parquet


def _read_folder(path: Path, key: str | None) -> tuple[np.ndarray, list[str] | None, tuple[str, ...]]:
    """clip-retrieval's folders, and parts in the order of their numbers."""
    beside = path
    if (path / "img_emb").is_dir():
        path = path / "img_emb"
    elif path.name == "img_emb":
        beside = path.parent
    parts = sorted(path.glob("*.npy"), key=_natural)
    if not parts:
        parts = sorted(path.glob("*.parquet"), key=_natural)
        if not parts:
            raise InputError(f"{beside}: no features in this folder: give {_READ}")
        pieces = [_read_parquet(part, key) for part in parts]
        names = (
            None
            if any(each is None for _, each, _ in pieces)
            else [name for _, each, _ in pieces for name in each or ()]
        )
        return _joined([vectors for vectors, _, _ in pieces], parts), names, ()
    vectors = _joined([map_npy(part) for part in parts], parts)
    metadata = sorted((beside / "metadata").glob("*.parquet"), key=_natural)
    if not metadata:
        return vectors, None, ()
    try:
        _, parquet = _pyarrow(metadata[0])
    except MissingExtraError as missing:
        return vectors, None, (f"names are ignored: {missing}",)
    names = []
    with parsing(beside / "metadata", "complete parquet files"):
        for file in metadata:
            columns = parquet.read_schema(file).names
            column = next((name for name in _NAMES if name in columns), None)
            if column is None:
                return vectors, None, (f"names are ignored: {file}: no column {', '.join(_NAMES[:3])} or the like",)
            names += [str(value) for value in parquet.read_table(file, columns=[column]).column(column).to_pylist()]
    if len(names) != len(vectors):
        raise InputError(
            f"{beside}: {len(names):,} rows of metadata for {len(vectors):,} vectors: some parts are missing"
        )
    return vectors, names, ()


def _joined(parts: list[np.ndarray], files: Sequence[Path]) -> np.ndarray:
    """The parts as one array."""
    for part, file in zip(parts, files, strict=True):
        if part.ndim != 2 or part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype:
            raise InputError(
                f"{file}: {part.dtype} {part.shape} does not match {files[0].name}, {parts[0].dtype} "
                f"{parts[0].shape}: give a folder of vectors [N, d] alone"
            )
    if len(parts) == 1:
        return parts[0]
    whole = allocate((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype)
    start = 0
    for part in parts:
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _fitting(names: list[str] | None, vectors: np.ndarray) -> list[str] | None:
    return names if names is not None and len(names) == len(vectors) else None


def _pick(names: Sequence[str], key: str | None, path: object, what: str = "array") -> str:
    """Which of the arrays `names` holds the vectors."""
    if key is not None:
        candidates = [key] if key in names else []
    else:
        candidates = [name for name in _FEATURES if name in names][:1]
        candidates = candidates or [
            name for name in names if name not in (*_NAMES, "video_ids", "timestamps", "labels")
        ]
    if len(candidates) != 1:
        problem = f"no {what}" if not names else f"pick the {what} of features with key=…: {listed(names)}"
        raise InputError(f"{path}: {problem}" + ("" if key is None else f" (there is no {key!r})"))
    return candidates[0]


def _is_own(path: Path) -> bool:
    """Whether `FeatureSet.save` wrote the file."""
    from safetensors import safe_open

    with parsing(path, "a complete safetensors file"), safe_open(path, framework="pt") as file:
        return "diffmem" in (file.metadata() or {}) and list(file.keys()) == ["features"]


def read_own(path: Path) -> tuple[FeatureSet, dict[str, Any]]:
    """What `FeatureSet.save` wrote, memory-mapped, and what it was kept for.

    Raises:
        InputError: The file is damaged, or is none of these.
    """
    from safetensors import safe_open

    advice = "compute the features again"
    with parsing(path, "features that diffmem wrote", advice), safe_open(path, framework="pt") as file:
        about = unsealed(json.loads(file.metadata()["diffmem"]), path, advice)
        vectors = to_numpy(file.get_tensor("features"), str(path))
        if arrays_sha256({"features": vectors}) != about["contents"]:
            raise InputError(f"{path}: damaged (its checksum differs): {advice}")
        if about["metric"] not in METRICS:
            raise ValueError("an unknown metric")
        found = FeatureSet(
            vectors, about["metric"], about["fingerprint"], about["names"], about["source"], about["features"]
        )
        return found, about["key"]
