"""What this installation consists of and what it would use here: the facts behind `diffmem info`."""

from __future__ import annotations

import importlib
import pkgutil
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import diffmem
import diffmem.ops
import diffmem.search.gpu  # registers how it searches
from diffmem.ops.registry import OPS, build_info, native_module

# Packages of the module `faiss`. Each writes over the others' files, so that an environment holds one of them.
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")

# Package: the extra that brings it, and what it is for.
OPTIONAL = {
    "faiss-cpu": ("faiss", "approximate search"),
    "faiss-gpu": ("gpu", "approximate search, also on GPUs; replaces faiss-cpu"),
    "triton": ("triton", "fused GPU kernels"),
    "datasets": ("datasets", "Hugging Face data sets on disk"),
    "pandas": ("pandas", "audits as data frames"),
    "timm": ("features", "DINOv2, CLIP and other networks' features"),
    "onnxruntime": ("onnx", "features of networks in ONNX files"),
    "simplejpeg": ("jpeg", "small JPEG files decoded at a fifth of the time"),
    "pyarrow": ("parquet", "images, features and names in parquet files"),
    "h5py": ("hdf5", "images in HDF5 files"),
    "pydicom": ("medical", "images in DICOM files"),
    "nibabel": ("medical", "images in NIfTI files"),
    "ray": ("ray", "studies and indexes on many machines"),
    "s3fs": ("remote", "training sets in object stores"),
    "torchmetrics": ("torchmetrics", "metrics of memorization"),
    "lightning": ("lightning", "a callback that watches for copies"),
    "diffusers": ("diffusers", "pipelines monitored, their networks sampled"),
    "transformers": ("transformers", "a callback of its Trainer"),
    "wandb": ("wandb", "records of monitors in Weights & Biases"),
    "mlflow": ("mlflow", "records of monitors in MLflow"),
}


def describe() -> dict[str, Any]:
    """Versions, processor features, builds, the backend of each op and of the search and why,
    and the optional packages found."""
    for module in pkgutil.iter_modules(diffmem.ops.__path__):
        if module.ispkg:  # importing an op's folder registers it
            folder = importlib.import_module(f"diffmem.ops.{module.name}")
            getattr(folder, "OP", None)  # one that is registered when it is first asked for
    module, built = native_module(), build_info()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "diffmem": diffmem.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if len(devices) > 1 else [],
        "native": {
            "present": module is not None,
            "why": built["native_reason"],
            "cpu_level": module.cpu_level() if module is not None else None,
            "cpu_features": module.cpu_features() if module is not None else [],
        },
        "cuda": {"present": module is not None and module.with_cuda, "why": built["cuda_reason"]},
        "ops": {name: op.explanations(devices) for name, op in sorted(OPS.items())},
        "faiss": describe_faiss(),
        "optional": {
            name: {"version": _version(name), "extra": extra, "purpose": purpose}
            for name, (extra, purpose) in OPTIONAL.items()
        },
    }


def describe_faiss() -> dict[str, Any]:
    """Which FAISS is installed: `packages` with their versions, `gpus` that it sees, and in `problem` what is wrong
    with that (None: nothing)."""
    packages = {name: found for name in FAISS if (found := _version(name)) is not None}
    problem, gpus = None, 0
    if len(packages) > 1:
        names = " ".join(packages)
        problem = (
            f"{' and '.join(packages)} provide the same module: pip uninstall {names}, then install the one you want"
        )
    try:
        gpus = importlib.import_module("faiss").get_num_gpus()
    except ImportError as error:
        if packages:
            problem = problem or f"it cannot be imported: {error}"
    return {"packages": packages, "gpus": gpus, "problem": problem}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
