"""Indexes of training sets built shard by shard: the same rows as the sets read at once, nothing made twice."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes.conftest import write_tar

import diffmem
from diffmem.errors import InputError
from diffmem.features import extract, load_features
from diffmem.indexes import add_to_index, build_index, open_index, verify_index
from diffmem.indexes.duplicates import united
from diffmem.search import find_duplicates


def made(index):
    """When each shard was made."""
    return {path.parent.name: path.stat().st_mtime_ns for path in index.path.glob("shards/*/shard.json")}


def everything(index):
    """What must not depend on how an index came about."""
    rows = [shard.vectors.tobytes() for shard in index.shards]
    found = index.duplicates
    return index.fingerprint, rows, list(index.names), found.members.tolist(), found.roots.tolist()


def test_rows_names_and_answers_are_those_of_the_set_read_at_once(tmp_path, shards, digits):
    index = build_index(shards, tmp_path / "index")
    at_once = diffmem.load_images(shards)
    assert index.holds(at_once)
    assert list(index.names) == list(at_once.names)
    assert index.names[105] == index.name(105) == at_once.names[105]
    assert len(index) == 230
    assert (len(index.shards), index.image_shape, index.dimension) == (3, (1, 8, 8), 64)
    queries = digits.images[::7] ^ np.uint8(3)
    found, expected = index.query(queries, 5), diffmem.TrainingIndex(at_once).query(queries, 5)
    assert np.array_equal(found.indices, expected.indices)
    assert np.array_equal(found.squared_distances, expected.squared_distances)
    rows = np.array([229, 0, 100, 99, 0])
    assert np.array_equal(index.take(rows), digits.images[rows].reshape(5, -1))
    assert diffmem.open_index(index.path).fingerprint == index.fingerprint
    with pytest.raises(InputError, match="k must be between"):
        index.query(queries, 231)


def test_what_is_finished_is_never_made_again(tmp_path, shards, digits):
    index = build_index([shards / "train-000.tar", shards / "train-001.tar"], tmp_path / "index")
    before = made(index)
    more = build_index("".join([str(shards), "/train-{000..002}.tar"]).split(), tmp_path / "other")
    again = build_index([shards / f"train-{n:03d}.tar" for n in range(3)], index.path)
    assert {name: made(again)[name] for name in before} == before
    assert everything(again)[:2] == everything(more)[:2]
    # The same contents under another name, in another place.
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "other.tar").write_bytes((shards / "train-001.tar").read_bytes())
    (tmp_path / "third" / "shards").mkdir(parents=True)
    for address in before:
        (index.path / "shards" / address).rename(tmp_path / "third" / "shards" / address)
    third = build_index([moved / "other.tar"], tmp_path / "third")
    assert made(third) == before
    # A file that changed is another one.
    write_tar(moved / "other.tar", digits.images[:5])
    assert len(build_index([moved / "other.tar"], tmp_path / "fourth")) == 5


def test_duplicates_are_those_of_the_set_read_at_once(tmp_path, digits):
    images = np.concatenate([digits.images[:40], digits.images[10:20], digits.images[15:16], digits.images[:40]])
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", images[number * 31 : number * 31 + 31])
    index = build_index([tmp_path / f"{number}.npy" for number in range(3)], tmp_path / "index", memory="500MB")
    expected = find_duplicates(images[:91])
    assert index.duplicates.as_groups().group_of.tolist() == expected.group_of.tolist()
    assert index.duplicates.distinct == expected.distinct
    assert index.duplicates.group_of(np.arange(91)).tolist() == expected.group_of.tolist()
    assert [group.tolist() for group in index.duplicates.groups] == [group.tolist() for group in expected.groups]


def test_near_duplicates_are_those_of_the_set_read_at_once(tmp_path):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (90, 1, 6, 6), dtype=np.uint8)
    for one, other in ((3, 80), (80, 45), (10, 11), (12, 60)):
        images[other] = np.clip(images[one].astype(int) + rng.integers(-2, 3, images[one].shape), 0, 255)
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", images[number * 30 : number * 30 + 30])
    expected = find_duplicates(images, 2)
    assert expected.number_of_groups < 90
    files = [tmp_path / f"{number}.npy" for number in range(3)]
    index = build_index(files, tmp_path / "index", duplicate_radius=2, shards=5)
    assert index.duplicates.as_groups().group_of.tolist() == expected.group_of.tolist()
    grown = build_index(files[:1], tmp_path / "grown", duplicate_radius=2)
    for file in files[1:]:
        grown = add_to_index(grown.path, file)
    assert (grown.duplicates.radius, grown.duplicates.distinct) == (2, 90)
    assert grown.duplicates.as_groups().group_of.tolist() == expected.group_of.tolist()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40))
@settings(max_examples=30)
def test_united_links_are_connected_components(links):
    pairs = np.array([link for link in links if link[0] != link[1]], np.int64).reshape(-1, 2)
    members, roots = united([pairs] if len(pairs) else [])
    group = {node: {node} for node in set(pairs.ravel().tolist())}
    for one, other in pairs.tolist():
        merged = group[one] | group[other]
        for node in merged:
            group[node] = merged
    assert dict(zip(members.tolist(), roots.tolist(), strict=True)) == {node: min(group[node]) for node in group}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_from_elsewhere_are_compared_as_the_audit_does(tmp_path, dtype):
    vectors = np.random.default_rng(0).normal(size=(90, 16)).astype(dtype)
    folder = tmp_path / "vectors" / "img_emb"
    folder.mkdir(parents=True)
    for number in range(3):
        np.save(folder / f"img_emb_{number}.npy", vectors[number * 30 : number * 30 + 30])
    index = build_index(folder.parent, tmp_path / "index", "precomputed", shards=9)
    at_once = load_features(folder.parent)
    assert (index.metric, index.dtype, len(index.shards)) == ("cosine", np.dtype(dtype), 9)
    assert np.array_equal(index.take(np.arange(90)), at_once.rows)
    queries = load_features(vectors[::5] + np.float16(0.01))
    found = index.query(index.rows_of(queries), 3)
    assert np.array_equal(found.indices, diffmem.TrainingIndex(at_once.rows).query(queries.rows, 3).indices)
    with pytest.raises(InputError, match="have 8 values each"):
        index.rows_of(load_features(vectors[:, :8]))


def test_features_of_images(tmp_path, shards, digits):
    index = build_index(shards, tmp_path / "index", "hash")
    expected = extract(digits, "hash")
    assert np.array_equal(np.concatenate([shard.vectors for shard in index.shards]), expected.vectors)
    assert (index.metric, index.features.fingerprint) == ("hamming", expected.fingerprint)


def test_unusable_files_are_refused_or_skipped_and_counted(tmp_path, shards, digits):
    write_tar(shards / "train-001.tar", digits.images[100:200], 100, damaged=(103, 177))
    with pytest.raises(InputError, match=r"train-001\.tar: 00103\.png .*skip_bad=True.*the other 2 are kept"):
        build_index(shards, tmp_path / "index")
    index = build_index(shards, tmp_path / "other", skip_bad=True)
    assert (len(index), index.skipped) == (228, 2)
    documents = [json.loads(path.read_text()) for path in index.path.glob("shards/*/skipped.json")]
    assert [name for name, _ in documents[0]["skipped"]] == ["00103.png", "00177.png"]


def test_another_index_is_not_overwritten(tmp_path, shards):
    index = build_index(shards, tmp_path / "index")
    with pytest.raises(InputError, match="holds an index of other sources"):
        build_index("builtin:digits", index.path)
    with pytest.raises(InputError, match="holds an index of pixels features, made or read in another way"):
        build_index(shards, index.path, "hash")
    with pytest.raises(InputError, match="exists and is not an index"):
        build_index(shards, shards)
    with pytest.raises(InputError, match="no index: make one with"):
        open_index(shards)
    text = (index.path / "index.json").read_text()
    (index.path / "index.json").write_text(text.replace('"rows": 230', '"rows": 231'))
    with pytest.raises(InputError, match="damaged or edited"):
        open_index(index.path)
    assert Path(index.path / "sources.json").is_file()


def test_more_sources_are_added_behind_those_that_are_there(tmp_path, shards, digits):
    index = build_index([shards / "train-000.tar"], tmp_path / "index")
    before = made(index)
    more = add_to_index(index.path, [shards / "train-001.tar", shards / "train-002.tar"])
    assert {name: made(more)[name] for name in before} == before
    assert everything(more) == everything(
        build_index([shards / f"train-{n:03d}.tar" for n in range(3)], tmp_path / "x")
    )
    with pytest.raises(InputError, match="is in this index already"):
        add_to_index(index.path, shards / "train-001.tar")


def test_damage_is_named_and_repaired(tmp_path, shards):
    index = build_index(shards, tmp_path / "index")
    whole = everything(index)
    assert verify_index(index.path).intact
    kinds = ["vectors.npy", "digests.npy", "names.npy", "shard.json"]
    for shard, name in zip([*index.shards, index.shards[0]], kinds, strict=True):
        path = shard.folder / name
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
        found = verify_index(index.path)
        assert [address for address, _, _ in found.damaged] == [shard.address]
        assert name in found.damaged[0][1]
        assert "train-00" in found.damaged[0][2]
        assert verify_index(index.path, rebuild=True).rebuilt == (shard.address,)
        assert verify_index(index.path).intact
    assert everything(open_index(index.path)) == whole
    # A source that is another one by now is not taken for what it was.
    index.shards[2].folder.rename(tmp_path / "aside")
    write_tar(shards / "train-002.tar", np.zeros((3, 1, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"train-002\.tar: is not the file that shard .* was made from"):
        verify_index(index.path, rebuild=True)
    (tmp_path / "aside").rename(index.shards[2].folder)
    data = bytearray((index.path / "duplicates.npz").read_bytes())
    data[40] ^= 1
    (index.path / "duplicates.npz").write_bytes(data)
    assert "duplicates.npz is damaged" in verify_index(index.path).derived[0]


def test_an_index_lies_on_this_machine_and_names_do_not_matter(tmp_path, shards, monkeypatch):
    with pytest.raises(InputError, match="an index is written to a folder of this machine"):
        build_index(shards, "s3://bucket/index")
    monkeypatch.chdir(shards.parent)
    index = build_index("tars/train-000.tar", "index")
    monkeypatch.chdir(tmp_path.parent)
    assert verify_index(index.path.absolute() if index.path.is_absolute() else tmp_path / "index").intact
    assert made(build_index(shards / "train-000.tar", tmp_path / "index")) == made(open_index(tmp_path / "index"))
    # What is missing of a shard is made again.
    (open_index(tmp_path / "index").shards[0].folder / "names.npy").unlink()
    assert build_index(shards / "train-000.tar", tmp_path / "index").names[3] == "00003.png"
