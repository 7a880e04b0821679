"""GroupNorm, scale and shift, SiLU as Triton kernels, forward and backward.

Notation, per image b, channel c of group G, pixel p, with n = channels · pixels of a group:

    z = x + added          x̂ = (z − mean_G)·rstd_G          v = x̂·gain + offset          y = v·sigmoid(v)
    gain = weight·(1 + scale)          offset = bias·(1 + scale) + shift

and backward, which computes x̂, v and the derivative of SiLU anew from x, the only map that was kept:

    g = dy·silu'(v)          S1 = Σ_p g          S2 = Σ_p g·x̂
    dx = rstd·(g·gain − Σ_G gain·S1/n − x̂·Σ_G gain·S2/n)
    dweight = Σ_b (1 + scale)·S2     dbias = Σ_b (1 + scale)·S1     dscale = weight·S2 + bias·S1     dshift = S1
    dadded = Σ_p dx

Statistics are float32, of the deviations from a mean that was computed first, never E[z²] − E[z]². Sums go through
buffers in a fixed order; there are no atomics. Bytes moved per element of the map, s = itemsize (statistics and
parameters come to less than 1 % of that; tests count the loads and stores of the compiled kernels):

    whole groups on chip:   forward 2s (read x, write y)             backward 3s (read x and dy, write dx)
    split groups:           forward 3s (read x twice, write y)       backward 5s (read x and dy twice, write dx)

Tiles are [pixels, columns] for channels_last maps and [columns, pixels] for contiguous ones, where a column is one
channel: see `diffmem.ops.group_norm_silu.tiles`. All loads but those of the map are marked evict_last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from diffmem.ops.group_norm_silu import arguments
from diffmem.ops.group_norm_silu.tiles import WHOLE, WHOLE_BACKWARD, WIDEST_GROUP, Tile, tile
from diffmem.ops.triton_ops import launch

MERGED = 16  # partial statistics that are merged at a time
BATCH_ROWS, BATCH_COLUMNS = 64, 32  # the tile that sums parameter gradients over the batch


@triton.jit
def _columns(
    first_group, num_groups, group_channels, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, EXACT: tl.constexpr
):
    """[K] each: channel, whether there is such a channel, group, and the position in it, of a tile's columns."""
    k = tl.arange(0, GROUPS * CHANNELS)
    group = first_group + k // CHANNELS
    within = k % CHANNELS
    if EXACT:
        channel = first_group * CHANNELS + k
        valid = channel < num_groups * CHANNELS
    else:
        channel = group * group_channels + within
        valid = (within < group_channels) & (group < num_groups)
    return channel, valid, group, within


@triton.jit
def _over_group(columns, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """[K]: for each column the sum over its group of `columns` [K]."""
    sums = tl.sum(tl.reshape(columns, [GROUPS, CHANNELS]), axis=1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [GROUPS, CHANNELS]), [GROUPS * CHANNELS])


