"""Op `nearest`: every implementation against plain integer arithmetic, on inputs made to break it."""

import os

import numpy as np
import pytest
import torch
from examples_made import at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from processes import finished, start_script

from diffmem.errors import InputError
from diffmem.ops.nearest import OP, blocked, nearest, pairs_within
from diffmem.ops.registry import native_module

BACKENDS = [backend.name for backend in OP.candidates("cpu")]


def brute_force(queries: np.ndarray, training: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    wide = np.int64 if queries.dtype == np.uint8 else np.float64
    squared = np.square(queries[:, None].astype(wide) - training[None].astype(wide)).sum(-1)
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, order, 1), order


def hostile_images(rng: np.random.Generator, kind: str, n: int, d: int) -> np.ndarray:
    """uint8 [n, d] of one hostile kind."""
    if kind == "noise":
        return rng.integers(0, 256, (n, d), dtype=np.uint8)
    if kind == "extremes":  # all-0 against all-255: the largest distances and products
        return np.repeat(rng.integers(0, 2, (n, 1), dtype=np.uint8) * 255, d, axis=1)
    if kind == "near ties":  # one gray level in one pixel apart
        images = np.full((n, d), 200, np.uint8)
        images[np.arange(n), rng.integers(0, d, n)] += rng.integers(0, 3, n, dtype=np.uint8)
        return images
    return rng.integers(0, 256, (max(1, n // 3), d), dtype=np.uint8)[rng.integers(0, max(1, n // 3), n)]  # duplicates


@pytest.mark.parametrize("impl", BACKENDS)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["noise", "extremes", "near ties", "duplicates"]),
    n=st.integers(1, 40),
    q=st.integers(0, 9),
    d=st.integers(1, 300),
    data=st.data(),
)
@settings(max_examples=at_most(60))
def test_equals_integer_brute_force(impl, seed, kind, n, q, d, data):
    k = data.draw(st.integers(1, n))
    rng = np.random.default_rng(seed)
    everyone = hostile_images(rng, kind, n + q, d)
    queries, training = everyone[:q], everyone[q:]
    block = data.draw(st.sampled_from([3, 8, 4096]))
    with pytest.MonkeyPatch.context() as patch:  # blocks smaller than the set, so that merging is exercised
        patch.setattr(blocked, "TRAINING_BLOCK", block)
        patch.setattr(blocked, "QUERY_BLOCK", block)
        squared, indices = nearest(torch.from_numpy(queries), torch.from_numpy(training), k, impl=impl)
    expected_squared, expected_indices = brute_force(queries, training, k)
    np.testing.assert_array_equal(squared, expected_squared)
    np.testing.assert_array_equal(indices, expected_indices)


def test_wide_images_where_float32_products_lose_the_order():
    """At d = 100,000 a float32 product is off by more than the difference between the candidates."""
    rng = np.random.default_rng(0)
    d = 100_000
    query = rng.integers(0, 256, (1, d), dtype=np.uint8)
    training = np.repeat(255 - query, 50, axis=0)
    training[np.arange(50), np.arange(50)] = query[0, :50]  # slightly different, very far away
    squared, indices = nearest(torch.from_numpy(query), torch.from_numpy(training), 50)
    expected_squared, expected_indices = brute_force(query, training, 50)
    assert expected_squared.max() > 2**31
    np.testing.assert_array_equal(squared, expected_squared)
    np.testing.assert_array_equal(indices, expected_indices)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_ranked_in_float64(dtype):
    rng = np.random.default_rng(1)
    training = rng.normal(size=(500, 64)).astype(dtype) + 1000  # a mean far from zero
    queries = training[:20] + rng.normal(size=(20, 64)).astype(dtype) * 1e-3
    squared, indices = nearest(torch.from_numpy(queries), torch.from_numpy(training), 3)
    expected_squared, expected_indices = brute_force(queries, training, 3)
    assert_close("float distances", squared, torch.from_numpy(expected_squared))
    np.testing.assert_array_equal(indices, expected_indices)


def test_pairs_within_are_all_pairs_within():
    rng = np.random.default_rng(2)
    images = hostile_images(rng, "near ties", 300, 40)
    squared = np.square(images[:, None].astype(np.int64) - images[None]).sum(-1)
    rows, columns, found = pairs_within(torch.from_numpy(images), torch.from_numpy(images), 4)
    expected = np.argwhere(squared <= 4)
    np.testing.assert_array_equal(sorted(zip(rows.tolist(), columns.tolist(), strict=True)), expected)
    np.testing.assert_array_equal(found, squared[rows, columns])


def test_operator_contract():
    images = torch.randint(0, 256, (12, 20), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.diffmem.nearest, (images[:3], images, 2, "torch"))


def test_bad_arguments_are_one_clear_line():
    images = torch.zeros(4, 10, dtype=torch.uint8)
    for call, words in [
        (lambda: nearest(images, images, 5), "k must be between 1 and the number of training images, 4"),
        (lambda: nearest(images, images.float(), 1), "training must be uint8"),
        (lambda: nearest(images[:, :3], images, 1), r"training must be \[N, 3\], got \(4, 10\)"),
        (lambda: nearest(torch.full((1, 3), float("nan")), torch.zeros(2, 3), 1), "NaN"),
        (lambda: nearest(images, images, 1, impl="magic"), "choose from"),
    ]:
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.skipif(native_module() is None, reason="PyTorch's own threads do not survive a fork")
def test_a_forked_process_searches_too():
    """As data loaders' workers are made: threads that the parent shared its loops with are not there."""
    code = (
        "import os, signal, torch\n"
        "from diffmem.ops.nearest import nearest\n"
        "x = torch.randint(0, 256, (600, 300), dtype=torch.uint8)\n"
        "torch.set_num_threads(2)\n"
        "expected = nearest(x[:64], x, 2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60)\n"
        "    found = nearest(x[:64], x, 2)\n"
        "    os._exit(0 if all(map(torch.equal, found, expected)) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = finished(start_script(code))
    assert done.returncode == 0, done.stderr
