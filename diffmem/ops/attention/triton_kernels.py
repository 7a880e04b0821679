"""Self-attention as Triton kernels on the packed map, forward with a running softmax, backward by recomputation.

For one image and head, with q, k, v [N, c], in powers of two since exp2 is what the hardware has:

    s = q·kᵀ·log2(e)/√c          lse = log2 Σ_n 2^s          p = 2^(s − lse)          out = p·v

and backward, from lse [N], out and its gradient do alone, so that no [N, N] matrix is ever stored:

    delta = Σ_c out·do           ds = p·(do·vᵀ − delta)      dq = ds·k/√c     dk = dsᵀ·q/√c     dv = pᵀ·do

(Dao et al., arXiv 2205.14135). Queries, keys and values are read from, and their gradients written to, the packed
layout: channel (c, 3) per head, pixels contiguous or channels last. dq comes from one kernel, dk and dv from another,
each program being the only one to write its part: no atomics, the same bits every time.

Scores are summed over `INNER` channels at a time, the result has `OUTER` of the head's channels per program (see
`diffmem.ops.attention.tiles`). Products accumulate in float32; p and ds are rounded to the map's dtype before the
second product.

Values of the map that a program moves, tokens outside of the image and channels outside of the head included (float32
vectors lse and delta come to two per token; tests hold the compiled kernels to these counts exactly):

                  per round of COLUMNS tokens, read               once, written
    forward       (ROWS + COLUMNS)·c + COLUMNS·OUTER              ROWS·OUTER
    dq            2·(ROWS + COLUMNS)·c + COLUMNS·OUTER            ROWS·OUTER
    dk and dv     2·(ROWS + COLUMNS)·c + 2·COLUMNS·OUTER          2·ROWS·OUTER

Backward's terms with OUTER fall away where the whole head is there already (c ≤ INNER = OUTER). What is read again
comes from the L2 cache: the programs of one head run side by side.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from diffmem.ops.attention import arguments
from diffmem.ops.attention.tiles import MOST_TOKENS, WIDEST_HEAD, precision_of, tile
from diffmem.ops.triton_ops import launch

DELTA_TOKENS, DELTA_CHANNELS = 32, 64


@triton.jit
def _load(pointer, token, channel, N, c, token_stride, channel_stride):
    """[tokens, channels] of a map, zero where there are none."""
    mask = (token < N)[:, None] & (channel < c)[None, :]
    return tl.load(pointer + token[:, None] * token_stride + channel[None, :] * channel_stride, mask=mask, other=0.0)


@triton.jit
def _store(pointer, values, token, channel, N, c, token_stride, channel_stride):
    mask = (token < N)[:, None] & (channel < c)[None, :]
    offsets = token[:, None] * token_stride + channel[None, :] * channel_stride
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _strides(N, C, LAST: tl.constexpr):
    """Strides of token, channel and q/k/v in the packed map, of token and channel in the plain one."""
    if LAST:
        return 3 * C, 3, 1, C, 1
    else:
        return 1, 3 * N, N, 1, N


@triton.jit
def _place(N, c, heads, blocks, chunks):
    """Block of tokens, chunk of channels, image and head of this program; programs of one head follow each other."""
    program = tl.program_id(0)
    pair = program // (blocks * chunks)
    return program % blocks, program // blocks % chunks, (pair // heads).to(tl.int64), pair % heads


@triton.jit
def _packed(pointer, image, head, c, image_stride, channel, part):
    """Where the head's q, k and v of the image begin in a packed map."""
    q = pointer + image * image_stride + head * c * channel
    return q, q + part, q + 2 * part


