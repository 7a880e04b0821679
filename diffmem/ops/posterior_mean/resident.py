"""The posterior mean over rows that live on the device: nothing but the queries travels, and one answer comes back.

`diffmem.ops.posterior_mean.blocked` says what is computed and why it may leave most rows out; it walks the rows block
by block and asks the device at each what to do next. Here the rows and their norms about the center are on the device,
made once, and a call has three parts:

1. All logits of all requests are computed, with the largest one of each query. Nothing waits.
2. One transfer brings back, for each request, how many pairs carry weight and how far the logits may be rounded, and
   with them every check of the inputs that is still open: the only synchronization of the call.
3. Each request takes the way that these numbers allow: float64 differences of the pairs that carry weight where these
   are few, the second product where its rounding is below the tolerance, float64 products of everything elsewhere.
   The number of pairs is known by then, so that even listing them waits for nothing.

The largest logit of all rows is known before any row is judged, so fewer pairs are kept than by a walk, never more.

Bytes of a call over 50,000 CIFAR-10 images, 256 queries, on a GPU, by the walk and by this: from the CPU to the device
157 MB and 0 (the queries are there already); read for the norms 1.4 GB (uint8, and float32 written and read) and 0;
synchronizations 12 or more (4 a block, 3 blocks) and 1. Launches of the score kernel: 3, of 88 programs at most, and 1,
of 196.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from diffmem.ops.posterior_mean import blocked
from diffmem.ops.posterior_mean.blocked import DROPPED_SHARE, Float32Products, Logits, Products, RunningMean

LOGIT_BYTES = 1 << 31  # of logits that are kept between the two parts of a call
BLOCK_BYTES = 1 << 30  # of rows in a wider type than they are stored in
KERNEL_ROWS = 1 << 24  # of one launch: offsets within a program's part have 32 bits

IN_FLOAT32: Callable[..., Products] = partial(Float32Products, keeps=False)

Means = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # mean [B, d], log-sum-exp [B], dropped share [B], float64


class Request(NamedTuple):
    """Queries x [B, d] float64 on the device, their noise levels sigma [B], and the rows they look at: a slice
    (start, stop), or a list of rows int64 [n]."""

    x: torch.Tensor
    sigma: torch.Tensor
    images: tuple[int, int] | torch.Tensor


class ResidentRows:
    """Training rows on a device, ready to be averaged.

    rows: [N, d] uint8, float32 or float64, anywhere; order: int64 [N], which of them is row 0, 1, … here. Both are sent
    to the device once, a block at a time, so that the CPU holds no second copy.
    center: [d] float64, whole numbers for uint8 rows. products: makes the two products of a request.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        center: torch.Tensor,
        device: torch.device,
        order: torch.Tensor | None = None,
        products: Callable[..., Products] = IN_FLOAT32,
    ):
        count, d = rows.shape
        self.center = center.to(device, torch.float64)
        self.products = products
        if order is None:
            self.rows = rows.to(device).contiguous()
        else:
            self.rows = torch.empty(count, d, dtype=rows.dtype, device=device)
        self.squared = torch.empty(count, dtype=torch.float64, device=device)
        step = self._step(8)
        for start in range(0, count, step):
            part = slice(start, start + step)
            if order is not None:
                self.rows[part] = rows[order[part]].to(device)
            self.squared[part] = (self.rows[part].double() - self.center).square_().sum(dim=1)

    def __len__(self) -> int:
        return len(self.rows)

    def means(
        self, requests: Sequence[Request], tolerance: float, checks: Sequence[torch.Tensor] = ()
    ) -> tuple[list[Means], list[bool]]:
        """The posterior means of all requests, and what `checks`, 0-dimensional bool tensors, turned out to be.

        One synchronization for each `LOGIT_BYTES` of logits. What comes of a request whose checks failed means nothing.
        """
        parts = [(number, part) for number, request in enumerate(requests) for part in self._split(request)]
        found: list[list[Means]] = [[] for _ in requests]
        passed: list[bool] = []
        while parts or (checks and not passed):
            group: list[Any] = []
            total = 0
            while parts and (not group or total + self._logit_bytes(parts[0][1]) <= LOGIT_BYTES):
                total += self._logit_bytes(parts[0][1])
                group.append(parts.pop(0))
            calls = [(number, _Call(self, part, tolerance)) for number, part in group]
            questions = [question for _, call in calls for question in call.questions()]
            asked = [*questions, *(check.double() for check in checks)] if not passed else questions
            answers = _to_host(torch.stack(asked)) if asked else []
            if not passed:
                passed = [answer != 0 for answer in answers[len(questions) :]]
            for number, call in calls:
                count = len(call.questions())
                found[number].append(call.finish(answers[:count]))
                answers = answers[count:]
        return [_joined(parts) if parts else self._nothing(request) for parts, request in zip(found, requests)], passed  # noqa: B905

    def select(
        self, images: tuple[int, int] | torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows start … stop − 1 of a request's, and their squared norms."""
        if isinstance(images, torch.Tensor):
            chosen = images[start:stop]
            return self.rows[chosen], self.squared[chosen]
        return self.rows[images[0] + start : images[0] + stop], self.squared[images[0] + start : images[0] + stop]

    def _split(self, request: Request) -> list[Request]:
        """By queries, where their logits would be too many at once."""
        if isinstance(request.images, torch.Tensor):
            request = request._replace(images=request.images.to(self.rows.device))
        step = max(1, LOGIT_BYTES // (4 * max(1, _length(request.images))))
        starts = range(0, len(request.x), step)
        return [Request(request.x[i : i + step], request.sigma[i : i + step], request.images) for i in starts]

    def _logit_bytes(self, request: Request) -> int:
        return 4 * len(request.x) * _length(request.images)

    def _nothing(self, request: Request) -> Means:
        return request.x.double(), request.sigma.double(), request.sigma.double()

    def _step(self, width: int) -> int:
        return max(1, BLOCK_BYTES // (width * self.rows.shape[1]))


@dataclass
class _Block:
    """Rows start … stop − 1 of a request, their logits, and which pairs carry weight."""

    start: int
    stop: int
    logits: Logits
    kept: torch.Tensor | None = None


class _Call:
    """One request between its logits and its mean."""

    def __init__(self, resident: ResidentRows, request: Request, tolerance: float) -> None:
        self.resident, self.request, self.tolerance = resident, request, tolerance
        count, d = request.x.shape
        self.length = _length(request.images)
        self.u = request.x.double() - resident.center
        self.weight = 1 / request.sigma.double().square()
        self.state = RunningMean(count, d, request.x.device, waits=False)
        self.blocks: list[_Block] = []
        if count * self.length * d <= blocked.SMALL:
            return  # float64 is as good as free: nothing has to be decided
        self.reach = math.log(self.length / (DROPPED_SHARE * tolerance))
        self.products = resident.products(self.u, self.weight, resident.center, tolerance)
        gathered = isinstance(request.images, torch.Tensor)
        step = resident._step(4) if gathered or isinstance(self.products, Float32Products) else KERNEL_ROWS
        for start in range(0, self.length, step):
            rows, squared = resident.select(request.images, start, min(start + step, self.length))
            self.blocks.append(_Block(start, start + len(rows), self.products.logits(rows, squared)))
        # A lower bound on each query's largest logit, and the least that carries weight beside it.
        known = torch.stack([b.logits.largest().double() - b.logits.error for b in self.blocks]).amax(dim=0)
        for block in self.blocks:
            least = (known - block.logits.error - self.reach).float()
            least = least.nextafter(torch.full_like(least, -math.inf))
            block.kept = block.logits.values >= least[:, None]

    def questions(self) -> list[torch.Tensor]:
        """What has to be known before the request goes on: pairs kept in each block, and the largest rounding."""
        if not self.blocks:
            return []
        rounding = torch.stack([block.logits.rounding.max() for block in self.blocks]).max()
        return [*(block.kept.sum(dtype=torch.float64) for block in self.blocks), rounding]

    def finish(self, answers: list[float]) -> Means:
        """The mean, by the way that the answers to `questions` allow."""
        state, u, weight, request = self.state, self.u, self.weight, self.request
        if not self.blocks:
            self._add_everything()
        else:
            *counts, rounding = answers
            few = sum(counts) <= blocked.DENSE_SHARE * len(u) * self.length
            if few:
                for block, count in zip(self.blocks, counts, strict=True):
                    queries, images = _pairs(block.kept, int(count))
                    rows, _ = self.resident.select(request.images, block.start, block.stop)
                    blocked.add_pairs(state, u, rows, self.resident.center, weight, queries, images)
                    state.dropped += (len(rows) - block.kept.sum(dim=1)) * math.exp(-self.reach)
            elif rounding > 0.5 * self.tolerance:
                self._add_everything()
            else:
                for block in self.blocks:
                    self.products.add_weighted(state, block.logits)
        log_sum = state.top + state.mass.log() - 0.5 * u.square().sum(dim=1) * weight
        return state.mean() + self.resident.center, log_sum, state.dropped / state.mass

    def _add_everything(self) -> None:
        """All pairs in float64."""
        step = self.resident._step(8)
        for start in range(0, self.length, step):
            rows, _ = self.resident.select(self.request.images, start, min(start + step, self.length))
            blocked.add_all(self.state, self.u, rows.double() - self.resident.center, self.weight)


def _to_host(values: torch.Tensor) -> list[float]:
    """The one place where the device is waited for."""
    return values.tolist()


def fits(rows: torch.Tensor, device: torch.device) -> bool:
    """Whether `device` is a GPU with room for rows [N, d], beside what a call needs."""
    if device.type != "cuda":
        return False
    held = rows.numel() * rows.element_size() + 8 * len(rows)
    return held + 2 * BLOCK_BYTES + 2 * LOGIT_BYTES <= torch.cuda.mem_get_info(device)[0]


def _length(images: tuple[int, int] | torch.Tensor) -> int:
    return len(images) if isinstance(images, torch.Tensor) else images[1] - images[0]


def _pairs(kept: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the `count` true entries of kept [B, n], in order: `nonzero` whose size is known, so that
    nobody has to wait for it."""
    flat = kept.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, count)
    listed = torch.empty(count + 1, dtype=torch.int64, device=kept.device)
    listed.scatter_(0, place, torch.arange(len(flat), device=kept.device))  # what is not kept goes behind the end
    listed = listed[:count]
    return listed // kept.shape[1], listed % kept.shape[1]


def _joined(parts: list[Means]) -> Means:
    return parts[0] if len(parts) == 1 else cast(Means, tuple(torch.cat(column) for column in zip(*parts, strict=True)))
