"""The parts both network families are built of: resampling, embeddings of the noise level, the residual block.

Parameters bear the names of EDM's networks, so that state dicts load as they are. Feature maps are channels_last in
memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffmem.ops.attention import attention
from diffmem.ops.conv3x3 import conv3x3
from diffmem.ops.group_norm_silu import fuses_added, group_norm_silu


def positional_embedding(values: torch.Tensor, channels: int, endpoint: bool) -> torch.Tensor:
    """(B, channels): cosines, then sines, of values (B,) times frequencies that fall geometrically from 1 to 1/10000.

    With `endpoint` the last frequency is 1/10000 exactly, else it is the next one that would be.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=values.dtype, device=values.device)
    frequencies = torch.exp(-math.log(10000) / (half - endpoint) * steps)
    angles = values[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """(B, channels): cosines, then sines, of values (B,) times fixed random frequencies (arXiv 2006.10739)."""

    freqs: torch.Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        angles = values[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class LabelEmbedding(nn.Module):
    """A linear layer over one-hot labels that never builds one.

    Class indices (B,) int64 look up columns of the weight (out, label_dim), which is kept column by column in memory,
    so that a label's column, and its gradient, is one contiguous row; float vectors (B, label_dim) are multiplied.
    `gain` is what a one-hot's 1 would be multiplied by.
    """

    def __init__(self, label_dim: int, out_features: int, bias: bool, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(label_dim, out_features).t())
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.gain = gain

    def forward(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        """(B, out), or what all-zero labels give: (1, out), None where that is nothing."""
        if labels is None:
            return None if self.bias is None else self.bias[None]
        if labels.is_floating_point():
            return F.linear(labels.to(self.weight.dtype) * self.gain, self.weight, self.bias)
        rows = F.embedding(labels, self.weight.t()) * self.gain
        return rows if self.bias is None else rows + self.bias


class Resample(nn.Module):
    """Down- or upsampling by 2 with a separable filter; upsampling is the transposed filter times 4."""

    resample_filter: torch.Tensor

    def __init__(self, direction: str, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", resample_filter(taps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return resample(x, self.resample_filter, self.direction)


def resample_filter(taps: tuple[int, ...]) -> torch.Tensor:
    """The (1, 1, n, n) filter of n taps per axis, normalized to sum 1."""
    one_axis = torch.tensor(taps, dtype=torch.float32)
    return (one_axis.outer(one_axis) / one_axis.sum().square())[None, None]


def resample(x: torch.Tensor, taps: torch.Tensor, direction: str) -> torch.Tensor:
    """x (B, C, H, W) at half or double resolution, see Resample."""
    if taps.shape[-1] == 2:
        # Averages of 2×2 and copies of each pixel, which every backend does faster than a grouped convolution. The
        # filter of two taps is (½, ½) in every network; another one would have to be (a, 1 − a), which no
        # configuration names.
        return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    channels = x.shape[1]
    padding = (taps.shape[-1] - 1) // 2
    kernel = taps.to(x.dtype).expand(channels, 1, -1, -1)
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(x, kernel * 4, stride=2, padding=padding, groups=channels)


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution, stride 1, zero padding 1, through `diffmem.ops.conv3x3`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(
        self, x: torch.Tensor, biased: bool = True, residual: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        return conv3x3(x, self.weight, self.bias if biased else None, residual, scale)


class ResampleConv2d(nn.Conv2d):
    resample_filter: torch.Tensor
    """A filter and a convolution, the filter first; `fused` first convolves and then filters while it skips pixels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        direction: str,
        taps: tuple[int, ...],
        fused: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.direction, self.fused = direction, fused
        self.register_buffer("resample_filter", resample_filter(taps))

    def forward(self, x: torch.Tensor, biased: bool = True) -> torch.Tensor:
        bias = self.bias if biased else None
        if not self.fused:
            x = resample(x, self.resample_filter, self.direction)
            return (
                conv3x3(x, self.weight, bias)
                if self.kernel_size == (3, 3)
                else F.conv2d(x, self.weight, bias, padding=self.padding)
            )
        # Zero padding of the convolution and of the filter both before the convolution, then no padding at all.
        margin = (self.resample_filter.shape[-1] - 1) // 2
        x = F.conv2d(x, self.weight, None, padding=int(self.kernel_size[0] // 2 + margin))
        channels = x.shape[1]
        kernel = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        x = F.conv2d(x, kernel, stride=2, groups=channels)
        return x if bias is None else x + bias.to(x.dtype).reshape(1, -1, 1, 1)


class QueryKeyValue(nn.Module):
    """A 1×1 convolution to queries, keys and values, one after the other: output channels (3, heads, channels).

    EDM's networks count them (heads, channels, 3), which leaves two foreign values between any two of a query. The rows
    of `weight` (3, C, C_in) and `bias` (3, C) are regrouped here once, when they are loaded, so that of what comes out
    the queries, keys and values are views with contiguous channels. Outside of the module EDM's order holds: in
    `state_dict()` and `load_state_dict()`, with EDM's shapes (3C, C_in, 1, 1) and (3C,), and in training states.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        drawn = nn.Conv2d(channels, 3 * channels, 1)
        assert drawn.bias is not None
        self.weight = nn.Parameter(self.from_edm(drawn.weight[:, :, 0, 0].detach()))
        self.bias = nn.Parameter(self.from_edm(drawn.bias.detach()))

    @staticmethod
    def from_edm(values: torch.Tensor) -> torch.Tensor:
        """(3, C, …) from EDM's (3C, …), where row 3·i + {0, 1, 2} is channel i's query, key, value."""
        return values.unflatten(0, (-1, 3)).transpose(0, 1).contiguous()

    @staticmethod
    def to_edm(values: torch.Tensor) -> torch.Tensor:
        """EDM's (3C, …) from (3, C, …)."""
        return values.transpose(0, 1).flatten(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.flatten(0, 1)[:, :, None, None], self.bias.flatten())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.to_edm(destination[f"{prefix}weight"])[:, :, None, None]
        destination[f"{prefix}bias"] = self.to_edm(destination[f"{prefix}bias"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        # A parameter of this module's own shape, as `named_parameters()` gives it, is loaded as it is.
        channels, inputs = self.weight.shape[1:]
        weight, bias = (state_dict.get(f"{prefix}{name}") for name in ("weight", "bias"))
        if weight is not None and weight.shape == (3 * channels, inputs, 1, 1):
            state_dict[f"{prefix}weight"] = self.from_edm(weight[:, :, 0, 0])
        if bias is not None and bias.shape == (3 * channels,):
            state_dict[f"{prefix}bias"] = self.from_edm(bias)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class GroupNorm(nn.Module):
    """GroupNorm over min(32, channels // 4) groups, with SiLU, an adaptive scale and shift, and an embedding
    added before it, where asked for."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.num_groups = max(1, min(32, channels // 4))
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        silu: bool = True,
        added: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, scale, shift, silu, added)


def dropout(x: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    """x with values zeroed at random and the others scaled so that the mean stays; x itself where not `training`.

    On a CPU PyTorch draws one Bernoulli number per value, which is 8 % of a small network's training step. Here one
    draw of 64 bits serves four values, and the probability is a multiple of 2^-16.
    """
    steps = round(probability * 2**16)
    if not training or not 0 < steps < 2**16 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, probability, training)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: x.numel()] >= steps - 2**15
    noise = keep * (1 / (1 - steps / 2**16))
    # In x's own order in memory, where x is dense.
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    noise = noise.as_strided(x.shape, x.stride()) if dense else noise.reshape(x.shape)
    return x * noise.to(x.dtype)


@dataclass(frozen=True)
class BlockStyle:
    """What tells the residual blocks of the two families apart.

    adaptive: the conditioning vector scales and shifts the second norm's output instead of being added to its input;
    channels_per_head None: one head; resample_skip: a block that only resamples keeps its skip free of a convolution.
    """

    eps: float
    skip_scale: float
    adaptive: bool
    channels_per_head: int | None
    resample_skip: bool
    taps: tuple[int, ...]
    dropout: float
    emb_channels: int


class UNetBlock(nn.Module):
    """A residual block: norm, SiLU, convolution, conditioning, norm, SiLU, dropout, convolution; attention where asked
    for.

    `zero_channels`: how many of the in_channels, the last ones, are zeros of a disabled skip connection; the block is
    then called with the others only.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        resample: str | None = None,
        attention: bool = False,
        zero_channels: int = 0,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.style = in_channels, out_channels, style
        self.zero_channels = zero_channels

        def convolution(outputs: int, kernel: int) -> nn.Conv2d:
            if resample is None:
                return Conv3x3(in_channels, outputs) if kernel == 3 else nn.Conv2d(in_channels, outputs, kernel)
            return ResampleConv2d(in_channels, outputs, kernel, resample, style.taps)

        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = convolution(out_channels, 3)
        self.affine = nn.Linear(style.emb_channels, out_channels * (2 if style.adaptive else 1))
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.conv1 = Conv3x3(out_channels, out_channels)
        self.skip: nn.Conv2d | Resample | None = None
        if in_channels != out_channels or (resample is not None and not style.resample_skip):
            self.skip = convolution(out_channels, 1)
        elif resample is not None:
            self.skip = Resample(resample, style.taps)
        self.num_heads = 0
        if attention:
            # Narrower than one head: no attention at all.
            self.num_heads = 1 if style.channels_per_head is None else out_channels // style.channels_per_head
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, style.eps)
            self.qkv = QueryKeyValue(out_channels)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """(B, out_channels, H', W') from x (B, in_channels − zero_channels, H, W) and emb (B or 1, emb_channels)."""
        style = self.style
        conditioning = self.affine(emb)
        scale, shift = conditioning.chunk(2, dim=1) if style.adaptive else (None, None)
        added = None if style.adaptive else conditioning
        # The convolution's bias is one number per channel as well: added by the norm's kernel it takes no pass over the
        # map, forward (where the convolution would add it in one of its own) or backward (a sum over the map).
        folded = added is not None or fuses_added(x.device.type)
        if folded:
            assert self.conv0.bias is not None
            added = self.conv0.bias[None] if added is None else added + self.conv0.bias
        y = self.norm1(self._first_convolution(x, biased=not folded), scale, shift, added=added)
        y = self.conv1(dropout(y, style.dropout, self.training), residual=self._skip(x), scale=style.skip_scale)
        if self.num_heads:
            attended = self.proj(attention(self.qkv(self.norm2(y, silu=False)), self.num_heads))
            y = (y + attended) * style.skip_scale
        return y

    def _first_convolution(self, x: torch.Tensor, biased: bool) -> torch.Tensor:
        if not self.zero_channels:
            return self.conv0(self.norm0(x), biased)
        norm, conv = self.norm0, self.conv0
        group = self.in_channels // norm.num_groups
        # A group that straddles the border mixes its statistics with zeros: its zero channels stay in the computation.
        live = -(-x.shape[1] // group) * group
        y = group_norm_silu(
            F.pad(x, (0, 0, 0, 0, 0, live - x.shape[1])) if live > x.shape[1] else x,
            live // group,
            norm.weight[:live],
            norm.bias[:live],
            norm.eps,
        )
        y = conv3x3(y, conv.weight[:, :live], conv.bias if biased else None)
        if live == self.in_channels:
            return y
        # Groups of zeros only leave the norm as their bias, one constant per channel, the same for every image. Away
        # from the border the convolution turns them into one constant per channel again; a 3×3 image has all the
        # borders there are.
        height, width = y.shape[2:]
        rows, columns = min(height, 3), min(width, 3)
        constant = F.silu(norm.bias[live:]).reshape(1, -1, 1, 1).expand(1, -1, rows, columns)
        corners = F.conv2d(constant, conv.weight[:, live:], padding=1)
        return y + _stretch(_stretch(corners, 2, height), 3, width)

    def _skip(self, x: torch.Tensor) -> torch.Tensor:
        if self.skip is None:
            return x
        if not self.zero_channels:
            return self.skip(x)
        return F.conv2d(x, self.skip.weight[:, : x.shape[1]], self.skip.bias)  # type: ignore[arg-type, index]


def _stretch(image: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """`image` widened to `size` along `dim` by repeating its middle entry."""
    if image.shape[dim] == size:
        return image
    repeats = [size - 2 if d == dim else -1 for d in range(image.ndim)]
    first, middle, last = image.split(1, dim)
    return torch.cat([first, middle.expand(repeats), last], dim)


def initialize(module: QueryKeyValue | LabelEmbedding | nn.Conv2d | nn.Linear, gain: float, scheme: str) -> None:
    """Draws a convolution's or linear layer's weights, times `gain`; biases are zero for "xavier" (Glorot and Bengio
    2010).

    "default" is PyTorch's own, uniform within ±1/√fan_in for weights and biases (ADM).
    """
    if isinstance(module, QueryKeyValue):  # the numbers of a seed are those of EDM's order
        _, channels, inputs = module.weight.shape
        drawn = nn.utils.skip_init(nn.Conv2d, inputs, 3 * channels, 1, device=module.weight.device)
        initialize(drawn, gain, scheme)
        module.load_state_dict(drawn.state_dict())
        return
    with torch.no_grad():
        if scheme == "xavier":
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                module.bias.zero_()
        else:
            cast(nn.Linear, module).reset_parameters()
            if module.bias is not None:
                module.bias.mul_(gain)
        module.weight.mul_(gain)
