"""The Triton kernels without a GPU: values by the interpreter in a process of its own, and what they compile to.

Every configuration is compiled by `python -m benchmarks kernels` into benchmarks/results/kernels.triton-<version>.csv,
and with `pytest --exhaustive` here (about half an hour); else one of each kernel, in the types and tiles of networks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from triton_interpreter import why_not

from benchmarks import bench_kernels
from benchmarks.triton_resources import (
    ARCHITECTURES,
    COUNTERS,
    PROGRAMS,
    Launch,
    narrow_products,
    recorded,
    ttir_of,
)
from diffmem.ops.attention import tiles as attention_tiles
from diffmem.ops.group_norm_silu import tiles as group_norm_tiles

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no triton here: pip install 'diffmem[triton]'")
# Where Triton's compiler is called as benchmarks/triton_resources.py calls it.
compiles = pytest.mark.skipif(
    find_spec("triton") is None or tuple(map(int, version("triton").split(".")[:2])) < (3, 5),
    reason="the compiler of Triton before 3.5 is called in another way",
)
SUBJECTS = {subject.op: subject for subject in bench_kernels.SUBJECTS}


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_values_and_gradients_by_the_interpreter(pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_kernels.py")]
    command += ["--exhaustive"] if pytestconfig.getoption("exhaustive") else []
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def launches_of_attention(dtype: torch.dtype, precision: str):
    """The launches of attention, forward and backward, of two heads of 64 channels, by name."""
    from diffmem.ops.attention import triton_kernels

    with (
        torch.device("meta"),
        recorded(triton_kernels) as launches,
        mock.patch.object(triton_kernels, "precision_of", return_value=precision),
    ):
        qkv = torch.empty(4, 3 * 2 * 64, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
        out, lse = triton_kernels.launch_forward(qkv, 2)
        triton_kernels.launch_backward(out, qkv, out, lse, 2)
    return {launch.name: launch for launch in launches}


def launches_of_networks():
    """(op, launch): every kernel, of maps of one tile and of several, in bfloat16; and what differs in float32."""
    small, large = (launches_of(shape, 32, torch.bfloat16, last=True) for shape in NETWORK_MAPS)
    yield from (("group_norm_silu", launch) for launch in small.values())
    yield from (("group_norm_silu", large[name]) for name in ("forward", "map_gradient"))
    yield (
        "group_norm_silu",
        launches_of((8, 1344, 16, 16), 32, torch.bfloat16, last=True)["forward"],
    )  # 8 bytes at a time
    yield "group_norm_silu", launches_of(NETWORK_MAPS[0], 32, torch.float32, last=False)["forward"]
    yield from (("attention", launch) for launch in launches_of_attention(torch.bfloat16, "ieee").values())
    yield "attention", launches_of_attention(torch.float32, "tf32")["forward"]
    yield "attention", launches_of_attention(torch.float32, "ieee")["query_gradient"]
    yield from (("posterior_mean", launch) for launch in bench_kernels.every_launch(SUBJECTS["posterior_mean"]))


@pytest.fixture(scope="module")
def compiled(pytestconfig):
    """What launches compile to, as rows of the table of kernels."""
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 5):
        pytest.skip("the compiler of Triton before 3.5 is called in another way")
    if pytestconfig.getoption("exhaustive"):
        every = ((op, launch) for op, subject in SUBJECTS.items() for launch in bench_kernels.every_launch(subject))
        return [bench_kernels.row_of(op, launch, sm) for op, launch in every for sm in ARCHITECTURES]
    return [bench_kernels.row_of(op, launch, 90) for op, launch in launches_of_networks()]


def test_every_kernel_is_compiled(compiled):
    found = {(row["op"], row["kernel"]) for row in compiled}
    assert found == {
        (op, launch.name)
        for op, subject in SUBJECTS.items()
        for launch in bench_kernels.every_launch(subject, (torch.bfloat16,))
    }


def test_nothing_spills_and_products_use_the_matrix_unit(compiled):
    for row in compiled:
        assert row["stack_bytes"] == row["spill_bytes"] == "0", row
        assert int(row["blocks_per_multiprocessor"]) >= 1, row
        products = row["op"] == "posterior_mean" or (row["op"] == "attention" and row["kernel"] != "delta")
        plain = "float32" in row["configuration"] and "precision=ieee" in row["configuration"]
        assert (int(row["matrix_instructions"]) > 0) == (products and not plain), row


@given(
    group_channels=st.integers(1, group_norm_tiles.WIDEST),
    num_groups=st.integers(1, 40),
    pixels=st.integers(1, 300_000),
    last=st.booleans(),
    batch=st.integers(1, 4096),
)
def test_no_tile_of_group_norm_is_missing(group_channels, num_groups, pixels, last, batch):
    def compiled(tile):  # what is not compiled in: groups
        return replace(tile, groups=0)

    assume(group_norm_tiles.fits(group_channels, last))
    listed = {
        compiled(group_norm_tiles.tile(channels, 32, *rest[:1], last, *rest[1:]))
        for channels, *rest in group_norm_tiles.every_tile(last)
    }
    tile = group_norm_tiles.tile(group_channels, num_groups, pixels, last, batch)
    assert compiled(tile) in listed
    width = tile.groups * group_channels
    assert tile.groups >= 1
    assert width <= tile.block_c
    assert width % tile.align == 0
    assert not tile.single_pass or tile.block_p >= pixels


# Of bfloat16 maps whose groups are one tile, and several.
NETWORK_MAPS = ((512, 256, 8, 8), (4, 192, 64, 64))
# Channels of DDPM++ (arXiv 2011.13456) and of ADM (arXiv 2105.05233) at 64×64, skip connections included.
WIDTHS = (128, 256, 384, 512, 192, 576, 768, 960, 1152, 1344, 1536)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("batch", [8, 64, 512])
def test_every_width_of_the_networks_is_moved_in_aligned_rows(channels, batch):
    """In half precision: rows of whole sectors of 32 bytes, or nearly, that begin at multiples of 16 bytes; of 1344
    channels, whose groups are 42 wide, of 8 bytes."""
    group_channels = channels // 32
    for pixels in (16, 64, 256, 1024, 4096):
        tile = group_norm_tiles.tile(group_channels, 32, pixels, True, batch)
        assert tile.align == (4 if channels == 1344 else 8)
        assert 2 * tile.groups * group_channels >= 32
        # No more than half of the threads' columns are empty.
        assert 2 * tile.groups * group_channels > tile.block_c
    assert group_norm_tiles.fits(group_channels, False)


@given(
    kernel=st.sampled_from(attention_tiles.KERNELS),
    channels=st.integers(1, attention_tiles.WIDEST_HEAD),
    number=st.sampled_from([(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]),
)
def test_no_tile_of_attention_is_missing(kernel, channels, number):
    listed = {
        (tile := attention_tiles.tile(kernel, each, *number), each <= tile.block_k)
        for each in attention_tiles.every_tile(kernel, *number)
    }
    tile = attention_tiles.tile(kernel, channels, *number)
    assert (tile, channels <= tile.block_k) in listed


def launches_of(shape, groups, dtype, last):
    """The launches of group_norm_silu, forward and backward, by name."""
    from diffmem.ops.group_norm_silu import triton_kernels

    with torch.device("meta"), recorded(triton_kernels) as launches:
        x = torch.empty(shape, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        weight, rows = torch.empty(shape[1]), torch.empty(shape[:2])
        y, mean, rstd = triton_kernels.launch_forward(x, groups, weight, weight, 1e-5, rows, rows, True, rows)
        triton_kernels.launch_backward(y, x, mean, rstd, groups, weight, weight, rows, rows, True, rows)
    return {launch.name: launch for launch in launches}


def constants_of(configuration: str) -> tuple[torch.dtype, dict[str, int]]:
    dtype, *rest = configuration.split()
    return getattr(torch, dtype), {
        name: int(value) for name, value in (each.split("=") for each in rest) if value.isdecimal()
    }


def widths_of(text: str) -> dict[int, int]:
    return {int(width): int(count) for width, count in (each.split(":") for each in text.split())}


def test_group_norm_moves_each_element_as_often_as_its_docstring_says(compiled):
    """Loads and stores of the compiled kernels, counted: of a map of one tile each map once; else x once for the first
    tile's mean, then each map twice, once for the sums and once for the result; the result once."""
    checked = set()
    for row in compiled:
        kernel = row["kernel"]
        if row["op"] != "group_norm_silu" or kernel not in ("forward", "map_gradient"):
            continue
        dtype, constants = constants_of(row["configuration"])
        tile = constants["block_p"] * constants["block_c"] * dtype.itemsize
        maps = 1 if kernel == "forward" else 2
        assert int(row["load_bytes"]) == maps * tile * (1 if constants["single_pass"] else 3), row
        loads = [int(each) for each in row["loads_by_depth"].split()]
        assert loads[1:] == ([] if constants["single_pass"] else [2 * maps * tile]), row
        # Beside the result a column's statistics or sums: a vector's store is one 4-byte instruction or several.
        beside = int(row["store_bytes"]) - tile
        assert 0 <= beside <= 3 * 4 * 32 * int(row["warps"]) * 4, row
        checked.add((kernel, constants["single_pass"]))
    assert len(checked) == 4


