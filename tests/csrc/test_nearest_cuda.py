"""The CUDA search without a GPU: values and races on the host stand-in (csrc/simt), compilation by nvcc."""

import importlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_build import CSRC, HERE, PLAIN, compile_for_races, compile_host, run_for_races

from benchmarks import host_core
from benchmarks.host_core import SimtCore
from diffmem.errors import InputError
from diffmem.ops.nearest import cuda
from diffmem.ops.registry import native_module

SOURCES = list(host_core.SOURCES)
NO_DISTANCE = 2**63 - 1
BAD_SIZE, BAD_NEIGHBORS, BAD_DIMENSION, MISALIGNED, NULL_POINTER, SMALL_WORKSPACE = range(-1, -7, -1)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return SimtCore(compile_host(SOURCES, tmp_path_factory.mktemp("nearest") / "nearest.so", PLAIN))


class Guarded:
    """An array of garbage with a guard behind it, aligned to 64 bytes."""

    def __init__(self, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = np.full(size + 256, 0xCD, np.uint8)
        start = -memory.ctypes.data % 64
        self.array = memory[start : start + size].view(dtype).reshape(shape)
        self.guard = memory[start + size :]
        self.address = self.array.ctypes.data

    def intact(self) -> np.ndarray:
        assert (self.guard == 0xCD).all(), "a store went past the end of an array"
        return self.array


def placed(images: np.ndarray) -> Guarded:
    copy = Guarded(images.shape, images.dtype)
    copy.array[...] = images
    return copy


def search(core, queries, training, k, multiprocessors=4):
    """center + search on the stand-in; every array has the size that the contract says and starts as garbage."""
    os.environ["DIFFMEM_SIMT_MULTIPROCESSORS"] = str(multiprocessors)
    n, d = training.shape
    row = core.nearest_cuda_centered_row(d)
    prepared = []
    for images in (queries, training):
        source, centered, norms = placed(images), Guarded((len(images), row), np.int8), Guarded(len(images), np.int64)
        core.nearest_cuda_center(source.address, len(images), d, centered.address, norms.address, 0)
        expected = images.astype(np.int64) - 128
        np.testing.assert_array_equal(centered.intact()[:, :d], expected)
        assert not centered.array[:, d:].any()
        np.testing.assert_array_equal(norms.intact(), (expected**2).sum(1))
        prepared += [centered, norms]
    size = core.nearest_cuda_search_workspace(len(queries), n, d, k)
    workspace = Guarded(size, np.uint8)
    indices, distances = Guarded((len(queries), k), np.int64), Guarded((len(queries), k), np.int64)
    core.nearest_cuda_search(
        prepared[0].address, prepared[1].address, len(queries), prepared[2].address, prepared[3].address, n, d, k,
        workspace.address, size, indices.address, distances.address, 0,
    )  # fmt: skip
    for array in (*prepared, workspace):
        array.intact()
    return indices.intact(), distances.intact()


def refine(core, queries, training, candidates, offsets, k):
    sources = [placed(each) for each in (queries, training, candidates, offsets)]
    indices, distances = Guarded((len(queries), k), np.int64), Guarded((len(queries), k), np.int64)
    core.nearest_cuda_refine(
        sources[0].address, len(queries), sources[1].address, len(training), queries.shape[1], sources[2].address,
        sources[3].address, k, indices.address, distances.address, 0,
    )  # fmt: skip
    return indices.intact(), distances.intact()


def by_definition(queries, training, k):
    """Indices and squared distances of the k nearest, in int64, ties to the lower index."""
    distances = ((queries[:, None].astype(np.int64) - training[None].astype(np.int64)) ** 2).sum(2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, 1)


def images(kind: str, count: int, d: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "noise":
        return rng.integers(0, 256, (count, d), dtype=np.uint8)
    if kind == "ties":  # few gray levels, few distances
        return rng.integers(0, 2, (count, d), dtype=np.uint8)
    if kind == "extremes":  # all-0 against all-255: the greatest distance there is
        return np.repeat(rng.integers(0, 2, (count, 1), dtype=np.uint8) * 255, d, axis=1)
    if kind == "duplicates":
        return rng.integers(0, 256, (3, d), dtype=np.uint8)[rng.integers(0, 3, count)]
    if kind == "near ties":  # one gray level in one value
        base = np.full((count, d), 100, np.uint8)
        base[np.arange(count), rng.integers(0, d, count)] += rng.integers(0, 2, count, dtype=np.uint8)
        return base
    assert kind == "descending"  # each image nearer to black than all before it: every one passes the threshold
    return np.repeat(np.linspace(250, 3, count).astype(np.uint8)[:, None], d, axis=1)


KINDS = ["noise", "ties", "extremes", "duplicates", "near ties", "descending"]


@pytest.mark.parametrize(
    ("queries", "n", "d", "k", "multiprocessors", "kind"),
    [
        (1, 1, 1, 1, 1, "noise"),
        (127, 255, 15, 2, 1, "ties"),
        (128, 256, 16, 2, 4, "noise"),
        (129, 257, 65, 5, 2, "near ties"),  # two tiles of queries, two splits, two stages
        (3, 1025, 17, 1, 1, "noise"),  # more tiles than stages, one chunk each: the ring and the norms wrap
        (2, 1024, 33, 5, 1, "descending"),
        (3, 600, 128, 64, 1, "descending"),  # lists in the workspace
        (2, 700, 31, 64, 4, "duplicates"),
        (5, 64, 9, 64, 2, "extremes"),  # k = N
        (4, 300, 256, 4, 1, "extremes"),
    ],
)
def test_search_equals_its_definition(core, queries, n, d, k, multiprocessors, kind):
    rng = np.random.default_rng(n)
    training = images(kind, n, d, rng)
    asked = np.concatenate([images(kind, queries, d, rng), np.zeros((1, d), np.uint8), training[:1]])[:queries]
    found = search(core, asked, training, k, multiprocessors)
    np.testing.assert_array_equal(found, by_definition(asked, training, k))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(1, 5), st.integers(1, 520), st.integers(1, 130), st.integers(1, 64), st.integers(1, 6),
    st.sampled_from(KINDS), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_search_property(core, queries, n, d, k, multiprocessors, kind, seed):
    rng = np.random.default_rng(seed)
    training, asked = images(kind, n, d, rng), images(kind, queries, d, rng)
    k = min(k, n)
    np.testing.assert_array_equal(search(core, asked, training, k, multiprocessors), by_definition(asked, training, k))


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_one_gray_level_in_a_later_tile_decides(core, multiprocessors):
    training = np.zeros((1000, 40), np.uint8)
    training[:, :10] = 1
    training[[300, 999], 9] = 0  # distance 9 among nothing but 10
    indices, distances = search(core, np.zeros((1, 40), np.uint8), training, 5, multiprocessors)
    assert indices.tolist() == [[300, 999, 0, 1, 2]]
    assert distances.tolist() == [[9, 9, 10, 10, 10]]


@pytest.mark.parametrize("d", [33100, 66052, 131137])
def test_long_images(core, d):
    """Distances beyond 31 bits, the first d with 64-bit sums and the other tiling, products that overflow 32 bits."""
    training = np.zeros((4, d), np.uint8)
    training[0], training[2, -1], training[3] = 255, 1, 254
    queries = np.stack([np.zeros(d, np.uint8), np.full(d, 255, np.uint8)])
    found = search(core, queries, training, 4, 1)
    np.testing.assert_array_equal(found, by_definition(queries, training, 4))
    assert found[1].max() == 255**2 * d


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 6), st.integers(1, 80), st.sampled_from([1, 3, 4, 12, 16, 48, 50, 64, 784]), st.integers(1, 64),
    st.sampled_from(KINDS), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_refine_property(core, queries, n, d, k, kind, seed):
    rng = np.random.default_rng(seed)
    training, asked = images(kind, n, d, rng), images(kind, queries, d, rng)
    lists = [rng.integers(-2, n + 2, rng.integers(0, 90)) for _ in range(queries)]  # some twice, some out of range
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    candidates = np.concatenate([*lists, np.empty(0, np.int64)]).astype(np.int64)
    indices, distances = refine(core, asked, training, candidates, offsets, k)
    for query in range(queries):
        kept = np.unique(lists[query][(lists[query] >= 0) & (lists[query] < n)])
        order, expected = by_definition(asked[query : query + 1], training[kept], min(k, len(kept)))
        count = order.shape[1]
        np.testing.assert_array_equal(indices[query, :count], kept[order[0]])
        np.testing.assert_array_equal(distances[query, :count], expected[0])
        assert (indices[query, count:] == -1).all()
        assert (distances[query, count:] == NO_DISTANCE).all()


def test_refine_of_many_candidates_and_long_images(core):
    """More values per lane than a 32-bit sum could hold: d = 4 × 32 × 65,536 bytes of difference 255."""
    d = 32 * 65536 * 4
    training = np.stack([np.full(d, 255, np.uint8), np.zeros(d, np.uint8)])
    found = refine(core, np.zeros((1, d), np.uint8), training, np.array([0, 1]), np.array([0, 2]), 2)
    np.testing.assert_array_equal(found, [[[1, 0]], [[0, 255**2 * d]]])


def test_bad_arguments_are_refused_before_anything_is_written(core):
    rng = np.random.default_rng(0)
    centered, norms, out = Guarded((9, 64), np.int8), Guarded(9, np.int64), Guarded(64 * 9, np.int64)
    size = core.nearest_cuda_search_workspace(3, 9, 5, 2)
    workspace = Guarded(size, np.uint8)
    good = {
        "query_images": centered.address, "query_norms": norms.address, "queries": 3,
        "training_images": centered.address, "training_norms": norms.address, "n": 9, "d": 5, "k": 2,
        "workspace": workspace.address, "workspace_bytes": size, "indices": out.address,
        "squared_distances": out.address, "stream": 0,
    }  # fmt: skip
    for wrong, code in [
        ({"queries": -1}, BAD_SIZE),
        ({"queries": 2**31}, BAD_SIZE),
        ({"d": 0}, BAD_SIZE),
        ({"k": 0}, BAD_NEIGHBORS),
        ({"k": 10}, BAD_NEIGHBORS),
        ({"n": 100, "k": 65}, BAD_NEIGHBORS),
        ({"d": 16909061}, BAD_DIMENSION),
        ({"training_images": centered.address + 8}, MISALIGNED),
        ({"indices": out.address + 4}, MISALIGNED),
        ({"workspace": 0}, NULL_POINTER),
        ({"workspace_bytes": size - 1}, SMALL_WORKSPACE),
    ]:
        assert core.call("search", *{**good, **wrong}.values()) == code, wrong
    assert core.call("search", *{**good, "queries": 0, "query_images": 0}.values()) == 0
    assert (out.array.view(np.uint8) == 0xCD).all()
    assert core.call("refine", 64, 1, 64, 5, 16, 64, 64, 65, 64, 64, 0) == BAD_NEIGHBORS
    assert core.call("refine", 64, 1, 64, 5, 16, 64, 0, 2, 64, 64, 0) == NULL_POINTER
    assert core.call("center", 64, 3, 5, 65, 64, 0) == MISALIGNED
    with pytest.raises(RuntimeError, match="k must be at least 1"):
        search(core, images("noise", 1, 3, rng), images("noise", 4, 3, rng), 5)


def test_no_races(tmp_path):
    """Every kernel under ThreadSanitizer; test_simt.py shows that a missing barrier is reported there."""
    program = compile_for_races(SOURCES, tmp_path / "nearest", ["-DNEAREST_SIMT_MAIN"])
    done = run_for_races(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "every kernel agrees with the definition\n", "")


def test_a_missing_barrier_in_the_search_is_reported(tmp_path):
    """The proof that `test_no_races` could fail: the same program without the barrier between copies and products."""
    source = SOURCES[0].read_text()
    broken = re.sub(r"__syncthreads\(\);  // this stage has arrived", "// this stage has arrived", source)
    assert broken != source
    (tmp_path / "broken.cu").write_text(broken)
    program = compile_for_races([tmp_path / "broken.cu", SOURCES[1]], tmp_path / "broken", ["-DNEAREST_SIMT_MAIN"])
    done = run_for_races(program)
    assert done.returncode == 66
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.fixture
def on_the_stand_in(core):
    """diffmem.ops.nearest.cuda with CPU tensors in the place of CUDA tensors; outputs start as garbage."""
    with host_core.on_the_stand_in(core):
        yield cuda


def test_torch_functions(on_the_stand_in):
    rng = np.random.default_rng(5)
    training, queries = images("noise", 90, 3 * 4 * 5, rng), images("noise", 3, 3 * 4 * 5, rng)
    expected = by_definition(queries, training, 3)
    asked, images_ = torch.from_numpy(queries).view(3, 3, 4, 5), torch.from_numpy(training).view(90, 3, 4, 5)
    prepared = cuda.center(images_)
    assert len(prepared) == 90
    for given_ in (images_, prepared):
        found = cuda.nearest_cuda(asked, given_, 3)
        np.testing.assert_array_equal(np.stack([each.numpy() for each in found[::-1]]), expected)
    assert [each.shape for each in cuda.nearest_cuda(asked[:0], prepared, 3)] == [(0, 3), (0, 3)]
    offsets = torch.tensor([0, 90, 180, 270])
    found = cuda.refine_cuda(asked, images_, torch.arange(90).repeat(3), offsets, 3)
    np.testing.assert_array_equal(np.stack([each.numpy() for each in found[::-1]]), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("queries", "n", "d", "k"), [(300, 5000, 768, 2), (1, 4097, 61, 64), (129, 300, 66052, 5)])
def test_on_a_gpu(queries, n, d, k):
    rng = np.random.default_rng(d)
    training = images("near ties", n, d, rng)
    asked = np.concatenate([training[: queries // 2], images("noise", queries - queries // 2, d, rng)])
    expected = [by_definition(each[None], training, k) for each in asked]
    expected = np.stack([np.concatenate([each[part] for each in expected]) for part in (0, 1)])
    on_device = torch.from_numpy(asked).cuda(), torch.from_numpy(training).cuda()
    candidates, offsets = torch.arange(n).repeat(queries).cuda(), (torch.arange(queries + 1) * n).cuda()
    for found in (cuda.nearest_cuda(*on_device, k), cuda.refine_cuda(*on_device, candidates, offsets, k)):
        np.testing.assert_array_equal(torch.stack(found[::-1]).cpu().numpy(), expected)


def test_torch_functions_refuse_what_they_cannot_use(on_the_stand_in, monkeypatch):
    training, queries = torch.zeros(9, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)
    none, offsets = torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for call, message in [
        (lambda: cuda.nearest_cuda(queries.float(), training), "queries must be torch.uint8, got"),
        (lambda: cuda.nearest_cuda(queries, training.mT), "training must be contiguous"),
        (
            lambda: cuda.nearest_cuda(queries, training[:, :2].contiguous()),
            "queries have 16 values per image, training",
        ),
        (lambda: cuda.nearest_cuda(queries, training, 10), "there are only 9 training images"),
        (lambda: cuda.nearest_cuda(queries, training, 0), "k must be from 1 to 64, got 0"),
        (lambda: cuda.nearest_cuda(queries[:, :0], training), "at least one value"),
        (lambda: cuda.nearest_cuda(queries[0, 0], training), "queries must have at least 2 axes"),
        (lambda: cuda.refine_cuda(queries, training, none.int(), offsets), "candidate_indices must be torch.int64"),
        (lambda: cuda.refine_cuda(queries, training, none, offsets[:2]), r"offsets \[3\] for 2 queries"),
        (lambda: cuda.refine_cuda(queries, training, none, offsets, 65), "k must be from 1 to 64"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cuda")
    with pytest.raises(InputError, match=r"queries must be on a CUDA device, but it is on cpu"):
        cuda.nearest_cuda(queries, training)


def test_compiled_core_takes_the_arguments_that_the_stand_in_takes():
    module = native_module()
    if module is None or not module.with_cuda:
        pytest.skip("diffmem._C was built without CUDA")
    for name, function in inspect.getmembers(SimtCore, inspect.isfunction):
        if name.startswith("nearest_cuda_"):
            signature = getattr(module, name).__doc__.splitlines()[0]
            expected = [each for each in inspect.signature(function).parameters if each != "self"]
            assert re.findall(r"(\w+): typing", signature) == expected, name
    assert module.nearest_cuda_centered_row(d=3073) == 3136
    assert module.nearest_cuda_max_neighbors == SimtCore.nearest_cuda_max_neighbors
    with pytest.raises(RuntimeError, match="k must be at least 1"):
        module.nearest_cuda_search_workspace(queries=1, n=1, d=1, k=2)


# ---- compiled for real -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """For each architecture what ptxas reports and the cubin."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE.parents[1])
        resources = importlib.import_module("benchmarks.cuda_resources")
    folder = tmp_path_factory.mktemp("cubin")
    results = {}
    for architecture in resources.ARCHITECTURES:
        cubin = folder / f"sm_{architecture}.cubin"
        report = resources.compile_for(architecture, cubin)  # warnings are errors
        results[architecture] = resources.read_report(architecture, report, {}), cubin
    return results


def test_nvcc_compiles_without_warnings_and_spills(compiled):
    assert sorted(compiled) == [80, 90, 100, 120]
    for kernels, _ in compiled.values():
        assert [each.kernel for each in kernels] == [
            "center_kernel<uint32_t>", "center_kernel<uint8_t>", "merge_kernel", "refine_kernel<uint32_t>",
            "refine_kernel<uint4>", "refine_kernel<uint8_t>", "search_kernel<Narrow>", "search_kernel<Wide>",
        ]  # fmt: skip
        for each in kernels:
            assert (each.spill_bytes, each.stack_bytes) == (0, 0), each
            assert 0 < each.registers < 255, each
            assert each.blocks_per_multiprocessor >= 1, each


def test_matrix_unit_and_dot_products_are_used(compiled, tmp_path):
    """In the machine code where nvdisasm is at hand (it comes with triton), else in the PTX."""
    places = [str(Path(shutil.which("nvcc")).parent), "/usr/local/cuda/bin", os.environ.get("PATH", "")]
    if spec := importlib.util.find_spec("triton"):
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    tool = shutil.which("nvdisasm", path=os.pathsep.join(places))
    if tool is None:
        ptx = tmp_path / "kernels.ptx"
        command = ["nvcc", "-std=c++17", f"-I{CSRC}", "-arch=compute_80", "-ptx", str(SOURCES[0]), "-o", str(ptx)]
        subprocess.run(command, check=True)
        codes = [re.split(r"\.entry ", ptx.read_text())[1:]]
        product, dot = "mma.sync.aligned.m16n8k32.row.col.s32.s8", "dp4a.u32"
    else:
        listings = [
            subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
            for _, cubin in compiled.values()
        ]
        codes = [listing.split("//--------------------- .text.")[1:] for listing in listings]
        product, dot = "IMMA.16832.S8.S8", "IDP.4A.U8.U8"
    for functions in codes:
        assert len(functions) == 8
        for function in functions:
            name = function.split(maxsplit=1)[0]
            assert (product in function) == ("search_kernel" in name), name
            assert (dot in function) == ("refine_kernelI5uint4" in name or "refine_kernelIj" in name), name
