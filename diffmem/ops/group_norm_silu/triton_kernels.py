"""GroupNorm, scale and shift, SiLU as Triton kernels, forward and backward, each one launch.

Notation, per image b, channel c of group G, pixel p, with n = channels · pixels of a group:

    z = x + added          x̂ = (z − mean_G)·rstd_G          v = x̂·gain + offset          y = v·sigmoid(v)
    gain = weight·(1 + scale)          offset = bias·(1 + scale) + shift

and backward, which computes x̂, v and the derivative of SiLU again from x, the only map that was kept:

    g = dy·silu'(v)          S1 = Σ_p g          S2 = Σ_p g·x̂          S3 = Σ_p x̂
    dx = rstd·(g·gain − Σ_G gain·S1/n − x̂·Σ_G gain·S2/n)
    dweight = Σ_b (1 + scale)·S2     dbias = Σ_b (1 + scale)·S1     dscale = weight·S2 + bias·S1     dshift = S1
    dadded = Σ_p dx = rstd·(gain·S1 − pixels·Σ_G gain·S1/n − S3·Σ_G gain·S2/n)

A program has some whole groups of one image, channels side by side, and goes through their pixels twice, a tile at a
time: for the sums, and for the result. Each thread keeps sums of its own, so that nothing is exchanged inside of the
loops. Small maps are one tile and stay on chip (see `diffmem.ops.group_norm_silu.tiles`).

Statistics are float32, of the deviations from the mean of the first tile, never E[z²] − E[z]²; deviations of later
tiles are merged by Welford's update. The parameters' gradients are summed over 32 images at a time, then over those
sums: two levels in a fixed order, no atomics. Bytes moved per element of the map, s = itemsize (statistics and
parameters come to less than 1 % of that; tests count the loads and stores of the compiled kernels, and hold them to
this; benchmarks/results/kernel_traffic.csv has them for the networks' maps):

                        memory                                        and again, from the cache
    forward             2s (read x, write y)                          s  (x; nothing where one tile holds the map)
    backward            3s (read x and dy, write dx)                  2s (x and dy; the same)

What is read again are the program's own channels (64 of 32×32 pixels in bfloat16: 0.13 MB forward, 0.26 MB backward).
Tiles are [pixels, channels] for channels_last maps and [channels, pixels] for contiguous ones. All loads but those of
the map are marked evict_last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from diffmem.ops.group_norm_silu import arguments
from diffmem.ops.group_norm_silu.tiles import WIDEST, Tile, fits, tile
from diffmem.ops.triton_ops import launch

BLOCK_IMAGES, BLOCK_CHANNELS = 32, 64  # the tile that sums parameter gradients over the batch


@triton.jit
def _place(blocks):
    """Block of groups and image of this program, and the number of images; counts of images are 64 bits wide, and with
    them every product that leads from one to the next."""
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    images = (tl.num_programs(0) // blocks).to(tl.int64)
    return program % blocks, image, images


@triton.jit
def _columns(block, units, C, group_channels, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_C] each: channel, whether it is one of this program's units·ALIGN channels, and its group."""
    k = tl.arange(0, BLOCK_C)
    width = units * ALIGN  # whole groups
    channel = block * width + k
    valid = (k < width) & (channel < C)
    return channel, valid, channel // group_channels


@triton.jit
def _over_group(columns, group):
    """[BLOCK_C]: for each column the sum over its group of `columns`, which are zero where there is no channel."""
    same = tl.expand_dims(group, 1) == tl.expand_dims(group, 0)
    return tl.sum(tl.where(same, tl.expand_dims(columns, 0), 0.0), axis=1)


@triton.jit
def _offsets(channel, valid, first_pixel, C, pixels, BLOCK_P: tl.constexpr, AXIS: tl.constexpr):
    """A tile's offsets inside an image, and its mask; AXIS is the axis of the pixels: 0 channels_last, 1 contiguous."""
    p = first_pixel + tl.arange(0, BLOCK_P)
    mask = tl.expand_dims(valid, AXIS) & tl.expand_dims(p < pixels, 1 - AXIS)
    if AXIS == 0:
        offsets = tl.expand_dims(p, 1) * C + tl.expand_dims(channel, 0)
    else:
        offsets = tl.expand_dims(channel, 1) * pixels + tl.expand_dims(p, 0)
    return offsets, mask


