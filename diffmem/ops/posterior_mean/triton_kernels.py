"""Both products of the posterior mean of uint8 rows as Triton kernels, and an online log-sum-exp between them.

With u = x − c and z_i = y_i − c for a center c of whole numbers (`diffmem.ops.posterior_mean.blocked` says what becomes
of what these kernels compute), for a block of n images:

**scores.** u is rounded to P bytes, u ≈ Σ_p 2^8(P−1−p)·unit·q_p, and q_p·(y − 128) is an exact product of signed bytes
on the matrix unit, summed in int32. So s_i = (Σ_p unit_p·(q_p·(y_i − 128) − q_p·(c − 128)) − ‖z_i‖²/2) / σ² has two
errors only: what the rounding of u leaves, at most unit/2·‖z‖₁, and the float32 arithmetic after the sums. A program
has BLOCK_M queries and SPAN images, a tile of BLOCK_N at a time. It keeps the running maximum and the running Σ exp(s −
maximum), and writes them beside the scores: two numbers for each query and span.

**weighted sums.** p_i = exp(s_i − top) in two parts of 11 bits, p ≈ high + low/2048, both float16, times z, whole
numbers up to 255 and so exact in float16, summed in float32 over the images of a program, never more than GROUP spans:
long sums on the matrix unit lose bits. Spans in which no query of the program has weight are not even read; this, and
the sums of the programs, which are added in float64 in a fixed order, makes the cost that of what carries weight.

Bytes that must move, per block of n images and B queries, by the kernels' grids: scores n·d/BLOCK_M·B + P·B·d/SPAN·n
for operands and 4·B·n for the result; sums 4·B·n·d/BLOCK_N and n·d·B/BLOCK_M; of these n·d + 8·B·n from memory, the
rest from the second-level cache. Operations: 2·P·B·n·d in 8 bits and 4·B·n·d in 16. For CIFAR-10 and 256 queries on an
H100 (1979 and 989 Top/s, 3.35 TB/s): 79·P Gop, 0.08 ms for P = 2; 157 Gop, 0.16 ms; memory 0.26 GB, 0.08 ms. Not
measured: no GPU was there.

Not done: float16 or tf32 instead of bytes for the first product would need three products for 24 bits; sums of p·z in
int32 would be exact, but the matrix unit wants bytes with the summed index contiguous, which images do not have here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffmem.ops.posterior_mean.tiles import SPAN, score_tile, sum_tile
from diffmem.ops.triton_ops import launch

LOG2_E = 1.4426950408889634


@triton.jit
def _tile(pointer, row, rows, row_stride, column, columns, other):
    """[row, column] of what begins at `pointer`, `other` where there is nothing. Offsets have 32 bits."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + row[:, None] * row_stride + column[None, :], mask=mask, other=other)


