"""What an index holds, as JSON and as lines to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from diffmem.indexes.folder import IndexFolder
from diffmem.indexes.planning import size_text

_MOST_SOURCES = 20


def describe(index: IndexFolder, full: bool = False) -> dict[str, Any]:
    """Everything that `diffmem index info` says.

    Args:
        index: An index.
        full: With every shard.
    """
    about = index.description
    found: dict[str, Any] = {
        "path": str(index.path),
        "rows": len(index),
        "dimension": index.dimension,
        "dtype": index.dtype.name,
        "image_shape": None if index.image_shape is None else list(index.image_shape),
        "features": index.features.to_json(),
        "reading": index.reading.to_json(),
        "fingerprint": index.fingerprint,
        "quantizer": about["quantizer"],
        "duplicates": about["duplicates"],
        "skipped": index.skipped,
        "bytes": sum(entry["bytes"] for entry in about["shards"]),
        "sources": _sources(index),
    }
    if full:
        found["shards"] = about["shards"]
    else:
        found["shards"] = len(about["shards"])
    return found


def _sources(index: IndexFolder) -> list[dict[str, Any]]:
    """What each source came to."""
    found: list[dict[str, Any]] = [
        {"source": source, "shards": 0, "rows": 0, "skipped": 0, "bytes": 0} for source in index.sources
    ]
    for entry in index.description["shards"]:
        mine = found[entry["part"]["source"]]
        mine["shards"] += 1
        for name in ("rows", "skipped", "bytes"):
            mine[name] += entry[name]
    return found


def table(index: IndexFolder) -> list[str]:
    """The same as lines."""
    about = describe(index)
    features = about["features"]
    shape = about["image_shape"]
    made = f"{features['name']}, {about['dtype']} × {about['dimension']:,}, {features['metric']}"
    if shape is not None:
        made += f", of images {'×'.join(map(str, shape))}"
    lines = [
        f"{index.path}: {about['rows']:,} rows in {about['shards']:,} shards, {size_text(about['bytes'])}",
        f"  features     {made}",
    ]
    if features["fingerprint"] not in (None, features["name"]):
        lines.append(f"  network      {features['fingerprint']}")
    if about["reading"]:
        lines.append(f"  read with    {', '.join(f'{name}={value}' for name, value in about['reading'].items())}")
    lines.append(f"  candidates   {quantizer_text(about['quantizer'])}")
    lines.append(f"  duplicates   {_duplicates(about['duplicates'])}")
    if about["skipped"]:
        lines.append(
            f"  skipped      {about['skipped']:,} files that could not be used; skipped.json of a shard names them"
        )
    lines.append(f"  fingerprint  {about['fingerprint']}")
    return lines + _source_table(about["sources"])


def quantizer_text(quantizer: dict[str, Any] | None) -> str:
    """What the index proposes candidates by."""
    if quantizer is None:
        return "none stored (flat): the search is exact, over all rows"
    return (
        f"{quantizer['factory']}, {quantizer['code_bytes']:,} bytes per row, trained on {quantizer['trained_on']:,} of "
        f"{quantizer['rows']:,} rows"
    )


def _duplicates(about: dict[str, Any]) -> str:
    kind = "identical" if about["radius"] == 0 else f"within {about['radius']:g} (rms)"
    if not about["groups"]:
        return f"none are {kind}"
    return f"{about['rows']:,} rows in {about['groups']:,} groups, {kind}; the largest has {about['largest']:,}"


def _source_table(sources: Sequence[dict[str, Any]]) -> list[str]:
    head = ("source", "shards", "rows", "skipped", "size")
    rows = [
        (
            _short(each["source"]),
            f"{each['shards']:,}",
            f"{each['rows']:,}",
            f"{each['skipped']:,}",
            size_text(each["bytes"]),
        )
        for each in sources[:_MOST_SOURCES]
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [""]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    if len(sources) > _MOST_SOURCES:
        lines.append(f"  and {len(sources) - _MOST_SOURCES:,} more")
    return lines


def _short(source: str) -> str:
    if len(source) <= 60:
        return source
    return f"…/{PurePosixPath(source).parent.name}/{PurePosixPath(source).name}"[-60:]