def test_group_norm_moves_16_bytes_at_a_time(compiled):
    """Aligned channels_last maps, in every dtype and tile: loads of maps and the store of the result as wide as there
    is, whatever the groups' width; 8 bytes where groups come to multiples of 4 channels only."""
    checked, widths = set(), set()
    for row in compiled:
        kernel = row["kernel"]
        if row["op"] != "group_norm_silu" or kernel not in ("forward", "map_gradient"):
            continue
        dtype, constants = constants_of(row["configuration"])
        if constants["axis"] == 1 or "aligned" in constants:
            continue
        width = min(16, constants["align"] * dtype.itemsize)
        loads, stores = widths_of(row["loads_by_width"]), widths_of(row["stores_by_width"])
        assert list(loads) == [width], row
        rounds = 1 if constants["single_pass"] else 2
        per_thread = (
            constants["block_p"] * constants["block_c"] * dtype.itemsize // (32 * constants["num_warps"] * width)
        )
        assert sum(loads.values()) == per_thread * (1 if kernel == "forward" else 2) * (2 * rounds - 1), row
        assert max(stores) == width, row
        assert stores[width] >= per_thread, row
        checked.add((kernel, constants["single_pass"]))
        widths.add(width)
    assert len(checked) == 4
    assert {8, 16} <= widths


