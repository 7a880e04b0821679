"""EDM's augmentations that do not leak into samples: the network is told what was done, and later asked for nothing.

The geometric transformations of Table 6 in Karras et al. (arXiv 2206.00364): mirroring, scaling, rotation, anisotropic
scaling, translation, each of them with a probability. They are composed into one affine map per image. Pixels come from
a bicubic interpolation of the image continued by reflection, at twice the resolution per axis, averaged 2×2 against
aliasing (EDM filters with a wavelet instead, which is sharper). Images to which none but mirrorings befell are exact.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

LABELS = 9  # length of an augmentation label
_SCALE = 2**0.2
_TRANSLATE = 1 / 8


def draw_augmentation(count: int, probability: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """(count, 8) float64 on the CPU, a_0 … a_7 of the paper's table; 0 where a transformation does not apply.

    a_0, a_1 mirror along x (always drawn) and y; a_2 scales by 2^(0.2·a_2); a_3 rotates; a_4, a_5 stretch along angle
    a_4 by 2^(0.2·a_5); a_6, a_7 move by eighths of the image.
    """
    uniform = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    normal = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    applies = torch.rand(count, 5, generator=generator, dtype=torch.float64) < probability
    yflip, scaling, rotation, anisotropy, translation = applies.unbind(1)
    return torch.stack(
        [
            (uniform[:, 0] < 0.5).double(),
            (uniform[:, 1] < 0.5) * yflip,
            normal[:, 0] * scaling,
            (2 * uniform[:, 2] - 1) * math.pi * rotation,
            (2 * uniform[:, 3] - 1) * math.pi * anisotropy,
            normal[:, 1] * anisotropy,
            normal[:, 2] * translation,
            normal[:, 3] * translation,
        ],
        dim=1,
    )


def augmentation_labels(a: torch.Tensor) -> torch.Tensor:
    """(count, 9) float32: a_0, a_1, a_2, cos a_3 − 1, sin a_3, a_5·cos a_4, a_5·sin a_4, a_6, a_7; 0: nothing done."""
    angle, along, stretch = a[:, 3], a[:, 4], a[:, 5]
    turned = [angle.cos() - 1, angle.sin(), stretch * along.cos(), stretch * along.sin()]
    return torch.stack([a[:, 0], a[:, 1], a[:, 2], *turned, a[:, 6], a[:, 7]], dim=1).float()


def augment(images: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The images (B, C, H, W), transformed as `a` (B, 8, see `draw_augmentation`) says."""
    moved = (a[:, 2:] != 0).any(dim=1).to(images.device)
    mirrored = images
    for axis, column in ((3, 0), (2, 1)):
        which = (a[:, column] != 0).to(images.device)
        mirrored = torch.where(which[:, None, None, None], mirrored.flip(axis), mirrored)
    if not bool((a[:, 2:] != 0).any()):
        return mirrored
    inverse = _inverse_map(a)[:, :2].to(device=images.device, dtype=images.dtype)
    batch, channels, height, width = images.shape
    grid = F.affine_grid(inverse, [batch, channels, 2 * height, 2 * width], align_corners=False)
    fine = F.grid_sample(mirrored, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return torch.where(moved[:, None, None, None], F.avg_pool2d(fine, 2).clamp(-1, 1), mirrored)


def _inverse_map(a: torch.Tensor) -> torch.Tensor:
    """(B, 3, 3): from places in the result to places in the mirrored image, both in −1 … 1."""
    identity = torch.eye(3, dtype=a.dtype).expand(len(a), 3, 3)

    def scale(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=1))

    def rotate(angle: torch.Tensor) -> torch.Tensor:
        matrix = identity.clone()
        matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
        matrix[:, 1, 0] = angle.sin()
        matrix[:, 0, 1] = -angle.sin()
        return matrix

    translate = identity.clone()
    translate[:, :2, 2] = 2 * _TRANSLATE * a[:, 6:8]  # the image is 2 wide in these coordinates
    zoom, stretch = _SCALE ** a[:, 2], _SCALE ** a[:, 5]
    forward = translate @ rotate(a[:, 4]) @ scale(stretch, 1 / stretch) @ rotate(-a[:, 4])
    forward = forward @ rotate(-a[:, 3]) @ scale(zoom, zoom)
    return torch.linalg.inv(forward)
