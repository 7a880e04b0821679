"""One workload, computed in several ways: values first, then time.

A kernel's error against the reference in float64 must be at most twice that of PyTorch's own formulation in the same
dtype, plus a rounding floor; it must give the same bits twice, and under a captured CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.target import Target
from benchmarks.gpu.timing import REPEATS, captured, seconds_per_call

HALF_FLOOR, FLOAT_FLOOR, TF32_FLOOR = 8, 32, 2**14  # roundings of the largest value that are forgiven

Values = list[torch.Tensor]
Way = Callable[[int], Values]


@dataclass(frozen=True)
class Case:
    """ways: functions of the number of a set of inputs, ours first; they must not change their inputs. exact: the same
    in float64 for set 0, or in integers, which then have to be equal. plain: the one of `ways` whose error is the
    yardstick. ours: names of those that are checked. sets: of inputs. bytes moved at least and operations, 0 where they
    say nothing; matrix: the name of the rate that the operations are set against. capturable: in a CUDA graph.
    tolerance: of ours, relative to each row of the result, where it is not held against `plain`.
    """

    name: str
    ways: dict[str, Way]
    exact: Callable[[], Values]
    plain: str
    ours: tuple[str, ...]
    sets: int = 1
    bytes: float = 0.0
    operations: float = 0.0
    matrix: str = ""
    capturable: bool = True
    tolerance: float | None = None


def errors(case: Case) -> list[str]:
    """What is wrong with the answers of our ways, each in one line."""
    exact = case.exact()
    answers = {name: way(0) for name, way in case.ways.items() if name in (*case.ours, case.plain)}
    wrong = []
    for name in case.ours:
        found = answers[name]
        if exact[0].dtype == torch.int64:
            if not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, exact, strict=True)):
                wrong.append(f"{name} is not exact")
        elif case.tolerance is not None:
            gap = max(float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) for a, b in zip(found, exact, strict=True))
            if not gap <= case.tolerance:
                wrong.append(f"{name} is off by {gap:.2e}, allowed {case.tolerance:.2e}")
        else:
            wrong += _beyond(case, name, found, answers[case.plain], exact)
    first = case.ours[0]
    if not all(torch.equal(a, b) for a, b in zip(answers[first], case.ways[first](0), strict=True)):
        wrong.append(f"{first}: two runs differ")
    if case.capturable and answers[first][0].device.type == "cuda":
        kept: list[Values] = []
        captured([lambda: kept.append(case.ways[first](0))])()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(kept[-1], answers[first], strict=True)):
            wrong.append(f"{first}: under a CUDA graph the result differs")
    return wrong


def _beyond(case: Case, name: str, found: Values, plain: Values, exact: Values) -> list[str]:
    wrong = []
    for index, (a, p, b) in enumerate(zip(found, plain, exact, strict=True)):
        floor = {torch.float32: TF32_FLOOR if " tf32 " in case.name else FLOAT_FLOOR}.get(a.dtype, HALF_FLOOR)
        allowed = 2 * (p - b).abs().max() + floor * torch.finfo(a.dtype).eps * b.abs().max()
        if not (error := (a - b).abs().max()) <= allowed:
            wrong.append(f"{name}: output {index} is off by {error:.2e}, allowed {allowed:.2e}")
    return wrong


def measure(case: Case, target: Target, stage: str) -> list[str]:
    """Checks, times, and adds a row per way; returns what is wrong, and measures nothing then."""
    if wrong := errors(case):
        return [f"{case.name}: {each}" for each in wrong]
    first = None
    for name, way in case.ways.items():
        if not target.fits(1.0, f"{case.name}, {name}"):
            continue
        way(0)
        calls = [lambda number=number, way=way: way(number) for number in range(case.sets)]
        found = seconds_per_call(calls, target.device, case.capturable)
        first = found.seconds if first is None else first
        notes = [found.how]
        if case.bytes:
            notes.append(f"{case.bytes / found.seconds / target.rates['bytes']:.0%} of the copy's bytes/s")
        if case.operations:
            notes.append(f"{case.operations / found.seconds / target.rates[case.matrix]:.0%} of the {case.matrix} rate")
        target.record(
            stage, case.name, name, ", ".join(notes), seconds=f"{found.seconds:.4g}", fastest=f"{found.fastest:.4g}",
            repeats=str(1 if target.tiny else REPEATS), ratio=f"{found.seconds / first:.4g}",
        )  # fmt: skip
    return []
