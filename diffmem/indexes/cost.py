"""What an index of very many images costs before it is built: time, disk, memory, money.

The model is a product of counts and rates. A build reads N images (bytes over the network), decodes them and computes
their features (on cores, or on GPUs), writes vectors and codes. An audit compares Q generated images with all N
vectors, exactly. The rates of `MEASURED` are those of one core of an AMD EPYC (Zen 4, 2.6 GHz) that works alone; two
cores of that machine do 1.46 to 1.59 times as much, and `efficiency` is what is taken for all cores of all machines.
Whoever plans gives the rates of their own machines. docs/guides/large-training-sets.md shows what was compared with the
model, and how far it was off.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from diffmem.errors import InputError
from diffmem.indexes.planning import size_text

HOUR = 3600.0
MONTH_HOURS = 730.0
PIXEL_CODE = 3 * 128 + 64 + 4 + 8  # bytes of the code of an image's pixels (diffmem.search.filtered)
CODE_TERMS = 24  # bytes of a code beside one per value (diffmem.search.vector_codes)
ROW_BYTES = 16 + 16 + 24  # of a row in the index beside its vector: digests, and a short name
PROCESS = 0.45e9  # bytes of a worker that has loaded PyTorch
BLOCK = 0.4e9  # and of the rows that it works on
QUERY_BLOCK = 4096  # queries that share one pass over the codes


@dataclass(frozen=True)
class Rates:
    """What one core does in a second, and what is left of it where all cores work.

    Attributes:
        decode: Images: JPEG of 256×256 and 21.5 kB, decoded by Pillow.
        features: Images through a network, by name; on a CPU in float32, SSCD in int8.
        codes: Vectors of 512 float16 values, checked, hashed, rotated and coded.
        pairs: Pairs of vectors of 512 values, of features with a spectrum like that of images.
        flat_pairs: The same where no component stands out (white noise), the worst case.
        pixel_codes: Images of 3,072 pixel values, coded for the search of pixels.
        pixel_pairs: Pairs of them.
        efficiency: What is left.
    """

    decode: float
    features: dict[str, float]
    codes: float
    pairs: float
    flat_pairs: float
    pixel_codes: float
    pixel_pairs: float
    efficiency: float


MEASURED = Rates(
    decode=2265.0,
    features={"pixels": math.inf, "precomputed": math.inf, "sscd": 26.7, "clip": 9.9, "dinov2": 0.55},
    codes=75e3,
    pairs=800e6,
    flat_pairs=320e6,
    pixel_codes=36e3,
    pixel_pairs=510e6,
    efficiency=0.73,
)
DIMENSIONS = {"sscd": 512, "clip": 768, "dinov2": 1024, "precomputed": 512, "pixels": 3072}
ITEM_BYTES = {"float16": 2, "float32": 4, "uint8": 1}


@dataclass(frozen=True)
class Machines:
    """What there is to work with, and what it costs.

    Attributes:
        count: Machines, all alike.
        cores: Of one machine.
        gpus: Of one machine; 0 computes the features on the cores.
        memory: Of one machine, in bytes.
        bandwidth: Bytes per second that one machine reads from the store of images, and from its own disk.
        price_core_hour, price_gpu_hour, price_gb_month: In one currency, whichever.
    """

    count: int = 10
    cores: int = 16
    gpus: int = 0
    memory: float = 64e9
    bandwidth: float = 500e6
    price_core_hour: float = 0.04
    price_gpu_hour: float = 2.5
    price_gb_month: float = 0.023


@dataclass(frozen=True)
class Cost:
    """What the model says.

    Attributes:
        images: N.
        stages: Seconds of the build by stage: "read", "decode", "features", "codes".
        core_hours, gpu_hours: Of the build.
        build_seconds: Wall time of the build; reading goes on beside the rest.
        audit_seconds: Wall time of one audit.
        vectors, codes, rows: Bytes on disk, of all machines together.
        worker_memory: Bytes that one worker holds at most.
        cached: Share of a machine's codes that its memory holds as page cache; below 1 an audit reads from disk.
        build_price, audit_price, storage_price: The last one by month.
        rests_on: The assumptions, in words.
    """

    images: int
    stages: dict[str, float]
    core_hours: float
    gpu_hours: float
    build_seconds: float
    audit_seconds: float
    vectors: float
    codes: float
    rows: float
    worker_memory: float
    cached: float
    build_price: float
    audit_price: float
    storage_price: float
    rests_on: list[str] = field(default_factory=list)

    @property
    def disk(self) -> float:
        """Bytes on disk."""
        return self.vectors + self.codes + self.rows

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "disk": self.disk}


def cost_of_index(
    images: int,
    features: str = "sscd",
    machines: Machines | None = None,
    *,
    generated: int = 10_000,
    dimension: int | None = None,
    dtype: str = "float16",
    image_bytes: float = 21.5e3,
    images_per_second: float | None = None,
    flat: bool = False,
    rates: Rates = MEASURED,
) -> Cost:
    """What building an index of so many images costs, and one audit against it.

    Args:
        images: N, training images.
        features: "sscd", "clip", "dinov2", "pixels", "precomputed" (nothing is decoded), or any other name with
            `images_per_second` and `dimension`.
        machines: What works on it.
        generated: Images of one audit.
        dimension: Values of a vector; default by the features.
        dtype: Of stored vectors, "float16", "float32" or "uint8".
        image_bytes: Of one image in the store.
        images_per_second: Of the network, on one GPU, or on one core where machines have none; default as measured on a
            core.
        flat: Take the worst case of a search, in which no component of the vectors stands out.
        rates: Of one core.

    Raises:
        InputError: A count, size or rate that is not positive; features whose rate or dimension is not known; GPUs
            without `images_per_second`, since no rate was measured on one.
    """
    machines = Machines() if machines is None else machines
    for name, value in (  # as "name is …, but must be", which the command line turns into the flag
        ("images", images), ("generated", generated), ("dimension", dimension), ("image_bytes", image_bytes),
        ("images_per_second", images_per_second), ("machines", machines.count), ("cores", machines.cores),
        ("machine_memory", machines.memory), ("bandwidth", machines.bandwidth),
    ):  # fmt: skip
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} is {value}, but must be a number above 0")
    if dtype not in ITEM_BYTES:
        raise InputError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {dtype!r}")
    network = features not in ("pixels", "precomputed")
    if images_per_second is None:
        if features not in rates.features:
            raise InputError(f"no rate is known of {features!r}: say how many it computes, with images_per_second=…")
        if machines.gpus and network:
            raise InputError("no rate was measured on a GPU: say what one of yours does, with images_per_second=…")
    d = DIMENSIONS.get(features) if dimension is None else dimension
    if d is None:
        raise InputError(f"how many values vectors of {features!r} have is not known: say it with dimension=…")
    rate = rates.features.get(features, math.inf) if images_per_second is None else images_per_second
    item = ITEM_BYTES["uint8" if features == "pixels" else dtype]

    cores = machines.count * machines.cores
    at_once = cores * (rates.efficiency if machines.cores > 1 else 1.0)
    gpus = machines.count * machines.gpus if network else 0
    pair_rate = (rates.flat_pairs if flat else rates.pairs) * 512 / d
    code_rate, code_bytes = rates.codes * (512 / d) ** 2, math.ceil(d / 64) * 64 + CODE_TERMS
    if features == "pixels":  # their codes are of principal components alone
        pair_rate, code_rate, code_bytes = rates.pixel_pairs, rates.pixel_codes * 3072 / d, PIXEL_CODE
        if flat:
            raise InputError("pixels have leading components: flat=True is for vectors")
    read_bytes = d * item if features == "precomputed" else image_bytes
    stages = {
        "read": images * read_bytes / (machines.count * machines.bandwidth),
        "decode": 0.0 if features == "precomputed" else images / rates.decode / at_once,
        "features": images / rate / (gpus or at_once),
        "codes": images / code_rate / at_once,
    }
    on_cores = stages["decode"] + stages["codes"] + (0.0 if gpus else stages["features"])
    on_gpus = stages["features"] if gpus else 0.0
    build = max(stages["read"], on_cores + on_gpus)
    codes, vectors = images * code_bytes, images * d * item
    cached = min(1.0, machines.memory * 0.8 * machines.count / codes)
    passes = math.ceil(generated / QUERY_BLOCK)
    from_disk = passes * codes * (1 - cached) / (machines.count * machines.bandwidth)
    audit = max(images * generated / pair_rate / at_once, from_disk)
    hourly = machines.count * (machines.cores * machines.price_core_hour + machines.gpus * machines.price_gpu_hour)
    rows = float(images) * ROW_BYTES
    return Cost(
        images=images,
        stages=stages,
        core_hours=on_cores * at_once / HOUR,
        gpu_hours=on_gpus * gpus / HOUR,
        build_seconds=build,
        audit_seconds=audit,
        vectors=vectors,
        codes=codes,
        rows=rows,
        worker_memory=PROCESS + BLOCK,
        cached=cached,
        build_price=build / HOUR * hourly,
        audit_price=audit / HOUR * hourly,
        storage_price=(vectors + codes + rows) / 1e9 * machines.price_gb_month,
        rests_on=_assumptions(
            features, rate, images_per_second is None, gpus > 0, flat, image_bytes, rates, code_rate, pair_rate
        ),
    )


def _assumptions(
    features: str,
    rate: float,
    measured: bool,
    on_gpu: bool,
    flat: bool,
    image_bytes: float,
    rates: Rates,
    code_rate: float,
    pair_rate: float,
) -> list[str]:
    where = "one GPU" if on_gpu else "one core"
    lines = []
    if features != "precomputed":
        lines.append(
            f"decoding: {rates.decode:,.0f} images/s per core (256×256 JPEG, measured); {image_bytes / 1e3:,.1f} kB "
            "read per image"
        )
    if math.isfinite(rate):
        lines.append(f"{features}: {rate:,.3g} images/s on {where} ({'measured' if measured else 'as given'})")
    kind = "images" if features == "pixels" else "vectors"
    spectrum = " without leading components" if flat else "" if features == "pixels" else " with the spectrum of images"
    size = "3,072" if features == "pixels" else "512"
    return [
        *lines,
        f"codes: {code_rate:,.0f} {kind}/s per core (measured at {size} values)",
        f"audit: {pair_rate / 1e6:,.0f} million pairs/s per core, exact, {kind}{spectrum} (measured at {size} values)",
        f"cores that work together: {rates.efficiency:.0%} of that each (measured with two)",
    ]


def report_of(cost: Cost, features: str, machines: Machines, generated: int) -> list[str]:
    """The costs as lines of text."""
    kind = f"{machines.cores} cores" + (f" and {machines.gpus} GPUs" if machines.gpus else "")
    parts = ", ".join(f"{name} {duration_text(seconds)}" for name, seconds in cost.stages.items() if seconds > 0)
    hours = f"{cost.core_hours:,.0f} core-hours" + (f", {cost.gpu_hours:,.0f} GPU-hours" if cost.gpu_hours else "")
    beside = (
        "all of it is in memory as page cache" if cost.cached >= 1 else f"{cost.cached:.0%} of it fits the page cache"
    )
    rows = [
        ("build", duration_text(cost.build_seconds), money(cost.build_price), f"{parts}; {hours}"),
        ("audit", duration_text(cost.audit_seconds), money(cost.audit_price), f"of {generated:,} images, exact"),
        (
            "disk", size_text(cost.disk), f"{money(cost.storage_price)} a month",
            f"vectors {size_text(cost.vectors)}, codes {size_text(cost.codes)}, the rest {size_text(cost.rows)}",
        ),
        (
            "memory", size_text(cost.worker_memory), "per worker",
            f"beside {size_text(cost.codes / machines.count)} of codes on each machine ({beside})",
        ),
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    head = f"{cost.images:,} images, {features}; {machines.count:,} machines of {kind}"
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return [head, *lines, "", "This rests on", *(f"- {line}" for line in cost.rests_on)]


def duration_text(seconds: float) -> str:
    """Seconds in words of the size that they have: "40 s", "3.5 h", "12 days"."""
    for size, unit in ((60.0, "s"), (60.0, "min"), (48.0, "h")):
        if seconds < size:
            return f"{seconds:.2g} {unit}" if seconds < 10 else f"{seconds:.0f} {unit}"
        seconds /= 24.0 if unit == "h" else 60.0
    return f"{seconds:,.0f} days" if seconds >= 10 else f"{seconds:.2g} days"


def money(amount: float) -> str:
    """An amount in the currency of the prices."""
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"
