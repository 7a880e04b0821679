"""What `diffmem info` says of the search is what an audit uses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import diffmem
from diffmem.cli import cli
from diffmem.errors import InputError
from diffmem.ops import registry
from diffmem.ops.nearest import cuda
from diffmem.search import TrainingIndex, gpu, index
from diffmem.search.index import METHODS, SMALL

needs_core = pytest.mark.skipif(registry.native_module() is None, reason="built without its compiled core")


def told(op: str = "search") -> dict[str, str]:
    done = CliRunner().invoke(cli, ["info", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)["ops"][op]


def used(training, generated) -> str:
    """What an audit's search did, by its own account."""
    detector = diffmem.CopyDetector(training, device="cpu")
    detector.update(generated)
    return detector.index.stats.method


@needs_core
def test_info_names_what_an_audit_uses():
    patches = diffmem.load_images("builtin:patches?n=1200").images
    said = told()["cpu"]
    assert said.startswith("filtered (")
    assert said.endswith("; not gpu: searches on a GPU")
    assert used(patches, patches[:60]) == "filtered"
    # The two exceptions that the line names: few images, and images on which bounds do not prune.
    assert f"dense below {SMALL:,} images and where bounds do not prune" in said
    assert used(patches[: SMALL - 1], patches[:60]) == "dense"
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1, 16, 16), dtype=np.uint8)
    assert "dense" in used(noise, 255 - noise[:600])


def test_without_the_core_info_says_torch_and_why(monkeypatch):
    reason = "DIFFMEM_NATIVE=off in the environment"
    monkeypatch.setattr(registry, "native_module", lambda: None)
    monkeypatch.setattr(registry, "build_info", lambda: {"native_reason": reason, "cuda_reason": reason})
    said = index.OP.explanations(["cpu"])["cpu"]
    assert said.startswith("torch (exact")
    assert f"; not filtered: {reason}; not dense: {reason}" in said
    images = np.random.default_rng(0).integers(0, 256, (1100, 1, 4, 4), dtype=np.uint8)
    assert used(images, images[:3]) == "torch"
    with pytest.raises(InputError, match=f"method 'dense' cannot be used here: {reason}"):
        TrainingIndex(images, method="dense", device="cpu")


def test_on_a_gpu_info_names_what_is_measured_and_why_not_the_rest(monkeypatch):
    """The candidates are those among which a search measures, `available_backends`."""
    said = index.OP.explanations(["cuda"])["cuda"]
    assert said == "gpu (exact, by the fastest backend of gpu search)"
    assert index.OP.explain("cuda", torch.empty(0, 1, dtype=torch.float64)).startswith("torch (")
    monkeypatch.setattr(cuda, "native_unavailable", lambda device_type: "nvcc was not found")
    monkeypatch.setattr(gpu, "_faiss_unavailable", lambda device_type: None)
    said = gpu.OP.explanations(["cpu", "cuda"])
    assert set(said) == {"cuda, images", "cuda, float32 vectors"}
    names = [backend.name for backend in gpu.OP.candidates("cuda", torch.uint8)]
    assert "int8" in names
    assert "cuda" not in names
    assert "int8 (int8 products by cuBLAS)" in said["cuda, images"]
    assert "; not cuda: nvcc was not found" in said["cuda, images"]
    assert said["cuda, float32 vectors"].startswith("the fastest of tf32 (")
    assert "float64 (" in said["cuda, float32 vectors"]
    assert told("gpu search") == (gpu.OP.explanations(["cuda"]) if torch.cuda.is_available() else {})


def test_every_method_is_registered():
    assert {"gpu", *METHODS} - {"auto"} == {backend.name for backend in index.OP.backends}
    images = np.random.default_rng(0).integers(0, 256, (1100, 12), dtype=np.uint8)
    expected = TrainingIndex(images, method="reference").query(images[:5])
    for backend in index.OP.candidates("cpu", torch.from_numpy(images)):
        found = backend.function(images, device="cpu").query(images[:5])
        np.testing.assert_array_equal(found.squared_distances, expected.squared_distances)
        np.testing.assert_array_equal(found.indices, expected.indices)
