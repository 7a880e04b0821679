"""The posterior mean as it is written: every difference, in float64."""

from __future__ import annotations

import torch


def posterior_mean_reference(
    x: torch.Tensor,
    sigma: torch.Tensor,
    training: torch.Tensor,
    tolerance: float = 0.0,
    center: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [B, d], log Σ_i exp(−‖x − y_i‖² / (2σ²)) [B] and dropped share [B], float64, of x [B, d], sigma [B] and
    training [N, d]. Nothing is dropped, whatever the tolerance, and differences need no center."""
    x, sigma, y = x.double(), sigma.double(), training[:].to(x.device).double()
    squared = torch.stack([(row - y).square().sum(dim=1) for row in x]) if len(x) else x.new_empty(0, len(y))
    logits = squared / (-2 * sigma.square()[:, None])
    log_sum = torch.logsumexp(logits, dim=1)
    return torch.softmax(logits, dim=1) @ y, log_sum, torch.zeros_like(log_sum)
