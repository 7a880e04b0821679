"""`build_index`: an index of a training set, shard by shard, wherever workers are."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffmem.atomic_io import atomic_write, check_output_folder, output_lock
from diffmem.errors import InputError, OutputInUseError
from diffmem.executors import Executor, InProcess, Processes, Ranks, Ray
from diffmem.features.feature_set import Metric
from diffmem.indexes import remote
from diffmem.indexes.duplicates import (
    NearJob,
    StoredDuplicates,
    find_identical,
    near_jobs,
    near_pairs,
    read_duplicates,
    united,
    write_duplicates,
)
from diffmem.indexes.folder import FORMAT, INDEX, UNFINISHED, IndexFolder, open_index, read_index
from diffmem.indexes.planning import (
    MemoryPlan,
    first_rows,
    parse_memory,
    plan_memory,
    size_text,
    warn_of_machine,
    with_metric,
)
from diffmem.indexes.quantizer import (
    AUTO,
    FLAT_BYTES,
    QUANTIZERS,
    CodeJob,
    check_choice,
    chosen_factory,
    growth_note,
    keeps,
    make_codes,
    plan_quantizer,
    read_quantizer,
    train,
)
from diffmem.indexes.reading import Features, Reading, features_of
from diffmem.indexes.shards import DESCRIPTION, SHARDS, read_shard
from diffmem.indexes.sources import Identities, Part, parts_of
from diffmem.indexes.work import Job, make_shard
from diffmem.integrity import file_sha256, sealed
from diffmem.logs import logger
from diffmem.progress import Progress, silent
from diffmem.system import usable_cores
from diffmem.text import counted

_log = logger(__name__)
LOSSES = 3  # workers that may die over one shard before the build ends
SMALL = 64e6  # bytes of sources that one process indexes sooner than others would have started
SORT_BYTES = 2e9  # to find duplicates in, where no memory is given
_LEFT = re.compile(r"\.([0-9a-f]{32})\.(?:[0-9a-f]{8}\.partial|lock)")
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
Say = Callable[[str], None]


class ShardJob(Protocol):
    """A piece of work on one shard: its address, by which its result is known, and what to call it in a message."""

    @property
    def address(self) -> str: ...
    @property
    def where(self) -> str: ...


def build_index(
    sources: Sequence[Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    features: str = "pixels",
    *,
    metric: Metric | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    preprocessing: str | None = None,
    batch: int | None = None,
    precision: str | None = None,
    index: str = "auto",
    duplicate_radius: float = 0,
    shards: int | None = None,
    memory: str | float | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    device: str = "auto",
    say: Say | None = None,
    progress: Progress | None = None,
    **reading: Any,
) -> IndexFolder:
    """An index of a training set of any size, in a folder.

    What is finished there is kept, whoever made it: a build that was killed continues, and one of more sources adds the
    shards that are missing. Sources are read as streams; the memory does not depend on how large they are.

    Args:
        sources: Paths, URLs (`s3://`, `gs://`, `hf://`, `https://`, …: extra `remote`), brace patterns and globs of
            whatever `load_images` reads, or, with features "precomputed", `load_features`.
        out: The folder, on this disk or one that all workers share.
        features: What images are compared by: "pixels", "hash" or a network, as for `diffmem.features.extractor`;
            "precomputed": the sources are vectors.
        metric: "euclidean", "cosine" or "hamming"; default the features' own.
        dtype: "float16" stores vectors in half the space, rounded; "float32"; default as they are.
        weights: The file of a network's weights, as for `diffmem.features.extractor`.
        preprocessing: Of images for a network, by name.
        batch: Images per call of a network.
        precision: In which a network computes.
        index: Codes for finding candidates, which FAISS makes (extra `faiss`): "flat" stores none, the search is exact;
            "ivf", "ivf1024" or a factory string with inverted lists ("IVF4096,PQ64"); "auto": flat up to 16 GB of
            vectors, and where there is no FAISS, else ivf.
        duplicate_radius: Rows within this distance (root mean square per value, gray levels for pixels) are duplicates;
            0: identical ones. Beyond 0 all rows are compared with each other, exactly.
        shards: Into about how many shards sources that can be divided are; default by the size of each file. A tar
            archive is always one.
        memory: Of one worker at most, in bytes or as "2GB"; default what a block of rows needs.
        workers: Processes of this machine; default its cores, or this process alone where there is little to do.
        executor: Where else to work (`diffmem.executors`), in place of `workers`.
        device: Where networks compute.
        say: Called with lines about what is planned.
        progress: Called as `progress(stage, done, total)`.
        **reading: As for `diffmem.load_images`: resize, center_crop, color, alpha, key, layout, value_range, skip_bad.

    Raises:
        InputError: A source cannot be read, holds other images than the rest, or `out` holds an index of other things.
        OutputInUseError: Another process builds there.

    Example:
        >>> import diffmem
        >>> diffmem.build_index("builtin:digits", "digits.index").duplicates.number_of_groups
        0
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    texts = [os.fspath(each) for each in given]
    asked = features_of(
        features, metric, dtype, device, weights=weights, preprocessing=preprocessing, batch=batch, precision=precision
    )
    settings = Settings(
        asked,
        _reading(reading),
        shards,
        parse_memory(memory),
        workers,
        executor,
        device,
        index,
        duplicate_radius,
        False,
        say or _quiet,
        progress or silent,
    )
    return build(texts, Path(out).expanduser(), settings)


