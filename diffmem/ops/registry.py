"""One protocol for the backends of all ops: which there are, which of them can be used here, and which one is.

An op lists its backends, best first; `Op.select` takes the first that supports the device and the arguments. Nothing
falls back silently: `explain` says why the backends before it are not used, and forcing one that cannot be used raises
with that reason.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from diffmem.errors import InputError
from diffmem.logs import logger
from diffmem.system import usable_cores

F = TypeVar("F", bound=Callable[..., Any])

_log = logger(__name__)
_own = threading.local()  # how many threads a thread may use
NAMES = ("reference", "torch", "native", "triton", "cuda")


def anywhere(device_type: str) -> None:
    """`unavailable` of a backend that runs on every device."""
    return None


def anything(*arguments: Any) -> None:
    """`unfit` of a backend that takes whatever its op takes."""
    return None


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to compute an op. All backends of an op take the same arguments and return the same results, in the same
    order.

    Attributes:
        name: Name of an op, one of `NAMES`.
        description: How it computes, in a few words.
        function: Computes the op; imports what only this backend needs when it is called.
        unavailable: Why it cannot run on a device type ("cpu", "cuda"), as a clause, or None.
        unfit: Why it cannot take some arguments, as a clause, or None. Asked only where it is available; looks at
            metadata alone, so that torch.compile can trace it.
    """

    name: str
    description: str
    function: Callable[..., Any]
    unavailable: Callable[[str], str | None] = anywhere
    unfit: Callable[..., str | None] = anything

    def supports(self, device_type: str, *arguments: Any) -> str | None:
        """None where it can compute the op on `device_type`, of these arguments if any are given; else why not."""
        reason = self.unavailable(device_type)
        return reason if reason is not None or not arguments else self.unfit(*arguments)


_UNAVAILABLE: dict[tuple[str, str], Callable[[str], str | None]] = {}  # by the names of op and backend


class Op:
    """An op's backends, best first.

    Args:
        name: Name of the op.
        backends: Best first; the last one of an op, its reference, supports everything.
        autotuned: Names of backends of which, where several can be used, the fastest is found by measurement on GPUs.
        cases: Arguments by what they stand for, where which backend is used depends on them: `explanations` has a line
            for each.
        devices: Device types that it is for.
    """

    def __init__(
        self,
        name: str,
        backends: tuple[Backend, ...],
        autotuned: tuple[str, ...] = (),
        cases: Mapping[str, tuple[Any, ...]] | None = None,
        devices: tuple[str, ...] = ("cpu", "cuda"),
    ):
        self.name, self.backends, self.autotuned = name, backends, autotuned
        self.cases, self.devices = cases or {"": ()}, devices
        _UNAVAILABLE.update({(name, backend.name): backend.unavailable for backend in backends})

    def __getitem__(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.backends)
        raise InputError(f"{self.name} has no backend {name!r}; choose from {known}")

    def only(self, *names: str) -> Op:
        """The op with these of its backends."""
        return Op(self.name, tuple(self[name] for name in names))

    def candidates(self, device_type: str, *arguments: Any) -> list[Backend]:
        """The backends that can be used on `device_type`, of these arguments if any are given; best first."""
        return [backend for backend in self.backends if self._supports(backend, device_type, *arguments) is None]

    def select(self, device_type: str, impl: str | None, *arguments: Any) -> Backend:
        """The backend to use on `device_type`, of these arguments if any are given.

        Args:
            device_type: "cpu" or "cuda".
            impl: The name of a backend, to force it.
            arguments: The op's.

        Raises:
            InputError: There is no backend of that name, or it cannot be used; the message says why.
        """
        if impl is not None:
            backend = self[impl]
            reason = self._supports(backend, device_type)
            if reason is not None:
                raise InputError(f"{self.name}: backend {impl!r} cannot be used here: {reason}")
            reason = self._supports(backend, device_type, *arguments)
            if reason is not None:
                raise InputError(f"{self.name}: backend {impl!r} does not support these arguments: {reason}")
            return backend
        for backend in self.backends:
            if self._supports(backend, device_type, *arguments) is None:
                return backend
        raise InputError(f"{self.name} has no backend for device {device_type!r}")

    def explain(self, device_type: str, *arguments: Any) -> str:
        """One line: what is used on `device_type`, of these arguments if any are given, and why not what comes before
        it."""
        chosen = self.select(device_type, None, *arguments)
        tuned = [self[name] for name in self.autotuned]
        rivals = [each for each in tuned if each.supports(device_type, *arguments) is None]
        if device_type == "cuda" and len(rivals) > 1 and chosen in rivals:
            ways = ", ".join(f"{each.name} ({each.description})" for each in rivals)
            text = f"the fastest of {ways}, measured at first use"
        else:
            text = f"{chosen.name} ({chosen.description})"
        others = self.backends[: self.backends.index(chosen)]
        if chosen in rivals:
            others = tuple(each for each in self.backends if each in others or each.name in self.autotuned)
        reasons = [(each.name, each.supports(device_type, *arguments)) for each in others]
        return text + "".join(f"; not {name}: {reason}" for name, reason in reasons if reason is not None)

    def explanations(self, devices: Iterable[str]) -> dict[str, str]:
        """`explain` for each of these devices that the op is for, and for each of its cases, {"cuda, images": …}; one
        line where all cases are the same, {"cpu": …}."""
        found = {}
        for device in devices:
            if device in self.devices:
                texts = {case: self.explain(device, *arguments) for case, arguments in self.cases.items()}
                if len(set(texts.values())) == 1:
                    found[device] = next(iter(texts.values()))
                else:
                    found |= {f"{device}, {case}": text for case, text in texts.items()}
        return found

    def _supports(self, backend: Backend, device_type: str, *arguments: Any) -> str | None:
        """`backend.supports`, of which torch.compile traces what looks at arguments only."""
        reason = _unavailable(self.name, backend.name, device_type)
        return reason if reason is not None or not arguments else backend.unfit(*arguments)


