"""Runs the stages one after the other, each in a process of its own; imports neither PyTorch nor diffmem.

OUT receives results.csv (rows as they are measured), stages.json (what became of each stage), summary.txt (the table
that is printed last), log.txt (all that the stages print), and what single stages leave: tests.txt, sanitizer.txt,
ncu.txt. Caches of compilers lie in a temporary folder: nothing is written to the home folder or the checkout, but for
`_C` itself.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 480.0
RESULTS, STAGES_FILE, SUMMARY, LOG = "results.csv", "stages.json", "summary.txt", "log.txt"
ENDING = 4.0  # seconds between a polite and a final signal
SHORTEST = 12.0  # seconds below which a stage is not begun: it would not get past its imports


@dataclass(frozen=True)
class Stage:
    """planned: seconds it is expected to take on an H100 with 16 cores; limit: after which it is ended; quiet: it
    measures, so that nothing else may run."""

    name: str
    planned: float
    limit: float
    quiet: bool = True


STAGES = (
    Stage("build", 35, 75, quiet=False),
    Stage("correctness", 85, 130, quiet=False),
    Stage("ceilings", 12, 25),
    Stage("search", 40, 65),
    Stage("sampler", 100, 130),
    Stage("training", 60, 80),
    Stage("operations", 45, 60),
    Stage("optimum", 20, 40),
)
COMPILATIONS = 170.0  # seconds after the start at which compilations that run beforehand are ended


@dataclass(frozen=True)
class Job:
    """A compilation beforehand: the name that its stage knows it by, and the device memory it may take."""

    name: str
    gigabytes: float


@dataclass
class Outcome:
    """What became of a stage: finished, failed, ended at its limit, or did not fit."""

    stage: str
    status: str
    seconds: float
    limit: float
    detail: str = ""


def environment(cache: Path, interpret: bool) -> dict[str, str]:
    """Of the stages: every cache below `cache`."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("DIFFMEM_")}
    found |= {
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "DIFFMEM_CACHE": str(cache / "diffmem"),
        "CUDA_CACHE_PATH": str(cache / "cuda"),
        "XDG_CACHE_HOME": str(cache / "other"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if interpret:
        found |= {"TRITON_INTERPRET": "1", "DIFFMEM_GPU_TESTS": "interpret", "DIFFMEM_DEVICE": "cpu"}
    return found


def command(stage: str, out: Path, limit: float, interpret: bool, only: str = "") -> list[str]:
    """Of one stage's process."""
    parts = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage, "--out", str(out), "--limit", f"{limit:.0f}"]
    return [*parts, *(["--interpret"] if interpret else []), *(["--only", only] if only else [])]


def end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    kill = getattr(os, "killpg", os.kill)  # Windows: the process alone, at once
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with suppress(ProcessLookupError, PermissionError):
            kill(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
            if number == signal.SIGTERM:
                continue  # what it started may still be there
    process.wait()


def run_process(parts: Sequence[str], environment: dict[str, str], log: Path, limit: float) -> tuple[str, float, str]:
    """(status, seconds, its last line) of a process that writes to the log."""
    began = time.monotonic()
    with log.open("a") as stream:
        stream.write(f"\n$ {' '.join(parts)}\n")
        stream.flush()
        start = stream.tell()
        process = subprocess.Popen(
            parts, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
            status = "finished" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "ended at its limit"
        finally:
            end(process)
    with log.open(errors="replace") as stream:
        stream.seek(start)
        lines = [line.strip() for line in stream if line.strip()]
    return status, time.monotonic() - began, lines[-1][:200] if lines else ""


class Compilations:
    """Runs jobs side by side, as many at a time as fit into the cores and the device's memory."""

    def __init__(
        self, jobs: Sequence[Job], start: Callable[[Job], subprocess.Popen], at_once: int, gigabytes: float,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.waiting, self.start, self.at_once, self.gigabytes, self.clock = (
            list(jobs),
            start,
            at_once,
            gigabytes,
            clock,
        )
        self.running: dict[str, tuple[Job, subprocess.Popen]] = {}
        self.outcomes: dict[str, str] = {}

    def poll(self) -> bool:
        """Notes what has ended, starts what fits; whether anything is left."""
        for name, (_, process) in list(self.running.items()):
            if process.poll() is not None:
                self.outcomes[name] = "finished" if process.returncode == 0 else "failed"
                del self.running[name]
        taken = sum(job.gigabytes for job, _ in self.running.values())
        for job in list(self.waiting):
            alone = not self.running
            if len(self.running) < self.at_once and (alone or taken + job.gigabytes <= self.gigabytes):
                self.running[job.name] = job, self.start(job)
                self.waiting.remove(job)
                taken += job.gigabytes
        return bool(self.waiting or self.running)

    def close(self) -> None:
        """Ends what still runs."""
        for name, (_, process) in self.running.items():
            end(process)
            self.outcomes[name] = "ended at its limit"
        self.outcomes |= {job.name: "did not fit" for job in self.waiting}
        self.running, self.waiting = {}, []


def in_background(compilations: Compilations, done: threading.Event) -> threading.Thread:
    """Starts the jobs, in a thread, until all have ended or `done` is set."""

    def go() -> None:
        while compilations.poll() and not done.wait(0.2):
            pass
        compilations.close()

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    return thread


def device_gigabytes() -> float:
    """Free memory of the first GPU; 0 where nvidia-smi does not say."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return float(found.split()[0]) / 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0.0


def run(
    out: Path,
    budget: float = BUDGET,
    interpret: bool = False,
    only: Sequence[str] = (),
    stages: Sequence[Stage] = STAGES,
    jobs: Sequence[Job] = (),
    command: Callable[..., list[str]] = command,
    cache: Path | None = None,
    say: Callable[[str], object] = print,
) -> list[Outcome]:
    """All stages (or those named, with the build and the ceilings), and their outcomes; see the module's docstring."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, STAGES_FILE, SUMMARY, LOG):
        (out / name).unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="diffmem-gpu-")) if cache is None else cache
    variables = environment(folder, interpret)
    chosen = [stage for stage in stages if not only or stage.name in (*only, "build", "ceilings")]
    outcomes: list[Outcome] = []
    done = threading.Event()
    wanted = [job for job in jobs if not only or job.name.split()[0] in only]

    def start(job: Job) -> subprocess.Popen:
        with (out / LOG).open("a") as stream:
            parts = command("compile", out, COMPILATIONS, interpret, job.name)
            return subprocess.Popen(parts, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=stream,
                                    stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    compilations = Compilations(wanted, start, 1 if interpret else max(1, cores - 3), 0.85 * device_gigabytes())
    thread = in_background(compilations, done)
    try:
        for stage in chosen:
            left = budget - (time.monotonic() - began)
            if stage.quiet and thread.is_alive():
                thread.join(max(0.0, min(COMPILATIONS - (time.monotonic() - began), left - SHORTEST)))
                done.set()
                thread.join()
                left = budget - (time.monotonic() - began)
            limit = min(stage.limit if not interpret else budget, left)
            if limit < SHORTEST:
                outcome = Outcome(stage.name, "did not fit", 0.0, limit, f"{left:.0f} s were left")
            else:
                say(f"{stage.name}: at most {limit:.0f} s")
                status, seconds, line = run_process(
                    command(stage.name, out, limit, interpret), variables, out / LOG, limit
                )
                outcome = Outcome(stage.name, status, seconds, limit, line)
            outcomes.append(outcome)
            say(f"{outcome.stage}: {outcome.status} after {outcome.seconds:.0f} s: {outcome.detail}")
            write_stages(out, outcomes, interpret, compilations, time.monotonic() - began)
    finally:
        done.set()
        thread.join()
        write_stages(out, outcomes, interpret, compilations, time.monotonic() - began)
        if cache is None:
            shutil.rmtree(folder, ignore_errors=True)
    table = summary(out, outcomes, time.monotonic() - began)
    (out / SUMMARY).write_text(table + "\n")
    say(table)
    return outcomes


def write_stages(
    out: Path, outcomes: Sequence[Outcome], interpret: bool, compilations: Compilations, seconds: float
) -> None:
    """What became of the stages so far."""
    metadata = {
        "dry_run": interpret,
        "seconds": round(seconds, 1),
        "stages": [{**asdict(each), "seconds": round(each.seconds, 1)} for each in outcomes],
        "compilations": dict(compilations.outcomes),
    }
    partial = out / f".{STAGES_FILE}"
    partial.write_text(json.dumps(metadata, indent=1) + "\n")
    partial.replace(out / STAGES_FILE)


def summary(out: Path, outcomes: Sequence[Outcome], seconds: float) -> str:
    """The stages, and of each workload the first contender's seconds and the others' ratios: a line each."""
    lines = [f"{'stage':14}{'status':22}{'seconds':>8}  last line"]
    lines += [f"{each.stage:14}{each.status:22}{each.seconds:8.0f}  {each.detail[:70]}" for each in outcomes]
    lines.append(f"{'in all':36}{seconds:8.0f}")
    rows = []
    if (out / RESULTS).exists():
        with (out / RESULTS).open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    by_workload: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_workload.setdefault(row["workload"], []).append(row)
    if by_workload:
        lines += ["", f"{'workload':62}{'ours':>10}  the others, in times of ours"]
    for workload, (ours, *others) in by_workload.items():
        ratios = ", ".join(f"{row['contender']} {row['ratio']}" for row in others)
        lines.append(f"{workload[:61]:62}{ours['seconds']:>10}  {ratios or ours['note']}"[:150].rstrip())
    return "\n".join(lines)