def add_to_index(
    path: str | os.PathLike[str],
    sources: Sequence[Any] | str | os.PathLike[str] = (),
    *,
    retrain: bool = False,
    memory: str | float | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    device: str = "auto",
    say: Say | None = None,
    progress: Progress | None = None,
) -> IndexFolder:
    """An index with more sources behind those that it has, read in the same way.

    Args:
        path: Folder of the index.
        sources: As for `build_index`; none with `retrain` alone.
        retrain: Train the codes again, on all rows that there are then; an index without codes gets those of "auto".
        memory: As for `build_index`.
        workers: As for `build_index`.
        executor: As for `build_index`.
        device: As for `build_index`.
        say: As for `build_index`.
        progress: As for `build_index`.

    Raises:
        InputError: As `build_index` does; a source that the index has already.
        OutputInUseError: Another process builds there.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    settings = Settings(
        memory=parse_memory(memory), workers=workers, executor=executor, device=device, retrain=retrain,
        say=say or _quiet, progress=progress or silent,
    )  # fmt: skip
    return add(Path(path).expanduser(), [os.fspath(each) for each in given], settings)


@dataclass(frozen=True)
class Settings:
    """How an index is built; see `build_index`."""

    features: Features = field(default_factory=Features)
    reading: Reading = field(default_factory=Reading)
    shards: int | None = None
    memory: int | None = None
    workers: int | None = None
    executor: Executor | None = None
    device: str = "auto"
    index: str | None = None
    duplicate_radius: float | None = None
    retrain: bool = False
    say: Say = print
    progress: Progress = silent


def _quiet(line: str) -> None:
    _log.info("%s", line)


def _reading(options: dict[str, Any]) -> Reading:
    if unknown := options.keys() - Reading().__dict__.keys():
        raise InputError(f"build_index takes no {min(unknown)}=…: there are {', '.join(Reading().__dict__)}")
    resize = options.pop("resize", None)
    size = (resize, resize) if isinstance(resize, int) else resize
    color = {"grey": "gray"}.get(options.pop("color", None) or "") or options.get("color")
    return Reading(resize=None if size is None else tuple(size), color=color, **options)


def absolute(source: str) -> str:
    """A source by a name that is the same in every folder and process."""
    if remote.is_remote(source) or source.startswith("builtin:"):
        return source
    if source.startswith("hf:"):
        path, mark, query = source.removeprefix("hf:").partition("?")
        return f"hf:{os.path.abspath(os.path.expanduser(path))}{mark}{query}"
    return os.path.abspath(os.path.expanduser(source.removeprefix("file://")))


def build(sources: Sequence[str], out: Path, settings: Settings) -> IndexFolder:
    """`build_index`, with everything said."""
    if not sources:
        raise InputError("sources is empty, but must name at least one")
    check_choice(settings.index)
    sources = [absolute(source) for source in sources]
    ranks = settings.executor if isinstance(settings.executor, Ranks) else None
    if ranks is None or ranks.first:
        _check_place(out)
        check_output_folder(out)
        with output_lock(out):
            sweep(out)
            return _build(sources, out, settings, ranks)
    return _build(sources, out, settings, ranks)


def _build(sources: Sequence[str], out: Path, settings: Settings, ranks: Ranks | None) -> IndexFolder:
    if ranks is not None and not ranks.first:
        ranks.together()  # the first rank has read the sources' files; their hashes are known then
    before = read_index(out) if (out / INDEX).is_file() else None
    parts = _listed(sources, 0, settings, before)
    settings, plan = _planned(parts, settings)
    if before is not None:
        _check_same(before, sources, settings, out)
    if not 0 <= (settings.duplicate_radius or 0) < float("inf"):
        raise InputError(f"duplicate_radius is {settings.duplicate_radius!r}, but must be 0 or more (rms per value)")
    jobs = _jobs(parts, out, settings, plan)
    first = ranks is None or ranks.first
    if first:
        document = {"sources": _public(sources), "shards": [job.address for job in jobs]}
        _write(out / UNFINISHED, document)
    if ranks is not None and ranks.first:
        ranks.together()
    entries = make_all(jobs, settings, plan)
    finish(out, sources, entries, settings, before, ranks)
    if ranks is not None:
        ranks.together()
    return open_index(out, device=settings.device)


def add(out: Path, sources: Sequence[str], settings: Settings) -> IndexFolder:
    """The index with more sources behind those that it has; of `settings` only where and with how much to work."""
    before = read_index(out)
    with output_lock(out):
        before = read_index(out)
        sweep(out)
        known = list(before["sources"])
        fresh = [absolute(source) for source in sources]
        if again := [source for source in fresh if _public([source])[0] in known]:
            raise InputError(f"{again[0]}: is in this index already")
        settings = as_before(before, settings)
        entries = list(before["shards"])
        if fresh:
            parts = _listed(fresh, len(known), settings, before)
            jobs, plan = plan_jobs(parts, out, settings)
            entries += make_all(jobs, settings, plan)
        elif not settings.retrain:
            raise InputError("sources is empty, but must name at least one")
        finish(out, [*known, *fresh], entries, settings, before)
        return open_index(out, device=settings.device)


def _check_place(out: Path) -> None:
    if _ELSEWHERE.match(os.fspath(out)):
        raise InputError(f"{out}: an index is written to a folder of this machine, or one that all workers share")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in (INDEX, UNFINISHED, SHARDS)):
        raise InputError(f"{out}: exists and is not an index: choose another folder")


def sweep(out: Path) -> None:
    """Removes what killed workers left half-written."""
    from diffmem.atomic_io import remove_dead

    folder = out / SHARDS
    folder.mkdir(exist_ok=True)
    for name in os.listdir(folder):
        if (match := _LEFT.fullmatch(name)) is not None:
            remove_dead(folder / match[1])
            with suppress(OutputInUseError), output_lock(folder / match[1]):
                pass  # a lock that nobody holds goes with this


def _listed(sources: Sequence[str], first: int, settings: Settings, before: dict[str, Any] | None) -> list[Part]:
    parts: list[Part] = []
    rows = before["rows_per_shard"] if before is not None else None
    for number, source in enumerate(sources, first):
        settings.progress("listing sources", number - first, len(sources))
        parts += parts_of(source, number, settings.reading, settings.features.precomputed, rows)
    if before is None and settings.shards is not None:
        total = sum(part.stop or 0 for part in whole_files(parts))
        rows = max(1, -(-total // settings.shards)) if total else None
        parts = [
            part
            for number, source in enumerate(sources, first)
            for part in parts_of(source, number, settings.reading, settings.features.precomputed, rows)
        ]
    settings.progress("listing sources", len(sources), len(sources))
    return parts


def whole_files(parts: Sequence[Part]) -> list[Part]:
    """The last part of each file that was divided: its `stop` is the number of the file's rows."""
    last: dict[tuple[int, str], Part] = {}
    for part in parts:
        last[part.source, part.file] = part
    return list(last.values())


