"""How images are brought to what a network wants, by the name of who does it so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from diffmem.errors import InputError
from diffmem.lazy import torch

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocessing:
    """Resized, cropped and normalized images, (x / 255 − mean) / std, float32 [B, 3, H, W]; gray ones as three equal
    channels.

    Attributes:
        name: What it is called.
        side: Pixels: of the shorter side (the aspect ratio is kept), or both of `square`; None: images stay as they
            are.
        square: Whether images are squeezed to side × side.
        crop: Side of the square that is cut from the center then, or None.
        filter: "bilinear" or "bicubic", antialiased as Pillow does it, rounded to gray levels.
        mean: Mean of each channel, on the scale of 0 to 1.
        std: The same.
    """

    name: str
    side: int | None
    square: bool = False
    crop: int | None = None
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = _IMAGENET[0]
    std: tuple[float, float, float] = _IMAGENET[1]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The images as the network wants them.

        Args:
            images: uint8 [B, C, H, W], C 1 or 3.
        """
        mean, std = (torch.tensor(each, device=images.device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return (self.resized(images).float() / 255 - mean) / std

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W], resized and cropped."""
        if images.shape[1] not in (1, 3):
            raise InputError(
                f"networks take gray or color images, these have {images.shape[1]} channels: pass color='rgb'"
            )
        images = images.expand(-1, 3, -1, -1)
        height, width = images.shape[2:]
        if self.side is not None:
            shorter = min(height, width)
            # As torchvision rounds: the longer side down.
            size = (
                (self.side, self.side) if self.square else (height * self.side // shorter, width * self.side // shorter)
            )
            for step in ((height, size[1]), size):  # Pillow resizes lines, then columns, and rounds after each
                if step != tuple(images.shape[2:]):
                    values = torch.nn.functional.interpolate(
                        images.float(), step, mode=self.filter, antialias=True, align_corners=False
                    )
                    images = values.round().clamp(0, 255).to(torch.uint8)
        if self.crop is not None:
            height, width = images.shape[2:]
            if min(height, width) < self.crop:
                raise InputError(
                    f"preprocessing {self.name!r} cuts out {self.crop} pixels, images are {height}x{width}"
                )
            top, left = (round((length - self.crop) / 2) for length in (height, width))  # as torchvision
            images = images[:, :, top : top + self.crop, left : left + self.crop]
        return images

    def of_side(self, side: int) -> Preprocessing:
        """The same for a network whose input is a square of another side."""
        scaled = None if self.side is None else max(side, round(self.side * side / (self.crop or self.side)))
        return replace(self, side=scaled, crop=None if self.crop is None else side)


PRESETS = {
    each.name: each
    for each in (
        # SSCD's README: `small_288`, and `skew_320` for batches of one size
        Preprocessing("sscd", 288),
        Preprocessing("sscd-320", 320, square=True),
        # somepago/DCR (Somepalli 2023), and Wen 2024 after it
        Preprocessing("dcr", 256, crop=224, mean=_HALF[0], std=_HALF[1]),
        # dgm-eval's and fld's DINOv2
        Preprocessing("dinov2", 224, square=True, filter="bicubic"),
        # open_clip's and OpenAI's
        Preprocessing("clip", 224, crop=224, filter="bicubic", mean=_CLIP[0], std=_CLIP[1]),
        # torchvision's evaluation of classifiers
        Preprocessing("imagenet", 256, crop=224),
        # images at their own size, on the scale of 0 to 1 and of −1 to 1
        Preprocessing("0-1", None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        Preprocessing("-1-1", None, mean=_HALF[0], std=_HALF[1]),
    )
}


def preprocessing_preset(name: str) -> Preprocessing:
    """The preset of that name.

    Raises:
        InputError: There is none.
    """
    if name not in PRESETS:
        raise InputError(f"preprocessing must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
