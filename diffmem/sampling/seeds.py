"""One random generator per image, so that an image depends on its seed alone and not on the batch it is made in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffmem.errors import InputError


class SeededGenerators:
    """A generator per seed, seeded with the seed modulo 2³², on `device`. Draws stack one draw of each.

    The order of draws is part of the protocol: latent, then class index where the model has labels (drawn and then
    overwritten where the class is given), then the steps' noise.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed) % 2**32) for seed in seeds]
        if not self.generators:
            raise InputError("seeds: none given")

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(images, *shape) of standard normal numbers."""
        draws = [torch.randn(*shape, generator=g, device=self.device, dtype=dtype) for g in self.generators]
        return torch.stack(draws)

    def randint(self, high: int) -> torch.Tensor:
        """(images,) int64, uniform over 0 … high − 1."""
        return torch.stack([torch.randint(high, (), generator=g, device=self.device) for g in self.generators])

    def randint_among(self, high: int, choices: Sequence[int]) -> torch.Tensor:
        """(images,) int64, uniform over `choices`, some of 0 … high − 1: where `randint(high)` is among them, it is
        that; the other generators draw once more."""
        drawn, allowed = self.randint(high), torch.tensor(sorted(choices), device=self.device)
        for row in (~torch.isin(drawn, allowed)).nonzero().flatten().tolist():
            drawn[row] = allowed[torch.randint(len(allowed), (), generator=self.generators[row], device=self.device)]
        return drawn
