"""The host stand-in for CUDA: it computes what CUDA computes, and it notices what a GPU would punish."""

import ctypes

import numpy as np
import pytest
from simt_build import HERE, PLAIN, compile_for_races, compile_host, run_for_races

POISON = 0xCDCDCDCD


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = ctypes.CDLL(
        str(compile_host([HERE / "simt_check.cpp"], tmp_path_factory.mktemp("simt") / "check.so", PLAIN))
    )
    for name in ("collectives", "intrinsics", "product", "garbage", "rule"):
        getattr(library, f"check_{name}").restype = ctypes.c_char_p
    return library


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def test_collectives_and_indices(library):
    out = np.full((2, 2, 64, 8), -1, np.int32)
    assert library.check_collectives(pointer(out)) == b"no error"
    thread = np.arange(64)
    lane, first = thread % 32, thread // 32 * 32
    expected = np.stack(
        [
            thread ^ 5,
            np.where(lane >= 3, thread - 3, thread),
            np.where(lane < 29, thread + 3, thread),
            first + 7,
            np.full(64, sum(1 << i for i in range(0, 32, 3))),
            np.where(thread < 32, 1, 2),
            np.full(64, 40 * 4 + 2),
        ],
        axis=1,
    )
    np.testing.assert_array_equal(out[..., :7], np.broadcast_to(expected, (2, 2, 64, 7)))
    np.testing.assert_array_equal(out[..., 7], np.broadcast_to([[[0], [1]], [[10], [11]]], (2, 2, 64)))


def test_atomics_and_intrinsics(library):
    out = np.array([0, 100, 0, -1, -1, -1, -1, -1], np.int32)
    assert library.check_intrinsics(pointer(out)) == b"no error"
    signed, unsigned = 128 * 128 - 2 + 127 * 3 + 5 + 7, 128 * 128 + 255 * 2 + 127 * 3 + 5 + 7
    expected = [127 * 64, 50 - 127, 127, signed, unsigned, 0xFFFF7D7F - 2**32, 800 + 24 + 32, 400 + 0 + 2]
    assert out.tolist() == expected


def test_matrix_product(library):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, (rows, 32), dtype=np.int8) for rows in (16, 8))
    a[0], b[0] = -128, -128
    c = rng.integers(-1000, 1000, (16, 8), dtype=np.int32)
    aligned = [np.empty(array.size + 16, np.uint8) for array in (a, b)]
    views = [memory[-memory.ctypes.data % 16 :][: array.size] for memory, array in zip(aligned, (a, b), strict=True)]
    for view, array in zip(views, (a, b), strict=True):
        view[:] = array.view(np.uint8).ravel()
    expected = c + a.astype(np.int32) @ b.astype(np.int32).T
    assert library.check_product(*map(pointer, views), pointer(c)) == b"no error"
    np.testing.assert_array_equal(c, expected)


def test_what_is_not_initialized_or_not_waited_for_is_garbage(library):
    data, out = np.array([7], np.uint32), np.zeros(4, np.uint32)
    assert library.check_garbage(pointer(data), pointer(out)) == b"no error"
    np.testing.assert_array_equal(out, [POISON, POISON, POISON, 0])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (0, "wait at different barriers"),
        (1, "different collectives"),
        (2, "not reached by all lanes"),
        (3, "full mask"),
        (4, "past the end of dynamic shared memory"),
        (5, "not aligned to 16 bytes"),
    ],
)
def test_broken_rules_are_named(library, rule, message):
    assert message in library.check_rule(rule, 32, 16).decode()


def test_impossible_launches_are_refused(library):
    assert b"less dynamic shared memory" in library.check_rule(-1, 32, 8)
    assert library.check_rule(-1, 2048, 16) == b"invalid configuration argument"
    assert library.check_rule(-1, 32, 1 << 20) == b"invalid argument"
    assert b"multiples of 32" in library.check_rule(-1, 33, 16)


def test_missing_barriers_are_races(tmp_path):
    program = compile_for_races([HERE / "simt_check.cpp"], tmp_path / "check", ["-DSIMT_CHECK_MAIN"])
    complete = run_for_races(program)
    assert (complete.returncode, complete.stdout, complete.stderr) == (0, "no error, 2016\n", "")
    for missing in ("no-syncthreads", "no-syncwarp"):
        broken = run_for_races(program, missing)
        assert broken.returncode == 66, missing
        assert "ThreadSanitizer: data race" in broken.stderr
