"""Sources in an object store: the same index as from the files themselves, whatever the connection does."""

import sys
import zipfile

import numpy as np
import pytest
from indexes.conftest import png, write_tar

import diffmem
from diffmem.errors import InputError, MissingExtraError
from diffmem.indexes import add_to_index, build_index, remote


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)


def rows(index):
    return np.concatenate([shard.vectors for shard in index.shards]), list(index.names), index.image_shape


def same(one, other):
    return np.array_equal(rows(one)[0], rows(other)[0]) and rows(one)[1:] == rows(other)[1:]


def upload(store, folder, name):
    store.files.put(str(folder), f"train/{name}", recursive=True)
    return f"s3://train/{name}"


def test_every_kind_of_source_is_read_where_it_lies(tmp_path, store, shards, digits):
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(digits.images[:70]):
        (images / f"img{number}.png").write_bytes(png(image))
    with zipfile.ZipFile(tmp_path / "digits.zip", "w") as archive:
        for number, image in enumerate(digits.images[:50]):
            archive.writestr(f"a/{number}.png", png(image))
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    import pyarrow.parquet

    table = pyarrow.table({"image": [png(image) for image in digits.images], "key": [f"k{n}" for n in range(230)]})
    pyarrow.parquet.write_table(table, tmp_path / "digits.parquet", row_group_size=50)
    for source in (shards, images, tmp_path / "digits.zip", tmp_path / "digits.parquet"):
        url = upload(store, source, f"kinds/{source.name}")
        here = build_index(source, tmp_path / f"here-{source.name}", shards=3)
        there = build_index(url, tmp_path / f"there-{source.name}", shards=3)
        assert same(here, there), source
    brace = build_index("s3://train/kinds/tars/train-{000..002}.tar", tmp_path / "brace")
    assert brace.fingerprint == build_index("s3://train/kinds/tars/train-*.tar", tmp_path / "glob").fingerprint
    url = f"{store.url}/train/kinds/digits.zip"
    store.files.chmod("train/kinds/digits.zip", "public-read")
    assert len(build_index(url, tmp_path / "http")) == 50


@pytest.mark.parametrize(("url", "package"), [("gs://train", "gcsfs"), ("hf://datasets/me/train", "huggingface_hub")])
def test_other_stores_are_read_by_ranges(tmp_path, elsewhere, monkeypatch, url, package):
    pytest.importorskip("fsspec", reason="the extra remote is not installed")
    # The bucket's type is asked for by gRPC otherwise, which the server does not speak.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip(package, reason="the extra remote is not installed")
    import fsspec.config

    options = {
        "gs": {"endpoint_url": elsewhere.url, "token": "anon"},
        "hf": {"endpoint": elsewhere.url, "token": False},
    }
    for protocol, values in options.items():
        monkeypatch.setitem(fsspec.config.conf, protocol, values)
    images = np.random.default_rng(2).integers(0, 256, (150, 3, 120, 120), dtype=np.uint8)
    for number in range(2):
        file = write_tar(tmp_path / f"{number}.tar", images[number * 75 :][:75], number * 75)
        elsewhere.files[f"tars/{number}.tar"] = file.read_bytes()
    size = sum(map(len, elsewhere.files.values()))
    here = build_index(tmp_path / "{0..1}.tar", tmp_path / "here")
    there = build_index(f"{url}/tars/*.tar", tmp_path / "there")
    assert same(here, there)
    assert elsewhere.bytes < 1.1 * size + remote.BLOCK  # the first image is looked at before the plan
    before = elsewhere.bytes
    assert same(build_index(f"{url}/tars/*.tar", tmp_path / "there"), here)
    assert elsewhere.bytes - before < remote.BLOCK + size / 10  # what is finished is not read again
    assert same(build_index(f"{url}/tars/{{0..1}}.tar", tmp_path / "brace"), here)
    with pytest.raises(InputError, match=r"nothing\.tar: cannot be read \(no such file"):
        build_index(f"{url}/nothing.tar", tmp_path / "index")


