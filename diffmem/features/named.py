"""Features by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffmem.errors import InputError
from diffmem.features.builtin import Function, PerceptualHash, Pixels
from diffmem.features.feature_set import FeatureExtractor, Metric, check_metric

NAMES = ("pixels", "hash", "sscd", "dinov2", "clip", "timm:NAME", "torchscript:PATH", "onnx:PATH")


def extractor(
    features: str | Callable[..., Any] | FeatureExtractor = "pixels",
    *,
    weights: str | None = None,
    preprocessing: str | None = None,
    metric: Metric | None = None,
    device: str = "auto",
    batch: int | None = None,
    precision: str = "float32",
) -> FeatureExtractor:
    """What makes vectors of images, by its name.

    Args:
        features: "pixels"; "hash", a perceptual hash; a network: "sscd", "dinov2", "clip", "timm:NAME",
            "torchscript:PATH", "onnx:PATH"; a function (or `torch.nn.Module`) that takes uint8 images [B, C, H, W] as a
            tensor and returns [B, d]; or an extractor, which is returned.
        weights: The file of a network's weights, where they are not in its library's own cache. Nothing is downloaded.
        preprocessing: How images are brought to what the network wants, by the name of who does it so: a preset of
            `diffmem.features.preprocessing`; default the network's own.
        metric: "euclidean", "cosine" or "hamming"; default the features' own, "cosine" for networks and functions.
        device: "cpu", "cuda", or "auto".
        batch: Images per call.
        precision: "float32", "bf16" or "fp16", in which the network computes.

    Raises:
        InputError: A name that is unknown, weights that are not there (with where to get them), or an option that
            these features do not have.
        MissingExtraError: A package is missing.

    Example:
        >>> extractor("pixels").metric, extractor("hash").metric
        ('euclidean', 'hamming')
        >>> extractor(lambda images: images.float().mean((2, 3)), metric="euclidean").metric
        'euclidean'
    """
    if metric is not None:
        check_metric(metric)
    if batch is not None and not (isinstance(batch, int) and batch >= 1):
        raise InputError(f"batch must be at least 1, got {batch!r}")
    options = {"weights": weights, "preprocessing": preprocessing, "metric": metric, "batch": batch}
    if isinstance(features, str):
        if features in ("pixels", "hash"):
            found = Pixels() if features == "pixels" else PerceptualHash()
            _refuse(f"features={features!r}", {**options, "batch": None})
            return found
        raise InputError(f"features={features!r} is unknown: choose {', '.join(NAMES)}, or give a function")
    if isinstance(features, FeatureExtractor):
        _refuse("features that are an extractor", options)
        return features
    if callable(features):
        _refuse("features that are a function", {"weights": weights})
        return Function(features, metric=metric or "cosine", batch=batch or 64)
    raise InputError(
        f"features must be a name ({', '.join(NAMES)}), a function or an extractor, got {type(features).__name__}"
    )


def _refuse(what: str, options: dict[str, Any]) -> None:
    """Raises InputError where an option was given that `what` has not."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(f"{what}: there is no {given[0]} to choose: leave {given[0]} out")
