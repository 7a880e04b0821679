"""Where trials run: in this process, in a pool of processes, or on the machines of a Ray cluster.

An executor has a number of slots and a method `submit`, which returns a future of the trial's result. It knows nothing
of the ledger, which `run_trials` keeps.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, cast

from diffmem.errors import InputError, MissingExtraError
from diffmem.logs import logger
from diffmem.studies.measure import Result, run_trial
from diffmem.studies.trial import Trial

_log = logger(__name__)
_WATCH_SECONDS = 5.0  # between looks of a process at whether its parent is still there


class Executor(Protocol):
    """slots: trials that run at the same time."""

    slots: int

    def submit(self, trial: Trial, folder: Path) -> Future[Result]:
        """Starts a trial."""
        ...

    def close(self) -> None:
        """Lets trials that still run save what they have, and ends them."""
        ...


class InProcess:
    """One run after another, in this process.

    Args:
        device: As for `run_trial`.
    """

    slots = 1

    def __init__(self, device: str = "auto") -> None:
        self.device = device

    def submit(self, trial: Trial, folder: Path) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(run_trial(trial, folder, self.device))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


class Processes:
    """Several processes of this machine, started fresh (spawn). A process that dies takes its own run with it only, and
    is replaced.

    Args:
        workers: How many.
        threads: Threads of each, outside its runs, which set their own (`Setting.threads`), for results depend on their
            number; None: the machine's cores, divided among the processes.
        device: As for `run_trial`; "cuda" deals the GPUs out in turns.
    """

    def __init__(self, workers: int, *, threads: int | None = None, device: str = "auto") -> None:
        if workers < 1:
            raise InputError(f"workers is {workers}, but must be at least 1")
        self.slots = workers
        self.threads = threads or max(1, (os.cpu_count() or 1) // workers)
        self.device = device
        # One pool per process: when a process dies, its whole pool is lost.
        self._pools: list[ProcessPoolExecutor | None] = [None] * workers
        self._busy: list[Future[Result] | None] = [None] * workers
        self._processes = [0] * workers

    def submit(self, trial: Trial, folder: Path) -> Future[Result]:
        place = next(i for i, future in enumerate(self._busy) if future is None or future.done())
        for _ in range(2):
            if self._pools[place] is None:
                self._pools[place] = ProcessPoolExecutor(
                    1, multiprocessing.get_context("spawn"), _begin_process, (self.threads, os.getpid())
                )
            try:
                self._processes[place] = cast(ProcessPoolExecutor, self._pools[place]).submit(os.getpid).result()
                future = cast(ProcessPoolExecutor, self._pools[place]).submit(
                    run_trial, trial, folder, self._device(place)
                )
            except BrokenProcessPool:
                _log.warning("a worker process died; another one replaces it")
                self._pools[place] = None  # its process died with the trial before
                continue
            self._busy[place] = future
            return future
        raise InputError("no worker process can be started")

    def _device(self, place: int) -> str:
        if self.device == "cuda":
            import torch

            return f"cuda:{place % max(1, torch.cuda.device_count())}"
        return self.device

    def close(self) -> None:
        for future, process in zip(self._busy, self._processes, strict=True):
            if future is not None and not future.done():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        for pool in self._pools:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._pools = [None] * self.slots


def _begin_process(threads: int, parent: int) -> None:
    """A process of a pool. An interrupt from the keyboard is its parent's affair, which then ends it properly; when the
    parent is gone without that, it saves what it has and ends by itself."""
    os.setpgid(0, 0)
    _prepare(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


class Ray:
    """A Ray cluster (extra `ray`): many machines and GPUs, which must all see the folder of the study. Only this
    process writes to the ledger.

    Args:
        address: Address of a running cluster, "auto" to find one, None to start one on this machine.
        gpus: That a run takes; a fraction of a GPU lets several runs share one.
        cpus: That a run takes.
        retries: Retries of a run whose machine or process is lost.
        slots: Runs at the same time; None: as many as the cluster has room for.
        device: As for `run_trial`.
        **init: Passed on to `ray.init`.

    Raises:
        MissingExtraError: The package is not installed.
        InputError: No cluster answers, or it has no room for a single run.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        gpus: float = 0.0,
        cpus: float = 1.0,
        retries: int = 3,
        slots: int | None = None,
        device: str = "auto",
        **init: Any,
    ):
        try:
            import ray
        except ImportError:
            raise MissingExtraError("ray", "ray", "running studies on a Ray cluster") from None
        self._ray, self._started = ray, not ray.is_initialized()
        self._references: list[Any] = []
        if self._started:
            try:
                ray.init(address=address, log_to_driver=False, **init)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(f"Ray cluster {address or 'on this machine'}: {error}") from None
        there = ray.cluster_resources()
        room = [int(there.get(kind, 0) / needed) for kind, needed in (("CPU", cpus), ("GPU", gpus)) if needed]
        self.slots = min(room, default=1) if slots is None else slots
        if self.slots < 1:
            self.close()
            raise InputError(
                f"the Ray cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs: not enough for a "
                f"trial that needs {cpus:g} and {gpus:g}"
            )
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(_run_on_cluster)
        self._cpus = cpus
        self.device = device

    def submit(self, trial: Trial, folder: Path) -> Future[Result]:
        reference = self._task.remote(trial.to_json(), str(Path(folder).absolute()), self.device, self._cpus)
        self._references.append(reference)
        return _translated(reference.future(), self._ray.exceptions.RayTaskError)

    def close(self) -> None:
        for reference in self._references:
            self._ray.cancel(reference)
        self._references.clear()
        if self._started:
            self._ray.shutdown()


def _run_on_cluster(trial: dict[str, Any], folder: str, device: str, cpus: float) -> Result:
    _prepare(max(1, int(cpus)))
    return run_trial(Trial.from_json(trial), folder, device)


def _translated(inner: Future[Result], wrapper: type[Exception]) -> Future[Result]:
    """A future that fails with what the trial failed with, not with Ray's account of it."""
    outer: Future[Result] = Future()

    def settle(done: Future[Result]) -> None:
        error = done.exception()
        if error is None:
            outer.set_result(done.result())
        else:
            outer.set_exception(getattr(error, "cause", error) if isinstance(error, wrapper) else error)

    inner.add_done_callback(settle)
    return outer