@triton.jit
def _scores(
    planes, shifts, units, weight, rows, half_norms, scores, tops, masses, B, n, d, stride, spans,
    PLANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program: the scores of BLOCK_M queries and SPAN images."""
    # Everything is addressed from where the program's part of it begins: 64 bits there, 32 within.
    block, span = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    query, local = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_M)
    queries, images = B - block * BLOCK_M, n - span * SPAN
    planes += block * BLOCK_M * PLANES * d
    rows += span * SPAN * stride
    scores += block * BLOCK_M * n + span * SPAN
    here = local < queries
    scale = tl.load(weight + query, mask=here, other=0.0)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, SPAN, BLOCK_N):
        image = start + tl.arange(0, BLOCK_N)
        first = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        second = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        third = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for begin in range(0, d, BLOCK_K):
            value = begin + tl.arange(0, BLOCK_K)
            y = _tile(rows, image, images, stride, value, d, 128)
            z = tl.trans((y ^ 128).to(tl.int8, bitcast=True))  # y − 128
            first = tl.dot(_tile(planes, local, queries, PLANES * d, value, d, 0), z, first, out_dtype=tl.int32)
            plane = _tile(planes + d, local, queries, PLANES * d, value, d, 0)
            second = tl.dot(plane, z, second, out_dtype=tl.int32)
            if PLANES == 3:
                plane = _tile(planes + 2 * d, local, queries, PLANES * d, value, d, 0)
                third = tl.dot(plane, z, third, out_dtype=tl.int32)
        place = query * PLANES
        s = _scaled(first, shifts, units, place, here) + _scaled(second, shifts, units, place + 1, here)
        if PLANES == 3:
            s += _scaled(third, shifts, units, place + 2, here)
        half = tl.load(half_norms + span * SPAN + image, mask=image < images, other=0.0)
        s = (s - half[None, :]) * scale[:, None]
        pairs = here[:, None] & (image < images)[None, :]
        tl.store(scores + local[:, None] * n + image[None, :], s, mask=pairs)
        s = tl.where(pairs, s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # of queries that are not there
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(s - base[:, None]), axis=1)
        largest = larger
    tl.store(tops + query * spans + span, largest, mask=here)
    tl.store(masses + query * spans + span, total, mask=here)


@triton.jit
def _scaled(sums, shifts, units, place, here):
    """A plane's share of u·z."""
    shift = tl.load(shifts + place, mask=here, other=0)
    unit = tl.load(units + place, mask=here, other=0.0)
    return (sums - shift[:, None]).to(tl.float32) * unit[:, None]


@triton.jit
def _weighted_sums(
    scores, top, kept, rows, center, sums, B, n, d, stride, spans,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: Σ exp(s − top)·(y − center) of BLOCK_M queries and BLOCK_N values over GROUP spans of images."""
    chunk, block, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query, value = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    queries, values = B - block * BLOCK_M, d - chunk * BLOCK_N
    here = query < queries
    reference = tl.load(top + block * BLOCK_M + query, mask=here, other=0.0)
    middle = tl.load(center + chunk * BLOCK_N + value, mask=value < values, other=0.0)
    high_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    low_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(GROUP):
        span = group * GROUP + number
        if tl.load(kept + block * spans + span, mask=span < spans, other=0) != 0:
            images = n - span * SPAN
            logits = scores + block * BLOCK_M * n + span * SPAN
            y_rows = rows + span * SPAN * stride + chunk * BLOCK_N
            for start in range(0, SPAN, BLOCK_K):
                image = start + tl.arange(0, BLOCK_K)
                s = _tile(logits, query, queries, n, image, images, float("-inf"))
                p = tl.exp(s - reference[:, None])
                high = p.to(tl.float16)
                low = ((p - high.to(tl.float32)) * 2048.0).to(tl.float16)
                # Images that are not there have weight 0, values that are not there are not stored.
                y = _tile(y_rows, image, images, stride, value, values, 0)
                z = y.to(tl.float16) - middle.to(tl.float16)[None, :]
                high_sums = tl.dot(high, z, high_sums)
                low_sums = tl.dot(low, z, low_sums)
    sums += (group * B + block * BLOCK_M) * d + chunk * BLOCK_N
    mask = here[:, None] & (value < values)[None, :]
    tl.store(sums + query[:, None] * d + value[None, :], high_sums + low_sums * (1.0 / 2048), mask=mask)


def launch_scores(
    planes: torch.Tensor,
    shifts: torch.Tensor,
    units: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    half_norms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [B, n], and the largest and Σ exp(s − largest) of each span of images [B, spans], float32.

    planes int8 [B, P, d], shifts int32 [B, P], units float32 [B, P], weight float32 [B], rows uint8 [n, d] with
    contiguous rows, half_norms float32 [n].
    """
    (queries, count, d), n = planes.shape, len(rows)
    cut, spans = score_tile(queries), -(-n // SPAN)
    scores = torch.empty(queries, n, dtype=torch.float32, device=rows.device)
    tops, masses = (torch.empty(queries, spans, dtype=torch.float32, device=rows.device) for _ in range(2))
    if scores.numel():
        launch(
            _scores, (-(-queries // cut.block_m), spans),
            planes, shifts, units, weight, rows, half_norms, scores, tops, masses, queries, n, d, rows.stride(0), spans,
            PLANES=count, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, SPAN=SPAN,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return scores, tops, masses


def launch_weighted_sums(
    scores: torch.Tensor, top: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor, center: torch.Tensor
) -> torch.Tensor:
    """Σ exp(s − top)·(y − center) over all images of the spans that are kept [B, d] float64.

    top float32 [B]; kept bool [B, spans]: a span is read for a query if it is kept for one that shares its tile;
    center float32 [d], whole numbers.
    """
    queries, n = scores.shape
    d, spans = rows.shape[1], kept.shape[1]
    cut = sum_tile(queries)
    blocks, chunks, groups = -(-queries // cut.block_m), -(-d // cut.block_n), -(-spans // cut.group)
    padded = torch.zeros(blocks * cut.block_m, spans, dtype=torch.bool, device=rows.device)
    padded[:queries] = kept
    tiles = padded.reshape(blocks, cut.block_m, spans).any(dim=1).to(torch.uint8)
    sums = torch.empty(groups, queries, d, dtype=torch.float32, device=rows.device)
    if sums.numel():
        launch(
            _weighted_sums, (chunks, blocks, groups),
            scores, top, tiles, rows, center, sums, queries, n, d, rows.stride(0), spans,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, SPAN=SPAN, GROUP=cut.group,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return sums.sum(dim=0, dtype=torch.float64)