def roots_of(launch: Launch) -> tuple[str, ...]:
    """What counts images in a kernel: the program's number, or where all images are summed a loop."""
    return COUNTERS if launch.name == "parameter_gradients" else PROGRAMS


@compiles
@pytest.mark.parametrize("op", SUBJECTS)
def test_addresses_are_products_of_64_bits(op, tmp_path):
    """From which image to which is 64 bits wide in every kernel; a copy with any one of the conversions taken out is
    caught."""
    kernels = importlib.import_module(f"diffmem.ops.{op}.triton_kernels")
    launches = {each.name: each for each in bench_kernels.every_launch(SUBJECTS[op], (torch.bfloat16,))}
    for launch in launches.values():
        assert not narrow_products(ttir_of(launch), roots_of(launch)), launch.name
    wide, source = ".to(tl.int64)", Path(kernels.__file__).read_text().split("\ndef unfit(")[0]
    pieces = source.split(wide)
    assert len(pieces) > 1
    for index in range(1, len(pieces)):
        path = tmp_path / f"narrow_{op}_{index}.py"
        path.write_text(wide.join(pieces[:index]) + wide.join(pieces[index:]))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(narrow := importlib.util.module_from_spec(spec))
        changed = [replace(each, kernel=getattr(narrow, each.kernel.__name__)) for each in launches.values()]
        assert any(narrow_products(ttir_of(each), roots_of(each)) for each in changed), f"conversion {index}"


