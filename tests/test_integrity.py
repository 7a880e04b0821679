"""Checksums: no single bit of what is read back may turn over unnoticed."""

import io
import json

import numpy as np
import pytest

from diffmem.errors import InputError
from diffmem.integrity import (
    NoChecksumError,
    arrays_sha256,
    load_arrays,
    read_sealed,
    save_arrays,
    sealed,
    unsealed,
)

ARRAYS = {"images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "seed": np.array(7), "way": np.array("{}")}


def test_documents(tmp_path):
    values = {"images": 16, "loss": 0.1, "nothing": None, "nested": {"random": 2**127, "list": [1.5, float("inf")]}}
    path = tmp_path / "state.json"
    text = json.dumps(sealed(values), indent=1).encode()
    path.write_bytes(text)
    assert read_sealed(path, "delete it") == values
    assert sealed(sealed(values)) == sealed(values)
    refusals = []
    for position in range(len(text)):
        for bit in (1, 4, 16):
            path.write_bytes(text[:position] + bytes([text[position] ^ bit]) + text[position + 1 :])
            try:
                assert read_sealed(path, "delete it") == values  # white space became other white space
            except InputError as error:
                refusals.append(str(error))
    assert len(refusals) > 2 * len(text)
    assert all(message.startswith(f"{path}: ") and message.endswith(": delete it") for message in refusals)
    with pytest.raises(NoChecksumError, match="without a checksum"):
        unsealed(values, path, "delete it")


def test_arrays(tmp_path):
    path = tmp_path / "block.npz"
    with path.open("wb") as stream:
        save_arrays(stream, ARRAYS)
    for name, values in load_arrays(path, "delete it").items():
        np.testing.assert_array_equal(values, ARRAYS[name])
        assert values.dtype == ARRAYS[name].dtype
    content = path.read_bytes()
    refusals = []
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 8]) + content[position + 1 :])
        try:
            found = load_arrays(path, "delete it")
            assert arrays_sha256(found) == arrays_sha256(ARRAYS)  # a date, or padding
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > len(content) / 3
    assert all(message.startswith(f"{path}: ") and message.endswith(": delete it") for message in refusals)


@pytest.mark.parametrize("name", ["images", "seed", "other"])
def test_arrays_that_were_exchanged(name, tmp_path):
    """Other contents, stored as a program would: the archive's own checksums fit, the one over all of it does not."""
    path = tmp_path / "block.npz"
    stream = io.BytesIO()
    save_arrays(stream, ARRAYS)
    stream.seek(0)
    stored = dict(np.load(stream))
    stored[name] = stored["images"][::-1] if name == "images" else np.array(8)
    np.savez(path, **stored)
    with pytest.raises(InputError, match="damaged"):
        load_arrays(path, "delete it")
    del stored["sha256"]
    np.savez(path, **stored)
    with pytest.raises(NoChecksumError):
        load_arrays(path, "delete it")


def test_the_checksum_sees_shape_dtype_name_and_order():
    values = np.arange(6, dtype=np.int32)
    others = [
        {"x": values.reshape(2, 3)},
        {"x": values.view(np.uint32)},
        {"y": values},
        {"x": values[::-1]},
        {"x": values[:5]},
        {"x": values, "y": values[:0]},
    ]
    assert len({arrays_sha256(arrays) for arrays in [{"x": values}, *others]}) == 1 + len(others)
    assert arrays_sha256({"x": np.asfortranarray(values.reshape(2, 3))}) == arrays_sha256({"x": values.reshape(2, 3)})