def test_vectors_are_read_by_ranges(tmp_path, store):
    vectors = np.random.default_rng(1).normal(size=(3000, 256)).astype(np.float16)
    folder = tmp_path / "emb" / "img_emb"
    folder.mkdir(parents=True)
    np.save(folder / "img_emb_0.npy", vectors[:2000])
    np.save(folder / "img_emb_1.npy", vectors[2000:])
    url = upload(store, tmp_path / "emb", "emb")
    there = build_index(url, tmp_path / "there", "precomputed", shards=6)
    here = build_index(tmp_path / "emb", tmp_path / "here", "precomputed", shards=6)
    assert same(here, there)
    assert len(there.shards) == 6


def test_a_tar_is_read_once_and_a_finished_shard_never(tmp_path, store, digits):
    large = np.random.default_rng(2).integers(0, 256, (60, 3, 200, 200), dtype=np.uint8)
    size = write_tar(tmp_path / "large.tar", large).stat().st_size
    assert size > 1.5 * remote.BLOCK
    url = upload(store, tmp_path / "large.tar", "large.tar")
    store.counts["bytes"] = 0
    index = build_index(url, tmp_path / "index")
    assert index.holds(large)
    assert store.counts["bytes"] < 1.3 * size + 3 * remote.BLOCK  # the first image is looked at before the plan
    before = store.counts["bytes"]
    write_tar(tmp_path / "more.tar", large[:3])
    add_to_index(index.path, upload(store, tmp_path / "more.tar", "more.tar"))
    assert store.counts["bytes"] - before < size / 2
    # Another object under the same name is another one.
    write_tar(tmp_path / "large.tar", large[5:9])
    store.files.invalidate_cache()
    upload(store, tmp_path / "large.tar", "large.tar")
    assert len(build_index(url, tmp_path / "other")) == 4


def test_what_breaks_is_asked_for_again(tmp_path, store, shards, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    url = upload(store, shards, "faults")
    here = build_index(shards, tmp_path / "here")
    store.queue += [500, "cut", 503, None, "slow", "cut", 500]
    there = build_index(url, tmp_path / "there")
    assert store.queue == []
    assert same(here, there)


def test_what_stays_broken_ends_in_one_line_and_keeps_what_is_finished(tmp_path, store, shards, monkeypatch):
    url = upload(store, shards, "broken")
    original = remote.RemoteFile.fetch

    def fetch(self, start, stop):
        if "train-001" in self.url:
            return remote.patiently(lambda: (_ for _ in ()).throw(OSError("the connection was reset")), self.url)
        return original(self, start, stop)

    monkeypatch.setattr(remote.RemoteFile, "fetch", fetch)
    with pytest.raises(InputError, match=r"train-001\.tar: cannot be read, 5 attempts failed .*the other 2 are kept"):
        build_index(url, tmp_path / "index")
    monkeypatch.undo()
    store.counts["GET"] = 0
    assert len(build_index(url, tmp_path / "index")) == 230
    assert store.counts["GET"] < 8  # the two that are there are not read again


def test_names_that_cannot_be_opened(tmp_path, store, monkeypatch):
    with pytest.raises(InputError, match=r"s3://train/nothing\.tar: cannot be read \(no such file"):
        build_index("s3://train/nothing.tar", tmp_path / "index")
    with pytest.raises(InputError, match="cannot be opened"):
        build_index("nonsense://train/nothing.tar", tmp_path / "index")
    from fsspec.registry import _registry  # where drivers are kept that other tests have used

    monkeypatch.delitem(_registry, "gs", raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtraError, match=r"gcsfs: pip install 'diffmem\[remote\]'"):
        build_index("gs://train/nothing.tar", tmp_path / "index")
    assert diffmem.indexes.remote.without_secrets("https://u:p@host/a.tar?X-Signature=1") == "https://host/a.tar"
