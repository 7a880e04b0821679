"""Where a stage runs, how large its cases are, how long it has, and the table that its rows go to."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.runner import RESULTS
from benchmarks.harness import COLUMNS, environment, package_version

LAUNCHED = "launched.json"  # of a dry run: the Triton kernels that each stage ran
RATES = "rates.json"
MOST_SETS = 24  # of rotating buffers
KINDS = ("bytes", "float32 ieee", "float32 tf32", "bfloat16", "float16", "int8")  # of measured rates


@dataclass
class Target:
    """The device, the time, and the results of one process.

    rates: what the device was measured to do, per second, by KINDS. deadline: of time.monotonic(); a case that is not
    expected to end before it is left out, and named.
    """

    device: torch.device
    tiny: bool
    out: Path
    name: str
    deadline: float = float("inf")
    rates: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def here(cls, out: Path, interpret: bool, deadline: float) -> Target:
        """Raises SystemExit where there is no GPU and this is no dry run."""
        if interpret:
            device, name = torch.device("cpu"), "dry run"
        elif torch.cuda.is_available():
            device = torch.device("cuda:0")
            torch.cuda.set_device(device)
            name = torch.cuda.get_device_name(device)
        else:
            raise SystemExit("no GPU here; --interpret makes a dry run on the CPU")
        out.mkdir(parents=True, exist_ok=True)
        rates = json.loads((out / RATES).read_text()) if (out / RATES).exists() else {}
        return cls(device, interpret, out, name, deadline, rates)

    @property
    def isa(self) -> str:
        """The device's architecture."""
        if self.device.type != "cuda":
            return self.device.type
        return "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))

    def fits(self, seconds: float, name: str) -> bool:
        """Whether that long is left; where it is not, `name` is among what was left out."""
        if time.monotonic() + (0 if self.tiny else seconds) <= self.deadline:
            return True
        self.left_out.append(name)
        return False

    def sets(self, size: int) -> int:
        """How many buffers of `size` bytes are more than twice the device's L2 cache, so that each comes from memory
        when its turn comes."""
        if self.device.type != "cuda":
            return 2
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 << 20
        return max(2, min(MOST_SETS, -(-2 * cache // max(size, 1)) + 1))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        """Standard normal numbers, made on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def bytes(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Random uint8, made on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=self.device)

    def combinations(self, *factors: Sequence) -> Iterator[tuple]:
        """All of them; of a dry run, all of the first and last factor, each with some of the others, all in turn."""
        if not self.tiny:
            yield from product(*factors)
            return
        first, *others, last = factors
        for index, (a, z) in enumerate(product(first, last)):
            yield (a, *(each[(index + index // 2) % len(each)] for each in others), z)

    def compile(self, function: Callable, **options: Any) -> Callable:
        """torch.compile, of a dry run without generated code; what was compiled before is forgotten, so that no case
        meets the limit on recompilations of another."""
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False, backend="eager" if self.tiny else "inductor", **options)

    def record(self, stage: str, workload: str, contender: str, note: str = "", **values: str) -> None:
        """Appends a row to the table, and prints it."""
        row = environment() | {"subject": stage, "workload": workload, "contender": contender, "note": note}
        row |= {"machine": self.name, "isa": self.isa, "version": package_version("torch"), **values}
        path = self.out / RESULTS
        new = not path.exists()
        with path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, restval="")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(f"{workload:60} {contender:26} {values.get('seconds', ''):>10} x{values.get('ratio', '')}  {note}",
              flush=True)  # fmt: skip

    def empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def dry_compile(target: Target) -> Iterator[None]:
    """In a dry run, what diffmem itself compiles is traced, but no code is generated."""
    if not target.tiny:
        yield
        return
    with mock.patch.object(torch, "compile", partial(_traced, torch.compile)):
        yield


def _traced(compile: Callable, function: Callable, **options: Any) -> Callable:
    return compile(function, backend="eager", dynamic=options.get("dynamic"), fullgraph=options.get("fullgraph", False))


def triton_ops() -> list[str]:
    """The ops that have Triton kernels."""
    from benchmarks.bench_kernels import SUBJECTS

    return [subject.op for subject in SUBJECTS]


@contextlib.contextmanager
def recorded_launches(target: Target, stage: str) -> Iterator[None]:
    """In a dry run, adds the names of the Triton kernels that are launched to LAUNCHED."""
    if not target.tiny:
        yield
        return
    names: set[tuple[str, str]] = set()
    with contextlib.ExitStack() as stack:
        for op in triton_ops():
            try:
                module = importlib.import_module(f"diffmem.ops.{op}.triton_kernels")
            except ImportError:  # no Triton
                continue

            def launch(kernel, *arguments, _op=op, _launch=module.launch, **named):
                names.add((_op, kernel.__name__.strip("_")))
                _launch(kernel, *arguments, **named)

            stack.enter_context(mock.patch.object(module, "launch", launch))
        yield
    path = target.out / LAUNCHED
    known = json.loads(path.read_text()) if path.exists() else {}
    known[stage] = sorted(map(list, names))
    path.write_text(json.dumps(known, indent=1) + "\n")
