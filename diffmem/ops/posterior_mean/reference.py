"""The posterior mean as it is written: every difference, in float64."""

from __future__ import annotations

import torch


def posterior_mean_reference(
    x: torch.Tensor, sigma: torch.Tensor, training: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [B, d] and log Σ_i exp(−‖x − y_i‖² / (2σ²)) [B], float64, of x [B, d], sigma [B], training [N, d]."""
    x, sigma, y = x.double(), sigma.double(), training.to(x.device).double()
    squared = torch.stack([(row - y).square().sum(dim=1) for row in x]) if len(x) else x.new_empty(0, len(y))
    logits = squared / (-2 * sigma.square()[:, None])
    return torch.softmax(logits, dim=1) @ y, torch.logsumexp(logits, dim=1)
