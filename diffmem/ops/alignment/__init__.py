"""Op `alignment`: the best correlation of each template with any window of a query image's variants."""

from __future__ import annotations

import torch

from diffmem.ops.alignment import native, reference, torch_backend
from diffmem.ops.alignment.arguments import check
from diffmem.ops.registry import Backend, Op, register

OP = register(
    Op(
        "alignment",
        (
            Backend(
                "native",
                "products of templates side by side, for float32; torch for others",
                native.alignment,
                native.unavailable,
                native.unfit,
            ),
            Backend("torch", "windows as rows of matrix products", torch_backend.alignment),
            Backend("reference", "the plain formula, window by window", reference.alignment),
        ),
    )
)


def alignment(
    searched: torch.Tensor, templates: torch.Tensor, *, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest correlation of each template with a window of its query's variants, and where that window lies.

    The correlation of a window and a template of one size is Σ_c ⟨w_c − mean(w_c), t_c − mean(t_c)⟩ over the product
    of the two lengths √(Σ_c ‖·‖²): brightness and color are removed per channel, contrast over all channels
    (zero-mean normalized cross-correlation). It is 0 where a window or a template has no variance.

    Args:
        searched: float32 [Q, V, C, H, W], V variants (mirrored, scaled, …) of each query image; float64 for the
            reference and the torch backend.
        templates: [Q, K, C, h, w] of the same dtype and device, h <= H and w <= W: what each query is compared with.
        impl: Forces a backend.

    Returns:
        correlations: [Q, K] in [−1, 1].
        positions: int64 [Q, K], (v·(H − h + 1) + y)·(W − w + 1) + x of the window whose first pixel is (y, x) in
            variant v; the first of equals.

    Raises:
        InputError: Shapes, dtypes or devices do not fit, or a forced backend cannot be used.
    """
    check(searched, templates)
    return OP.select(searched.device.type, impl, searched, templates).function(searched, templates)
