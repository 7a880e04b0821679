"""Features by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.features.builtin import Function, PerceptualHash, Pixels
from diffmem.features.feature_set import FeatureExtractor, Metric, check_metric
from diffmem.features.preprocessing import preprocessing_preset
from diffmem.lazy import torch

NAMES = ("pixels", "hash", "sscd", "dinov2", "clip", "timm:NAME", "torchscript:PATH", "onnx:PATH")


def extractor(
    features: str | Callable[..., Any] | FeatureExtractor = "pixels",
    *,
    weights: str | None = None,
    preprocessing: str | None = None,
    metric: Metric | None = None,
    device: str = "auto",
    batch: int | None = None,
    precision: str = "ieee",
) -> FeatureExtractor:
    """What makes vectors of images, by its name.

    Args:
        features: "pixels"; "hash", a perceptual hash; a network: "sscd" ("sscd:disc_large", …), "dinov2" and "clip"
            (ViT-L/14, as dgm-eval has them), "timm:NAME", "torchscript:PATH", "onnx:PATH"; a function (or
            `torch.nn.Module`) that takes uint8 images [B, C, H, W] as a tensor and returns [B, d]; or an extractor,
            which is returned.
        weights: The file of a network's weights, where they are not in its library's own cache. Nothing is downloaded.
        preprocessing: How images are brought to what the network wants, by the name of who does it so: "sscd",
            "sscd-320", "dcr", "dinov2", "clip", "imagenet", "0-1" or "-1-1" (`diffmem.features.preprocessing`);
            default the network's own. Functions get bytes where none is named.
        metric: "euclidean", "cosine" or "hamming"; default the features' own, "cosine" for networks and functions.
        device: "cpu", "cuda", or "auto".
        batch: Images per call.
        precision: "ieee", "tf32", "bf16" or "fp16" (`diffmem.precision`), in which a network computes.

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
    chosen = {"metric": metric, "device": device, "batch": batch, "precision": precision}
    if isinstance(features, str):
        return _by_name(features, weights, preprocessing, chosen)
    if isinstance(features, FeatureExtractor):
        given = {"weights": weights, "preprocessing": preprocessing, "metric": metric, "batch": batch}
        _refuse("features that are an extractor", given)
        return features
    if callable(features):
        _refuse("features that are a function", {"weights": weights})
        prepare = None if preprocessing is None else preprocessing_preset(preprocessing)
        where = pick_device(device)
        if isinstance(features, torch.nn.Module):
            where = next((values.device for values in features.parameters()), where)
        return Function(features, metric=metric or "cosine", batch=batch or 64, device=where, prepare=prepare)
    raise InputError(
        f"features must be a name ({', '.join(NAMES)}), a function or an extractor, got {type(features).__name__}"
    )


def _by_name(features: str, weights: str | None, preprocessing: str | None, chosen: dict[str, Any]) -> FeatureExtractor:
    kind, colon, rest = features.partition(":")
    if features in ("pixels", "hash"):
        _refuse(f"features={features!r}", {"weights": weights, "preprocessing": preprocessing, **chosen})
        return Pixels() if features == "pixels" else PerceptualHash()
    from diffmem.features import networks

    if kind == "sscd":
        return networks.sscd(rest if colon else networks.SSCD[0], weights, preprocessing, chosen)
    if features in ("dinov2", "clip"):
        name = networks.DINOV2 if features == "dinov2" else networks.CLIP
        return networks.timm(name, weights, preprocessing, chosen, features)
    if kind == "timm" and rest:
        return networks.timm(rest, weights, preprocessing, chosen, features)
    if kind in ("torchscript", "onnx") and rest:
        _refuse(f"features={features!r}", {"weights": weights})
        return (networks.torchscript if kind == "torchscript" else networks.onnx)(rest, preprocessing, chosen)
    raise InputError(f"features={features!r} is unknown: choose {', '.join(NAMES)}, or give a function")


def _refuse(what: str, options: dict[str, Any]) -> None:
    """Raises InputError where an option was given that `what` has not."""
    harmless = ("device", "batch", "precision")
    given = [name for name, value in options.items() if value is not None and name not in harmless]
    if given:
        raise InputError(f"{what}: does not take {given[0]}=…: remove it")