@triton.jit
def _products(
    a, b, row, column, N, c, a_token, a_channel, b_token, b_channel,
    INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS]: a·bᵀ over the head's channels. ONCE: they are at most INNER."""
    if ONCE:
        i = tl.arange(0, INNER)
        left = _load(a, row, i, N, c, a_token, a_channel)
        right = _load(b, column, i, N, c, b_token, b_channel)
        return tl.dot(left, tl.trans(right), input_precision=PRECISION)
    else:
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, c, INNER):
            i = start + tl.arange(0, INNER)
            left = _load(a, row, i, N, c, a_token, a_channel)
            right = _load(b, column, i, N, c, b_token, b_channel)
            sums = tl.dot(left, tl.trans(right), sums, input_precision=PRECISION)
        return sums


@triton.jit
def _forward(
    qkv, out, lse, N, C, c, heads, blocks, chunks, image_stride, scale,
    LAST: tl.constexpr, PRECISION: tl.constexpr, ONCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """One program: OUTER channels of ROWS tokens' results."""
    token, channel, part, out_token, out_channel = _strides(N, C, LAST)
    block, chunk, image, head = _place(N, c, heads, blocks, chunks)
    q, k, v = _packed(qkv, image, head, c, image_stride, channel, part)
    row = block * ROWS + tl.arange(0, ROWS)
    o = chunk * OUTER + tl.arange(0, OUTER)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, OUTER], tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        s = _products(q, k, row, column, N, c, token, channel, token, channel, INNER, ROWS, COLUMNS, PRECISION, ONCE)
        s = tl.where((column < N)[None, :], s * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, axis=1)
        values = _load(v, column, o, N, c, token, channel)
        sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
        largest = larger
    to = out + image * C * N + head * c * out_channel
    _store(to, sums / total[:, None], row, o, N, c, out_token, out_channel)
    first = (row < N) & (tl.zeros([ROWS], tl.int32) == chunk)  # the first chunk's program; a branch takes registers
    tl.store(lse + (image * heads + head) * N + row, largest + tl.log2(total), mask=first)


