"""Denoisers of one's own: `as_denoiser` gives any module or function that denoises the interface of `Denoiser`.

The protocol is that of EDM's networks: `model(x, sigma, class_labels=None)` returns the denoised images.

    x             (B, C, H, W) noisy images, noise of deviation sigma added to images in [-1, 1], in the model's dtype
    sigma         one noise level, a 0-d tensor; or (B,), one per image, where the model needs that
    class_labels  (B, label_dim) one-hot, in the model's dtype; or (B,) int64 class indices, where the model needs that;
                  not passed where the model is unconditional
    returns       (B, C, H, W)

With `preconditioning` the module is a network F instead, and the denoiser is c_skip·x + c_out·F(c_in·x; c_noise), as
for diffmem's own networks: `model(x, noise, class_labels=None)` is given c_in·x and c_noise, (B,).

`diffmem.training.train` trains such a denoiser: its `config` says what it is in a `TrainingConfig`, and the module goes
in as `model`. `save` and `load` store its weights under the module's own names, and never the module.

A module in half precision is given half-precision images at all noise levels, which costs accuracy where noise is high:
a float32 module sampled with `SamplerConfig(precision="bf16")` or "fp16" keeps it.

What the model says of itself is read from its attributes, under our names or EDM's: `resolution` or `img_resolution`,
`channels` or `img_channels`, `label_dim`, `sigma_min`, `sigma_max`, `round_sigma`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import math
import secrets
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn as nn

from diffmem.errors import InputError
from diffmem.inert.boundary import one_line, short
from diffmem.models.config import DenoiserConfig, ModuleConfig
from diffmem.models.denoiser import Denoiser
from diffmem.models.preconditioning import EDM, VE, VP

_NAMES = {
    "channels": ("channels", "img_channels"),
    "resolution": ("resolution", "img_resolution"),
    "label_dim": ("label_dim",),
    "sigma_min": ("sigma_min",),
    "sigma_max": ("sigma_max",),
}
# A module of someone else's, or what makes one.
Model = nn.Module | Callable[[], nn.Module]
_INTERFACE = ("channels", "resolution", "label_dim", "summary", "fingerprint")
_LABEL_NAMES = ("class_labels", "labels")
_LARGEST = 65_536  # pixels along an edge, channels, classes


def as_denoiser(
    model: nn.Module | Callable[..., torch.Tensor],
    *,
    preconditioning: VP | VE | EDM | None = None,
    channels: int | None = None,
    resolution: int | None = None,
    label_dim: int | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    sigma_per_image: bool | None = None,
    class_indices: bool | None = None,
    device: torch.device | str | None = None,
    fingerprint: str | None = None,
) -> Denoiser | WrappedDenoiser:
    """A denoiser that samplers, audits and comparisons take, around a model that denoises; see this module's protocol.

    What is a denoiser of diffmem's already is returned as it is. Others are called once, on noise, to see that they do
    what the protocol says. Modules inside DataParallel, DistributedDataParallel and torch.compile are recognized; a
    module in training mode is sampled in evaluation mode and left as it was.

    Args:
        model: the module, or a function.
        preconditioning: VP(), VE() or EDM() around a network F; None: the model denoises by itself.
        channels: of the images, where the model does not say so itself.
        resolution: height and width of the images, likewise.
        label_dim: number of classes, likewise; where nothing says so 0, unconditional.
        sigma_min: the lowest noise level that the model knows (where it says nothing: all, or the preconditioning's).
        sigma_max: the highest.
        sigma_per_image: whether sigma is passed as (B,). None: where a 0-d tensor fails, and with a preconditioning.
        class_indices: whether class_labels are passed as indices. None: where one-hot vectors fail.
        device: of a function; a module's is where its parameters are.
        fingerprint: what stands for the model, so that an interrupted run can continue. None: the SHA-256 of a module's
            class and state; a function counts as a new one each time.

    Returns:
        A module with the interface of `Denoiser`.

    Raises:
        InputError: the sizes are not known, or the model does not do what the protocol says.

    Example:
        >>> net = as_denoiser(lambda x, sigma: x / (1 + sigma**2), channels=1, resolution=8)
        >>> net(torch.ones(2, 1, 8, 8), 1.0).unique().tolist()
        [0.5]
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    if is_denoiser(model):
        if preconditioning is not None:
            raise InputError(f"{type(model).__name__}: is already a denoiser: remove preconditioning")
        return cast(Denoiser, model)
    if preconditioning is not None and not isinstance(preconditioning, (VP, VE, EDM)):
        raise InputError(f"preconditioning is {short(preconditioning)}, but must be VP(), VE() or EDM()")
    given = {
        "channels": channels, "resolution": resolution, "label_dim": label_dim, "sigma_min": sigma_min,
        "sigma_max": sigma_max,
    }  # fmt: skip
    wrapped = WrappedDenoiser(model, given, device, fingerprint, preconditioning)
    wrapped._find_call(sigma_per_image, class_indices)
    return wrapped


def is_denoiser(model: Any) -> bool:
    """Whether `model` has the interface of `Denoiser` itself.

    Args:
        model: Anything.
    """
    return isinstance(model, Denoiser) or (
        isinstance(model, nn.Module) and all(hasattr(model, name) for name in _INTERFACE)
    )


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A module in evaluation mode for as long as this lasts; each of its parts is then in the mode it was in.

    Args:
        model: A module; anything else is left alone.
    """
    training = [part for part in model.modules() if part.training] if isinstance(model, nn.Module) else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class WrappedDenoiser(nn.Module):
    """A model with the interface of `Denoiser`; made by `as_denoiser`.

    `channels`, `resolution`, `label_dim`, `sigma_min`, `sigma_max`: of the model. `autocast_dtype`: as of `Denoiser`.

    Args:
        model: The module or function that denoises.
        given: What it does not say of itself, by name; None: its own attribute is taken.
        device: Of a function; a module is where its parameters are.
        fingerprint: What stands for the model, for runs that resume; None: the SHA-256 of its weights.
        preconditioning: That turns its raw output into a denoised image; None: it denoises by itself.
    """

    channels: int
    resolution: int
    label_dim: int
    sigma_min: float
    sigma_max: float
    compilable = False  # its owner knows whether torch.compile takes it

    def __init__(
        self,
        model: Any,
        given: dict[str, Any],
        device: torch.device | str | None,
        fingerprint: str | None,
        preconditioning: VP | VE | EDM | None = None,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise InputError(f"{type(model).__name__}: not a denoising module or function")
        self.model = model
        plain = getattr(self.model, "_orig_mod", self.model)  # what torch.compile was given
        self.plain_name = type(plain).__name__ if isinstance(plain, nn.Module) else _name_of(plain)
        self.autocast_dtype: torch.dtype | None = None
        self._fingerprint = fingerprint
        for name, value in given.items():
            setattr(self, name, _attribute(plain, name, value))
        for name in ("channels", "resolution"):
            value = getattr(self, name)
            if value is None:
                raise InputError(
                    f"{self.plain_name}: does not say its {name}: give it an attribute `{name}`, or call "
                    "diffmem.models.as_denoiser(model, channels=…, resolution=…)"
                )
            self._check_whole(name, value, 1)
        self.label_dim = 0 if self.label_dim is None else self.label_dim
        self._check_whole("label_dim", self.label_dim, 0)
        self.preconditioning = preconditioning
        around: Any = EDM() if preconditioning is None else preconditioning  # of EDM, all levels
        self.sigma_min = self._level("sigma_min", around.sigma_min)
        self.sigma_max = self._level("sigma_max", around.sigma_max)
        self._round_sigma = getattr(plain, "round_sigma", None)
        if self._round_sigma is not None and not callable(self._round_sigma):
            raise InputError(f"{self.plain_name}: round_sigma is {short(self._round_sigma)}, but must be a function")
        tensors = (*plain.parameters(), *plain.buffers()) if isinstance(plain, nn.Module) else ()
        if any(tensor.is_meta for tensor in tensors):
            raise InputError(f"{self.plain_name}: has no weights yet (they are on the meta device): load them first")
        place = next((t.device for t in tensors), device or "cpu")
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        # So that samplers find the device.
        self.anchor = nn.Parameter(torch.zeros(0, device=place), requires_grad=False)
        self._labels_name = _labels_name(plain)
        self._sigma_per_image = self._class_indices = self._known = False

    def _check_whole(self, name: str, value: Any, least: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
            raise InputError(
                f"{self.plain_name}: {name} is {short(value)}, but must be a whole number from {least} to {_LARGEST:,}"
            )

    def _level(self, name: str, default: float) -> float:
        """A noise level that the model may name."""
        value = getattr(self, name)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value) or value < 0:
            raise InputError(f"{self.plain_name}: {name} is {short(value)}, but must be a noise level of at least 0")
        return float(value)

    @property
    def plain(self) -> Any:
        """The model itself, out of what torch.compile made of it."""
        return getattr(self.model, "_orig_mod", self.model)

    @property
    def config(self) -> DenoiserConfig:
        """What diffmem knows of the model, for a `TrainingConfig`; without a preconditioning the loss is EDM's."""
        network = ModuleConfig(
            name=self.plain_name,
            resolution=self.resolution,
            channels=self.channels,
            label_dim=self.label_dim,
            parameters=sum(parameter.numel() for parameter in self.parameters()),
            preconditioned=self.preconditioning is not None,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            sigma_per_image=self._sigma_per_image,
            class_indices=self._class_indices,
        )
        return DenoiserConfig(network, EDM() if self.preconditioning is None else self.preconditioning)

    def summary(self) -> str:
        """One line for a person: the model's class, image size, parameters, classes."""
        size = f"{self.channels}x{self.resolution}x{self.resolution}"
        classes = f"label_dim {self.label_dim}" if self.label_dim else "unconditional"
        parameters = sum(parameter.numel() for parameter in self.parameters())
        around = "" if self.preconditioning is None else f" with {type(self.preconditioning).__name__} preconditioning"
        return f"{self.plain_name}{around}, images {size}, {parameters:,} parameters, {classes}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model's class, sizes and state, or what was given in its place."""
        if self._fingerprint is None and not isinstance(self.model, nn.Module):
            self._fingerprint = f"function {secrets.token_hex(16)}"  # what it computes cannot be told
        if self._fingerprint is not None:
            return self._fingerprint
        plain = self.plain
        kind = (type(plain).__module__, type(plain).__qualname__, self.channels, self.resolution, self.label_dim)
        around: tuple[str, ...] = ()
        if self.preconditioning is not None:
            around = (repr(self.preconditioning),)
        digest = hashlib.sha256(repr((*kind, *around, self.sigma_min, self.sigma_max)).encode())
        for name, tensor in sorted(plain.state_dict().items()):
            digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def round_sigma(self, sigma: float) -> float:
        """The noise level that the model really sees for `sigma`, by its own `round_sigma` where it has one."""
        if self._round_sigma is None:
            return sigma
        try:
            return float(self._round_sigma(torch.tensor(sigma, dtype=torch.float64, device=self.anchor.device)))
        except Exception as error:
            raise self._failure(error, f"in round_sigma({sigma:g})") from error

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The denoised images (B, C, H, W) float32, as `Denoiser.forward` (float64 of a float64 model)."""
        if augment_labels is not None:
            raise InputError(f"{self.plain_name}: does not support augmentation: train it with augment=0")
        if self.preconditioning is None:
            return self._call(x, torch.as_tensor(sigma, device=x.device), labels)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        x = x.to(wide)
        level = torch.as_tensor(sigma, device=x.device).to(wide).reshape(-1, 1, 1, 1)
        c = self.preconditioning.coefficients(level)
        return c.skip * x + c.out * self._call(c.in_ * x, c.noise, labels)

    def _call(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """What the model returns for `x` and a level, one or one per image, in the forms that it takes."""
        sigma = sigma.to(self.dtype)
        if self._sigma_per_image:
            sigma = sigma.reshape(-1).expand(len(x))
        elif sigma.numel() > 1:
            sigma = sigma.reshape(-1, 1, 1, 1)
        else:
            sigma = sigma.reshape(())
        arguments: dict[str, torch.Tensor] = {}
        extra: tuple[torch.Tensor, ...] = ()
        if self.label_dim:
            given = self._labels(labels, x)
            extra, arguments = ((given,), {}) if self._labels_name is None else ((), {self._labels_name: given})
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.autocast_dtype is not None:
            context = torch.autocast(x.device.type, self.autocast_dtype)
        try:
            with context:
                output = self.model(x.to(self.dtype), sigma, *extra, **arguments)
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not self._known:
                raise
            raise self._failure(error, f"on images {tuple(x.shape)} at sigma {float(sigma.max()):g}") from error
        if not isinstance(output, torch.Tensor):
            raise InputError(
                f"{self.plain_name}: returns a {type(output).__name__}, but must return the denoised images, a tensor: "
                "give a function that takes them out, as in as_denoiser(lambda x, sigma: net(x, sigma)[0], channels=…, "
                "resolution=…)"
            )
        if not output.is_floating_point():
            raise InputError(f"{self.plain_name}: returns {output.dtype}, but must return denoised images as floats")
        if output.shape != x.shape:
            raise InputError(
                f"{self.plain_name}: returns {tuple(output.shape)} for noisy images {tuple(x.shape)}, but must return "
                "the denoised images"
            )
        return output.to(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def _labels(self, labels: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """Class indices or one-hot vectors, as the model takes them."""
        if labels is None:
            labels = torch.zeros(len(x), self.label_dim, dtype=self.dtype, device=x.device)
        if self._class_indices:
            return labels.argmax(dim=1) if labels.is_floating_point() else labels
        if not labels.is_floating_point():
            labels = nn.functional.one_hot(labels, self.label_dim)
        return labels.to(self.dtype)

    def _find_call(self, sigma_per_image: bool | None, class_indices: bool | None) -> None:
        """Calls the model once on noise, in the ways that are left open, and keeps the first that works."""
        count, place = 2, self.anchor.device
        shape = (count, self.channels, self.resolution, self.resolution)
        try:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place)
        except RuntimeError as error:
            raise InputError(f"{self.plain_name}: images of {shape[1:]} do not fit in memory") from error
        sigma = min(max(1.0, self.sigma_min), self.sigma_max)
        labels = torch.zeros(count, dtype=torch.int64, device=place) if self.label_dim else None
        failure: Exception | None = None
        either = (False, True) if self.preconditioning is None else (True, False)
        per_image = either if sigma_per_image is None else (sigma_per_image,)
        indices = (False, True) if class_indices is None and self.label_dim else (bool(class_indices),)
        for self._sigma_per_image in per_image:
            for self._class_indices in indices:
                try:
                    with torch.no_grad(), evaluating(self):
                        self(x, sigma, labels)
                    self._known = True
                    return
                except InputError:
                    raise
                except Exception as error:  # whatever a model of someone else's may raise
                    failure = failure or error
        size = f"{self.channels}x{self.resolution}x{self.resolution}"
        assert failure is not None
        message = one_line(failure)
        needs_more = not self.label_dim and isinstance(failure, TypeError) and "missing" in message
        classes = "; a model that needs labels must state its number of classes: label_dim=…" if needs_more else ""
        raise InputError(
            f"{self.plain_name}: cannot be called as model(x, sigma{', class_labels' if self.label_dim else ''}) on "
            f"images {size} ({type(failure).__name__}: {message}){classes}; see diffmem.models.as_denoiser"
        ) from failure

    def _failure(self, error: Exception, where: str) -> InputError:
        """What a model of someone else's raised where it was known how to call it, in one line."""
        return InputError(f"{self.plain_name}: fails {where} ({type(error).__name__}: {one_line(error)})")


def as_configured(model: Any, config: DenoiserConfig) -> WrappedDenoiser:
    """The denoiser that `config` describes, made of a copy of `model`: an instance of that network, or what makes one.

    Raises InputError where it is another network, or none.
    """
    network = config.network
    assert isinstance(network, ModuleConfig)
    if isinstance(model, WrappedDenoiser):
        model = model.plain
    elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.Module):
        try:
            model = copy.deepcopy(model)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__}: cannot be copied ({one_line(error)}): give a function that makes it"
            ) from error
    elif callable(model):
        model = model()
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, but must be a module, or a function that makes one")
    if isinstance(model, Denoiser):
        raise InputError(f"the network is {network.name}, your own network, but model is one of diffmem's")
    wrapped = as_denoiser(
        model,
        preconditioning=cast(Any, config.preconditioning) if network.preconditioned else None,
        channels=network.channels,
        resolution=network.resolution,
        label_dim=network.label_dim,
        sigma_min=network.sigma_min,
        sigma_max=network.sigma_max,
        sigma_per_image=network.sigma_per_image,
        class_indices=network.class_indices if network.label_dim else None,
    )
    if not isinstance(wrapped, WrappedDenoiser):
        raise InputError(f"{type(model).__name__}: has its own interface and cannot be stored")
    found = wrapped.config.network
    assert isinstance(found, ModuleConfig)
    if (found.name, found.parameters) != (network.name, network.parameters):
        raise InputError(
            f"model is {found.name} with {found.parameters:,} parameters, but must be {network.name} with "
            f"{network.parameters:,}"
        )
    return wrapped


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _attribute(model: Any, name: str, given: Any) -> Any:
    """What was given, else what the model says under one of the names, None where it says nothing."""
    if given is not None:
        return given
    value = next((getattr(model, each) for each in _NAMES[name] if hasattr(model, each)), None)
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _labels_name(model: Any) -> str | None:
    """Under which name the model takes labels; None: by position."""
    try:
        parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()) and len(parameters) <= 3:
        return next((name for name in _LABEL_NAMES if name in parameters), _LABEL_NAMES[0])
    return next((name for name in _LABEL_NAMES if name in parameters), None)
