"""`SamplerConfig`: what decides the images of a run, beside the checkpoint and the seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffmem.errors import InputError
from diffmem.precision import AUTOCAST
from diffmem.sampling.plan import Churn, Plan, dpmpp_2m_plan, general_plan, unipc_plan
from diffmem.sampling.samplers import rounding_of
from diffmem.sampling.sigmas import checked_sigmas, clip_range, round_sigmas, sigmas_karras, sigmas_logistic

# Noise levels of the protocol's sampler (35 evaluations), and of the fast ones (as many evaluations).
HEUN_STEPS, FAST_STEPS = 18, 14
# Default steps, sigma_min and rho.
SOLVERS = {"heun": (HEUN_STEPS, 0.002, 7.0), "unipc": (FAST_STEPS, 0.02, None), "dpm++": (FAST_STEPS, 0.002, 7.0)}
COMPILE = ("auto", "on", "off")


@dataclass(frozen=True)
class SamplerConfig:
    """How images are sampled; the defaults are the reference protocol's (Gu et al., arXiv 2310.02664).

    Attributes:
        solver: "heun" (NFE: 2·steps − 1), "unipc" or "dpm++" (NFE: steps).
        steps: Number of noise levels; None for the solver's default.
        sigma_min: The lowest noise level, clipped to the network's range; None for the solver's default.
        sigma_max: The highest noise level, clipped to the network's range.
        rho: Spacing of the levels, see `sigmas_karras`; None for the solver's default. The levels of "unipc" are those
            of `sigmas_logistic`, without rho.
        S_churn: Noise added on the way, by "heun" only, see `Churn`; 0: none.
        S_min: See `Churn`.
        S_max: See `Churn`.
        S_noise: See `Churn`.
        class_index: The class of all images; None: drawn per seed, where the network has classes. A class that is given
            replaces the one that the seed draws, so that noise added on the way is the same.
        classes: Where given, classes are drawn among these, as for a training set that has no images of the others: a
            seed that draws another class draws once more, among these, so that the images of all other seeds stay
            what they are. None: among all of the network's.
        batch: Images at a time.
        precision: Precision of the network's products: "ieee" (the protocol's float32), "tf32", "bf16" or "fp16", see
            `diffmem.precision`; "float32" is another name of "ieee".
        compile: "on", "off" (or True, False), or "auto": where the run is long enough to pay for it.

    Raises:
        InputError: For values that make no sense.

    Example:
        >>> from diffmem.sampling import SamplerConfig
        >>> SamplerConfig(solver="unipc").steps
        14
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
    classes: tuple[int, ...] | None = None
    batch: int = 64
    precision: str = "ieee"
    compile: str | bool = "auto"

    def __post_init__(self) -> None:
        if self.precision == "float32":
            object.__setattr__(self, "precision", "ieee")
        if isinstance(self.compile, bool):
            object.__setattr__(self, "compile", "on" if self.compile else "off")
        for name, choices in (("solver", SOLVERS), ("precision", AUTOCAST), ("compile", COMPILE)):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
        if self.solver == "unipc" and self.rho is not None:
            raise InputError("rho is for the solvers heun and dpm++; unipc has its own spacing of noise levels")
        for name, default in zip(("steps", "sigma_min", "rho"), SOLVERS[self.solver], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.batch < 1:
            raise InputError(f"batch is {self.batch}, but must be at least 1")
        if self.rho is not None and not 0 < self.rho < math.inf:
            raise InputError(f"rho is {self.rho:g}, but must be positive and finite")
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(sorted({int(each) for each in self.classes})))
            if not self.classes:
                raise InputError("classes: name at least one")
            if self.class_index is not None:
                raise InputError("class_index and classes: give one of them; class_index is the class of all images")
        if not all(value >= 0 for value in (self.S_churn, self.S_min, self.S_max, self.S_noise)):
            raise InputError("churn: S_churn, S_min, S_max and S_noise must not be negative")
        if self.S_churn and self.solver != "heun":
            raise InputError(f"churn is for the solver heun; {self.solver} adds no noise")

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values; no bound on S_max is None, and classes are there where given."""
        values = {**dataclasses.asdict(self), "S_max": None if math.isinf(self.S_max) else self.S_max}
        # Without classes it reads as what was stored before there were any.
        del values["classes"]
        return values if self.classes is None else {**values, "classes": list(self.classes)}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the images, in JSON types: batch size and compiling change them by rounding only."""
        return {name: value for name, value in self.to_json().items() if name not in ("batch", "compile")}

    @staticmethod
    def from_json(values: dict[str, Any]) -> SamplerConfig:
        """The configuration that `to_json` gave; raises InputError for what is none."""
        try:
            return SamplerConfig(**{**values, "S_max": math.inf if values.get("S_max") is None else values["S_max"]})
        except (TypeError, AttributeError) as error:
            raise InputError(f"a sampler's configuration: a field is unknown or of the wrong type ({error})") from None

    @property
    def churn(self) -> Churn:
        """Noise added on the way."""
        return Churn(self.S_churn, self.S_min, self.S_max, self.S_noise)

    def sigmas(self, denoiser: Any) -> list[float]:
        """The noise levels for this denoiser, clipped to its range and rounded as it rounds them, and 0."""
        assert self.steps is not None and self.sigma_min is not None  # noqa: PT018 (set in __post_init__)
        low, high = clip_range(denoiser, self.sigma_min, self.sigma_max)
        if self.solver == "unipc":
            return round_sigmas(sigmas_logistic(self.steps, low, high), denoiser)
        assert self.rho is not None
        return round_sigmas(sigmas_karras(self.steps, low, high, self.rho), denoiser)

    def plan(self, denoiser: Any, sigmas: Sequence[float] | None = None) -> Plan:
        """The run's plan for this denoiser, built once per run.

        Args:
            denoiser: Whose range, rounding and classes count.
            sigmas: Noise levels in place of the configuration's own.

        Raises:
            InputError: Where the configuration does not fit the denoiser.
        """
        classes = getattr(denoiser, "label_dim", 0)
        if self.class_index is not None and not classes:
            raise InputError(f"class {self.class_index}: this network is unconditional")
        if self.class_index is not None and not 0 <= self.class_index < classes:
            raise InputError(f"class {self.class_index}: this network has the classes 0 … {classes - 1}")
        if self.classes is not None and not classes:
            raise InputError("classes: this network is unconditional")
        if self.classes is not None and not 0 <= self.classes[0] <= self.classes[-1] < classes:
            raise InputError(f"classes: this network has the classes 0 … {classes - 1}")
        multistep = self.solver != "heun"
        if sigmas is None:
            sigmas = self.sigmas(denoiser)
            if multistep and len(set(sigmas)) < len(sigmas):
                raise InputError(f"steps is {self.steps}, more than the network has distinct noise levels; use fewer")
        levels = checked_sigmas(sigmas, distinct=multistep)
        if not multistep:
            return general_plan(levels, churn=self.churn, round_sigma=rounding_of(denoiser))
        return unipc_plan(levels) if self.solver == "unipc" else dpmpp_2m_plan(levels)
