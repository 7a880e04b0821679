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
        for bit in (1, 4, 16)[position % 3 :: 3]:
            path.write_bytes(text[:position] + bytes([text[position] ^ bit]) + text[position + 1 :])
            try:
                assert read_sealed(path, "delete it") == values  # white space became other white space
            except InputError as error:
                refusals.append(str(error))
    assert len(refusals) > 2 / 3 * len(text)
    assert all(message.startswith(f"{path}: ") and message.endswith(": delete it") for message in refusals)
    with pytest.raises(NoChecksumError, match="has no checksum"):
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
    positions = range(0, len(content), 3)
    for position in positions:
        path.write_bytes(content[:position] + bytes([content[position] ^ 8]) + content[position + 1 :])
        try:
            found = load_arrays(path, "delete it")
            assert arrays_sha256(found) == arrays_sha256(ARRAYS)  # a date, or padding
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > len(positions) / 3
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


SNAPSHOT = {"images": 8, "epochs": 1.0, "loss": 0.5, "score": None, "kept": True}
DAMAGES = [
    b"",
    b"null",
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"config": ' + b"9" * 5000 + b"}",
    b'{"sha256": "0"}',
    b"[1, null]",
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: repr(damage[:20]))
def test_damaged_documents_are_one_line(damage, tmp_path):
    from diffmem.studies.folder import read_studies
    from diffmem.studies.measure import read_result
    from diffmem.studies.study import load_study
    from diffmem.training.run_folder import RunFolder
    from diffmem.training.run_folder.snapshots import read_records

    (tmp_path / "studies").mkdir()
    for name, read in (
        ("config.json", lambda: RunFolder.open(tmp_path)),
        ("snapshots.json", lambda: read_records(tmp_path)),
        ("result.json", lambda: read_result(tmp_path)),
        ("study.json", lambda: load_study(tmp_path / "study.json")),
        ("studies/width.json", lambda: read_studies(tmp_path)),
    ):
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(InputError) as caught:
            pytest.fail(f"{name}: {read()}")
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_lists_of_snapshots(tmp_path):
    from diffmem.training.run_folder.snapshots import SnapshotRecord, read_records

    path = tmp_path / "snapshots.json"
    for values in ([SNAPSHOT], sealed({"snapshots": [SNAPSHOT]})):  # of an older version, and of this one
        path.write_text(json.dumps(values))
        assert read_records(tmp_path) == [SnapshotRecord(**SNAPSHOT)]
    path.write_text(path.read_text().replace("0.5", "0.4"))
    with pytest.raises(InputError, match="checksum differs"):
        read_records(tmp_path)
    path.write_text(json.dumps([{**SNAPSHOT, "images": "../../elsewhere"}]))
    with pytest.raises(InputError, match="not a list of snapshots"):
        read_records(tmp_path)


def test_a_damaged_ledger(tmp_path):
    from diffmem.studies.ledger import FILE, Ledger

    ledger = Ledger(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / FILE).write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    for use in (ledger.entries, lambda: ledger.claim(["a"]), lambda: ledger.retry(["a"])):
        with pytest.raises(InputError, match="cannot be used as a ledger"):
            use()
