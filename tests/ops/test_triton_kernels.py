"""The Triton kernels without a GPU: values by the interpreter in a process of its own, and what they compile to.

Every configuration is compiled by `python -m benchmarks kernels` into benchmarks/results/kernels.triton-<version>.csv;
here a few are, and the table of this Triton, where there is one, is held against what can be launched.
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

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_interpreter import why_not

from benchmarks import bench_kernels
from benchmarks.triton_resources import (
    ARCHITECTURES,
    COUNTERS,
    PROGRAMS,
    Launch,
    compile_launch,
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
def test_values_and_gradients_by_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_kernels.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def table():
    if not (path := bench_kernels.result()).exists():
        there = ", ".join(each.name for each in sorted(path.parent.glob("kernels.triton-*.csv")))
        pytest.skip(f"no table of kernels that this Triton compiled ({path.name}); there are {there}")
    return bench_kernels.read_rows()


@compiles
@pytest.mark.parametrize("op", SUBJECTS)
def test_the_table_holds_every_launch_as_the_source_is_now(table, op):
    from benchmarks.triton_resources import source_digest

    missing = [
        f"{launch.name} {launch.configuration} sm_{architecture}"
        for launch in bench_kernels.every_launch(SUBJECTS[op])
        for architecture in ARCHITECTURES
        if (row := table.get((op, launch.name, launch.configuration, f"sm_{architecture}"))) is None
        or row["source"] != source_digest(launch.kernel)
    ]
    assert not missing, f"python -m benchmarks kernels: {len(missing)} to be compiled, {missing[0]}"


def test_nothing_in_the_table_spills_and_products_use_the_matrix_unit(table):
    for row in table.values():
        assert row["stack_bytes"] == row["spill_bytes"] == "0", row
        assert int(row["blocks_per_multiprocessor"]) >= 1, row
        products = row["op"] == "posterior_mean" or (row["op"] == "attention" and row["kernel"] != "delta")
        plain = "float32" in row["configuration"] and "precision=ieee" in row["configuration"]
        assert (int(row["matrix_instructions"]) > 0) == (products and not plain), row


@given(
    group_channels=st.integers(1, group_norm_tiles.WIDEST_GROUP),
    pixels=st.integers(1, 300_000),
    last=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
)
def test_no_tile_of_group_norm_is_missing(group_channels, pixels, last, itemsize):
    for room in (group_norm_tiles.WHOLE, group_norm_tiles.WHOLE_BACKWARD):
        every = group_norm_tiles.every_tile(last, itemsize)
        listed = {group_norm_tiles.tile(*each, last, itemsize, room) for each in every}
        tile = group_norm_tiles.tile(group_channels, pixels, last, itemsize, room)
        assert tile in listed
        assert tile.channels >= group_channels
        assert not tile.whole or tile.pixels >= pixels


@given(
    kernel=st.sampled_from(attention_tiles.KERNELS),
    tokens=st.integers(1, attention_tiles.MOST_TOKENS),
    channels=st.integers(1, attention_tiles.WIDEST_HEAD),
    number=st.sampled_from([(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]),
)
def test_no_tile_of_attention_is_missing(kernel, tokens, channels, number):
    listed = {
        (tile := attention_tiles.tile(kernel, *each, *number), each[1] <= tile.inner)
        for each in attention_tiles.every_tile(kernel, *number)
    }
    tile = attention_tiles.tile(kernel, tokens, channels, *number)
    assert (tile, channels <= tile.inner) in listed


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


# Maps read and written by each kernel, and the vectors that it stores per channel or group.
TRAFFIC = {
    "forward_whole": (1, 1, 3), "backward_whole": (2, 1, 3), "statistics_split": (1, 0, 2),
    "forward_split": (1, 1, 3), "sums_split": (2, 0, 3), "backward_split": (2, 1, 3),
}  # fmt: skip


def tile_bytes(configuration: str) -> int:
    """Bytes of one map's tile."""
    dtype, *rest = configuration.split()
    constants = dict(each.split("=") for each in rest)
    elements = int(constants["groups"]) * int(constants["channels"]) * int(constants["pixels"])
    return elements * getattr(torch, dtype).itemsize


def test_group_norm_moves_each_element_as_often_as_its_docstring_says(table):
    """Loads and stores of the compiled kernels, counted: no tile is read twice, none is wider than the map's part."""
    checked = 0
    for (op, kernel, configuration, _), row in table.items():
        if op != "group_norm_silu" or kernel not in TRAFFIC:
            continue
        reads, writes, vectors = TRAFFIC[kernel]
        tile = tile_bytes(configuration)
        assert int(row["load_bytes"]) == reads * tile, row
        # A vector's store is one 4-byte instruction or several of a thread's columns.
        beside = int(row["store_bytes"]) - writes * tile
        assert 0 <= beside <= vectors * 4 * 32 * int(row["warps"]) * 4, row
        checked += 1
    assert checked > 500


@compiles
@pytest.mark.parametrize(("shape", "groups", "names"), [
    ((64, 256, 32, 32), 32, ("forward_whole", "backward_whole", "parameter_gradients")),
    ((4, 192, 64, 64), 32, ("statistics_split", "forward_split", "sums_split", "backward_split")),
])  # fmt: skip
def test_group_norm_compiles_as_the_table_says(table, shape, groups, names):
    launches = launches_of(shape, groups, torch.bfloat16, last=True)
    for name in names:
        compiled = compile_launch(launches[name], 90)
        row = table["group_norm_silu", name, launches[name].configuration, "sm_90"]
        assert (compiled.registers, compiled.stack_bytes) == (int(row["registers"]), 0)


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

    Of the maps: in a round of tokens, of both sides of each score (and of each gradient of a score) the INNER channels
    at a time, and OUTER channels of what the weights are multiplied with, unless that is what is there already.
    """
    rows, inner = constants["rows"], constants["inner"]
    if kernel == "delta":  # out and its gradient, once
        return [0, 2 * rows * inner * itemsize], 4 * rows
    columns, outer = constants["columns"], constants["outer"]
    sides = (rows + columns) * inner * itemsize * (1 if kernel == "forward" else 2)
    part = columns * outer * itemsize
    vectors = 2 * 4  # lse and delta
    once, there = constants["once"], constants["once"] and inner == outer
    outside, parts, stored = {
        "forward": (0, part, rows * outer * itemsize + 4 * rows),
        "query_gradient": (vectors * rows, 0 if there else part, rows * outer * itemsize),
        "key_value_gradient": (0, (0 if there else 2 * part) + vectors * columns, 2 * rows * outer * itemsize),
    }[kernel]
    return ([outside, parts + sides] if once else [outside, parts, sides]), stored


def test_attention_moves_no_more_than_said(table):
    """Every load and store of the compiled kernels, exactly, in every configuration; none is hidden in another loop."""
    checked = 0
    for (op, kernel, configuration, _), row in table.items():
        if op != "attention":
            continue
        dtype, *rest = configuration.split()
        constants = {name: int(value) for name, value in (each.split("=") for each in rest) if value.isdecimal()}
        loads, stored = attention_traffic(kernel, constants, getattr(torch, dtype).itemsize)
        assert [int(each) for each in row["loads_by_depth"].split()] == loads, row
        assert [int(each) for each in row["stores_by_depth"].split()] == [stored], row
        checked += 1
    assert checked > 500
