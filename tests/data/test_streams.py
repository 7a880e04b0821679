"""Images that come once, item by item, and datasets in memory: torch's, torchvision's kind, Hugging Face's."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from data.test_containers import encoded, pixels
from data.test_tar_shards import says
from PIL import Image

from diffmem.data import DatasetSpec, load_images

STREAM = """
import resource, numpy as np
import diffmem.data.storage as storage
from diffmem.data import load_images
storage.MEMORY_SHARE = 2**24 / storage.memory_bytes()
load_images(np.zeros((3, 64, 64), np.uint8) for _ in range(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = (np.full((1000, 3, 64, 64), number, np.uint8) for number in range(25))
images = load_images(made).images
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert next(made, None) is None
assert images.shape == (25000, 3, 64, 64)
assert images[24999, 0, 0, 0] == 24
print((after - before) // 1024, images.nbytes // 2**20)
"""


def test_a_stream_larger_than_its_share_of_memory():
    """300 MB in blocks of 12 MB take a few blocks' memory, not 300 MB."""
    done = subprocess.run(
        [sys.executable, "-c", STREAM], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert size == 292
    assert grown < 100


def test_samples_of_webdataset_and_others():
    images = pixels(4)
    shown = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    samples = [{"__key__": f"k{index}", "jpg": image, "cls": index} for index, image in enumerate(shown)]
    taken = iter(samples)
    loaded = load_images(taken, limit=3)
    assert len(list(taken)) == 1  # no more were taken
    np.testing.assert_array_equal(loaded.images, images[:3])
    np.testing.assert_array_equal(loaded.labels, [0, 1, 2])
    assert loaded.names == ["k0", "k1", "k2"]
    np.testing.assert_array_equal(load_images(map(encoded, images)).images, images)
    undecoded = [{"image": {"bytes": encoded(image), "path": None}} for image in images]
    np.testing.assert_array_equal(load_images(undecoded).images, images)
    batches = [{"names": ["a", "b"], "x": images[:2]}, {"names": ["c", "d"], "x": images[2:]}]
    assert load_images(batches, key="x").names == list("abcd")
    assert load_images([{**batches[0], "names": ["a"]}, batches[1]], key="x").names is None
    says(batches, "'image'", "key=")
    says(batches, "must hold 'y'", key="y")
    says([encoded(images[0])[:40]], "item 0")


class LikeTorchvision:
    """What torchvision's datasets hand out: a Pillow image and a class number, by index."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index].transpose(1, 2, 0)), index % 3


class OfTorch(LikeTorchvision, torch.utils.data.Dataset):
    pass


@pytest.mark.parametrize("kind", [LikeTorchvision, OfTorch])
def test_datasets_by_index(kind):
    images = pixels(5)
    loaded = load_images(kind(images))
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, [0, 1, 2, 0, 1])


def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    images = pixels(6)
    rows = {"img": [{"bytes": encoded(image), "path": None} for image in images], "fine": [3, 4, 5, 3, 4, 5]}
    rows["mask"] = rows["img"][::-1]
    kinds = {"img": datasets.Image(), "mask": datasets.Image(), "fine": datasets.Value("int64")}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    assert "img, mask, the first" in load_images(dataset).notes[0]
    np.testing.assert_array_equal(load_images(dataset, key="img", limit=4).images, images[:4])
    np.testing.assert_array_equal(load_images(dataset, key="mask").images, images[::-1])
    says(dataset, "no column 'x'", "img, mask", key="x")
    stream = dataset.to_iterable_dataset()
    np.testing.assert_array_equal(load_images(stream).images, images)
    np.testing.assert_array_equal(load_images(stream, key="mask").images, images[::-1])
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([5])})
    np.testing.assert_array_equal(load_images(both, key="test").images, images[5:])
    says(both, "pick one split", "train, test")
    both.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    for folder in ("saved", "hub"):
        spec = f"hf:{tmp_path / folder}?split=train&column=mask&label=fine"
        loaded = load_images(spec)
        np.testing.assert_array_equal(loaded.images, images[::-1])
        np.testing.assert_array_equal(loaded.labels, rows["fine"])
        for wrong in ("split=x", "split=train&column=x", "split=train&label=x", "splat=1", "?"):
            says(f"hf:{tmp_path / folder}?{wrong}", str(tmp_path / folder))
        assert load_images(DatasetSpec(spec, limit=2).absolute()).fingerprint == loaded.select([0, 1]).fingerprint
    says("hf:cifar10", "nothing is downloaded")