def attention_traffic(kernel: str, constants: dict[str, int], itemsize: int) -> tuple[list[int], int]:
    """Bytes that a program loads outside of loops, per round of tokens, per round of channels; and that it stores.

    Of the maps: what belongs to its own tokens once, where all channels are taken in one pass; in a round of tokens the
    other side of each score (and of each gradient of a score), or both sides BLOCK_K channels at a time, and BLOCK_D
    channels of what the weights are multiplied with, unless that is what is there already.
    """
    block_m, block_k = constants["block_m"], constants["block_k"]
    if kernel == "delta":  # out and its gradient, once
        return [0, 2 * block_m * block_k * itemsize], 4 * block_m
    block_n, block_d = constants["block_n"], constants["block_d"]
    scores = 1 if kernel == "forward" else 2
    own, others = scores * block_m * block_k * itemsize, scores * block_n * block_k * itemsize
    part = block_n * block_d * itemsize
    vectors = 2 * 4  # lse and delta
    single, there = constants["single_pass"], constants["single_pass"] and block_k == block_d
    outside, parts, stored = {
        "forward": (0, part, block_m * block_d * itemsize + 4 * block_m),
        "query_gradient": (vectors * block_m, 0 if there else part, block_m * block_d * itemsize),
        "key_value_gradient": (0, (0 if there else 2 * part) + vectors * block_n, 2 * block_m * block_d * itemsize),
    }[kernel]
    return ([outside + own, parts + others] if single else [outside, parts, own + others]), stored


def test_attention_moves_no_more_than_said(compiled):
    """Every load and store of the compiled kernels, exactly, in every configuration; none is hidden in another loop."""
    checked = set()
    for row in compiled:
        kernel = row["kernel"]
        if row["op"] != "attention":
            continue
        dtype, constants = constants_of(row["configuration"])
        loads, stored = attention_traffic(kernel, constants, dtype.itemsize)
        assert [int(each) for each in row["loads_by_depth"].split()] == loads, row
        assert [int(each) for each in row["stores_by_depth"].split()] == [stored], row
        checked.add(kernel)
    assert {*attention_tiles.KERNELS} <= checked


def test_attention_loads_16_bytes_at_a_time_beside_its_products(compiled):
    """Heads of channels_last maps: every load of a map as wide as there is, where a thread has as much of it; those of
    the loop asynchronous. (lse and delta, one number per token, take narrower ones.)"""
    checked = set()
    for row in compiled:
        kernel = row["kernel"]
        dtype, constants = constants_of(row["configuration"])
        if row["op"] != "attention" or not constants["channels_last"]:
            continue
        widths = widths_of(row["loads_by_width"])
        # Bytes of the narrowest tile of a map, per thread.
        narrowest = min(constants.get("block_n", 64), constants["block_m"]) * min(
            constants["block_k"], constants.get("block_d", 64)
        ) * dtype.itemsize // (32 * constants["num_warps"])  # fmt: skip
        if narrowest >= 16:
            loads, _ = attention_traffic(kernel, constants, dtype.itemsize)
            vectors = 8 * (constants["block_m"] + constants.get("block_n", 0))
            assert 16 * widths[16] * 32 * constants["num_warps"] >= sum(loads) - vectors, row
            assert min(widths) >= 4, row
            assert max(widths_of(row["stores_by_width"])) == (4 if kernel == "delta" else 16), row
            checked.add(kernel)
        if kernel != "delta":
            in_flight = int(row["asynchronous_copies"])
            assert in_flight > 0, row
            vectors = 8 * constants["block_n"]
            assert in_flight * 16 * 32 * constants["num_warps"] >= int(row["loads_by_depth"].split()[-1]) - vectors, row
    assert {*attention_tiles.KERNELS} <= checked
