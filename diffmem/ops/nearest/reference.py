"""The k nearest training images, the plain way: every difference, squared and summed. Slow and obviously right."""

from __future__ import annotations

from diffmem.lazy import torch


def nearest_reference(queries: torch.Tensor, training: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances [Q, k] and indices [Q, k] of the k nearest rows of `training` for each row of `queries`.

    uint8 rows are compared in int64, floats in float64. Equal distances go to the lower index (the sort is stable).
    """
    wide = torch.int64 if queries.dtype == torch.uint8 else torch.float64
    squared = torch.empty(len(queries), k, dtype=wide, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    everyone = training.to(queries.device, wide)
    for row, query in enumerate(queries.to(wide)):
        distances = (everyone - query).square().sum(dim=1)
        ordered, order = distances.sort(stable=True)
        squared[row], indices[row] = ordered[:k], order[:k]
    return squared, indices