@triton.jit
def _vector(pointer, offset, valid):
    return tl.load(pointer + offset, mask=valid, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _map(pointer, offsets, mask, AGAIN: tl.constexpr):
    """A tile of a map; AGAIN where it is going to be read once more."""
    if AGAIN:
        values = tl.load(pointer + offsets, mask=mask, other=0.0)
    else:
        values = tl.load(pointer + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    return values.to(tl.float32)


@triton.jit
def _shifted(x, added_row, offsets, mask, ADDED: tl.constexpr, AXIS: tl.constexpr, AGAIN: tl.constexpr):
    """z = x + added as a tile, zero outside of the mask; x: the image, added_row [BLOCK_C]."""
    z = _map(x, offsets, mask, AGAIN)
    if ADDED:
        z = tl.where(mask, z + tl.expand_dims(added_row, AXIS), 0.0)
    return z


@triton.jit
def _added_row(added, image, channel, valid, added_stride, ADDED: tl.constexpr):
    if ADDED:
        return _vector(added, image * added_stride + channel, valid)
    else:
        return 0.0


@triton.jit
def _gain_and_offset(
    image, channel, valid, weight, bias, scale, shift, scale_stride, shift_stride, ADAPTIVE: tl.constexpr
):
    gain = _vector(weight, channel, valid)
    offset = _vector(bias, channel, valid)
    if ADAPTIVE:
        factor = 1.0 + _vector(scale, image * scale_stride + channel, valid)
        gain *= factor
        offset = offset * factor + _vector(shift, image * shift_stride + channel, valid)
    return gain, offset


@triton.jit
def _activated(v, SILU: tl.constexpr):
    if SILU:
        v = v * tl.sigmoid(v)
    return v


@triton.jit
def _activation_gradient(dy, v, SILU: tl.constexpr):
    if SILU:
        sigmoid = tl.sigmoid(v)
        dy = dy * sigmoid * (1.0 + v * (1.0 - sigmoid))
    return dy


@triton.jit
def _deviations(
    x, added_row, center, channel, valid, C, pixels,
    ADDED: tl.constexpr, AXIS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of each element of the tile over all rounds: mean and sum of squared deviations of z − center, and how many
    rounds had a pixel there, [BLOCK_P] along AXIS."""
    if AXIS == 0:
        means = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    else:
        means = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, pixels, BLOCK_P):
        offsets, mask = _offsets(channel, valid, start, C, pixels, BLOCK_P, AXIS)
        z = _shifted(x, added_row, offsets, mask, ADDED, AXIS, True) - tl.expand_dims(center, AXIS)
        step = tl.where(mask, z - means, 0.0)
        means += step * (1.0 / (start // BLOCK_P + 1))
        squares += step * (z - means)
    counts = ((pixels - tl.arange(0, BLOCK_P) + BLOCK_P - 1) // BLOCK_P).to(tl.float32)
    return means, squares, tl.expand_dims(counts, 1 - AXIS)


@triton.jit
def _forward(
    x, y, mean, rstd, weight, bias, scale, shift, added,
    C, pixels, num_groups, group_channels, units, blocks, eps, x_stride, scale_stride, shift_stride, added_stride,
    SILU: tl.constexpr, ADAPTIVE: tl.constexpr, ADDED: tl.constexpr, AXIS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SINGLE_PASS: tl.constexpr,
):  # fmt: skip
    """One program: units·ALIGN channels, whole groups, of one image. SINGLE_PASS: a tile has all of its pixels."""
    block, image, images = _place(blocks)
    channel, valid, group = _columns(block, units, C, group_channels, ALIGN, BLOCK_C)
    x += image * x_stride
    y += image * C * pixels
    added_row = _added_row(added, image, channel, valid, added_stride, ADDED)
    n = 1.0 * group_channels * pixels
    offsets, mask = _offsets(channel, valid, 0, C, pixels, BLOCK_P, AXIS)
    z = _shifted(x, added_row, offsets, mask, ADDED, AXIS, not SINGLE_PASS)
    of_first = 1.0 * group_channels * tl.minimum(pixels, BLOCK_P)
    center = _over_group(tl.sum(z, axis=AXIS), group) / of_first
    # What separates the mean from `center`, the first tile's, or its rounding: a constant group comes out as zero.
    if SINGLE_PASS:
        z = tl.where(mask, z - tl.expand_dims(center, AXIS), 0.0)
        rest = _over_group(tl.sum(z, axis=AXIS), group) / n
        z = tl.where(mask, z - tl.expand_dims(rest, AXIS), 0.0)
        variance = _over_group(tl.sum(z * z, axis=AXIS), group) / n
    else:
        means, squares, counts = _deviations(
            x, added_row, center, channel, valid, C, pixels, ADDED, AXIS, BLOCK_C, BLOCK_P
        )
        rest = _over_group(tl.sum(means * counts, axis=AXIS), group) / n
        between = tl.where(tl.expand_dims(valid, AXIS), means - tl.expand_dims(rest, AXIS), 0.0)
        variance = _over_group(tl.sum(squares + counts * between * between, axis=AXIS), group) / n
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    first = valid & (channel % group_channels == 0)
    row = image * num_groups + group
    tl.store(mean + row, center, mask=first)
    tl.store(mean + images * num_groups + row, rest, mask=first)
    tl.store(rstd + row, inverse, mask=first)
    gain, offset = _gain_and_offset(
        image, channel, valid, weight, bias, scale, shift, scale_stride, shift_stride, ADAPTIVE
    )
    gain = tl.expand_dims(inverse * gain, AXIS)
    offset = tl.expand_dims(offset, AXIS)
    if SINGLE_PASS:
        tl.store(y + offsets, _activated(z * gain + offset, SILU).to(y.dtype.element_ty), mask=mask)
    else:
        for start in range(0, pixels, BLOCK_P):
            offsets, mask = _offsets(channel, valid, start, C, pixels, BLOCK_P, AXIS)
            z = _shifted(x, added_row, offsets, mask, ADDED, AXIS, False)
            z = z - tl.expand_dims(center, AXIS) - tl.expand_dims(rest, AXIS)
            tl.store(y + offsets, _activated(z * gain + offset, SILU).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _recomputed(
    dy, x, added_row, center, rest, inverse, gain, offset, offsets, mask,
    SILU: tl.constexpr, ADDED: tl.constexpr, AXIS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """What backward needs of forward: g and x̂ as tiles, zero outside of the mask."""
    z = _shifted(x, added_row, offsets, mask, ADDED, AXIS, AGAIN)
    z = z - tl.expand_dims(center, AXIS) - tl.expand_dims(rest, AXIS)
    xhat = tl.where(mask, z * tl.expand_dims(inverse, AXIS), 0.0)
    v = xhat * tl.expand_dims(gain, AXIS) + tl.expand_dims(offset, AXIS)
    return _activation_gradient(_map(dy, offsets, mask, AGAIN), v, SILU), xhat


@triton.jit
def _input_gradient(g, xhat, gain, inverse, c1, c2, AXIS: tl.constexpr):
    dx = g * tl.expand_dims(gain, AXIS) - tl.expand_dims(c1, AXIS) - xhat * tl.expand_dims(c2, AXIS)
    return dx * tl.expand_dims(inverse, AXIS)


@triton.jit
def _map_gradient(
    dy, x, dx, sums, dadded, mean, rstd, weight, bias, scale, shift, added,
    C, pixels, num_groups, group_channels, units, blocks, x_stride, scale_stride, shift_stride, added_stride,
    SILU: tl.constexpr, ADAPTIVE: tl.constexpr, ADDED: tl.constexpr, AXIS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SINGLE_PASS: tl.constexpr,
):  # fmt: skip
    """One program: dx of units·ALIGN channels, whole groups, of one image, their S1 and S2 in the first two planes of
    sums (…, B, C), and dadded."""
    block, image, images = _place(blocks)
    channel, valid, group = _columns(block, units, C, group_channels, ALIGN, BLOCK_C)
    x += image * x_stride
    dy += image * C * pixels
    dx += image * C * pixels
    added_row = _added_row(added, image, channel, valid, added_stride, ADDED)
    row = image * num_groups + group
    center, rest = _vector(mean, row, valid), _vector(mean + images * num_groups, row, valid)
    inverse = _vector(rstd, row, valid)
    gain, offset = _gain_and_offset(
        image, channel, valid, weight, bias, scale, shift, scale_stride, shift_stride, ADAPTIVE
    )
    offsets, mask = _offsets(channel, valid, 0, C, pixels, BLOCK_P, AXIS)
    g, xhat = _recomputed(
        dy, x, added_row, center, rest, inverse, gain, offset, offsets, mask, SILU, ADDED, AXIS, not SINGLE_PASS
    )
    sum_1, sum_2, sum_3 = g, g * xhat, xhat
    if not SINGLE_PASS:
        for start in range(BLOCK_P, pixels, BLOCK_P):
            later, present = _offsets(channel, valid, start, C, pixels, BLOCK_P, AXIS)
            g, xhat = _recomputed(
                dy, x, added_row, center, rest, inverse, gain, offset, later, present, SILU, ADDED, AXIS, True
            )
            sum_1 += g
            sum_2 += g * xhat
            sum_3 += xhat
    s1, s2 = tl.sum(sum_1, axis=AXIS), tl.sum(sum_2, axis=AXIS)
    n = 1.0 * group_channels * pixels
    c1, c2 = _over_group(gain * s1, group) / n, _over_group(gain * s2, group) / n
    row = image * C + channel
    tl.store(sums + row, s1, mask=valid)
    tl.store(sums + images * C + row, s2, mask=valid)
    if ADDED:
        s3 = tl.sum(sum_3, axis=AXIS)
        total = inverse * (gain * s1 - c1 * pixels - c2 * s3)
        tl.store(dadded + row, total.to(dadded.dtype.element_ty), mask=valid)
    if SINGLE_PASS:
        result = _input_gradient(g, xhat, gain, inverse, c1, c2, AXIS)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
    else:
        for start in range(0, pixels, BLOCK_P):
            offsets, mask = _offsets(channel, valid, start, C, pixels, BLOCK_P, AXIS)
            g, xhat = _recomputed(
                dy, x, added_row, center, rest, inverse, gain, offset, offsets, mask, SILU, ADDED, AXIS, False
            )
            result = _input_gradient(g, xhat, gain, inverse, c1, c2, AXIS)
            tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _batch_sums(
    sums, weight, bias, scale, partial, dscale, dshift,
    batch, C, plane, blocks, scale_stride, SCALE_ROWS: tl.constexpr, ADDED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The first level. One program: the sums over BLOCK_B images of BLOCK_C channels' (1 + scale)·S1, (1 + scale)·S2
    and, ADDED, dadded, into partial (…, chunks of images, C). SCALE_ROWS: there is a row of scale and shift per image,
    whose gradients are written; else 1 + scale is left for later."""
    program = tl.program_id(0)
    block, chunk = program % blocks, (program // blocks).to(tl.int64)
    chunks = (tl.num_programs(0) // blocks).to(tl.int64)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    image = chunk * BLOCK_B + tl.arange(0, BLOCK_B)
    valid = channel < C
    mask = tl.expand_dims(image < batch, 1) & tl.expand_dims(valid, 0)
    offsets = tl.expand_dims(image, 1) * C + tl.expand_dims(channel, 0)
    s1, s2 = _vector(sums, offsets, mask), _vector(sums + plane, offsets, mask)
    if SCALE_ROWS:
        w, b = _vector(weight, channel, valid), _vector(bias, channel, valid)
        gradient = s2 * tl.expand_dims(w, 0) + s1 * tl.expand_dims(b, 0)
        tl.store(dscale + offsets, gradient.to(dscale.dtype.element_ty), mask=mask)
        tl.store(dshift + offsets, s1.to(dshift.dtype.element_ty), mask=mask)
        rows = tl.expand_dims(image * scale_stride, 1) + tl.expand_dims(channel, 0)
        factor = 1.0 + _vector(scale, rows, mask)
        s1 *= factor
        s2 *= factor
    to = partial + chunk * C + channel
    tl.store(to, tl.sum(s1, axis=0), mask=valid)
    tl.store(to + chunks * C, tl.sum(s2, axis=0), mask=valid)
    if ADDED:
        tl.store(to + 2 * chunks * C, tl.sum(_vector(sums + 2 * plane, offsets, mask), axis=0), mask=valid)


@triton.jit
def _parameter_gradients(
    partial, weight, bias, scale, dweight, dbias, dscale, dshift, dadded,
    rows, C, plane, SCALE_ROW: tl.constexpr, ADDED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The second level. One program: the gradients of BLOCK_C channels' parameters, from partial (…, rows, C).

    SCALE_ROW: one row of scale and shift served all images. ADDED: one row of `added` did.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < C
    total_1 = tl.zeros([BLOCK_C], tl.float32)
    total_2 = tl.zeros([BLOCK_C], tl.float32)
    total_3 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        mask = tl.expand_dims(row < rows, 1) & tl.expand_dims(valid, 0)
        offsets = tl.expand_dims(row.to(tl.int64), 1) * C + tl.expand_dims(channel, 0)
        total_1 += tl.sum(_vector(partial, offsets, mask), axis=0)
        total_2 += tl.sum(_vector(partial + plane, offsets, mask), axis=0)
        if ADDED:
            total_3 += tl.sum(_vector(partial + 2 * plane, offsets, mask), axis=0)
    if SCALE_ROW:
        w, b = _vector(weight, channel, valid), _vector(bias, channel, valid)
        tl.store(dscale + channel, (total_2 * w + total_1 * b).to(dscale.dtype.element_ty), mask=valid)
        tl.store(dshift + channel, total_1.to(dshift.dtype.element_ty), mask=valid)
        factor = 1.0 + _vector(scale, channel, valid)
        total_1 *= factor
        total_2 *= factor
    if ADDED:
        tl.store(dadded + channel, total_3.to(dadded.dtype.element_ty), mask=valid)
    tl.store(dweight + channel, total_2.to(dweight.dtype.element_ty), mask=valid)
    tl.store(dbias + channel, total_1.to(dbias.dtype.element_ty), mask=valid)


def unfit(x: torch.Tensor, num_groups: int) -> str | None:
    """Why the kernels cannot take x, or None."""
    group_channels = x.shape[1] // num_groups
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} is not float32, bfloat16 or float16"
    if not fits(group_channels, _dense_format(x) == torch.channels_last):
        return (
            f"groups of {group_channels} channels, or of a channels_last map so many that they come to a multiple of 4 "
            f"channels, are wider than {WIDEST}"
        )
    if x.shape[1:].numel() >= 2**31:
        return "an image has 2^31 values or more"
    return None


@dataclass(frozen=True)
class _Cut:
    """A batch cut into tiles: the grid, and the arguments that both kernels take."""

    tile: Tile
    axis: int
    grid: tuple[int]
    sizes: tuple[int, ...]  # C, pixels, num_groups, group_channels, units, blocks

    @property
    def constants(self) -> dict[str, int | bool]:
        cut = self.tile
        return {
            "AXIS": self.axis, "ALIGN": cut.align, "BLOCK_C": cut.block_c, "BLOCK_P": cut.block_p,
            "SINGLE_PASS": cut.single_pass, "num_warps": cut.warps,
        }  # fmt: skip


def _cut(x: torch.Tensor, num_groups: int) -> _Cut:
    batch, channels = x.shape[:2]
    pixels = x.shape[2:].numel()
    group_channels = channels // num_groups
    axis = 1 if _dense_format(x) == torch.contiguous_format else 0
    cut = tile(group_channels, num_groups, pixels, axis == 0, batch)
    blocks = -(-num_groups // cut.groups)
    sizes = (channels, pixels, num_groups, group_channels, cut.groups * group_channels // cut.align, blocks)
    return _Cut(cut, axis, (batch * blocks,), sizes)


def _dense_format(x: torch.Tensor) -> torch.memory_format | None:
    """The format in which every image of x is dense (whatever lies between images), or None."""
    channels, pixels = x.shape[1], x.shape[2:].numel()
    image = x[:1]
    if image.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and image.is_contiguous(memory_format=torch.channels_last) and x.stride(0) >= channels * pixels:
        return torch.channels_last
    return None


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous() if _dense_format(x) is None else x


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialized, of x's shape and dtype, tightly packed in its memory format."""
    return torch.empty_like(x, memory_format=_dense_format(x) or torch.contiguous_format)


def _row_stride(values: torch.Tensor) -> int:
    """Elements from one image's row to the next; 0 where one row serves all images."""
    return 0 if values.shape[0] == 1 else values.stride(0)


def _rows(values: torch.Tensor | None, stand_in: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Scale, shift or added as a pointer with unit stride along the channels, and its row stride."""
    if values is None:
        return stand_in, 0
    values = values if values.stride(1) == 1 else values.contiguous()
    return values, _row_stride(values)


def _check(x, num_groups, weight, bias, eps, scale, shift, added) -> None:
    arguments.check(x, num_groups, weight, bias, eps, scale, shift, added)
    arguments.check_kernel(unfit(x, num_groups))


def _check_backward(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, added) -> None:
    _check(x, num_groups, weight, bias, 0.0, scale, shift, added)
    arguments.check_saved(dy, x, mean, rstd, (2, x.shape[0], num_groups), torch.float32)


def launch_forward(x, num_groups, weight, bias, eps, scale, shift, silu, added):
    """The result, and the statistics of each image's groups, float32: the mean as the sum of two numbers (2, B,
    num_groups), since one is not enough where it is far from zero, and 1/√(variance + eps) (B, num_groups)."""
    _check(x, num_groups, weight, bias, eps, scale, shift, added)
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    y = _empty_like(x)
    mean = torch.empty((2, x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean[0])
    if x.numel() == 0:
        return y, mean, rstd
    cut = _cut(x, num_groups)
    scale_rows, scale_stride = _rows(scale, weight)
    shift_rows, shift_stride = _rows(shift, weight)
    added_rows, added_stride = _rows(added, weight)
    launch(
        _forward, cut.grid,
        x, y, mean, rstd, weight, bias, scale_rows, shift_rows, added_rows,
        *cut.sizes, eps, x.stride(0), scale_stride, shift_stride, added_stride,
        SILU=silu, ADAPTIVE=scale is not None, ADDED=added is not None, **cut.constants,
    )  # fmt: skip
    return y, mean, rstd


group_norm_silu_forward = torch.library.custom_op(
    "diffmem::group_norm_silu_triton",
    launch_forward,
    mutates_args=(),
    schema=f"({arguments.FORWARD}) -> (Tensor, Tensor, Tensor)",
)


@group_norm_silu_forward.register_fake
def _(x, num_groups, weight, bias, eps, scale, shift, silu, added):
    _check(x, num_groups, weight, bias, eps, scale, shift, added)
    mean = x.new_empty((2, x.shape[0], num_groups), dtype=torch.float32)
    return _empty_like(x), mean, torch.empty_like(mean[0])


def launch_backward(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, silu, added):
    """Gradients of x, weight, bias, scale, shift and added; those of absent ones have no elements."""
    _check_backward(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, added)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    gradients = _empty_gradients(x, weight, bias, scale, shift, added)
    if x.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    dx, dweight, dbias, dscale, dshift, dadded = gradients
    dy = dy.contiguous(memory_format=_dense_format(x))
    cut = _cut(x, num_groups)
    batch, channels = x.shape[:2]
    scale_rows, scale_stride = _rows(scale, weight)
    shift_rows, shift_stride = _rows(shift, weight)
    added_rows, added_stride = _rows(added, weight)
    # One row of scale and shift, or of `added`, for all images: its gradient is summed over the batch as weight's is.
    per_image = scale is not None and scale.shape[0] == batch
    one_row = added is not None and added.shape[0] != batch
    sums = torch.empty((3 if one_row else 2, batch, channels), dtype=torch.float32, device=x.device)
    launch(
        _map_gradient, cut.grid,
        dy, x, dx, sums, sums[2] if one_row else dadded, mean, rstd, weight, bias, scale_rows, shift_rows, added_rows,
        *cut.sizes, x.stride(0), scale_stride, shift_stride, added_stride,
        SILU=silu, ADAPTIVE=scale is not None, ADDED=added is not None, **cut.constants,
    )  # fmt: skip
    blocks, chunks = -(-channels // BLOCK_CHANNELS), -(-batch // BLOCK_IMAGES)
    options = {"ADDED": one_row, "BLOCK_B": BLOCK_IMAGES, "BLOCK_C": BLOCK_CHANNELS, "num_warps": 4}
    if per_image or chunks > 1:
        partial = torch.empty((len(sums), chunks, channels), dtype=torch.float32, device=x.device)
        launch(
            _batch_sums, (blocks * chunks,),
            sums, weight, bias, scale_rows, partial, dscale, dshift,
            batch, channels, batch * channels, blocks, scale_stride, SCALE_ROWS=per_image, **options,
        )  # fmt: skip
        sums = partial
    launch(
        _parameter_gradients, (blocks,),
        sums, weight, bias, scale_rows, dweight, dbias, dscale, dshift, dadded,
        sums.shape[1], channels, sums.shape[1] * channels,
        SCALE_ROW=scale is not None and not per_image, **options,
    )  # fmt: skip
    return dx, dweight, dbias, dscale, dshift, dadded


def _empty_gradients(x, weight, bias, scale, shift, added) -> tuple[torch.Tensor, ...]:
    """What the backward pass fills: packed, one per tensor, without elements for those that are None."""
    parameters = (
        x.new_empty(0) if values is None else torch.empty_like(values, memory_format=torch.contiguous_format)
        for values in (weight, bias, scale, shift, added)
    )
    return (_empty_like(x), *parameters)


group_norm_silu_backward = torch.library.custom_op(
    "diffmem::group_norm_silu_triton_backward",
    launch_backward,
    mutates_args=(),
    schema=f"({arguments.BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@group_norm_silu_backward.register_fake
def _(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, silu, added):
    _check_backward(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, added)
    return _empty_gradients(x, weight, bias, scale, shift, added)


def _save(ctx, inputs, output):
    x, num_groups, weight, bias, _eps, scale, shift, silu, added = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, added)
    ctx.num_groups, ctx.silu = num_groups, silu
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, dy, _dmean, _drstd):
    x, mean, rstd, weight, bias, scale, shift, added = ctx.saved_tensors
    dx, dweight, dbias, dscale, dshift, dadded = group_norm_silu_backward(
        dy, x, mean, rstd, ctx.num_groups, weight, bias, scale, shift, ctx.silu, added
    )
    return (
        dx, None, dweight, dbias, None,
        None if scale is None else dscale, None if shift is None else dshift, None,
        None if added is None else dadded,
    )  # fmt: skip


group_norm_silu_forward.register_autograd(_backward, setup_context=_save)


def group_norm_silu(*all_arguments) -> torch.Tensor:
    """silu((x − mean)/√(var + eps)·weight + bias), with the arguments of `diffmem.ops.group_norm_silu`."""
    return group_norm_silu_forward(*all_arguments)[0]
