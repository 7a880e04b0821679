"""Op `affine_alignment`: the affine map under which an image fits a template best, from a first guess."""

from __future__ import annotations

import torch

from diffmem.ops.affine_alignment import native, reference, torch_backend
from diffmem.ops.affine_alignment.arguments import check
from diffmem.ops.registry import Backend, Op, register

OP = register(
    Op(
        "affine_alignment",
        (
            Backend(
                "native",
                "pair by pair, for float32; torch for others",
                native.affine_alignment,
                native.unavailable,
                native.unfit,
            ),
            Backend("torch", "batches of pairs", torch_backend.affine_alignment),
            Backend("reference", "the plain formula, pair by pair", reference.affine_alignment),
        ),
    )
)


def affine_alignment(
    images: torch.Tensor, templates: torch.Tensor, start: torch.Tensor, iterations: int = 6, *, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map under which each image fits its template best, near a first guess, and what then remains.

    A map (A, b) takes the template's pixel p, counted from its center, to A·p + b, counted from the image's center,
    where the image is read by linear interpolation; beyond its border the nearest pixel continues. What remains is
    √(1 − ρ)·e^(3·(s + |θ|) + ½·|ln √det A|) with the correlation ρ of `diffmem.ops.alignment`, the logarithm s of the
    ratio of A's singular values and its rotation θ in radians: small deformations cost little, others must pay by a
    better fit. Steps are those of Evangelidis and Psarakis (Parametric image alignment using enhanced correlation
    coefficient maximization, PAMI 2008), damped and bounded; the best of all maps on the way is returned.

    Args:
        images: float32 [n, C, H, W]; float64 for the reference and the torch backend.
        templates: [n, C, h, w] of the same dtype and device.
        start: [n, 2, 3], A beside b, x before y; of the same dtype and device.
        iterations: How many steps, 0 … 1000; with 0 the first guess is only measured.
        impl: Forces a backend.

    Returns:
        remainders: [n]; 0 for the same image under a shift, 1 where nothing is alike or something has no variance.
        maps: [n, 2, 3].

    Raises:
        InputError: Shapes, dtypes or devices do not fit, or a forced backend cannot be used.
    """
    check(images, templates, start, iterations)
    backend = OP.select(images.device.type, impl, images, templates, start, iterations)
    return backend.function(images, templates, start, iterations)