def constant_in_graphs(function: F) -> F:
    """What torch.compiler.assume_constant_result does; calling that would import Dynamo, and with it Triton, here."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def _unavailable(op: str, backend: str, device_type: str) -> str | None:  # names: PyTorch 2.6 takes no other constants
    return _UNAVAILABLE[op, backend](device_type)


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    OPS[op.name] = op
    return op


def native_unavailable(device_type: str) -> str | None:
    """Why the compiled core cannot serve `device_type`, or None."""
    if device_type == "cpu":
        return None if native_module() is not None else build_info()["native_reason"]
    if device_type == "cuda":
        module = native_module()
        return None if module is not None and module.with_cuda else build_info()["cuda_reason"]
    return f"the compiled core does not know device {device_type!r}"


def native_kernel_unavailable(device_type: str, kernel: str, instructions: str) -> str | None:
    """Why a kernel of the compiled core that is written for the CPU, and needs some instructions, cannot serve
    `device_type`, or None. kernel: the core says by `<kernel>_available()` whether the processor has them."""
    if device_type != "cpu":
        return "written for the CPU"
    reason = native_unavailable("cpu")
    if reason is None and not getattr(native_module(), f"{kernel}_available")():
        reason = f"this processor (or build) has no {instructions}"
    return reason


def available_core(op: str, unavailable: str | None) -> Any:
    """The compiled core, for an operator that needs it; unavailable: why it cannot be had for that, or None."""
    if unavailable is not None:
        raise InputError(f"{op}: backend 'native' cannot be used here: {unavailable}")
    return native_module()


@cache
def native_module() -> Any:
    """The compiled core, or None where it was not built or DIFFMEM_NATIVE=off forbids it."""
    if os.environ.get("DIFFMEM_NATIVE", "").lower() == "off":
        return None
    try:
        from diffmem import _C
    except ImportError as error:
        _log.info("no compiled core, ops use PyTorch only: %s", error)
        return None
    return _C


@contextmanager
def on_one_core() -> Iterator[None]:
    """What this thread asks of the compiled core is computed by this thread alone."""
    before = getattr(_own, "threads", None)
    _own.threads = 1
    try:
        yield
    finally:
        _own.threads = before


def core_threads() -> int:
    """How many threads the compiled core uses: as many as PyTorch, or would without a setting in the process where it
    is not imported."""
    if (own := getattr(_own, "threads", None)) is not None:
        return own
    if (torch := sys.modules.get("torch")) is not None:
        return torch.get_num_threads()
    for setting in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(setting, "").partition(",")[0]
        if value.isdecimal() and int(value):
            return int(value)
    return usable_cores()


@cache
def build_info() -> dict[str, Any]:
    """What the installation built and why not what it did not: native, native_reason, cuda, cuda_reason."""
    if os.environ.get("DIFFMEM_NATIVE", "").lower() == "off":
        reason = "DIFFMEM_NATIVE=off in the environment"
        return {"native": False, "native_reason": reason, "cuda": False, "cuda_reason": reason}
    path = Path(__file__).parents[1] / "_build_info.json"
    if not path.exists():
        reason = "diffmem was not installed (pip install .)"
        return {"native": False, "native_reason": reason, "cuda": False, "cuda_reason": reason}
    return json.loads(path.read_text())
