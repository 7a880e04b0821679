"""Which implementations an op has, which of them work here, and which one is used.

Nothing falls back silently: an implementation is chosen by the first entry of the op's list that is available for
the device, and `explain` says why the others before it are not. Forcing one that is unavailable raises with that
reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from diffmem.errors import InputError


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `unavailable(device_type)` returns None where it can run, else the reason in one phrase.
    """

    name: str
    description: str
    unavailable: Callable[[str], str | None]


@dataclass(frozen=True)
class Op:
    """An op's implementations, best first. The last one, `reference`, always works."""

    name: str
    implementations: tuple[Implementation, ...] = field(default=())

    def choose(self, device_type: str, impl: str | None = None) -> str:
        """The implementation to use on `device_type` ("cpu", "cuda"); `impl` forces one by name."""
        names = [candidate.name for candidate in self.implementations]
        if impl is not None:
            if impl not in names:
                raise InputError(f"{self.name} has no implementation {impl!r}; choose from {', '.join(names)}")
            reason = self.implementations[names.index(impl)].unavailable(device_type)
            if reason is not None:
                raise InputError(f"{self.name}: implementation {impl!r} cannot be used here: {reason}")
            return impl
        for candidate in self.implementations:
            if candidate.unavailable(device_type) is None:
                return candidate.name
        raise InputError(f"{self.name} has no implementation for device {device_type!r}")

    def explain(self, device_type: str) -> str:
        """One line: what is used on `device_type`, and why not what comes before it."""
        chosen = self.choose(device_type)
        passed_over = []
        for candidate in self.implementations:
            if candidate.name == chosen:
                return f"{chosen} ({candidate.description})" + "".join(f"; not {text}" for text in passed_over)
            passed_over.append(f"{candidate.name}: {candidate.unavailable(device_type)}")
        raise AssertionError("choose() returns a listed implementation")


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    OPS[op.name] = op
    return op


def always(device_type: str) -> None:
    """Available everywhere."""
    return None


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


def available_core(op: str, unavailable: str | None):
    """The compiled core, for an operator that needs it; unavailable: why it cannot be had for that, or None."""
    if unavailable is not None:
        raise InputError(f"{op}: implementation 'native' cannot be used here: {unavailable}")
    return native_module()


@cache
def native_module():
    """The compiled core, or None where it was not built or DIFFMEM_NATIVE=off forbids it."""
    if os.environ.get("DIFFMEM_NATIVE", "").lower() == "off":
        return None
    try:
        from diffmem import _C
    except ImportError:
        return None
    return _C


@cache
def build_info() -> dict:
    """What the installation built and why not what it did not: native, native_reason, cuda, cuda_reason."""
    if os.environ.get("DIFFMEM_NATIVE", "").lower() == "off":
        reason = "DIFFMEM_NATIVE=off in the environment"
        return {"native": False, "native_reason": reason, "cuda": False, "cuda_reason": reason}
    path = Path(__file__).parents[1] / "_build_info.json"
    if not path.exists():
        reason = "diffmem was not installed (pip install .)"
        return {"native": False, "native_reason": reason, "cuda": False, "cuda_reason": reason}
    return json.loads(path.read_text())