def _planned(parts: Sequence[Part], settings: Settings) -> tuple[Settings, MemoryPlan]:
    first = first_rows(parts, settings.features, settings.reading)
    settings = replace(settings, features=with_metric(settings.features, first))
    plan = plan_memory(parts, settings.features, settings.reading, first, settings.memory, settings.device)
    return settings, plan


def plan_jobs(parts: Sequence[Part], out: Path, settings: Settings) -> tuple[list[Job], MemoryPlan]:
    """The shards to make of some parts, and the memory that this takes."""
    settings, plan = _planned(parts, settings)
    return _jobs(parts, out, settings, plan), plan


def _jobs(parts: Sequence[Part], out: Path, settings: Settings, plan: MemoryPlan) -> list[Job]:
    identities = Identities(out)
    known = identities.identify(parts, settings.progress)
    identities.save()
    folder = str(out.absolute())
    return [Job(folder, part, settings.features, settings.reading, plan.rows) for part in known]


def make_all(jobs: Sequence[Job], settings: Settings, plan: MemoryPlan) -> list[dict[str, Any]]:
    """The shards of all jobs, as the index's description lists them."""
    missing = {job.address: job for job in jobs if read_shard(job.target) is None}
    there = len({job.address for job in jobs}) - len(missing)
    executor, own = _executor(settings, len(missing), sum(job.part.bytes for job in missing.values()))
    settings.say(
        f"{counted(len(missing) + there, 'shard')} from {counted(len({job.part.file for job in jobs}), 'file')}"
        + (f", {there:,} of them finished" if there else "")
        + (f"; {executor.slots} at a time" if missing and executor.slots > 1 else "")
    )
    if missing:
        settings.say(f"memory: {plan}")
        if not isinstance(executor, Ray) and (note := warn_of_machine(plan, executor.slots)):
            settings.say(f"note: {note}")
    try:
        if isinstance(executor, Ranks):
            # Shares of all shards, since each rank saw others missing.
            _make_share(executor, make_shard, list({job.address: job for job in jobs}.values()), settings)
        else:
            run_jobs(executor, make_shard, list(missing.values()), settings.progress, there)
    except BaseException:
        executor.close()
        raise
    if own:
        executor.close()
    return [_entry(job) for job in jobs]