@triton.jit
def _offsets(channel, valid, first_pixel, C, pixels, PIXELS: tl.constexpr, AXIS: tl.constexpr):
    """A tile's offsets inside an image, and its mask; AXIS is the axis of the pixels: 0 channels_last, 1 contiguous."""
    p = first_pixel + tl.arange(0, PIXELS)
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
    """A tile of a map; AGAIN where another kernel is going to read it once more, from L2 with luck."""
    if AGAIN:
        values = tl.load(pointer + offsets, mask=mask, other=0.0)
    else:
        values = tl.load(pointer + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    return values.to(tl.float32)


@triton.jit
def _shifted(
    x, added, image, channel, valid, offsets, mask, x_stride, added_stride,
    ADDED: tl.constexpr, AXIS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """z = x + added as a tile, zero outside of the mask."""
    z = _map(x + image * x_stride, offsets, mask, AGAIN)
    if ADDED:
        z += tl.expand_dims(_vector(added, image * added_stride + channel, valid), AXIS)
        z = tl.where(mask, z, 0.0)
    return z


@triton.jit
def _place(blocks, chunks):
    """Block of groups, chunk of pixels and image of this program, and the number of images; counts of images are
    64 bits wide, and with them every product that leads from one to the next."""
    program = tl.program_id(0)
    image = (program // (blocks * chunks)).to(tl.int64)
    images = (tl.num_programs(0) // (blocks * chunks)).to(tl.int64)
    return program % blocks, program // blocks % chunks, image, images


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
def _forward_whole(
    x, y, mean, rstd, weight, bias, scale, shift, added,
    C, pixels, num_groups, group_channels, blocks, eps, x_stride, scale_stride, shift_stride, added_stride,
    SILU: tl.constexpr, ADAPTIVE: tl.constexpr, ADDED: tl.constexpr, AXIS: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: `GROUPS` groups of one image, read once, normalized and written."""
    block, _chunk, image, images = _place(blocks, 1)
    channel, valid, group, within = _columns(block * GROUPS, num_groups, group_channels, GROUPS, CHANNELS, EXACT)
    offsets, mask = _offsets(channel, valid, 0, C, pixels, PIXELS, AXIS)
    z = _shifted(x, added, image, channel, valid, offsets, mask, x_stride, added_stride, ADDED, AXIS, False)
    n = 1.0 * group_channels * pixels
    centre = _over_group(tl.sum(z, axis=AXIS), GROUPS, CHANNELS) / n
    z = tl.where(mask, z - tl.expand_dims(centre, AXIS), 0.0)
    # What the rounding of the mean left, so that a constant group comes out as exactly zero.
    rest = _over_group(tl.sum(z, axis=AXIS), GROUPS, CHANNELS) / n
    z = tl.where(mask, z - tl.expand_dims(rest, AXIS), 0.0)
    variance = _over_group(tl.sum(z * z, axis=AXIS), GROUPS, CHANNELS) / n
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    gain, offset = _gain_and_offset(
        image, channel, valid, weight, bias, scale, shift, scale_stride, shift_stride, ADAPTIVE
    )
    v = z * tl.expand_dims(inverse * gain, AXIS) + tl.expand_dims(offset, AXIS)
    tl.store(y + image * C * pixels + offsets, _activated(v, SILU).to(y.dtype.element_ty), mask=mask)
    first = valid & (within == 0)
    row = image * num_groups + group
    tl.store(mean + row, centre, mask=first)
    tl.store(mean + images * num_groups + row, rest, mask=first)
    tl.store(rstd + row, inverse, mask=first)


@triton.jit
def _statistics_split(
    x, partial, added,
    C, pixels, num_groups, group_channels, blocks, chunks, x_stride, added_stride,
    ADDED: tl.constexpr, AXIS: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: mean and sum of squared deviations of each channel over one chunk of pixels.

    partial (2, B, chunks, C) float32.
    """
    block, chunk, image, images = _place(blocks, chunks)
    channel, valid, _group, _within = _columns(block * GROUPS, num_groups, group_channels, GROUPS, CHANNELS, EXACT)
    offsets, mask = _offsets(channel, valid, chunk * PIXELS, C, pixels, PIXELS, AXIS)
    z = _shifted(x, added, image, channel, valid, offsets, mask, x_stride, added_stride, ADDED, AXIS, True)
    n = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)
    centre = tl.sum(z, axis=AXIS) / n
    z = tl.where(mask, z - tl.expand_dims(centre, AXIS), 0.0)
    rest = tl.sum(z, axis=AXIS) / n
    z = tl.where(mask, z - tl.expand_dims(rest, AXIS), 0.0)
    row = (image * chunks + chunk) * C
    tl.store(partial + row + channel, centre + rest, mask=valid)
    tl.store(partial + images * chunks * C + row + channel, tl.sum(z * z, axis=AXIS), mask=valid)


@triton.jit
def _chunk_rows(start, chunks, C, channel, valid, ROWS: tl.constexpr):
    """Offsets [ROWS, K] and mask of some chunks' rows in a buffer (…, chunks, C) of one image."""
    i = start + tl.arange(0, ROWS)
    mask = tl.expand_dims(i < chunks, 1) & tl.expand_dims(valid, 0)
    return i, tl.expand_dims(i, 1) * C + tl.expand_dims(channel, 0), mask


@triton.jit
def _forward_split(
    x, y, mean, rstd, partial, weight, bias, scale, shift, added,
    C, pixels, num_groups, group_channels, blocks, chunks, eps,
    x_stride, scale_stride, shift_stride, added_stride,
    SILU: tl.constexpr, ADAPTIVE: tl.constexpr, ADDED: tl.constexpr, AXIS: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: merges the partial statistics of its groups (the weighted mean of the means first, then all
    deviations from it), normalizes one chunk of pixels."""
    block, chunk, image, images = _place(blocks, chunks)
    channel, valid, group, within = _columns(block * GROUPS, num_groups, group_channels, GROUPS, CHANNELS, EXACT)
    means = partial + image * chunks * C
    squares = means + images * chunks * C
    n = 1.0 * group_channels * pixels
    total = tl.zeros([GROUPS * CHANNELS], tl.float32)
    for start in range(0, chunks, ROWS):
        i, rows, present = _chunk_rows(start, chunks, C, channel, valid, ROWS)
        counts = tl.minimum(pixels - i * PIXELS, PIXELS).to(tl.float32)
        total += tl.sum(_vector(means, rows, present) * tl.expand_dims(counts, 1), axis=0)
    centre = _over_group(total, GROUPS, CHANNELS) / n
    total = tl.zeros([GROUPS * CHANNELS], tl.float32)
    rest = tl.zeros([GROUPS * CHANNELS], tl.float32)
    for start in range(0, chunks, ROWS):
        i, rows, present = _chunk_rows(start, chunks, C, channel, valid, ROWS)
        counts = tl.minimum(pixels - i * PIXELS, PIXELS).to(tl.float32)
        deviation = tl.where(present, _vector(means, rows, present) - tl.expand_dims(centre, 0), 0.0)
        between = deviation * tl.expand_dims(counts, 1)
        rest += tl.sum(between, axis=0)
        total += tl.sum(_vector(squares, rows, present) + between * deviation, axis=0)
    rest = _over_group(rest, GROUPS, CHANNELS) / n
    variance = _over_group(total, GROUPS, CHANNELS) / n - rest * rest
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    first = valid & (within + chunk == 0)  # the group's first channel, in the first chunk's program
    row = image * num_groups + group
    tl.store(mean + row, centre, mask=first)
    tl.store(mean + images * num_groups + row, rest, mask=first)
    tl.store(rstd + row, inverse, mask=first)

    offsets, mask = _offsets(channel, valid, chunk * PIXELS, C, pixels, PIXELS, AXIS)
    z = _shifted(x, added, image, channel, valid, offsets, mask, x_stride, added_stride, ADDED, AXIS, False)
    gain, offset = _gain_and_offset(
        image, channel, valid, weight, bias, scale, shift, scale_stride, shift_stride, ADAPTIVE
    )
    z = z - tl.expand_dims(centre, AXIS) - tl.expand_dims(rest, AXIS)
    v = z * tl.expand_dims(inverse * gain, AXIS) + tl.expand_dims(offset, AXIS)
    tl.store(y + image * C * pixels + offsets, _activated(v, SILU).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _recomputed(
    dy, x, mean, rstd, weight, bias, scale, shift, added, image, images, channel, valid, group, offsets, mask,
    C, pixels, num_groups, x_stride, scale_stride, shift_stride, added_stride,
    SILU: tl.constexpr, ADAPTIVE: tl.constexpr, ADDED: tl.constexpr, AXIS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """What backward needs of forward: g and x̂ as tiles, zero outside of the mask, gain [K] and rstd [K]."""
    z = _shifted(x, added, image, channel, valid, offsets, mask, x_stride, added_stride, ADDED, AXIS, AGAIN)
    row = image * num_groups + group
    centre, rest = _vector(mean, row, valid), _vector(mean + images * num_groups, row, valid)
    inverse = _vector(rstd, row, valid)
    z = z - tl.expand_dims(centre, AXIS) - tl.expand_dims(rest, AXIS)
    xhat = tl.where(mask, z * tl.expand_dims(inverse, AXIS), 0.0)
    gain, offset = _gain_and_offset(
        image, channel, valid, weight, bias, scale, shift, scale_stride, shift_stride, ADAPTIVE
    )
    v = xhat * tl.expand_dims(gain, AXIS) + tl.expand_dims(offset, AXIS)
    g = _activation_gradient(_map(dy + image * C * pixels, offsets, mask, AGAIN), v, SILU)
    return g, xhat, gain, inverse


@triton.jit
def _input_gradient(
    g, xhat, gain, inverse, s1, s2, n, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, AXIS: tl.constexpr
):
    """dx as a tile from the channels' S1, S2 [K], and the group's means of gain·S1 and gain·S2 [K]."""
    c1 = _over_group(gain * s1, GROUPS, CHANNELS) / n
    c2 = _over_group(gain * s2, GROUPS, CHANNELS) / n
    dx = g * tl.expand_dims(gain, AXIS) - tl.expand_dims(c1, AXIS) - xhat * tl.expand_dims(c2, AXIS)
    return dx * tl.expand_dims(inverse, AXIS), c1, c2


@triton.jit
def _backward_whole(
    dy, x, dx, sums, dadded, mean, rstd, weight, bias, scale, shift, added,
    C, pixels, num_groups, group_channels, blocks, x_stride, scale_stride, shift_stride, added_stride,
    SILU: tl.constexpr, ADAPTIVE: tl.constexpr, ADDED: tl.constexpr, AXIS: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: dx of `GROUPS` groups of one image, and their channels' S1, S2 in sums (2, B, C), and dadded."""
    block, _chunk, image, images = _place(blocks, 1)
    channel, valid, group, _within = _columns(block * GROUPS, num_groups, group_channels, GROUPS, CHANNELS, EXACT)
    offsets, mask = _offsets(channel, valid, 0, C, pixels, PIXELS, AXIS)
    g, xhat, gain, inverse = _recomputed(
        dy, x, mean, rstd, weight, bias, scale, shift, added, image, images, channel, valid, group, offsets, mask,
        C, pixels, num_groups, x_stride, scale_stride, shift_stride, added_stride,
        SILU, ADAPTIVE, ADDED, AXIS, False,
    )  # fmt: skip
    s1 = tl.sum(g, axis=AXIS)
    s2 = tl.sum(g * xhat, axis=AXIS)
    n = 1.0 * group_channels * pixels
    result, _c1, _c2 = _input_gradient(g, xhat, gain, inverse, s1, s2, n, GROUPS, CHANNELS, AXIS)
    tl.store(dx + image * C * pixels + offsets, result.to(dx.dtype.element_ty), mask=mask)
    row = image * C + channel
    tl.store(sums + row, s1, mask=valid)
    tl.store(sums + images * C + row, s2, mask=valid)
    if ADDED:
        tl.store(dadded + row, tl.sum(tl.where(mask, result, 0.0), axis=AXIS), mask=valid)


@triton.jit
def _sums_split(
    dy, x, partial, mean, rstd, weight, bias, scale, shift, added,
    C, pixels, num_groups, group_channels, blocks, chunks, x_stride, scale_stride, shift_stride, added_stride,
    SILU: tl.constexpr, ADAPTIVE: tl.constexpr, ADDED: tl.constexpr, AXIS: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: Σ g, Σ g·x̂ and Σ x̂ of each channel over one chunk of pixels, in partial (3, B, chunks, C)."""
    block, chunk, image, images = _place(blocks, chunks)
    plane = images * chunks * C
    channel, valid, group, _within = _columns(block * GROUPS, num_groups, group_channels, GROUPS, CHANNELS, EXACT)
    offsets, mask = _offsets(channel, valid, chunk * PIXELS, C, pixels, PIXELS, AXIS)
    g, xhat, _gain, _inverse = _recomputed(
        dy, x, mean, rstd, weight, bias, scale, shift, added, image, images, channel, valid, group, offsets, mask,
        C, pixels, num_groups, x_stride, scale_stride, shift_stride, added_stride,
        SILU, ADAPTIVE, ADDED, AXIS, True,
    )  # fmt: skip
    row = (image * chunks + chunk) * C + channel
    tl.store(partial + row, tl.sum(g, axis=AXIS), mask=valid)
    tl.store(partial + plane + row, tl.sum(g * xhat, axis=AXIS), mask=valid)
    tl.store(partial + 2 * plane + row, tl.sum(xhat, axis=AXIS), mask=valid)


@triton.jit
def _backward_split(
    dy, x, dx, partial, sums, dadded, mean, rstd, weight, bias, scale, shift, added,
    C, pixels, num_groups, group_channels, blocks, chunks, x_stride, scale_stride, shift_stride, added_stride,
    SILU: tl.constexpr, ADAPTIVE: tl.constexpr, ADDED: tl.constexpr, AXIS: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: dx of one chunk of pixels, from the sums of all chunks; that of chunk 0 also writes the totals."""
    block, chunk, image, images = _place(blocks, chunks)
    channel, valid, group, _within = _columns(block * GROUPS, num_groups, group_channels, GROUPS, CHANNELS, EXACT)
    plane = images * chunks * C
    s1 = tl.zeros([GROUPS * CHANNELS], tl.float32)
    s2 = tl.zeros([GROUPS * CHANNELS], tl.float32)
    s3 = tl.zeros([GROUPS * CHANNELS], tl.float32)
    for start in range(0, chunks, ROWS):
        _, rows, present = _chunk_rows(start, chunks, C, channel, valid, ROWS)
        rows = image * chunks * C + rows
        s1 += tl.sum(_vector(partial, rows, present), axis=0)
        s2 += tl.sum(_vector(partial + plane, rows, present), axis=0)
        s3 += tl.sum(_vector(partial + 2 * plane, rows, present), axis=0)
    offsets, mask = _offsets(channel, valid, chunk * PIXELS, C, pixels, PIXELS, AXIS)
    g, xhat, gain, inverse = _recomputed(
        dy, x, mean, rstd, weight, bias, scale, shift, added, image, images, channel, valid, group, offsets, mask,
        C, pixels, num_groups, x_stride, scale_stride, shift_stride, added_stride,
        SILU, ADAPTIVE, ADDED, AXIS, False,
    )  # fmt: skip
    n = 1.0 * group_channels * pixels
    result, c1, c2 = _input_gradient(g, xhat, gain, inverse, s1, s2, n, GROUPS, CHANNELS, AXIS)
    tl.store(dx + image * C * pixels + offsets, result.to(dx.dtype.element_ty), mask=mask)
    if chunk == 0:
        row = image * C + channel
        tl.store(sums + row, s1, mask=valid)
        tl.store(sums + images * C + row, s2, mask=valid)
        if ADDED:
            tl.store(dadded + row, inverse * (gain * s1 - c1 * pixels - c2 * s3), mask=valid)


@triton.jit
def _parameter_gradients(
    sums, added_rows, weight, bias, scale, dweight, dbias, dscale, dshift, dadded,
    batch, C, plane, scale_stride, ADAPTIVE: tl.constexpr, SCALE_ROWS: tl.constexpr, ADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of COLUMNS channels' parameters, summed over the batch in order.

    SCALE_ROWS: one row of scale and shift per image, else one for all. ADDED: one row of `added` served all images.
    """
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = channel < C
    w, b = _vector(weight, channel, valid), _vector(bias, channel, valid)
    total_w = tl.zeros([COLUMNS], tl.float32)
    total_b = tl.zeros([COLUMNS], tl.float32)
    total_1 = tl.zeros([COLUMNS], tl.float32)
    total_2 = tl.zeros([COLUMNS], tl.float32)
    total_added = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, batch, ROWS):
        image = start + tl.arange(0, ROWS)
        mask = tl.expand_dims(image < batch, 1) & tl.expand_dims(valid, 0)
        offsets = tl.expand_dims(image.to(tl.int64), 1) * C + tl.expand_dims(channel, 0)
        s1, s2 = _vector(sums, offsets, mask), _vector(sums + plane, offsets, mask)
        if ADAPTIVE:
            if SCALE_ROWS:
                rows = tl.expand_dims(image.to(tl.int64) * scale_stride, 1) + tl.expand_dims(channel, 0)
                factor = 1.0 + _vector(scale, rows, mask)
                gradient = s2 * tl.expand_dims(w, 0) + s1 * tl.expand_dims(b, 0)
                tl.store(dscale + offsets, gradient.to(dscale.dtype.element_ty), mask=mask)
                tl.store(dshift + offsets, s1.to(dshift.dtype.element_ty), mask=mask)
                total_w += tl.sum(s2 * factor, axis=0)
                total_b += tl.sum(s1 * factor, axis=0)
            else:
                total_1 += tl.sum(s1, axis=0)
                total_2 += tl.sum(s2, axis=0)
        else:
            total_w += tl.sum(s2, axis=0)
            total_b += tl.sum(s1, axis=0)
        if ADDED:
            total_added += tl.sum(_vector(added_rows, offsets, mask), axis=0)
    if ADAPTIVE and not SCALE_ROWS:
        factor = 1.0 + _vector(scale, channel, valid)
        total_w, total_b = total_2 * factor, total_1 * factor
        tl.store(dscale + channel, (total_2 * w + total_1 * b).to(dscale.dtype.element_ty), mask=valid)
        tl.store(dshift + channel, total_1.to(dshift.dtype.element_ty), mask=valid)
    if ADDED:
        tl.store(dadded + channel, total_added.to(dadded.dtype.element_ty), mask=valid)
    tl.store(dweight + channel, total_w.to(dweight.dtype.element_ty), mask=valid)
    tl.store(dbias + channel, total_b.to(dbias.dtype.element_ty), mask=valid)


def unfit(x: torch.Tensor, num_groups: int) -> str | None:
    """Why the kernels cannot take x, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} is not float32, bfloat16 or float16"
    if x.shape[1] // num_groups > WIDEST_GROUP:
        return f"groups of {x.shape[1] // num_groups} channels are wider than {WIDEST_GROUP}"
    if x.shape[1:].numel() >= 2**31:
        return "an image has 2^31 values or more"
    return None


@dataclass(frozen=True)
class _Cut:
    """A batch cut into tiles: the grid, and the arguments that every kernel takes."""

    tile: Tile
    axis: int
    blocks: int
    chunks: int
    grid: tuple[int]
    sizes: tuple[int, ...]  # C, pixels, num_groups, group_channels, blocks, and chunks where the groups are split

    @property
    def constants(self) -> dict[str, int | bool]:
        cut = self.tile
        return {
            "AXIS": self.axis, "GROUPS": cut.groups, "CHANNELS": cut.channels, "PIXELS": cut.pixels,
            "EXACT": cut.exact, "num_warps": cut.warps,
        }  # fmt: skip


def _cut(x: torch.Tensor, num_groups: int, room: int) -> _Cut:
    batch, channels = x.shape[:2]
    pixels = x.shape[2:].numel()
    group_channels = channels // num_groups
    axis = 1 if _dense_format(x) == torch.contiguous_format else 0
    cut = tile(group_channels, pixels, axis == 0, x.element_size(), room)
    blocks = -(-num_groups // cut.groups)
    chunks = 1 if cut.whole else -(-pixels // cut.pixels)
    sizes = (channels, pixels, num_groups, group_channels, blocks)
    return _Cut(cut, axis, blocks, chunks, (batch * blocks * chunks,), sizes if cut.whole else (*sizes, chunks))


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


def launch_forward(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    silu: bool,
    added: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, and the statistics of each image's groups, float32: the mean as the sum of two numbers (2, B,
    num_groups), since one is not enough where it is far from zero, and 1/√(variance + eps) (B, num_groups)."""
    _check(x, num_groups, weight, bias, eps, scale, shift, added)
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    y = _empty_like(x)
    mean = torch.empty((2, x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean[0])
    if x.numel() == 0:
        return y, mean, rstd
    cut = _cut(x, num_groups, WHOLE)
    scale_rows, scale_stride = _rows(scale, weight)
    shift_rows, shift_stride = _rows(shift, weight)
    added_rows, added_stride = _rows(added, weight)
    parameters = (weight, bias, scale_rows, shift_rows, added_rows)
    strides = (x.stride(0), scale_stride, shift_stride, added_stride)
    flags = {"SILU": silu, "ADAPTIVE": scale is not None, "ADDED": added is not None}
    if cut.tile.whole:
        launch(
            _forward_whole, cut.grid, x, y, mean, rstd, *parameters, *cut.sizes, eps, *strides, **flags, **cut.constants
        )
    else:
        partial = torch.empty((2, x.shape[0], cut.chunks, x.shape[1]), dtype=torch.float32, device=x.device)
        launch(
            _statistics_split, cut.grid,
            x, partial, added_rows, *cut.sizes, x.stride(0), added_stride,
            ADDED=added is not None, **cut.constants,
        )  # fmt: skip
        launch(
            _forward_split, cut.grid,
            x, y, mean, rstd, partial, *parameters, *cut.sizes, eps, *strides,
            **flags, ROWS=MERGED, **cut.constants,
        )  # fmt: skip
    return y, mean, rstd


group_norm_silu_forward = torch.library.custom_op("diffmem::group_norm_silu_triton", launch_forward, mutates_args=())


@group_norm_silu_forward.register_fake
def _(x, num_groups, weight, bias, eps, scale, shift, silu, added):
    _check(x, num_groups, weight, bias, eps, scale, shift, added)
    mean = x.new_empty((2, x.shape[0], num_groups), dtype=torch.float32)
    return _empty_like(x), mean, torch.empty_like(mean[0])


def launch_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    silu: bool,
    added: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, bias, scale, shift and added; those of absent ones have no elements."""
    _check_backward(dy, x, mean, rstd, num_groups, weight, bias, scale, shift, added)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    gradients = _empty_gradients(x, weight, bias, scale, shift, added)
    if x.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    dx, dweight, dbias, dscale, dshift, dadded = gradients
    dy = dy.contiguous(memory_format=_dense_format(x))
    cut = _cut(x, num_groups, WHOLE_BACKWARD)
    batch, channels = x.shape[:2]
    scale_rows, scale_stride = _rows(scale, weight)
    shift_rows, shift_stride = _rows(shift, weight)
    added_rows, added_stride = _rows(added, weight)
    tensors = (mean, rstd, weight, bias, scale_rows, shift_rows, added_rows)
    strides = (x.stride(0), scale_stride, shift_stride, added_stride)
    flags = {"SILU": silu, "ADAPTIVE": scale is not None, "ADDED": added is not None}
    sums = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device)
    # One row of `added` for all images: its gradient's rows are summed over the batch afterwards.
    one_row = added is not None and added.shape[0] != batch
    image_rows = torch.empty((batch, channels), dtype=torch.float32, device=x.device) if one_row else dadded
    if cut.tile.whole:
        launch(
            _backward_whole, cut.grid,
            dy, x, dx, sums, image_rows, *tensors, *cut.sizes, *strides, **flags, **cut.constants,
        )  # fmt: skip
    else:
        partial = torch.empty((3, batch, cut.chunks, channels), dtype=torch.float32, device=x.device)
        launch(_sums_split, cut.grid, dy, x, partial, *tensors, *cut.sizes, *strides, **flags, **cut.constants)
        launch(
            _backward_split, cut.grid,
            dy, x, dx, partial, sums, image_rows, *tensors, *cut.sizes, *strides,
            **flags, ROWS=MERGED, **cut.constants,
        )  # fmt: skip
    launch(
        _parameter_gradients, (-(-channels // BATCH_COLUMNS),),
        sums, image_rows, weight, bias, scale_rows, dweight, dbias, dscale, dshift, dadded,
        batch, channels, batch * channels, scale_stride,
        ADAPTIVE=scale is not None, SCALE_ROWS=scale is not None and scale.shape[0] != 1, ADDED=one_row,
        ROWS=BATCH_ROWS, COLUMNS=BATCH_COLUMNS, num_warps=4,
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
    "diffmem::group_norm_silu_triton_backward", launch_backward, mutates_args=()
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


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu((x − mean)/√(var + eps)·weight + bias), see `diffmem.ops.group_norm_silu`."""
    return group_norm_silu_forward(x, num_groups, weight, bias, eps, scale, shift, silu, added)[0]
