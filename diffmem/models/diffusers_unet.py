"""Networks of the library diffusers as denoisers: `UNet2DModel`, with the noise levels of the pipeline's scheduler.

Such a network knows noise levels t = 0 … T − 1 of the variance-preserving form x_t = √ᾱ_t x + √(1 − ᾱ_t) n, that is,
after division by √ᾱ_t, images with added noise of σ_t = √((1 − ᾱ_t)/ᾱ_t). It predicts n ("epsilon"), x ("sample"), or
v = √ᾱ_t n − √(1 − ᾱ_t) x ("v_prediction").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from safetensors.torch import load_file

from diffmem.errors import InputError, MissingExtraError
from diffmem.inert.boundary import parsing, short
from diffmem.inert.documents import read_json
from diffmem.models.wrapped import WrappedDenoiser, as_denoiser

SCHEME = "diffusers:"
PREDICTIONS = ("epsilon", "sample", "v_prediction")
_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
_NETWORK = "UNet2DModel"
# Of a scheduler's settings those that decide its noise levels.
_LEVELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INSTEAD = "sample it with its own pipeline, and audit the images that it makes (diffmem audit)"


class DiffusersUNet(nn.Module):
    """D(x; σ) of a `diffusers.UNet2DModel`: a model as `diffmem.models.as_denoiser` takes it.

    Args:
        unet: The network.
        alphas_cumprod: ᾱ of its noise levels, [T].
        prediction: What it predicts, one of "epsilon", "sample", "v_prediction".

    Raises:
        InputError: For networks of other images than square ones, or other predictions.
    """

    levels: torch.Tensor
    prediction: torch.Tensor

    def __init__(self, unet: Any, alphas_cumprod: torch.Tensor, prediction: str = "epsilon"):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise InputError(f"prediction_type is {prediction!r}, but must be one of {', '.join(PREDICTIONS)}")
        config, self.unet = unet.config, unet
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else (size or (None, None))
        if height is None or height != width:
            raise InputError(f"sample_size is {size}, but must be the edge of square images")
        if config.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise InputError(f"the network turns {config.in_channels} channels into {config.out_channels}: {_INSTEAD}")
        if config.class_embed_type is not None:
            raise InputError(f"class_embed_type is {config.class_embed_type!r}, which is not supported: {_INSTEAD}")
        self.kind = prediction
        self.channels, self.resolution, self.label_dim = config.in_channels, height, config.num_class_embeds or 0
        known = alphas_cumprod[alphas_cumprod > 0].to(torch.float64)  # at ᾱ = 0 nothing is left of the image
        self.register_buffer("levels", ((1 - known) / known).sqrt().to(torch.float32))
        self.register_buffer("prediction", torch.tensor(PREDICTIONS.index(prediction)))  # a part of the fingerprint
        self.sigma_min, self.sigma_max = self.levels.min().item(), self.levels.max().item()

    def round_sigma(self, sigma: float | torch.Tensor) -> torch.Tensor:
        """The noise level of the network's that is nearest to `sigma`."""
        return self.levels[self._times(torch.as_tensor(sigma, device=self.levels.device).reshape(1))[0]]

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """The denoised images.

        Args:
            x: (B, C, H, W), with noise of deviation sigma.
            sigma: One noise level, or one per image.
            class_labels: (B,) int64, where the network has classes.
        """
        sigma = sigma.reshape(-1).to(torch.float32)
        times = self._times(sigma).expand(len(x))
        sigma = sigma.reshape(-1, 1, 1, 1)
        scale = (1 + sigma**2).rsqrt()  # √ᾱ
        scaled = (x * scale).to(x.dtype)
        given = {} if class_labels is None else {"class_labels": class_labels}
        output = self.unet(scaled, times, **given).sample[:, : self.channels].to(torch.float32)
        if self.kind == "sample":
            return output
        return x - sigma * output if self.kind == "epsilon" else scale**2 * x - sigma * scale * output

    def _times(self, sigma: torch.Tensor) -> torch.Tensor:
        """t of the nearest noise levels, by their logarithm."""
        distances = (sigma.to(torch.float32).clamp_min(1e-12).log()[:, None] - self.levels.log()[None]).abs()
        return distances.argmin(1)