def _executor(settings: Settings, jobs: int, size: float, small: float = SMALL) -> tuple[Executor, bool]:
    """Where to do so many jobs over so many bytes, and whether it was made here, to be closed."""
    if settings.executor is not None:
        return settings.executor, False
    workers = max(1, min(settings.workers or (1 if size < small else usable_cores()), jobs))
    if workers == 1:
        return InProcess(settings.device), True
    return Processes(workers, threads=1, device=settings.device), True


def _make_share(ranks: Ranks, function: Callable[..., Any], jobs: Sequence[Any], settings: Settings) -> None:
    """This rank's share of the jobs; then all wait for each other."""
    error: Exception | None = None
    try:
        run_jobs(ranks, function, ranks.share(jobs), settings.progress)
    except Exception as failure:
        error = failure
    others = ranks.together(None if error is None else str(error))
    if error is not None:
        raise error
    if others:
        raise InputError(f"another rank failed: {others[0]}")


def _entry(job: Job) -> dict[str, Any]:
    from diffmem.integrity import read_sealed

    found = read_sealed(job.target / DESCRIPTION, "run the same command again")
    return {
        "address": job.address,
        "rows": found["rows"],
        "label": job.part.label,
        "skipped": found["skipped"],
        "unit_rows": found["unit_rows"],
        "dimension": found["dimension"],
        "dtype": found["dtype"],
        "image_shape": found["image_shape"],
        "vectors": found["files"].get("vectors.npy"),
        "description": file_sha256(job.target / DESCRIPTION),
        "bytes": sum((job.target / name).stat().st_size for name in found["files"]),
        "part": job.part.to_json(),
    }


def run_jobs(
    executor: Executor,
    function: Callable[..., Any],
    jobs: Sequence[ShardJob],
    progress: Progress,
    before: int = 0,
    stage: str = "building shards",
) -> list[Any]:
    """What the function returns for each job, through an executor. A job whose worker dies goes to another one; one
    that fails does not keep the others.

    Raises:
        InputError: Some failed: the first one's reason, once all others are done.
    """
    waiting: list[ShardJob] = list(reversed(jobs))
    total = len(jobs) + before
    running: dict[Future[Any], ShardJob] = {}
    results: dict[str, Any] = {}
    losses: dict[str, int] = {}
    errors: list[Exception] = []
    done = before
    progress(stage, done, total)
    while waiting or running:
        while waiting and len(running) < executor.slots:
            job = waiting.pop()
            running[executor.submit(function, job)] = job
            if executor.slots == 1:
                break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            error = future.exception()
            if error is None:
                done += 1
                results[job.address] = future.result()
                progress(stage, done, total)
            elif _is_loss(error) and losses.get(job.address, 0) < LOSSES:
                losses[job.address] = losses.get(job.address, 0) + 1
                _log.warning("%s: the worker that was at it was lost; another one does it", job.where)
                waiting.append(job)
            elif _is_loss(error):
                errors.append(
                    InputError(
                        f"{job.where}: {LOSSES + 1} workers died over it (out of memory, or a file that crashes "
                        "its decoder): give each less with memory=…, or remove it"
                    )
                )
            elif isinstance(error, Exception):
                errors.append(error)
            else:
                raise error
    if errors:
        if len(jobs) == 1 or not isinstance(errors[0], InputError):
            raise errors[0]
        kept = done
        raise InputError(f"{errors[0]} ({len(errors):,} of {total:,} shards failed; the other {kept:,} are kept)")
    return [results[job.address] for job in jobs]


