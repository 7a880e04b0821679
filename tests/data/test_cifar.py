"""CIFAR-10's own archive: read as its authors wrote it, without executing what a forged one asks for."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from diffmem.data import load_images
from diffmem.errors import InputError

RNG = np.random.default_rng(5)


def batch(count, start, **changes):
    names = [f"cat_s_{index:06d}.png" for index in range(start, start + count)]
    pixels = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [index % 10 for index in range(start, start + count)]
    return {"batch_label": "a batch", "labels": labels, "data": pixels, "filenames": names} | changes


def as_python2_wrote_it(content):
    """Protocol 2 with byte strings, as in the real archive: bytes are written as Python 2 wrote its strings."""

    class Python2Pickler(pickle._Pickler):
        dispatch = pickle._Pickler.dispatch.copy()

        def save_bytes(self, value):
            self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

        def save_str(self, value):
            self.save_bytes(value.encode("latin1"))

        dispatch[bytes], dispatch[str] = save_bytes, save_str

    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(content)
    return stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def archive(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("dump", [as_python2_wrote_it, pickle.dumps, lambda content: pickle.dumps(content, 2)])
def test_read(tmp_path, dump):
    batches = [batch(4, 4 * index) for index in range(6)]
    names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
    members = {name: dump(content) for name, content in zip(names, batches, strict=True)}
    path = archive(tmp_path / "cifar-10-python.tar.gz", dict(reversed(members.items())))
    train, test, both = (load_images(path, key=key) for key in (None, "test", "all"))
    pixels = np.concatenate([content["data"] for content in batches]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(both.images, pixels)
    np.testing.assert_array_equal(both.labels, np.arange(24) % 10)
    np.testing.assert_array_equal(train.images, pixels[:20])
    np.testing.assert_array_equal(test.images, pixels[20:])
    assert test.names == batches[5]["filenames"]
    assert load_images(path, limit=3).names == batches[0]["filenames"][:3]
    with pytest.raises(InputError, match="key='train', key='test' or key='all'"):
        load_images(path, key="validation")


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil",
    [
        lambda path: Call(os.system, f"touch {path}"),
        lambda path: Call(open, str(path), "w"),
        lambda path: batch(1, 0, data=Call(eval, f"open({str(path)!r}, 'w')")),
        lambda path: batch(1, 0, data=np.array([Call(open, str(path), "w")], dtype=object)),
    ],
)
def test_nothing_is_executed(tmp_path, evil):
    touched = tmp_path / "touched"
    path = archive(tmp_path / "cifar-10-python.tar.gz", {"test_batch": pickle.dumps(evil(touched))})
    with pytest.raises(
        InputError, match=r"test_batch is not a batch of CIFAR-10: it contains .+, which is never loaded"
    ):
        load_images(path, key="test")
    assert not touched.exists()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps([1]),
        pickle.dumps({}),
        pickle.dumps(batch(2, 0, labels=[1])),
        pickle.dumps(batch(2, 0, data=np.zeros((2, 3072), np.float32))),
        pickle.dumps(batch(2, 0, data=np.zeros((2, 5), np.uint8))),
        pickle.dumps(batch(2, 0, labels=["cat", "dog"])),
        pickle.dumps(batch(2, 0))[:-200],
        b"\x80\x02]" + b"(" * 10_000 + b"t" * 10_000 + b".",
    ],
)
def test_nonsense(tmp_path, content):
    path = archive(tmp_path / "cifar-10-python.tar.gz", {"test_batch": content})
    with pytest.raises(InputError, match=r"^[^\n]*test_batch[^\n]*$"):
        load_images(path, key="test")


def test_truncated_and_foreign_archives(tmp_path):
    path = archive(tmp_path / "cifar-10-python.tar.gz", {"test_batch": pickle.dumps(batch(4, 0))})
    with pytest.raises(InputError, match="lacks data_batch_1"):
        load_images(path)
    whole = path.read_bytes()
    for end in (0, 50, len(whole) // 2):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"not a complete tar archive|lacks"):
            load_images(path, key="test")
