"""Files made to crash, hang or exhaust whoever reads them: each is refused, or read, in little time and memory."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import pickletools
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from processes import finished, start_script

FOLDER = Path(__file__).parents[1] / "hostile"
READER = Path(__file__).with_name("reader.py")
MEMORY = 10**9


def read_all(paths, cwd):
    """What became of each path, read one after another in one process of its own (so that memory adds up)."""
    result = finished(start_script(READER.read_text(), *paths, env={"OMP_NUM_THREADS": "1"}, cwd=cwd), timeout=300)
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(outcomes) == len(paths), f"died in {paths[len(outcomes)]}: {result.stderr[-1000:]}"
    return outcomes


def check_all(paths, cwd, outcomes=("refused",)):
    for found in read_all(paths, cwd):
        assert found["outcome"] in outcomes, found
        assert found["memory"] < MEMORY, found
        assert found["outcome"] == "read" or found["path"] in found["message"], found
    assert not list(cwd.iterdir()), "something was executed"


@pytest.mark.parametrize("kind", ["pickles", "pickles2", "cifar"])
def test_files_that_went_wrong(kind, tmp_path):
    check_all(sorted(path for path in (FOLDER / kind).iterdir()), tmp_path)


STORAGE = b"ctorch.storage\n_load_from_bytes\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
OBJECT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def bombs():
    """Pickles by name, each small or of a few megabytes, and dear in one way."""
    doubled = b"N" + b"2\x86" * 60  # 2^60 values, if anyone follows them
    # A tensor that was stored by plain pickle holds its storage as a nested stream.
    tensor = pickle.dumps(torch.zeros(2**20), protocol=4)
    (stream,) = (value for _, value, _ in pickletools.genops(tensor) if isinstance(value, bytes))
    nested = b"B" + struct.pack("<I", len(stream)) + stream
    one = STORAGE + nested + b"\x85Rq\x01"
    window = b"K\x00(M\x00\x04M\x00\x04t(M\x00\x04K\x01t\x89}t"
    names = b"".join(text(f"w{n}") + TENSOR + b"(h\x01" + window + b"R" for n in range(1500))
    entries = zipfile.ZipFile(overlapping := io.BytesIO(), "w")
    entries.writestr("a/data.pkl", b"\x80\x02](" + b"".join(_storage_id(n) for n in range(3000)) + b"e.")
    entries.writestr("a/data/0", bytes(2**22))
    entries.close()
    return {
        "a key of tuples": b"\x80\x02}" + doubled + b"Ns.",
        "a member of tuples": b"\x80\x04\x8f(" + doubled + b"\x90.",
        "a set of tuples by name": b"\x80\x02c__builtin__\nset\n](" + doubled + b"e\x85R.",
        "a dictionary of tuples by name": b"\x80\x02ccollections\nOrderedDict\n](" + doubled + b"N\x86e\x85R.",
        "a class name of tuples": b"\x80\x02" + OBJECT + b"}(" + text("type") + doubled + b"u\x85R.",
        "a name of tuples": b"\x80\x04" + doubled + b"N\x93.",
        "a dtype of tuples": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85RN" + doubled + b"\x86b.",
        "huge numbers with one hash": b"\x80\x02}("
        + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(1, 100_000))
        + b"u.",
        "a tower of tuples": b"\x80\x02N" + b"\x85" * 700_000 + b".",
        "a tower of lists": b"\x80\x02" + b"]" * 350_000 + b"a" * 349_999 + b".",
        "a tower of objects": b"\x80\x02N" + b"".join([b"q\x010", _object(b"h\x01")] * 20_000) + b".",
        "empty sets": b"\x80\x04(" + b"\x8f" * 1_400_000 + b"t.",
        "marks": b"\x80\x04" + b"(" * 1_400_000 + b"t" * 1_400_000 + b".",
        "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
        "modules within each other": b"\x80\x02}(" + text("ema") + _modules(15, 40) + b"u.",
        "a module that holds itself": b"\x80\x02}("
        + text("ema")
        + b"}q\x00(" + text("_modules") + b"}(" + text("a") + _object(b"h\x00") + b"uu0" + _object(b"h\x00") + b"u.",
        "many tensors on one storage": b"\x80\x02" + one + b"0}(" + text("ema") + _with_parameters(names) + b"u.",
        "one nested stream many times": b"\x80\x02(" + nested + b"q\x02" + (STORAGE + b"h\x02\x85R0") * 4000 + b"t.",
        "entries on top of each other": _same_entry(overlapping.getvalue(), 3000),
        "a directory of empty entries": _many_entries(120_000),
    }  # fmt: skip


def _storage_id(key):
    kind = b"ctorch\nFloatStorage\n"
    return b"(" + text("storage") + kind + text(str(key)) + text("cpu") + b"J" + struct.pack("<i", 2**20) + b"tQ"


def _object(state):
    meta = text("type") + text("class") + text("class_name") + text("EDMPrecond") + text("state") + state
    return OBJECT + b"}(" + meta + b"u\x85R"


def _modules(depth, children):
    """Modules each of which holds the next one `children` times."""
    arguments = text("_init_args") + b"K\x08K\x01\x86"
    inner = _object(b"}(" + arguments + b"u")
    for _ in range(depth):
        same = b"".join(text(f"m{n}") + b"h\x05" for n in range(children))
        inner += b"q\x050" + _object(b"}(" + arguments + text("_modules") + b"}(" + same + b"uu")
    return inner


def _with_parameters(names):
    arguments = text("_init_args") + b"K\x08K\x01\x86"
    return _object(b"}(" + arguments + text("_parameters") + b"}(" + names + b"uu")


def _same_entry(content, count):
    """A zip whose entries a/data/0 … all name the same bytes."""
    start = content.rfind(b"PK\x01\x02")
    end = content.rfind(b"PK\x05\x06")
    one = content[start:end]
    name = b"a/data/0"
    first = content[: content.find(b"PK\x01\x02")]
    directory = content[content.find(b"PK\x01\x02") : start]
    for n in range(count):
        other = b"a/data/%d" % n
        directory += one[:28] + struct.pack("<H", len(other)) + one[30:46] + other + one[46 + len(name) :]
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count + 1, count + 1, len(directory), len(first), 0)
    return first + directory + tail


def _many_entries(count):
    header = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entry = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0) + b"%06d" % n
        for n in range(count)
    )
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFE, 0xFFFE, len(entry), len(header), 0)
    return header + entry + end


def test_pickles_that_are_dear_to_read(tmp_path):
    inputs, empty = tmp_path / "inputs", tmp_path / "empty"
    inputs.mkdir()
    empty.mkdir()
    for name, content in bombs().items():
        (inputs / f"{name.replace(' ', '-')}.pkl").write_bytes(content)
    check_all(sorted(inputs.iterdir()), empty)
    (inputs / "of-cifar").mkdir()
    archives = []
    for name, content in bombs().items():
        if len(content) > 10_000 and "tower of tuples" not in name:
            continue
        path = inputs / "of-cifar" / f"{name.replace(' ', '-')}-test_batch.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            info = tarfile.TarInfo("cifar-10-batches-py/test_batch")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        archives.append(path)
    labels = b"\x80\x02}(" + text("labels") + b"](](N" + b"2\x86" * 60 + b"eeu."
    archives.append(inputs / "of-cifar" / "labels-test_batch.tar")
    with tarfile.open(archives[-1], "w") as archive:
        info = tarfile.TarInfo("test_batch")
        info.size = len(labels)
        archive.addfile(info, io.BytesIO(labels))
    check_all(archives, empty)


def _header(name, size, kind=b"0", field=None):
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"%011o\x00" % size if field is None else field
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\x00 " % sum(block)
    return bytes(block)


def test_tar_archives_that_lie(tmp_path):
    inputs, empty = tmp_path / "inputs", tmp_path / "empty"
    inputs.mkdir()
    empty.mkdir()
    zeros = gzip.compress(bytes(2**24), 9)  # gzip members that follow each other are one stream
    archives = {
        "huge-pax.tar": _header("x", 2**29, b"x") + bytes(2**22),
        "huge-name.tar": _header("x", 2**29, b"L") + bytes(2**22),
        "sparse.tar": _header("test_batch", 0, b"S") + bytes(1024),
        "base256.tar": _header("test_batch", 0, field=b"\x80" + bytes(3) + b"\x7f" * 8) + bytes(1024),
        "negative.tar": _header("x", 0, field=b"\xff" * 12) + bytes(1024),
        "link-to-itself.tar": _header("test_batch", 0, b"1") + bytes(1024),
        "not-octal.tar": _header("test_batch", 0, field=b"99999999999\x00") + bytes(1024),
        "members.tar": _header("x", 0) * 200_000,
        "bomb.tar.gz": gzip.compress(_header("x", 2**33 - 1), 9) + zeros * 64,
        "zeros.tar.gz": zeros * 600,
        "packed.tar.xz": b"\xfd7zXZ\x00" + bytes(100),
    }
    for name, content in archives.items():
        (inputs / name.replace(".tar", "-test_batch.tar").replace(".xz", "")).write_bytes(content)
    check_all(sorted(inputs.iterdir()), empty)


def test_what_a_stored_checksum_says_of_an_archive(tmp_path):
    """A bit of a weight turns over in a .pt file: torch.load does not notice, this reader does."""
    path, empty = tmp_path / "images.pkl", tmp_path / "empty"
    empty.mkdir()
    torch.save({"ema": torch.ones(100)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 1.0) * 4)] ^= 1
    path.write_bytes(content)
    (found,) = read_all([path], empty)
    assert found["outcome"] == "refused"
    assert "checksum" in found["message"]