def run_by_shard(
    function: Callable[..., Any],
    jobs: Sequence[ShardJob],
    size: float,
    settings: Settings,
    stage: str,
    small: float = SMALL,
) -> list[Any]:
    """What the function returns for each job, wherever the settings say that workers are.

    Args:
        function: Of a job and a device.
        jobs: Each with an address of its own.
        size: Bytes that all of them read, by which the number of processes is chosen.
        settings: Where to work.
        stage: For the progress.
        small: Bytes that one process has read sooner than others would have started.
    """
    executor, own = _executor(settings, len(jobs), size, small)
    try:
        return run_jobs(executor, function, jobs, settings.progress, stage=stage)
    finally:
        if own:
            executor.close()


def _is_loss(error: BaseException) -> bool:
    return isinstance(error, BrokenProcessPool) or type(error).__module__.startswith("ray.")


def finish(
    out: Path,
    sources: Sequence[str],
    entries: list[dict[str, Any]],
    settings: Settings,
    before: dict[str, Any] | None,
    ranks: Ranks | None = None,
) -> None:
    """Derives what is derived from all shards, and writes the description; ranks make the codes together."""
    form = _common_form(entries, settings.features)
    description: dict[str, Any] = {
        "format": FORMAT,
        "features": settings.features.to_json(),
        "reading": settings.reading.to_json(),
        **form,
        "rows": sum(entry["rows"] for entry in entries),
        "rows_per_shard": before["rows_per_shard"] if before is not None else _rows_asked(entries, settings),
        "sources": _public(sources),
        "shards": entries,
        "quantizer": None,
        "duplicates": {"radius": 0.0},
    }
    first = ranks is None or ranks.first
    index = IndexFolder(out, description)
    if first:
        description["duplicates"] = _duplicates(out, index, settings, before)
    description["quantizer"] = _quantized(out, index, settings, before, ranks)
    if first:
        sweep(out)
        _write(out / INDEX, description)
        (out / UNFINISHED).unlink(missing_ok=True)
        used = description["quantizer"]["id"] if description["quantizer"] else None
        for other in out.glob(f"{QUANTIZERS}/*"):
            if other.name != used:
                shutil.rmtree(other, ignore_errors=True)


def _duplicates(out: Path, index: IndexFolder, settings: Settings, before: dict[str, Any] | None) -> dict[str, Any]:
    members, roots = find_identical(index.shards, int(settings.memory or SORT_BYTES), settings.progress)
    distinct = len(index) - (len(members) - len(set(roots.tolist())))
    radius = settings.duplicate_radius
    if radius is None:
        radius = before["duplicates"]["radius"] if before is not None else 0.0
    if radius > 0:
        known = None
        if before is not None and before["duplicates"]["radius"] == radius and _begins_as(before, index):
            known = read_duplicates(out, before["duplicates"], before["rows"])
        jobs: list[NearJob] = near_jobs(index.shards, radius, known)
        size = len(index) * index.dimension * index.dtype.itemsize
        near = run_by_shard(near_pairs, jobs, size, settings, "comparing training images with each other")
        if known is not None:
            near.append(np.stack([known.members, known.roots], axis=1))
        members, roots = united([np.stack([members, roots], axis=1), *near])
    return write_duplicates(out, StoredDuplicates(float(radius), members, roots, len(index), distinct))


def _begins_as(before: dict[str, Any], index: IndexFolder) -> bool:
    """Whether the first shards of an index are those that it had."""
    known = [entry["address"] for entry in before["shards"]]
    return [entry["address"] for entry in index.description["shards"][: len(known)]] == known


