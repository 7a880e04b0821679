"""The tolerances of all ops, samplers and networks, in one table.

The rule for implementations of one formula: the error against float64 may be at most `FACTOR` times the error of the
same-dtype PyTorch formulation, plus a rounding floor, `FLOORS` times the dtype's epsilon times the largest exact value
(`assert_as_exact`). Where there is no such formulation to compare with (the PyTorch formulation itself is tested), the
floor alone is allowed (`assert_rounded`). What compares two results in other ways takes its tolerance from `CLOSE`
(`assert_close`) or `RELATIVE` (`assert_relative`). Tests of ops, samplers and networks have no tolerances of their own:
tests/test_numerics.py holds them to that.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

FACTOR = 2.0

# Floors, in epsilons of the result's dtype times the largest exact value (with `norm`: times its root mean square).
FLOORS = {
    "group_norm_silu": 8.0,
    "group_norm_silu by its reference": 100.0,  # plain sums in any layout's order, where PyTorch's are pairwise
    "attention": 8.0,
    "conv3x3": 2.0,  # by the norm: Winograd's largest error is of few pixels
    "conv3x3 gradients": 12.0,  # by the norm; the direct sum's own error is not known here
    "attention by PyTorch": 25.0,  # float32 products in any order
    "half precision": 4.0,  # one rounding of the result, products and sums being wider
    "on a device": 16.0,  # any GPU's order of summation
}

# What TF32 drops: 13 bits of a float32's 23. A floor is that many times as high.
TF32 = 2.0**13

# (rtol, atol) of torch.testing.assert_close and pytest.approx.
CLOSE = {
    "conv3x3 by Winograd": (1e-4, 1e-5),
    "conv3x3 by Winograd, values of opcheck": (1e-3, 1e-4),
    "conv3x3 by PyTorch": (1e-5, 1e-5),
    "any op, another layout": (1e-4, 1e-4),
    "any op, another backend": (1e-4, 1e-4),
    "any op, twice": (0.0, 0.0),
    # A variance of zero multiplies the mean's rounding (7 · 2⁻²⁴) by 1/√eps and the weights, and by nothing worse.
    "group_norm_silu of constants": (0.0, 5e-4),
    "group_norm_silu of constants, one eps of 1e-6": (0.0, 1e-4),
    "SiLU at the ends of the range": (1e-6, 1e-30),
    "attention of scores of ±2500": (1e-4, 1e-3),
    "gradients through torch.compile": (1e-4, 1e-4),
    "gradients through aot_eager": (1e-5, 1e-5),
    "correlations": (0.0, 2e-5),  # of windows with means far from zero
    "remainders": (1e-3, 2e-3),  # the root of 1 − correlation, which is rounding where two images are the same
    "maps": (0.0, 5e-3),  # pixels
    "maps that were planted": (0.0, 0.03),  # linear interpolation blurs one of both images
    "what deformations cost": (0.02, 0.0),
    "posterior_mean in float32": (1e-5, 1e-6),
    "weighted sums of bytes": (1e-6, 2.6e-3),
    "float distances": (1e-12, 0.0),
    "float distances of a device": (1e-5, 1e-5),
    "the optimal denoiser": (0.0, 1e-6),
    "the optimal denoiser, few images": (0.0, 1e-9),
    "the score": (1e-6, 1e-9),
    "the optimal denoiser on a device, sigma > 1": (0.0, 1e-4),
    "the optimal denoiser on a device": (0.0, 1e-5),
    "dropout in float32": (1e-4, 0.0),
    "dropout in half precision": (1e-2, 0.0),
    "losses of the protocol": (2e-4, 1e-5),
    "weights after a step by hand": (1e-5, 1e-6),
    "weights after training by two processes": (1e-5, 1e-7),
    "weights after compiled training": (1e-3, 1e-4),
    "weights after training by a CUDA graph": (1e-3, 1e-4),
    "losses by two processes": (1e-6, 0.0),
    "losses after compiled training": (1e-5, 0.0),
    "losses of other parts of a batch": (1e-4, 0.0),
    "losses of bfloat16 products": (3e-2, 0.0),
    "losses by a CUDA graph": (1e-4, 0.0),
    "losses of a device, ieee": (1e-4, 0.0),
    "losses of a device, tf32": (1e-2, 0.0),
    "losses of a device, bf16": (5e-2, 0.0),
}

# ‖found − expected‖ / ‖expected‖, of the worst image.
RELATIVE = {
    "a network, golden": 1e-5,
    "a network in bfloat16": 0.05,
    "a sampler, golden": 1e-4,
    "a sampler on a device": 1e-3,
    "every variant, 400 steps": 0.03,  # iDDPM's highest levels lie far apart, farthest in t = σ²
    "half a schedule by Euler": 0.15,
    "half a schedule": 0.01,
    "a multistep method begun again": 0.01,
    "what a callback sees": 1e-12,
    "the last state a callback sees": 1e-5,
    "the optimal denoiser on a device": 3e-5,
}


def assert_as_exact(
    name: str,
    found: Sequence[torch.Tensor] | torch.Tensor,
    plain: Sequence[torch.Tensor] | torch.Tensor,
    exact: Sequence[torch.Tensor] | torch.Tensor,
    rounding: float = 1.0,
    norm: bool = False,
) -> None:
    """The rule, for each of the results of one call.

    Args:
        name: Of the floor.
        found: Results of the implementation.
        plain: Those of the PyTorch formulation, computed in the dtype of the map (parameters may be wider in `found`).
        exact: Those in float64.
        rounding: How many times coarser than the dtype's the rounding of products is (`TF32`).
        norm: Compare root mean squares instead of the largest values.
    """
    triples = [(found, plain, exact)] if isinstance(found, torch.Tensor) else zip(found, plain, exact, strict=True)
    for number, (ours, theirs, right) in enumerate(triples):
        error, allowed = _size(ours - right, norm), FACTOR * _size(theirs - right, norm)
        allowed += _floor(name, ours.dtype, rounding) * _size(right, norm)
        assert error <= allowed < torch.inf, f"{name}, result {number}: {error:.2e} > {allowed:.2e}"


def assert_rounded(name: str, found: torch.Tensor, exact: torch.Tensor, norm: bool = False) -> None:
    """The floor alone: `found` is `exact` but for rounding."""
    error, allowed = _size(found - exact, norm), _floor(name, found.dtype) * _size(exact, norm)
    assert error <= allowed < torch.inf, f"{name}: {error:.2e} > {allowed:.2e}"


def assert_close(name: str, found: torch.Tensor, expected: torch.Tensor, **options) -> None:
    """torch.testing.assert_close with the tolerances of `name`."""
    rtol, atol = CLOSE[name]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, **options)


def approximately(name: str, expected):
    """pytest.approx with the tolerances of `name`."""
    rtol, atol = CLOSE[name]
    return pytest.approx(expected, rel=rtol, abs=atol)


def assert_log_sums(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """The logarithm of the weights' sum, beside a posterior mean that was asked for to `tolerance`."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=20 * tolerance)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest over the images of ‖value − expected‖/‖expected‖."""
    difference = (value - expected).flatten(1).double().norm(dim=1)
    return (difference / expected.flatten(1).double().norm(dim=1)).max().item()


def assert_relative(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """`relative_error` is below the bound of `name`."""
    error = relative_error(found, expected)
    assert error < RELATIVE[name], f"{name}: {error:.2e} >= {RELATIVE[name]:.0e}"


def _floor(name: str, dtype: torch.dtype, rounding: float = 1.0) -> float:
    return FLOORS[name] * rounding * torch.finfo(dtype).eps


def _size(values: torch.Tensor, norm: bool) -> float:
    values = values.detach().double()
    return float(values.square().mean().sqrt() if norm else values.abs().max())
