"""What decides the images of a run, beside the checkpoint and the seeds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from diffmem.errors import InputError
from diffmem.models import Denoiser
from diffmem.precision import AUTOCAST
from diffmem.sampling import FAST_STEPS, HEUN_STEPS, Churn, Plan, dpmpp_plan, heun_plan, unipc_plan

# Default steps, sigma_min and rho.
SOLVERS = {"heun": (HEUN_STEPS, 0.002, 7.0), "unipc": (FAST_STEPS, 0.02, None), "dpm++": (FAST_STEPS, 0.002, 7.0)}
COMPILE = ("auto", "on", "off")


@dataclass(frozen=True)
class SampleSettings:
    """The defaults are the protocol's.

    solver: "heun" (2·steps − 1 network calls), "unipc" or "dpm++" (one call per step).
    steps, sigma_min, sigma_max, rho: the noise levels, clipped to the network's range; None for the solver's default.
        The levels of "unipc" are spaced by themselves, without rho.
    S_churn, S_min, S_max, S_noise: noise added on the way, by "heun" only; S_churn = 0: none.
    class_index: the class of all images; None: drawn per seed, where the network has classes. A class that is given
        replaces the one that the seed draws, so that noise added on the way is the same.
    batch: images at a time. precision: of the network's products, "ieee" (the protocol's float32), "tf32", "bf16" or
        "fp16", see `diffmem.precision`; "float32" is another name of "ieee".
    compile: "on", "off", or "auto": where the run is long enough to pay for it.
    Raises InputError for values that make no sense.
    """

    solver: str = "heun"
    steps: int | None = None
    sigma_min: float | None = None
    sigma_max: float = 80.0
    rho: float | None = None
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    class_index: int | None = None
    batch: int = 64
    precision: str = "ieee"
    compile: str = "auto"

    def __post_init__(self) -> None:
        if self.precision == "float32":
            object.__setattr__(self, "precision", "ieee")
        for name, choices in (("solver", SOLVERS), ("precision", AUTOCAST), ("compile", COMPILE)):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
        if self.solver == "unipc" and self.rho is not None:
            raise InputError("rho is for the solvers heun and dpm++; unipc spaces its noise levels by itself")
        for name, default in zip(("steps", "sigma_min", "rho"), SOLVERS[self.solver], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.batch < 1:
            raise InputError(f"batch is {self.batch}, but must be at least 1")
        if self.rho is not None and not 0 < self.rho < math.inf:
            raise InputError(f"rho is {self.rho:g}, but must be positive and finite")
        if not all(value >= 0 for value in (self.S_churn, self.S_min, self.S_max, self.S_noise)):
            raise InputError("churn: S_churn, S_min, S_max and S_noise must not be negative")
        if self.S_churn and self.solver != "heun":
            raise InputError(f"churn is for the solver heun; {self.solver} adds no noise")

    def to_dict(self) -> dict[str, Any]:
        """The settings in plain JSON types: no bound on S_max is None."""
        return {**asdict(self), "S_max": None if math.isinf(self.S_max) else self.S_max}

    def solver_arguments(self) -> dict[str, Any]:
        """What `diffmem.sampling.sample_batches` passes on to the solver."""
        arguments = {"steps": self.steps, "sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        if self.rho is not None:
            arguments["rho"] = self.rho
        if self.S_churn:
            arguments |= {"S_churn": self.S_churn, "S_min": self.S_min, "S_max": self.S_max, "S_noise": self.S_noise}
        return arguments

    def plan(self, denoiser: Denoiser) -> Plan:
        """The run's plan for this denoiser. Raises InputError where the settings do not fit it."""
        classes = denoiser.label_dim
        if self.class_index is not None and not classes:
            raise InputError(f"class {self.class_index}: this network is unconditional, it knows no classes")
        if self.class_index is not None and not 0 <= self.class_index < classes:
            raise InputError(f"class {self.class_index}: this network has the classes 0 … {classes - 1}")
        levels = (self.steps, self.sigma_min, self.sigma_max)
        if self.solver == "unipc":
            return unipc_plan(denoiser, *levels)
        if self.solver == "dpm++":
            return dpmpp_plan(denoiser, *levels, self.rho)
        return heun_plan(denoiser, *levels, self.rho, Churn(self.S_churn, self.S_min, self.S_max, self.S_noise))