def _quantized(
    out: Path, index: IndexFolder, settings: Settings, before: dict[str, Any] | None, ranks: Ranks | None
) -> dict[str, Any] | None:
    """The quantizer, trained if need be, with the codes of all shards made."""
    known = None if before is None or settings.retrain else before["quantizer"]
    if known is not None and keeps(settings.index, known["factory"]):
        plan = {name: known[name] for name in ("id", "factory", "rows")}
    else:
        known, asked = None, settings.index
        if asked is None and before is not None:
            asked = before["quantizer"]["factory"] if before["quantizer"] else AUTO if settings.retrain else "flat"
        asked = asked or AUTO
        size = len(index) * index.dimension * index.dtype.itemsize
        factory, why = chosen_factory(asked, len(index), index.dimension, size)
        settings.say(f"index: {why}")
        if factory is None:
            if settings.index is None and size > FLAT_BYTES and not settings.retrain:
                settings.say(f"note: {size_text(size)} of vectors are many to search exactly: retrain=True makes codes")
            return None
        plan = plan_quantizer(factory, index.shards, index.dimension)
    if ranks is None or ranks.first:
        settings.progress("training the quantizer", 0, 1)
        train(out, plan, index, settings.memory)
        settings.progress("training the quantizer", 1, 1)
    if ranks is not None:
        ranks.together()
    about = read_quantizer(out, plan["id"])
    jobs = [CodeJob(str(out.absolute()), plan["id"], shard) for shard in index.shards]
    missing = [job for job in jobs if not job.target.is_file()]
    if ranks is not None:
        _make_share(ranks, make_codes, jobs, settings)
    elif missing:
        run_by_shard(make_codes, missing, len(index) * index.dimension, settings, "making codes")
    if known is not None and (note := growth_note(about, len(index))):
        settings.say(f"note: {note}")
    return {**about, "codes": {job.address: file_sha256(job.target) for job in jobs}}


def _rows_asked(entries: Sequence[dict[str, Any]], settings: Settings) -> int | None:
    if settings.shards is None:
        return None
    return max((entry["part"]["stop"] or 0) - entry["part"]["start"] for entry in entries) or None


def _common_form(entries: Sequence[dict[str, Any]], features: Features) -> dict[str, Any]:
    """Dimension, dtype and image shape of all shards; raises InputError where they differ."""
    full = [entry for entry in entries if entry["rows"]]
    if not full:
        raise InputError("none of the sources holds anything that can be used: see what was skipped in the shards")
    first = full[0]
    for entry in full:
        for name in ("dimension", "dtype", "image_shape"):
            if entry[name] != first[name] and (name != "image_shape" or features.name == "pixels"):
                files = [Path(each["part"]["file"]).name for each in (first, entry)]
                way = (
                    "resize=N and color='rgb' bring them to one" if not features.precomputed else "index one kind alone"
                )
                raise InputError(
                    f"{files[1]} has {name.replace('_', ' ')} {entry[name]}, {files[0]} has {first[name]}: {way}"
                )
    rows, unit = (sum(entry[name] for entry in full) for name in ("rows", "unit_rows"))
    if features.precomputed and features.metric == "cosine" and 0.5 * rows < unit < rows:
        where = next(entry for entry in full if entry["unit_rows"] < entry["rows"])
        _log.warning(
            "%s: %d of %d vectors do not have the length 1 of the others", where["part"]["file"], rows - unit, rows
        )
    shapes = {json.dumps(entry["image_shape"]) for entry in full}
    return {
        "dimension": first["dimension"],
        "dtype": first["dtype"],
        "image_shape": first["image_shape"] if len(shapes) == 1 else None,
    }


def _check_same(before: dict[str, Any], sources: Sequence[str], settings: Settings, out: Path) -> None:
    """Raises InputError where `out` holds an index of other things than is asked for, and more."""
    same = before["features"] == json.loads(json.dumps(settings.features.to_json())) and before[
        "reading"
    ] == json.loads(json.dumps(settings.reading.to_json()))
    if not same:
        raise InputError(
            f"{out}: holds an index of {before['features']['name']} features, made or read in another way: choose "
            "another folder, or give the same options"
        )
    known = before["sources"]
    if list(_public(sources))[: len(known)] != known:
        raise InputError(
            f"{out}: holds an index of other sources ({', '.join(known[:3])}{', …' if len(known) > 3 else ''}): name "
            "these first, add to them with `diffmem index add`, or choose another folder"
        )


def as_before(before: dict[str, Any], settings: Settings) -> Settings:
    """The settings of an index that is there."""
    features, reading = Features.from_json(before["features"]), Reading.from_json(before["reading"])
    if not features.precomputed:
        made = features.extractor(settings.device)
        if made.fingerprint != features.fingerprint:
            raise InputError(
                f"features={features.name!r}: the index was made with {features.fingerprint}, here is "
                f"{made.fingerprint}: "
                "give the network that it was made with"
            )
    return replace(settings, features=features, reading=reading)


def _public(sources: Sequence[str]) -> list[str]:
    return [remote.without_secrets(source) for source in sources]


def _write(path: Path, document: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(sealed(document), indent=1) + "\n")
