"""TIFF stacks: pages in order, under the rules of other image files."""

import numpy as np
import pytest
from data.test_containers import pixels
from data.test_tar_shards import says
from PIL import Image

from diffmem.data import load_images


def stack(path, pages, **options):
    first, *others = [page if isinstance(page, Image.Image) else Image.fromarray(page) for page in pages]
    first.save(path, save_all=True, append_images=others, **options)
    return path


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_pages(tmp_path, compression):
    images = pixels(7)
    path = stack(tmp_path / "a.tif", images.transpose(0, 2, 3, 1), compression=compression)
    loaded = load_images(path)
    np.testing.assert_array_equal(loaded.images, images)
    assert loaded.names == [f"page-{index:06d}" for index in range(7)]
    np.testing.assert_array_equal(load_images(path, limit=2, color="gray").images.shape, (2, 1, 6, 6))
    gray = images[:, 0]
    np.testing.assert_array_equal(load_images(stack(tmp_path / "g.tiff", gray)).images[:, 0], gray)


def test_rules_of_other_files(tmp_path):
    levels = pixels(3)[:, 0].astype(np.uint16)
    np.testing.assert_array_equal(load_images(stack(tmp_path / "a.tif", levels * 257)).images[:, 0], levels)
    says(stack(tmp_path / "b.tif", levels * 256 + 1), "page-000000", "16-bit")
    says(stack(tmp_path / "c.tif", [levels[0].astype(np.uint8), levels[1].astype(np.float32)]), "page-000001")
    says(stack(tmp_path / "d.tif", [Image.new("L", (4, 4)), Image.new("L", (5, 4))]), "mixed sizes", "page-000001")
    says(stack(tmp_path / "e.tif", [Image.new("RGBA", (4, 4), (1, 2, 3, 9))] * 2), "page-000000", "transparent")
    data = stack(tmp_path / "good.tif", pixels(3, size=24).transpose(0, 2, 3, 1)).read_bytes()
    damaged = tmp_path / "damaged.tif"
    for cut in range(0, len(data) - 8, 131):
        damaged.write_bytes(data[:cut])
        says(damaged, "damaged.tif")
