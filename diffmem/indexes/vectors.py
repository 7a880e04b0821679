"""Vectors that were computed elsewhere, read in blocks from files of any size, here or in an object store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffmem.data.arrays import read_npy_header
from diffmem.errors import InputError, MissingExtraError
from diffmem.features import load_features
from diffmem.features.precomputed import name_column, vector_column
from diffmem.indexes import remote
from diffmem.indexes.sources import Part
from diffmem.inert.boundary import parsing
from diffmem.text import printable

_ADVICE = "download or write it again"
_LOCAL = (".npz", ".pt", ".pth")  # read as a whole
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "U8": "|u1"}
_LONGEST_HEADER = 2**27


def open_binary(file: str) -> Any:
    """A path or URL, opened for reading."""
    if remote.is_remote(file):
        return remote.RemoteFile(file)
    return open(Path(file).expanduser(), "rb")


def count_rows(file: str, key: str | None) -> int:
    """How many vectors a file holds, from its header."""
    suffix = _suffix(file)
    if suffix in (".npy", ".safetensors"):
        with closing(open_binary(file)) as stream:
            return (_npy_header if suffix == ".npy" else _safetensors_header)(stream, file, key)[0][0]
    if suffix == ".parquet":
        with closing(open_binary(file)) as stream:
            return int(_parquet(stream, file).metadata.num_rows)
    return len(_loaded(file, key).vectors)


def row_blocks(part: Part, rows: int) -> Iterator[tuple[np.ndarray, Sequence[str] | None]]:
    """The vectors of a part in blocks [n, d] of at most `rows`, with their names.

    Raises:
        InputError: The file is damaged, or holds no vectors.
    """
    suffix, stop = _suffix(part.file), part.stop
    assert stop is not None
    names = None if part.names is None else _names_beside(part.names, part.start, stop, rows)
    blocks: Iterator[tuple[np.ndarray, Sequence[str] | None]]
    if suffix in (".npy", ".safetensors"):
        blocks = _raw_blocks(part, suffix, rows)
    elif suffix == ".parquet":
        blocks = _parquet_blocks(part, rows)
    else:
        found = _loaded(part.file, part.key)
        blocks = (
            (
                found.vectors[start : min(start + rows, stop)],
                None if found.names is None else list(found.names[start : min(start + rows, stop)]),
            )
            for start in range(part.start, stop, rows)
        )
    for vectors, own in blocks:
        if vectors.dtype == np.bool_:
            vectors = vectors.astype(np.uint8)
        if vectors.ndim != 2:
            vectors = vectors.reshape(len(vectors), -1)
        given = own
        if names is not None:
            given = [next(names, "") for _ in range(len(vectors))]
        yield vectors, given


def _suffix(file: str) -> str:
    return Path(remote.without_secrets(file)).suffix.lower()


def _loaded(file: str, key: str | None) -> Any:
    if remote.is_remote(file):
        raise InputError(
            f"{printable(remote.without_secrets(file))}: {_suffix(file)} files cannot be read in parts: download it, "
            "or write it as .npy, .safetensors or .parquet"
        )
    return load_features(file, key=key, metric="euclidean")


Header = tuple[tuple[int, ...], np.dtype, int]  # shape, dtype, where the values begin


def _npy_header(stream: IO[bytes], file: str, key: str | None) -> Header:
    with parsing(printable(remote.without_secrets(file)), "a complete .npy array of vectors", _ADVICE):
        shape, fortran, dtype = read_npy_header(stream)
        if fortran or len(shape) < 2:
            raise ValueError(
                f"an array {shape} {'column by column' if fortran else ''}: vectors are [N, d], row by row"
            )
        return shape, dtype, stream.tell()


def _safetensors_header(stream: IO[bytes], file: str, key: str | None) -> Header:
    where = printable(remote.without_secrets(file))
    with parsing(where, "a complete safetensors file of vectors", _ADVICE):
        length = int.from_bytes(stream.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"a header of {length:,} bytes")
        tensors = {name: each for name, each in json.loads(stream.read(length)).items() if name != "__metadata__"}
        chosen = vector_column(list(tensors), key, where, "array")
        entry = tensors[chosen]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{entry['dtype']} is not float16, float32, float64 or uint8")
        return tuple(entry["shape"]), np.dtype(_DTYPES[entry["dtype"]]), 8 + length + int(entry["data_offsets"][0])


def _raw_blocks(part: Part, suffix: str, rows: int) -> Iterator[tuple[np.ndarray, None]]:
    with closing(open_binary(part.file)) as stream:
        shape, dtype, begin = (_npy_header if suffix == ".npy" else _safetensors_header)(stream, part.file, part.key)
        width = int(np.prod(shape[1:]))
        native = dtype.newbyteorder("=")
        stream.seek(begin + part.start * width * dtype.itemsize)
        assert part.stop is not None
        for start in range(part.start, part.stop, rows):
            count = min(rows, part.stop - start)
            block = np.empty((count, width), dtype)
            if _read_into(stream, block) != block.nbytes:
                raise InputError(f"{part.where}: cut short: {_ADVICE}")
            yield block.astype(native, copy=False), None


def _read_into(stream: Any, block: np.ndarray) -> int:
    view, done = block.data.cast("B"), 0
    while done < len(view) and (count := stream.readinto(view[done:])):
        done += count
    return done


def _parquet(stream: Any, file: str) -> Any:
    where = printable(remote.without_secrets(file))
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet", f"{where}: reading parquet files") from None
    with parsing(where, "a complete parquet file", _ADVICE):
        return pyarrow.parquet.ParquetFile(stream, buffer_size=2**20, pre_buffer=False)


def _batches(table: Any, columns: Sequence[str], start: int, stop: int, rows: int) -> Iterator[Any]:
    """Rows start to stop of some columns, in batches, from the row groups that hold them."""
    groups: list[int] = []
    first = before = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if before + count > start and before < stop:
            first = before if not groups else first
            groups.append(group)
        before += count
    position = first
    for batch in table.iter_batches(rows, row_groups=groups, columns=list(columns), use_threads=False):
        low, high = max(start, position), min(stop, position + len(batch))
        if high > low:
            yield batch.slice(low - position, high - low)
        position += len(batch)
        if position >= stop:
            break


def _parquet_blocks(part: Part, rows: int) -> Iterator[tuple[np.ndarray, Sequence[str] | None]]:
    assert part.stop is not None
    where = printable(remote.without_secrets(part.file))
    with closing(open_binary(part.file)) as stream:
        table = _parquet(stream, part.file)
        chosen = vector_column(table.schema_arrow, part.key, where)
        named = name_column(table.schema_arrow, chosen)
        columns = [chosen] if named is None else [chosen, named]
        with parsing(where, "a complete parquet file", _ADVICE):
            for batch in _batches(table, columns, part.start, part.stop, rows):
                column = batch.column(chosen)
                if column.null_count:
                    raise InputError(f"{where}: {column.null_count:,} rows of column {chosen} are empty: remove them")
                values = column.flatten().to_numpy(zero_copy_only=False)
                lengths = column.value_lengths().to_numpy() if hasattr(column, "value_lengths") else None
                if len(values) % len(column) or (lengths is not None and len(set(lengths.tolist())) > 1):
                    raise InputError(f"{where}: the lists in column {chosen} are not all of the same length")
                names = None if named is None else [printable(str(each)) for each in batch.column(named).to_pylist()]
                yield values.reshape(len(column), -1), names


def _names_beside(file: str, start: int, stop: int, rows: int) -> Iterator[str]:
    where = printable(remote.without_secrets(file))
    with closing(open_binary(file)) as stream:
        table = _parquet(stream, file)
        named = name_column(table.schema_arrow, "")
        if named is None:
            return
        if table.metadata.num_rows < stop:
            raise InputError(f"{where}: {table.metadata.num_rows:,} rows of metadata for {stop:,} vectors")
        with parsing(where, "a complete parquet file", _ADVICE):
            for batch in _batches(table, [named], start, stop, rows):
                yield from (printable(str(each)) for each in batch.column(named).to_pylist())
