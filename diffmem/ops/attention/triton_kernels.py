"""Self-attention as Triton kernels on the packed map, forward with a running softmax, backward by recomputation.

For one image and head, with q, k, v [N, c], in powers of two since exp2 is what the hardware has:

    s = q·kᵀ·log2(e)/√c          lse = log2 Σ_n 2^s          p = 2^(s − lse)          out = p·v

and backward, from lse [N], out and its gradient do alone, so that no [N, N] matrix is ever stored:

    delta = Σ_c out·do           ds = p·(do·vᵀ − delta)      dq = ds·k/√c     dk = dsᵀ·q/√c     dv = pᵀ·do

(Dao et al., arXiv 2205.14135). Queries, keys and values are read from, and their gradients written to, the packed
layout: channels (3, heads, c), pixels contiguous or channels last. In the latter a token's c channels are contiguous:
they are loaded 16 bytes at a time, asynchronously, while the products of the round before are formed. dq comes from one
kernel, dk and dv from another, each program being the only one to write its part: no copies of the gradients, no
atomics, the same bits every time.

Scores are summed over `BLOCK_K` channels at a time, the result has `BLOCK_D` of the head's channels per program (see
`diffmem.ops.attention.tiles`). Where all channels fit (SINGLE_PASS) what belongs to the program's own tokens is read
once. Products accumulate in float32; p and ds are rounded to the map's dtype before the second product.

Values of the map that a program moves, tokens outside of the image and channels outside of the head included (float32
vectors lse and delta come to two per token; tests hold the compiled kernels to these counts exactly):

                  once, read (SINGLE_PASS)   per round of BLOCK_N tokens, read          once, written
    forward       BLOCK_M·c                  BLOCK_N·(c + BLOCK_D)                      BLOCK_M·BLOCK_D
    dq            2·BLOCK_M·c                BLOCK_N·(2·c + BLOCK_D)                    BLOCK_M·BLOCK_D
    dk and dv     2·BLOCK_M·c                BLOCK_N·(2·c + 2·BLOCK_D)                  2·BLOCK_M·BLOCK_D

In several passes what is read once there is read in every round. Backward's terms with BLOCK_D fall away where the
whole head is there already (SINGLE_PASS and BLOCK_K = BLOCK_D). What is read again comes from the L2 cache: the
programs of one head run side by side.
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
def _strides(N, C, CHANNELS_LAST: tl.constexpr):
    """Strides of token, channel and q/k/v in the packed map, of token and channel in the plain one."""
    if CHANNELS_LAST:
        return 3 * C, 1, C, C, 1
    else:
        return 1, N, C * N, 1, N


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
def _kept(a, row, N, c, a_token, a_channel, BLOCK_K: tl.constexpr, SINGLE_PASS: tl.constexpr):
    """The head's channels of this program's own tokens, kept for all rounds; SINGLE_PASS: there are at most BLOCK_K."""
    if SINGLE_PASS:
        return _load(a, row, tl.arange(0, BLOCK_K), N, c, a_token, a_channel)
    else:
        return 0.0


@triton.jit
def _products(
    kept, a, b, row, column, N, c, a_token, a_channel, b_token, b_channel,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SINGLE_PASS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: a·bᵀ over the head's channels, of which `kept` holds a's where one pass is enough."""
    if SINGLE_PASS:
        right = _load(b, column, tl.arange(0, BLOCK_K), N, c, b_token, b_channel)
        return tl.dot(kept, tl.trans(right), input_precision=PRECISION)
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, c, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            left = _load(a, row, i, N, c, a_token, a_channel)
            right = _load(b, column, i, N, c, b_token, b_channel)
            sums = tl.dot(left, tl.trans(right), sums, input_precision=PRECISION)
        return sums


