"""Two commits, or two stored tables, row by row: what has become slower?

Of commits, each gets a working tree and a compiled core of its own; this checkout's benchmarks are run on both. Values
are checked first; then two processes, one of each, run the workload in turns, A B B A …, so that whatever the machine
does falls on both alike, and then the next two. What counts are the ratios of neighboring runs, with an interval
(`benchmarks/intervals.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import click

from benchmarks import harness, intervals
from benchmarks.load import Meter
from benchmarks.rows import Row, groups, read_table, times_of

WORKER = Path(__file__).with_name("compare_worker.py")
KEPT = "build/compare"  # below the checkout: compiled cores, by their source
CORE = ("csrc", "CMakeLists.txt", "setup.py")
SHORTEST = 0.02  # seconds of one measurement; shorter work is run several times in each
LONGEST = 60.0  # seconds of one pair of processes for one workload, after which no round is added


@dataclass
class Comparison:
    """One workload at A and at B.

    Args:
        workload: Its name.
        isa: The instruction set, of stored rows.
        before, after: Medians, in seconds (in times of the baseline where the machines differ).
        ratio, low, high: Of after to before, and its interval; nan where it could not be measured.
        verdict: slower, faster, same, undecided, or "failed".
        pairs: How many runs of both.
        note: Why it failed, or what was compared.
        load: Cores taken by other processes meanwhile.
    """

    workload: str
    isa: str = ""
    before: float = math.nan
    after: float = math.nan
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    verdict: str = "failed"
    pairs: int = 0
    note: str = ""
    load: float | None = None


class Refused(click.ClickException):
    """What cannot be compared."""


# ------------------------------------------------------------------------------------------------------------- commits


@contextlib.contextmanager
def trees(names: Sequence[str], root: Path, say=click.echo) -> Iterator[list[Path]]:
    """A built working tree of each commit, gone afterwards; "." is the checkout as it is.

    Raises:
        Refused: For what git does not know, and where the core cannot be built.
    """
    with tempfile.TemporaryDirectory(prefix="diffmem-compare-") as folder, contextlib.ExitStack() as stack:
        found = []
        for number, name in enumerate(names):
            if name == ".":
                found.append(root)
                continue
            commit = (harness.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", tree=root) or "").strip()
            if not commit:
                raise Refused(f"{name}: neither a commit nor a table of results (.csv), nor a folder of them")
            tree = Path(folder) / f"{number}-{commit[:12]}"
            if harness.git("worktree", "add", "--detach", str(tree), commit, tree=root) is None:
                raise Refused(f"{name}: git could not make a working tree of {commit[:12]}")
            stack.callback(harness.git, "worktree", "remove", "--force", str(tree), tree=root)
            build_core(tree, commit, root, say)
            found.append(tree)
        yield found


def build_core(tree: Path, commit: str, root: Path, say=click.echo) -> None:
    """Puts the compiled core of a commit into its tree: one that was built of the same source before, or a new one."""
    if not (tree / "setup.py").exists():
        return
    source = "".join(str(harness.git("rev-parse", f"{commit}:{each}", tree=root)) for each in CORE)
    source += f"{sys.version} {sys.executable}"
    kept = root / KEPT / hashlib.sha256(source.encode()).hexdigest()[:16]
    if not kept.exists():
        say(f"building the core of {commit[:12]}")
        environment = {**os.environ, "DIFFMEM_CUDA": "off"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        built = [*(tree / "diffmem").glob("_C*"), *(tree / "diffmem").glob("_build_info.json")]
        if done.returncode != 0:
            reason = "\n".join(done.stdout.splitlines()[-5:])
            raise Refused(f"{commit[:12]}: its core was not built; pip install -e '.[test]' brings the tools\n{reason}")
        partial = kept.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in built:
            shutil.copy2(path, partial)
        with contextlib.suppress(OSError):  # another run has just built it too
            partial.rename(kept)
    for path in kept.iterdir():
        shutil.copy2(path, tree / "diffmem")


class Worker:
    """A process that runs a subject's workloads of one tree when it is told to."""

    def __init__(self, tree: Path, file: Path, options: dict[str, Any], cache: Path, variables: dict[str, str]) -> None:
        environment = {
            **os.environ,
            # The one that waits must not spin on the cores of the one that runs.
            "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0",
            "PYTHONPATH": str(tree), "DIFFMEM_CACHE": str(cache), **variables,
        }  # fmt: skip
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(tree), str(file), json.dumps(options)], cwd=cache, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def tell(self, **command: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        last = [text.strip() for text in self._log if text.strip()][-1:] or [f"status {self._process.returncode}"]
        return {"workload": "", "error": last[0]}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()


@dataclass
class Measured:
    """Runs of one workload: seconds at A and B, a list per pair of processes."""

    before: list[list[float]] = field(default_factory=list)
    after: list[list[float]] = field(default_factory=list)
    error: str = ""
    others: float | None = None


def compare_trees(
    pair: Sequence[Path], files: Sequence[Path], only: Sequence[str] = (), quick: bool = False, processes: int = 3,
    rounds: int = 7, margin: float = 0.05, variables: dict[str, str] | None = None, say=click.echo,
) -> list[Comparison]:  # fmt: skip
    """Every workload of the benchmark files, at the first tree and at the second."""
    found = []
    for file in files:
        measured: dict[str, Measured] = {}
        for number in range(processes):
            say(f"{file.stem.removeprefix('bench_')}: processes {number + 1} of {processes}")
            with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
                options = {"quick": quick, "only": list(only), "check": number == 0}
                workers = []
                for name, tree in zip("AB", pair, strict=True):
                    (Path(folder) / name).mkdir()
                    worker = Worker(tree, file, options, Path(folder) / name, variables or {})
                    stack.callback(worker.close)
                    workers.append(worker)
                in_turns(workers, measured, rounds, say)
        found += [judged(workload, each, margin) for workload, each in measured.items()]
    return found


def in_turns(workers: Sequence[Worker], measured: dict[str, Measured], rounds: int, say) -> None:
    """One pair of processes through all workloads."""
    while True:
        for worker in workers:
            worker.tell(do="next")
        answers = [worker.answer() for worker in workers]
        if all(answer.get("done") for answer in answers):
            return
        workload = next((answer["workload"] for answer in answers if answer.get("workload")), "(the benchmark itself)")
        here = measured.setdefault(workload, Measured())
        errors = [f"at {name}: {a['error']}" for name, a in zip("AB", answers, strict=True) if a.get("error")]
        names = {answer.get("workload") for answer in answers}
        if errors or len(names) > 1:
            here.error = "; ".join(errors) or "A and B have different workloads"
            say(f"{workload}: {here.error}")
            if len(names) > 1 or not all(names):  # one of them has ended
                return
            continue
        inner = max(1, math.ceil(SHORTEST / max(min(answer["seconds"] for answer in answers), 1e-9)))
        times: tuple[list[float], list[float]] = ([], [])
        meter = Meter()
        for number in range(rounds):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                workers[side].tell(do="time", inner=inner)
                answer = workers[side].answer()
                if "error" in answer:
                    here.error = f"at {'AB'[side]}: {answer['error']}"
                    return
                times[side].append(answer["seconds"])
            if inner * (sum(times[0]) + sum(times[1])) > LONGEST and number >= 1:
                break
        here.others = max(filter(None, (here.others, meter.load().others)), default=here.others)
        here.before.append(times[0])
        here.after.append(times[1])


def judged(workload: str, measured: Measured, margin: float) -> Comparison:
    if measured.error or not measured.before:
        return Comparison(workload, note=measured.error or "nothing was measured")
    logs = [[math.log(b / a) for a, b in zip(*times, strict=True)]
            for times in zip(measured.before, measured.after, strict=True)]  # fmt: skip
    ratio, low, high = intervals.paired(logs)
    before, after = (sorted(chain.from_iterable(times)) for times in (measured.before, measured.after))
    return Comparison(
        workload, "", before[len(before) // 2], after[len(after) // 2], ratio, low, high,
        intervals.verdict(ratio, low, high, margin), len(before), "", measured.others,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- stored tables


def tables_of(name: str) -> dict[tuple[str, str], list[Row]] | None:
    """The rows of a table, or of all tables in a folder, by workload and instruction set; None for anything else."""
    path = Path(name)
    if path.suffix == ".csv" and path.is_file():
        return groups(read_table(path))
    if path.is_dir() and name != ".":
        return groups(row for each in sorted(path.glob("*.csv")) for row in read_table(each))
    return None


def compare_tables(
    before: dict[tuple[str, str], list[Row]], after: dict[tuple[str, str], list[Row]], only: Sequence[str] = (),
    margin: float = 0.05,
) -> list[Comparison]:  # fmt: skip
    """Workloads that both hold. Seconds count where the machines are the same, else times of the first baseline's.

    Raises:
        Refused: Where they have no workload in common.
    """
    found = []
    for workload, isa in before.keys() & after.keys():
        if only and not any(text in workload for text in only):
            continue
        sides = [table[workload, isa] for table in (before, after)]
        same = all(len({side[0].get(name, "") for side in sides}) == 1 for name in ("machine", "threads"))
        note = "" if same else "of another machine: in times of the baseline"
        if not same and any(len(side) < 2 or side[1]["contender"] != sides[0][1]["contender"] for side in sides):
            found.append(Comparison(workload, isa, note="of another machine, and no baseline in common"))
            continue
        units = [1.0 if same else float(side[1]["seconds"]) for side in sides]
        times = [[each / unit for each in times_of(side[0])] for side, unit in zip(sides, units, strict=True)]
        medians = [float(side[0]["seconds"]) / unit for side, unit in zip(sides, units, strict=True)]
        here = Comparison(workload, isa, medians[0], medians[1], medians[1] / medians[0], note=note)
        if min(map(len, times)) >= 3:
            here.ratio, here.low, here.high = intervals.unpaired(*times)
            here.verdict = intervals.verdict(here.ratio, here.low, here.high, margin)
            here.pairs = min(map(len, times))
        else:
            here.verdict, here.note = "undecided", f"{note}; fewer than three repeats kept".removeprefix("; ")
        found.append(here)
    if not found:
        raise Refused("the two have no workload in common")
    return sorted(found, key=lambda each: list(before).index((each.workload, each.isa)))


# -------------------------------------------------------------------------------------------------------------- output


def described(found: Sequence[Comparison], names: Sequence[str], margin: float) -> str:
    """A table for the terminal: what has become slower comes first."""
    order = ("slower", "failed", "undecided", "faster", "same")
    lines = [f"A = {names[0]}, B = {names[1]}; slower or faster: by more than {margin:.0%}",
             f"{'workload':58} {'A':>10} {'B':>10} {'B / A':>7}  95 % interval    verdict"]  # fmt: skip
    for each in sorted(found, key=lambda each: order.index(each.verdict)):
        name = f"{each.workload}, {each.isa}" if each.isa else each.workload
        if each.verdict == "failed":
            lines.append(f"{name[:58]:58} {each.verdict}: {each.note}")
            continue
        span = "unknown       " if math.isnan(each.low) else f"{each.low:.3f} to {each.high:.3f}"
        busy = f"  ({each.load:.1f} cores busy)" if (each.load or 0) > 0.1 else ""
        values = f"{each.before:10.4g} {each.after:10.4g} {each.ratio:7.3f}  {span}  {each.verdict}{busy}"
        lines.append(f"{name[:58]:58} {values}" + (f"  {each.note}" if each.note else ""))
    return "\n".join(lines)


def as_json(found: Sequence[Comparison], names: Sequence[str], margin: float) -> str:
    """The same for programs; what is unknown is null."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and math.isnan(value) else value

    rows = [{name: plain(value) for name, value in asdict(each).items()} for each in found]
    return json.dumps({"A": names[0], "B": names[1], "margin": margin, "rows": rows}, indent=1)
