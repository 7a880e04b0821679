"""The order in which training images come: one shuffle, then the same order every epoch, or one that keeps mixing."""

from __future__ import annotations

from typing import Any

import numpy as np


class DataOrder:
    """An endless sequence of the numbers below `size`, decided by `seed`.

    All are shuffled once. With window 0 that order repeats for ever: every epoch shows every image once, in the same
    order. A positive window, a share of the size, mixes the order while it is read: each number, after it was given
    out, changes places with one of the window·size entries before it in the cycle, so that an image comes back sooner
    or later than an epoch from now, and no order is seen twice.
    """

    def __init__(self, size: int, seed: int, window: float = 0.0) -> None:
        self._random = np.random.default_rng(seed)
        self.order = self._random.permutation(size)
        self.position = 0
        self.reach = round(window * size)

    def take(self, count: int) -> np.ndarray:
        """The next `count` numbers, int64."""
        size = len(self.order)
        places = (self.position + np.arange(count)) % size
        self.position += count
        if self.reach < 2:
            return self.order[places]
        order, taken = self.order, np.empty(count, dtype=np.int64)
        partners = (places - self._random.integers(self.reach, size=count)) % size
        for n, (place, partner) in enumerate(zip(places.tolist(), partners.tolist(), strict=True)):
            taken[n] = order[place]
            order[place], order[partner] = order[partner], order[place]
        return taken

    def state(self) -> dict[str, Any]:
        """Where it stands, in plain JSON types, without the order itself."""
        return {"position": self.position, "random": self._random.bit_generator.state}

    def restore(self, state: dict[str, Any], order: np.ndarray) -> None:
        """Continues where `state()` and `order` were taken."""
        order = np.array(order, dtype=np.int64)
        if len(order) != len(self.order) or not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ValueError("not an order of the same images")
        if int(state["position"]) < 0:
            raise ValueError("a negative position")
        self.order = order
        self.position = int(state["position"])
        self._random.bit_generator.state = state["random"]
