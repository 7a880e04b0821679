"""Where long work runs: in this process, in processes of this machine, or on the machines of a Ray cluster.

An executor has a number of slots and a method `submit`, which returns a future. It knows nothing of what the work is:
trials of a study, shards of an index. The function and its arguments must be of modules, so that they can be pickled.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar, cast

from diffmem import system
from diffmem.errors import InputError, MissingExtraError
from diffmem.inert.boundary import one_line
from diffmem.logs import logger

_log = logger(__name__)
T = TypeVar("T")
_WATCH_SECONDS = 5.0  # between looks of a process at whether its parent is still there
_JOIN_SECONDS = 10.0  # that the machines of a Ray cluster have to join it


class Executor(Protocol):
    """slots: calls that run at the same time."""

    slots: int

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Starts `function(*arguments, device)`, where device is the one that its place has."""
        ...

    def close(self) -> None:
        """Lets calls that still run save what they have, and ends them."""
        ...


class InProcess:
    """One call after another, in this process.

    Args:
        device: Handed to each call: "cpu", "cuda" or "auto".
    """

    slots = 1

    def __init__(self, device: str = "auto") -> None:
        self.device = device

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(function(*arguments, self.device))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


class Processes:
    """Several processes of this machine that share no state with this one: on Linux forks of a server that has imported
    PyTorch once for all of them, elsewhere started fresh. A process that dies takes with it its own call alone, and is
    replaced.

    Args:
        workers: How many.
        threads: Threads of each, outside calls that set their own, for results may depend on their number; None: the
            machine's cores, divided among the processes.
        device: Handed to each call; "cuda" deals the GPUs out in turns.
    """

    def __init__(self, workers: int, *, threads: int | None = None, device: str = "auto") -> None:
        if workers < 1:
            raise InputError(f"workers is {workers}, but must be at least 1")
        self.slots = workers
        self.threads = threads or max(1, (os.cpu_count() or 1) // workers)
        self.device = device
        # One pool per process: when a process dies, its whole pool is lost.
        self._pools: list[ProcessPoolExecutor | None] = [None] * workers
        self._busy: list[Future[Any] | None] = [None] * workers
        self._processes = [0] * workers

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        place = next(i for i, future in enumerate(self._busy) if future is None or future.done())
        for _ in range(2):
            if self._pools[place] is None:
                self._pools[place] = ProcessPoolExecutor(
                    1, _context(), _begin_process, (self.threads, os.getpid(), dict(os.environ))
                )
            try:
                self._processes[place] = cast(ProcessPoolExecutor, self._pools[place]).submit(os.getpid).result()
                future = cast(ProcessPoolExecutor, self._pools[place]).submit(function, *arguments, self._device(place))
            except BrokenProcessPool:
                _log.warning("a worker process died; another one replaces it")
                self._pools[place] = None  # its process died with the call before
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


def _context() -> multiprocessing.context.BaseContext:
    """How processes start. A server imports what this process has imported of diffmem, PyTorch with it, and each worker
    is a fork of it: importing takes seconds, and memory. The server runs nothing, so no threads are lost in its forks.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    # A program that preloads what it needs itself keeps its choice.
    if getattr(forkserver._forkserver, "_preload_modules", None) == ["__main__"]:
        ours = [name for name in sys.modules if name.startswith("diffmem.") and not name.endswith("__main__")]
        context.set_forkserver_preload(["torch", *sorted(ours)])
        _start_server(forkserver.ensure_running)
    return context


def _start_server(start: Callable[[], None]) -> None:
    """The server is to import what this process has imported: by itself it would look in the current folder first,
    where a folder may have the name of a package (PYTHONSAFEPATH; Python 3.10 does not know it)."""
    ours = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin_process(threads: int, parent: int, environment: dict[str, str]) -> None:
    """A process of a pool. An interrupt from the keyboard is its parent's affair, which then ends it properly; when the
    parent is gone without that, it saves what it has and ends by itself."""
    system.leave_interrupts_to_parent()
    if os.getppid() != parent:  # forked: the server ends with the program, and has the environment of its own start
        parent = os.getppid()
        os.environ.clear()
        os.environ.update(environment)
    _prepare(threads)

    def watch() -> None:
        while system.parent_lives(parent):
            time.sleep(_WATCH_SECONDS)
        system.end_myself()

    threading.Thread(target=watch, daemon=True).start()


def _prepare(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


class Ray:
    """A Ray cluster (extra `ray`): many machines and GPUs, which must all see the folders that the
    calls write to.

    Args:
        address: Address of a running cluster, "auto" to find one; None or "local" to start one on this machine, whether
            or not another runs there.
        gpus: That a call takes; a fraction of a GPU lets several calls share one.
        cpus: That a call takes.
        retries: Retries of a call whose machine or process is lost.
        slots: Calls at the same time; None: as many as the cluster has room for.
        device: Handed to each call.
        **init: Passed on to `ray.init`.

    Raises:
        MissingExtraError: The package is not installed.
        InputError: No cluster answers, or it has no room for a single call.
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
            raise MissingExtraError("ray", "ray", "running on a Ray cluster") from None
        self._ray, self._started = ray, not ray.is_initialized()
        self._references: list[Any] = []
        address = address or "local"  # without one Ray would join whatever cluster it finds here
        if self._started:
            try:
                ray.init(address=address, log_to_driver=False, **init)
            except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
                token = "" if address in ("auto", "local") or os.environ.get("RAY_AUTH_MODE") else (
                    "; where the cluster wants to see a token, set RAY_AUTH_MODE=token"
                )  # fmt: skip
                raise InputError(
                    f"Ray cluster {'on this machine' if address == 'local' else address}: {one_line(error)}{token}"
                ) from None
        there: dict[str, float] = {}
        end = time.monotonic() + _JOIN_SECONDS
        while True:
            there = cast(Any, ray).cluster_resources()
            room = [int(there.get(kind, 0) / needed) for kind, needed in (("CPU", cpus), ("GPU", gpus)) if needed]
            self.slots = min(room, default=1) if slots is None else slots
            if self.slots >= 1 or not self._started or address == "local" or time.monotonic() > end:
                break
            time.sleep(0.2)
        if self.slots < 1:
            self.close()
            raise InputError(
                f"the Ray cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs: not enough "
                f"where each call needs {cpus:g} and {gpus:g}"
            )
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(_run_on_cluster)
        self._cpus = cpus
        self.device = device

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        reference = self._task.remote(self._cpus, function, *arguments, self.device)
        self._references.append(reference)
        return _translated(reference.future(), self._ray.exceptions.RayTaskError)

    def close(self) -> None:
        for reference in self._references:
            self._ray.cancel(reference)
        self._references.clear()
        if self._started:
            self._ray.shutdown()


class Ranks(InProcess):
    """The processes that torchrun started, of which this is one: each does its share of the calls, in itself. A process
    group must be there (`torch.distributed`), by whose end the others learn that one has died.

    Args:
        device: Handed to each call.
    """

    def __init__(self, device: str = "auto") -> None:
        import torch.distributed as dist

        super().__init__(device)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this is the rank that plans, and writes what is not shared out."""
        return self.rank == 0

    def share(self, calls: Sequence[T]) -> Sequence[T]:
        """The calls that are this rank's: one in as many as there are ranks."""
        return calls[self.rank :: self.ranks]

    def together(self, error: str | None = None) -> list[str]:
        """Waits until all ranks are here, and returns the errors that they bring.

        Raises:
            InputError: One of them has ended.
        """
        import torch.distributed as dist

        told: list[Any] = [None] * self.ranks
        try:
            dist.all_gather_object(told, error)
        except RuntimeError as failure:
            reason = " ".join(str(failure).split())[:120]
            raise InputError(
                f"another rank has ended ({reason}): start all of them again, what is finished is kept"
            ) from None
        return [each for each in told if each is not None]


def _run_on_cluster(cpus: float, function: Callable[..., T], *arguments: Any) -> T:
    _prepare(max(1, int(cpus)))
    return function(*arguments)


def _translated(inner: Future[T], wrapper: type[Exception]) -> Future[T]:
    """A future that fails with what the call failed with, not with Ray's account of it."""
    outer: Future[T] = Future()

    def settle(done: Future[T]) -> None:
        error = done.exception()
        if error is None:
            outer.set_result(done.result())
        else:
            outer.set_exception(getattr(error, "cause", error) if isinstance(error, wrapper) else error)

    inner.add_done_callback(settle)
    return outer