@triton.jit
def _forward(
    qkv, out, lse, N, C, c, heads, blocks, chunks, image_stride, scale,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, SINGLE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of BLOCK_M tokens' results."""
    token, channel, part, out_token, out_channel = _strides(N, C, CHANNELS_LAST)
    block, chunk, image, head = _place(N, c, heads, blocks, chunks)
    q, k, v = _packed(qkv, image, head, c, image_stride, channel, part)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    queries = _kept(q, row, N, c, token, channel, BLOCK_K, SINGLE_PASS)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        s = _products(
            queries, q, k, row, column, N, c, token, channel, token, channel,
            BLOCK_K, BLOCK_M, BLOCK_N, PRECISION, SINGLE_PASS,
        )  # fmt: skip
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
    first = (row < N) & (tl.zeros([BLOCK_M], tl.int32) == chunk)  # the first chunk's program; a branch takes registers
    tl.store(lse + (image * heads + head) * N + row, largest + tl.log2(total), mask=first)


@triton.jit
def _delta(
    out, dout, delta, N, C, c, heads, blocks, chunks,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: Σ_c out·dout of BLOCK_M tokens."""
    _, _, _, token, channel = _strides(N, C, CHANNELS_LAST)
    block, _chunk, image, head = _place(N, c, heads, blocks, chunks)
    start_of_head = image * C * N + head * c * channel
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, c, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        a = _load(out + start_of_head, row, i, N, c, token, channel).to(tl.float32)
        b = _load(dout + start_of_head, row, i, N, c, token, channel).to(tl.float32)
        sums += tl.sum(a * b, axis=1)
    tl.store(delta + (image * heads + head) * N + row, sums, mask=row < N)


@triton.jit
def _query_gradient(
    qkv, dout, lse, delta, dqkv, N, C, c, heads, blocks, chunks, image_stride, scale, inverse_root,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, SINGLE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of BLOCK_M queries' gradients."""
    token, channel, part, out_token, out_channel = _strides(N, C, CHANNELS_LAST)
    block, chunk, image, head = _place(N, c, heads, blocks, chunks)
    q, k, v = _packed(qkv, image, head, c, image_stride, channel, part)
    do = dout + image * C * N + head * c * out_channel
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    vector = (image * heads + head) * N + row
    row_lse = tl.load(lse + vector, mask=row < N, other=0.0)
    row_delta = tl.load(delta + vector, mask=row < N, other=0.0)
    queries = _kept(q, row, N, c, token, channel, BLOCK_K, SINGLE_PASS)
    gradients = _kept(do, row, N, c, out_token, out_channel, BLOCK_K, SINGLE_PASS)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        s = _products(
            queries, q, k, row, column, N, c, token, channel, token, channel,
            BLOCK_K, BLOCK_M, BLOCK_N, PRECISION, SINGLE_PASS,
        )  # fmt: skip
        p = tl.where((column < N)[None, :], tl.exp2(s * scale - row_lse[:, None]), 0.0)
        dp = _products(
            gradients, do, v, row, column, N, c, out_token, out_channel, token, channel,
            BLOCK_K, BLOCK_M, BLOCK_N, PRECISION, SINGLE_PASS,
        )  # fmt: skip
        ds = p * (dp - row_delta[:, None])
        keys = _load(k, column, o, N, c, token, channel)
        sums = tl.dot(ds.to(keys.dtype), keys, sums, input_precision=PRECISION)
    to = dqkv + image * 3 * C * N + head * c * channel
    _store(to, sums * inverse_root, row, o, N, c, token, channel)


@triton.jit
def _key_value_gradient(
    qkv, dout, lse, delta, dqkv, N, C, c, heads, blocks, chunks, image_stride, scale, inverse_root,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, SINGLE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of BLOCK_M keys' and values' gradients; scores are [keys, queries] here."""
    token, channel, part, out_token, out_channel = _strides(N, C, CHANNELS_LAST)
    block, chunk, image, head = _place(N, c, heads, blocks, chunks)
    q, k, v = _packed(qkv, image, head, c, image_stride, channel, part)
    do = dout + image * C * N + head * c * out_channel
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    vectors = (image * heads + head) * N
    keys = _kept(k, row, N, c, token, channel, BLOCK_K, SINGLE_PASS)
    values = _kept(v, row, N, c, token, channel, BLOCK_K, SINGLE_PASS)
    key_sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    value_sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        s = _products(
            keys, k, q, row, column, N, c, token, channel, token, channel,
            BLOCK_K, BLOCK_M, BLOCK_N, PRECISION, SINGLE_PASS,
        )  # fmt: skip
        column_lse = tl.load(lse + vectors + column, mask=column < N, other=0.0)
        column_delta = tl.load(delta + vectors + column, mask=column < N, other=0.0)
        p = tl.where((column < N)[None, :], tl.exp2(s * scale - column_lse[None, :]), 0.0)
        gradients = _load(do, column, o, N, c, out_token, out_channel)
        value_sums = tl.dot(p.to(gradients.dtype), gradients, value_sums, input_precision=PRECISION)
        dp = _products(
            values, v, do, row, column, N, c, token, channel, out_token, out_channel,
            BLOCK_K, BLOCK_M, BLOCK_N, PRECISION, SINGLE_PASS,
        )  # fmt: skip
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
    cut = tile(name, head_channels, qkv.dtype, precision)
    blocks, chunks = -(-tokens // cut.block_m), -(-head_channels // cut.block_d)
    launch(
        kernel, (batch * num_heads * blocks * chunks,),
        *tensors, tokens, channels, head_channels, num_heads, blocks, chunks, qkv.stride(0), *scales,
        CHANNELS_LAST=_is_last(qkv), PRECISION=precision, SINGLE_PASS=head_channels <= cut.block_k,
        BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, BLOCK_D=cut.block_d,
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
        CHANNELS_LAST=last, BLOCK_M=DELTA_TOKENS, BLOCK_K=DELTA_CHANNELS, num_warps=4,
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