def load_diffusers(folder: str | Path, device: torch.device | str = "cpu") -> WrappedDenoiser:
    """The denoiser of a pipeline, or of its UNet, that diffusers' `save_pretrained` wrote; nothing in it is executed.

    Args:
        folder: Folder of a pipeline with a `UNet2DModel` that makes images (`DDPMPipeline`, `DDIMPipeline`, …), or its
            `unet`.
        device: Where to.

    Raises:
        InputError: It is no such folder, or damaged.
        MissingExtraError: diffusers is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give what save_pretrained of a pipeline of diffusers wrote")
    unet_folder, scheduler_folder = folder, folder.absolute().parent / "scheduler"
    if (folder / _INDEX).is_file():
        parts = _json(folder / _INDEX)
        if latent := sorted({"vae", "vqvae", "text_encoder", "movq"} & set(parts)):
            raise InputError(f"{folder}: is a {parts.get('_class_name')} with a {latent[0]}: {_INSTEAD}")
        unet_folder, scheduler_folder = folder / "unet", folder / "scheduler"
    if not (unet_folder / _CONFIG).is_file():
        raise InputError(f"{folder}: no {_INDEX} or {_CONFIG} in it: give the folder of a pipeline of diffusers")
    network = _json(unet_folder / _CONFIG)
    if (name := network.get("_class_name")) != _NETWORK:
        raise InputError(f"{unet_folder}: is a {short(name)}, and only {_NETWORK} is read: {_INSTEAD}")
    if not (unet_folder / _WEIGHTS).is_file():
        raise InputError(
            f"{unet_folder}: no {_WEIGHTS} in it; weights in other formats could run code when loaded, so they are "
            "refused: save the pipeline again with `save_pretrained`, which writes safetensors"
        )
    if not (scheduler_folder / _SCHEDULER).is_file():
        raise InputError(
            f"{folder}: no scheduler/{_SCHEDULER} beside it, which defines the noise levels: save the whole pipeline"
        )
    settings = _json(scheduler_folder / _SCHEDULER)
    if not settings.keys() & {"beta_schedule", "beta_start", "trained_betas"}:
        raise InputError(
            f"{scheduler_folder / _SCHEDULER}: {settings.get('_class_name')} has no betas, and other noise schedules "
            f"are not supported: {_INSTEAD}"
        )
    diffusers = _library(folder)
    with parsing(scheduler_folder / _SCHEDULER, "a scheduler with betas"):
        chosen = {name: settings[name] for name in _LEVELS if settings.get(name) is not None}
        scheduler = diffusers.DDPMScheduler(**chosen)
    with parsing(unet_folder / _CONFIG, f"the description of a {_NETWORK}"):
        unet = diffusers.UNet2DModel.from_config(network)
    with parsing(unet_folder / _WEIGHTS, "a complete safetensors file of this network"):
        unet.load_state_dict(load_file(unet_folder / _WEIGHTS))
    try:
        model = DiffusersUNet(unet, scheduler.alphas_cumprod, settings.get("prediction_type", "epsilon"))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    made = as_denoiser(model.to(device).eval(), sigma_per_image=False, class_indices=True)
    return cast("WrappedDenoiser", made)


def _json(path: Path) -> dict[str, Any]:
    values = read_json(path, "save the pipeline again")
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a diffusers configuration: save the pipeline again")
    return values


def _library(folder: Path) -> Any:
    try:
        import diffusers
    except ImportError:
        raise MissingExtraError("diffusers", "diffusers", f"reading {folder}, a pipeline of diffusers,") from None
    return diffusers