@triton.jit
def _delta(
    out, dout, delta, N, C, c, heads, blocks, chunks,
    LAST: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One program: Σ_c out·dout of ROWS tokens."""
    _, _, _, token, channel = _strides(N, C, LAST)
    block, _chunk, image, head = _place(N, c, heads, blocks, chunks)
    start_of_head = image * C * N + head * c * channel
    row = block * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS], tl.float32)
    for start in range(0, c, INNER):
        i = start + tl.arange(0, INNER)
        a = _load(out + start_of_head, row, i, N, c, token, channel).to(tl.float32)
        b = _load(dout + start_of_head, row, i, N, c, token, channel).to(tl.float32)
        sums += tl.sum(a * b, axis=1)
    tl.store(delta + (image * heads + head) * N + row, sums, mask=row < N)


@triton.jit
def _query_gradient(
    qkv, dout, lse, delta, dqkv, N, C, c, heads, blocks, chunks, image_stride, scale, inverse_root,
    LAST: tl.constexpr, PRECISION: tl.constexpr, ONCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """One program: OUTER channels of ROWS queries' gradients."""
    token, channel, part, out_token, out_channel = _strides(N, C, LAST)
    block, chunk, image, head = _place(N, c, heads, blocks, chunks)
    q, k, v = _packed(qkv, image, head, c, image_stride, channel, part)
    do = dout + image * C * N + head * c * out_channel
    row = block * ROWS + tl.arange(0, ROWS)
    o = chunk * OUTER + tl.arange(0, OUTER)
    vector = (image * heads + head) * N + row
    row_lse = tl.load(lse + vector, mask=row < N, other=0.0)
    row_delta = tl.load(delta + vector, mask=row < N, other=0.0)
    sums = tl.zeros([ROWS, OUTER], tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        s = _products(q, k, row, column, N, c, token, channel, token, channel, INNER, ROWS, COLUMNS, PRECISION, ONCE)
        p = tl.where((column < N)[None, :], tl.exp2(s * scale - row_lse[:, None]), 0.0)
        dp = _products(
            do, v, row, column, N, c, out_token, out_channel, token, channel, INNER, ROWS, COLUMNS, PRECISION, ONCE
        )
        ds = p * (dp - row_delta[:, None])
        keys = _load(k, column, o, N, c, token, channel)
        sums = tl.dot(ds.to(keys.dtype), keys, sums, input_precision=PRECISION)
    to = dqkv + image * 3 * C * N + head * c * channel
    _store(to, sums * inverse_root, row, o, N, c, token, channel)


@triton.jit
def _key_value_gradient(
    qkv, dout, lse, delta, dqkv, N, C, c, heads, blocks, chunks, image_stride, scale, inverse_root,
    LAST: tl.constexpr, PRECISION: tl.constexpr, ONCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """One program: OUTER channels of ROWS keys' and values' gradients; scores are [keys, queries] here."""
    token, channel, part, out_token, out_channel = _strides(N, C, LAST)
    block, chunk, image, head = _place(N, c, heads, blocks, chunks)
    q, k, v = _packed(qkv, image, head, c, image_stride, channel, part)
    do = dout + image * C * N + head * c * out_channel
    row = block * ROWS + tl.arange(0, ROWS)
    o = chunk * OUTER + tl.arange(0, OUTER)
    vectors = (image * heads + head) * N
    key_sums = tl.zeros([ROWS, OUTER], tl.float32)
    value_sums = tl.zeros([ROWS, OUTER], tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        s = _products(k, q, row, column, N, c, token, channel, token, channel, INNER, ROWS, COLUMNS, PRECISION, ONCE)
        column_lse = tl.load(lse + vectors + column, mask=column < N, other=0.0)
        column_delta = tl.load(delta + vectors + column, mask=column < N, other=0.0)
        p = tl.where((column < N)[None, :], tl.exp2(s * scale - column_lse[None, :]), 0.0)
        gradients = _load(do, column, o, N, c, out_token, out_channel)
        value_sums = tl.dot(p.to(gradients.dtype), gradients, value_sums, input_precision=PRECISION)
        dp = _products(
            v, do, row, column, N, c, token, channel, out_token, out_channel, INNER, ROWS, COLUMNS, PRECISION, ONCE
        )
        ds = p * (dp - column_delta[None, :])
        queries = _load(q, column, o, N, c, token, channel)
        key_sums = tl.dot(ds.to(queries.dtype), queries, key_sums, input_precision=PRECISION)
    to = dqkv + image * 3 * C * N + head * c * channel
    _store(to + part, key_sums * inverse_root, row, o, N, c, token, channel)
    _store(to + 2 * part, value_sums, row, o, N, c, token, channel)


def unfit(qkv: torch.Tensor, num_heads: int) -> str | None:
    """Why the kernels cannot take qkv, or None."""
    head_channels, tokens = qkv.shape[1] // (3 * num_heads), qkv.shape[2] * qkv.shape[3]
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{qkv.dtype} is not float32, bfloat16 or float16"
    if head_channels > WIDEST_HEAD:
        return f"heads of {head_channels} channels are wider than {WIDEST_HEAD}"
    if tokens > MOST_TOKENS:
        return f"{tokens} pixels are more than {MOST_TOKENS}"
    if qkv.shape[1:].numel() >= 2**31:
        return "an image has 2^31 values or more"
    return None


def _is_last(x: torch.Tensor) -> bool:
    """Whether the images of x (B, C, H, W), dense ones, are channels last in memory."""
    return not x[:1].is_contiguous()


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where an image is not dense in either layout."""
    image = x[:1]
    if image.is_contiguous() or image.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _empty(like: torch.Tensor, channels: int) -> torch.Tensor:
    batch, _, height, width = like.shape
    last = _is_last(_dense(like))
    return torch.empty(
        (batch, channels, height, width), dtype=like.dtype, device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip


def _launch(kernel, name: str, qkv: torch.Tensor, num_heads: int, tensors: tuple, scales: tuple[float, ...]) -> None:
    batch, packed, height, width = qkv.shape
    tokens, channels, head_channels = height * width, packed // 3, packed // (3 * num_heads)
    precision = precision_of(qkv.dtype)
    cut = tile(name, tokens, head_channels, qkv.dtype, precision)
    blocks, chunks = -(-tokens // cut.rows), -(-head_channels // cut.outer)
    launch(
        kernel, (batch * num_heads * blocks * chunks,),
        *tensors, tokens, channels, head_channels, num_heads, blocks, chunks, qkv.stride(0), *scales,
        LAST=_is_last(qkv), PRECISION=precision, ONCE=head_channels <= cut.inner,
        ROWS=cut.rows, COLUMNS=cut.columns, INNER=cut.inner, OUTER=cut.outer,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def _check(qkv: torch.Tensor, num_heads: int) -> None:
    arguments.check(qkv, num_heads)
    arguments.check_kernel(unfit(qkv, num_heads))


def launch_forward(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The attended map (B, C, H, W), and log2 of each row's sum of powers (B, num_heads, H·W) float32."""
    _check(qkv, num_heads)
    qkv = _dense(qkv)
    batch, packed, height, width = qkv.shape
    out = _empty(qkv, packed // 3)
    lse = torch.empty((batch, num_heads, height * width), dtype=torch.float32, device=qkv.device)
    if out.numel():
        scale = math.log2(math.e) / math.sqrt(packed // (3 * num_heads))
        _launch(_forward, "forward", qkv, num_heads, (qkv, out, lse), (scale,))
    return out, lse


attention_forward = torch.library.custom_op("diffmem::attention_triton", launch_forward, mutates_args=())


@attention_forward.register_fake
def _(qkv, num_heads):
    _check(qkv, num_heads)
    batch, packed, height, width = qkv.shape
    return _empty(qkv, packed // 3), qkv.new_empty((batch, num_heads, height * width), dtype=torch.float32)


def launch_backward(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """The gradient of qkv, in its layout."""
    _check(qkv, num_heads)
    arguments.check_saved(dout, qkv, out, lse, num_heads)
    qkv = _dense(qkv)
    batch, packed, height, width = qkv.shape
    dqkv = _empty(qkv, packed)
    if not dqkv.numel():
        return dqkv
    last = _is_last(qkv)
    layout = torch.channels_last if last else torch.contiguous_format
    dout, out, lse = dout.contiguous(memory_format=layout), out.contiguous(memory_format=layout), lse.contiguous()
    delta = torch.empty_like(lse)
    tokens, channels, head_channels = height * width, packed // 3, packed // (3 * num_heads)
    blocks = -(-tokens // DELTA_TOKENS)
    launch(
        _delta, (batch * num_heads * blocks,),
        out, dout, delta, tokens, channels, head_channels, num_heads, blocks, 1,
        LAST=last, ROWS=DELTA_TOKENS, INNER=DELTA_CHANNELS, num_warps=4,
    )  # fmt: skip
    inverse_root = 1 / math.sqrt(head_channels)
    scales = (math.log2(math.e) * inverse_root, inverse_root)
    tensors = (qkv, dout, lse, delta, dqkv)
    _launch(_query_gradient, "query_gradient", qkv, num_heads, tensors, scales)
    _launch(_key_value_gradient, "key_value_gradient", qkv, num_heads, tensors, scales)
    return dqkv


attention_backward = torch.library.custom_op("diffmem::attention_triton_backward", launch_backward, mutates_args=())


@attention_backward.register_fake
def _(dout, qkv, out, lse, num_heads):
    _check(qkv, num_heads)
    arguments.check_saved(dout, qkv, out, lse, num_heads)
    return _empty(qkv, qkv.shape[1])


def _save(ctx, inputs, output):
    qkv, ctx.num_heads = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, dout, _dlse):
    return attention_backward(dout, *ctx.saved_tensors, ctx.num_heads), None


attention_forward.register_autograd(_backward, setup_context=_save)


def attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q·kᵀ/√c)·v per head, see `diffmem.ops.attention`."""
    return attention_forward(qkv, num_heads)[0]
