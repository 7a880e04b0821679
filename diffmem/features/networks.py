"""Networks that make vectors, from local files or their library's own cache. Nothing is downloaded.

A TorchScript or ONNX file is a program that its library interprets: name only files you trust. Weights of timm's
networks are read without executing anything.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmem.devices import pick_device
from diffmem.errors import InputError, MissingExtraError
from diffmem.features.builtin import Function
from diffmem.features.feature_set import FeatureExtractor, Metric
from diffmem.features.preprocessing import PRESETS, Preprocessing, preprocessing_preset
from diffmem.inert.boundary import one_line, parsing
from diffmem.integrity import file_sha256
from diffmem.precision import AUTOCAST, float32_products

SSCD_URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_{}.torchscript.pt"
SSCD = (
    "disc_mixup",
    "disc_large",
    "disc_blur",
    "disc_advanced",
    "imagenet_mixup",
    "imagenet_blur",
    "imagenet_advanced",
)
# dgm-eval's choices (Stein 2023); fld's are timm:vit_base_patch14_dinov2.lvd142m and
# timm:vit_base_patch32_clip_224.openai.
DINOV2, CLIP = "vit_large_patch14_dinov2.lvd142m", "vit_large_patch14_clip_224.datacompxl"
BATCH = 64


def sscd(
    variant: str, weights: str | Path | None, preprocessing: str | None, options: dict[str, Any]
) -> FeatureExtractor:
    """SSCD (Pizzi 2022) from its TorchScript file, or one as ONNX.

    Args:
        variant: "disc_mixup" and others of `SSCD`.
        weights: The file; default where torch.hub would keep it.
        preprocessing: A preset; default SSCD's own.
        options: metric, device, batch and precision.
    """
    if variant not in SSCD:
        raise InputError(f"features='sscd:{variant}' is unknown: choose one of {', '.join(SSCD)}")
    url = SSCD_URL.format(variant)
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if weights is None and not place.is_file():
        raise InputError(
            f"features='sscd': the weights are not available: download {url} (MIT license) to {place}, or pass the "
            "file as weights=…"
        )
    path = Path(weights) if weights is not None else place
    load = onnx if path.suffix.lower() == ".onnx" else torchscript
    name = "sscd" if variant == SSCD[0] else f"sscd:{variant}"
    return load(path, preprocessing or "sscd", {**options, "name": name})


def torchscript(path: str | Path, preprocessing: str | None, options: dict[str, Any]) -> FeatureExtractor:
    """The network in a TorchScript file."""
    path = _file(path, "a TorchScript file")
    device = pick_device(options["device"])
    with parsing(path, "a TorchScript file that torch.jit.load reads"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated, and how its file was written
        network = torch.jit.load(str(path), map_location=device).eval()
    if preprocessing is None and "sscd" in path.name.lower():
        preprocessing = "sscd"
    return _network(network, f"torchscript:{path.name}", path, _wanted(preprocessing, path), device, options)


def onnx(path: str | Path, preprocessing: str | None, options: dict[str, Any]) -> FeatureExtractor:
    """The network in an ONNX file: one input of images, uint8 or float, [B, 3, H, W] or [B, H, W, 3]; its first output
    is taken. A network of bytes needs no preprocessing; of one that is named it gets the size."""
    path = _file(path, "an ONNX file")
    if options["precision"] != "ieee":
        raise InputError(f"{path}: an ONNX file fixes its own precision: remove precision=…")
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx", f"{path}: running ONNX files") from None
    device = pick_device(options["device"])
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    with parsing(path, "an ONNX file that onnxruntime reads"):
        session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
    network = _OnnxNetwork(session, path)
    if network.dtype == np.uint8:
        # Such a network normalizes by itself; of a preset it gets the size.
        prepare = Preprocessing("bytes", network.side, square=True)
        if preprocessing is not None:
            prepare = _of_side(preprocessing_preset(preprocessing), network.side, path)
        chosen: Callable[[torch.Tensor], torch.Tensor] = prepare.resized
        named = prepare.name
    else:
        if preprocessing is None and "sscd" in path.name.lower():
            preprocessing = "sscd"
        preset = _of_side(_wanted(preprocessing, path), network.side, path)
        chosen, named = preset, preset.name
    return _network(network, f"onnx:{path.name}", path, chosen, torch.device("cpu"), options, named)


def _of_side(preset: Preprocessing, side: int | None, path: Path) -> Preprocessing:
    """The preset for a network whose input is a square of that side, or of any size (None)."""
    if side is None or side == (preset.crop or (preset.side if preset.square else None)):
        return preset
    if preset.side is None:
        raise InputError(f"{path}: the network expects images of {side}x{side}: choose a preprocessing that resizes")
    preset = preset.of_side(side)
    return preset if preset.crop is not None else replace(preset, square=True)


class _OnnxNetwork:
    """A session as a function of tensors."""

    def __init__(self, session: Any, path: Path) -> None:
        inputs = session.get_inputs()
        kinds = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
        if len(inputs) != 1 or inputs[0].type not in kinds or len(inputs[0].shape) != 4:
            found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise InputError(f"{path}: takes {found or 'nothing'}, not one batch of images, uint8 or float, of 4 axes")
        self.session, self.path, self.input = session, path, inputs[0].name
        self.dtype = kinds[inputs[0].type]
        shape = inputs[0].shape
        self.last = shape[3] == 3 and shape[1] != 3
        sides = [length for length in (shape[1:3] if self.last else shape[2:]) if isinstance(length, int)]
        if len(set(sides)) > 1:
            raise InputError(f"{path}: expects images of {sides[0]}x{sides[1]}; only square inputs are supported")
        self.side = sides[0] if sides else None
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.__name__ = path.name

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        ordered = images.permute(0, 2, 3, 1) if self.last else images
        values = np.ascontiguousarray(ordered.cpu().numpy(), self.dtype)
        return np.concatenate([self._run(part) for part in self._parts(values)])[: len(values)]

    def _parts(self, values: np.ndarray) -> list[np.ndarray]:
        """The batch in the network's own size of batches, where it has one; the last is filled up."""
        if self.batch is None:
            return [values]
        missing = -len(values) % self.batch
        values = np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])
        return np.split(values, len(values) // self.batch)

    def _run(self, values: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(self.session.run(None, {self.input: values})[0])
        except Exception as error:  # onnxruntime's exceptions have no common class
            raise InputError(
                f"{self.path}: failed on {values.dtype} {list(values.shape)}: {one_line(error)}"
            ) from error


def timm(
    name: str, weights: str | Path | None, preprocessing: str | None, options: dict[str, Any], known_as: str
) -> FeatureExtractor:
    """A network of timm's, its classifier taken off; CLIP's keep their projection.

    Args:
        name: As timm knows it: "vit_base_patch14_dinov2.lvd142m".
        weights: A file of weights, `.safetensors` or what `torch.save` wrote; default the one in Hugging Face's cache.
        preprocessing: A preset; default what timm says of the network.
        options: metric, device, batch and precision.
        known_as: The features' name.
    """
    library = _timm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configuration = library.models.get_pretrained_cfg(name)
        if configuration is None or not library.is_model(name.partition(".")[0]):
            raise InputError(f"features={known_as!r}: timm {library.__version__} has no network {name}")
        path = (
            _cached_weights(configuration, name, known_as) if weights is None else _file(weights, "a file of weights")
        )
        clip = "_clip_" in name
        preset = preprocessing_preset(preprocessing) if preprocessing else _preset_of(configuration)
        size = preset.crop or (preset.side if preset.square else None)
        arguments: dict[str, Any] = {} if clip else {"num_classes": 0}
        if size is not None and "vit" in name and size != configuration.input_size[1]:
            arguments["img_size"] = size
        network = library.create_model(name, pretrained=False, **arguments)
        _load_weights(network, path, clip)
    device = pick_device(options["device"])
    return _network(network.eval().to(device), known_as, path, preset, device, options)


def _timm() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm
            import timm.models
    except ImportError:
        raise MissingExtraError("timm", "features", "features of timm's networks, DINOv2 and CLIP") from None
    except Exception as error:  # a torchvision made for another torch fails as it likes
        raise InputError(f"the package timm cannot be imported here ({one_line(error)})") from error
    return timm


def _preset_of(configuration: Any) -> Preprocessing:
    """What timm says of a network; DINOv2's 518 pixels become the 224 of dgm-eval and fld."""
    if "dinov2" in configuration.architecture:
        return PRESETS["dinov2"]
    if tuple(round(value, 3) for value in configuration.mean) == tuple(round(v, 3) for v in PRESETS["clip"].mean):
        return PRESETS["clip"]
    side = configuration.input_size[1]
    filter: Any = "bicubic" if configuration.interpolation == "bicubic" else "bilinear"
    return Preprocessing(
        "timm", int(side / configuration.crop_pct), crop=side, filter=filter,
        mean=tuple(configuration.mean), std=tuple(configuration.std),
    )  # fmt: skip


def _cached_weights(configuration: Any, name: str, known_as: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    repository = configuration.hf_hub_id
    for file in ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repository, file) if repository else None
        if isinstance(found, str):
            return Path(found)
    way = f"download them once with `hf download {repository}`, or " if repository else ""
    raise InputError(f"features={known_as!r}: the weights of {name} are not available; {way}pass a file as weights=…")


def _load_weights(network: torch.nn.Module, path: Path, clip: bool) -> None:
    """Weights from a file, brought to timm's names where they are the authors' own."""
    state = _state(path)
    module = sys.modules[type(network).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    with parsing(path, "weights of this network"):
        if convert is not None:
            state = convert(state, network)
        wanted = network.state_dict()
        classifier = () if clip else tuple(name for name in state if name not in wanted)
        state = {name: value for name, value in state.items() if name not in classifier}
        missing = [name for name in wanted if name not in state]
        wrong = [name for name in state if name not in wanted or state[name].shape != wanted[name].shape]
        if missing or wrong:
            first = (missing + wrong)[0]
            raise InputError(
                f"{path}: not the weights of this network: {len(missing):,} of its {len(wanted):,} tensors are missing"
                f", {len(wrong):,} have another shape (the first: {first})"
            )
        network.load_state_dict(state)


def _state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file, read without executing anything."""
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        with parsing(path, "a complete safetensors file"):
            return load_file(path)
    from diffmem.inert.pickles import Damaged, input_error
    from diffmem.inert.torch_files import TensorRecord, read_torch_file

    content = read_torch_file(path, "file of weights", "save the network's state_dict")
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    try:
        records = content.items() if isinstance(content, dict) else ()
        return {str(name): value.to_tensor() for name, value in records if isinstance(value, TensorRecord)}
    except Damaged as error:
        raise input_error(path, error, "file of weights", "save the network's state_dict") from None


def _file(path: str | Path, what: str) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {what}")
    return path


def _wanted(preprocessing: str | None, path: Path) -> Preprocessing:
    if preprocessing is None:
        raise InputError(
            f"{path}: does not record its preprocessing: choose one of {', '.join(PRESETS)} with preprocessing=…"
        )
    return preprocessing_preset(preprocessing)


def _network(
    network: Callable[[torch.Tensor], Any],
    name: str,
    path: Path,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    options: dict[str, Any],
    prepared: str | None = None,
) -> FeatureExtractor:
    """The network as an extractor, its fingerprint from the bytes of its file."""
    precision = options["precision"]
    if precision not in AUTOCAST:
        raise InputError(f"precision is {precision!r}, but must be one of {', '.join(AUTOCAST)}")
    prepared = prepared or prepare.name  # type: ignore[attr-defined]
    metric: Metric = options["metric"] or "cosine"
    return Function(
        _in_precision(network, precision, device),
        name=options.get("name") or name,
        metric=metric,
        batch=options["batch"] or BATCH,
        device=device,
        prepare=prepare,
        fingerprint=f"{path.name} {file_sha256(path)[:16]}, preprocessing {prepared}, {precision}",
        resizes=prepared not in ("0-1", "-1-1"),
    )


def _in_precision(
    network: Callable[[torch.Tensor], Any], precision: str, device: torch.device
) -> Callable[[torch.Tensor], Any]:
    dtype = AUTOCAST[precision]

    def run(batch: torch.Tensor) -> Any:
        with float32_products(precision), torch.autocast(device.type, dtype, enabled=dtype is not None):
            return network(batch)

    return run
