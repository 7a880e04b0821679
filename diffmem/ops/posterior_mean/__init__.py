"""Op `posterior_mean`: the mean of the training rows, weighted by how likely each is behind a noisy observation."""

from __future__ import annotations

import torch

from diffmem.ops.arguments import check_tensor
from diffmem.ops.posterior_mean.arguments import REAL, check_queries, check_rows, check_values
from diffmem.ops.posterior_mean.resident import Request
from diffmem.ops.posterior_mean.rows import OP, PosteriorMean, PosteriorRows

__all__ = ["OP", "PosteriorMean", "PosteriorRows", "Request", "posterior_mean"]


def posterior_mean(
    x: torch.Tensor,
    sigma: torch.Tensor,
    training: torch.Tensor,
    *,
    tolerance: float = 1e-5,
    impl: str | None = None,
) -> PosteriorMean:
    """Σ_i w_i y_i with w = softmax_i(−‖x − y_i‖² / (2σ²)) for each query: the optimal denoiser of a finite set.

    Karras et al., arXiv 2206.00364, appendix B.3; Gu et al., arXiv 2310.02664, section 3.1.

    x: [B, d] real, on the device to compute on. sigma: [B] the noise levels, positive, in the rows' units.
    training: [N, d] uint8, float32 or float64; it may lie on the CPU while x does not. Whoever asks the same rows again
        and again makes them ready once: `PosteriorRows`.
    tolerance: the relative error of the mean that is aimed at, ‖mean − exact‖ / ‖exact‖, for means whose length is
        about the spread of the rows or more. impl: forces a backend.
    Raises InputError where shapes do not fit, the training set is empty or a noise level is not positive.
    """
    check_rows(training)
    check_tensor("posterior_mean", "x", x, REAL)
    check_queries(x, sigma, tolerance, training.shape[1], x.device)
    check_values(x, sigma)
    center = torch.full((x.shape[1],), 128.0 if training.dtype == torch.uint8 else 0.0)
    return PosteriorRows(training, center, x.device, impl=impl).mean(x, sigma, tolerance)
