"""Folders, zip archives and saved datasets: order, names, labels, and everything that can be wrong with them."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffmem.data import ImageSet, decode_pool, load_images
from diffmem.data.classes import label_dim
from diffmem.data.containers import in_natural_order, natural_key
from diffmem.errors import InputError

RNG = np.random.default_rng(7)


def pixels(count, channels=3, size=6):
    return RNG.integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.squeeze(image.transpose(1, 2, 0)))
    image.save(stream, kind, **options)
    return stream.getvalue()


def zip_of(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def folder_of(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture(params=["folder", "zip"])
def container(request, tmp_path):
    """Builds a folder or a zip archive of the files it is given."""
    if request.param == "folder":
        return lambda files: folder_of(tmp_path / "set", files)
    return lambda files: zip_of(tmp_path / "set.zip", files)


@pytest.fixture
def refused(request):
    """Asserts that loading fails with one line that says `what`, and returns the line."""

    def check(source, *what, **options):
        with pytest.raises(InputError) as error:
            load_images(source, **options)
        line = str(error.value)
        assert "\n" not in line
        for text in what:
            assert text in line, line
        return line

    return check


def test_files_names_and_labels(container):
    images = pixels(4)
    files = {
        name: encoded(image) for name, image in zip(["b/10.PNG", "b/9.png", "a.bmp", "b/c/1.png"], images, strict=True)
    }
    files["a.bmp"] = encoded(images[2], "BMP")
    files |= {"readme.txt": b"no image", "b/.hidden.png": b"?", "__MACOSX/a.png": b"?"}
    files["dataset.json"] = json.dumps(
        {"labels": [["b/10.PNG", 3], ["a.bmp", 1], ["b/9.png", 2], ["b/c/1.png", 4], ["gone", 9]]}
    )
    files["dataset.json"] = files["dataset.json"].encode()
    loaded = load_images(container(files))
    assert loaded.names == ["a.bmp", "b/9.png", "b/10.PNG", "b/c/1.png"]
    np.testing.assert_array_equal(loaded.images, images[[2, 1, 0, 3]])
    np.testing.assert_array_equal(loaded.labels, [1, 2, 3, 4])
    assert loaded.labels.dtype == np.int64
    assert loaded.images.flags.c_contiguous
    two = load_images(container(files), limit=2)
    assert two.names == loaded.names[:2]
    np.testing.assert_array_equal(two.labels, [1, 2])


def test_folders_and_archives_skip_the_same(container):
    image = encoded(pixels(1)[0])
    junk = [
        ".hidden.png", "._0.png", "a/.hidden.png", ".ipynb_checkpoints/0-checkpoint.png", "a/.thumbnails/0.png",
        "__MACOSX/0.png", "__MACOSX/a/._0.png", "@eaDir/0.png/SYNOFILE_THUMB_M.png", "a/@EADIR/0.png",
        "#recycle/0.png", "$RECYCLE.BIN/0.png", "lost+found/0.png", "Thumbs.db", "desktop.ini", "a/.DS_Store", ".png",
    ]  # fmt: skip
    read = ["0.png", "a/b.png.png", "a/@1.png", "eaDir/0.png", "recycle/__MACOSX.png"]
    assert load_images(container(dict.fromkeys([*junk, *read], image))).names == sorted(read)


def test_backslashes_separate_folders(tmp_path):
    """As in archives of Windows tools, and in folders to which a Unix tool unpacked them."""
    images = pixels(12)
    names = [f"{index // 10:05d}\\img{index:08d}.png" for index in range(12)]
    files = {name: encoded(image) for name, image in zip(names, images, strict=True)} | {
        "__MACOSX\\._0.png": b"?", "00000\\.thumbnails\\0.png": b"?",
    }  # fmt: skip
    for separator in ("/", "\\"):
        labels = [[name.replace("\\", separator), index] for index, name in enumerate(names)]
        files["dataset.json"] = json.dumps({"labels": labels}).encode()
        archive = load_images(zip_of(tmp_path / "set.zip", files))
        folder = load_images(folder_of(tmp_path / "set", files))
        assert archive.names == [name.replace("\\", "/") for name in names]
        assert folder.names == names  # their names in the file system
        for loaded in (archive, folder):
            np.testing.assert_array_equal(loaded.images, images)
            np.testing.assert_array_equal(loaded.labels, np.arange(12))


def test_vector_labels_and_null_labels(container):
    files = {"0.png": encoded(pixels(1)[0]), "1.png": encoded(pixels(1)[0])}
    labels = [["0.png", [0.5, 1]], ["1.png", [2, 3e-5]]]
    vectors = load_images(container(files | {"dataset.json": json.dumps({"labels": labels}).encode()})).labels
    np.testing.assert_array_equal(vectors, np.array([[0.5, 1], [2, 3e-5]], np.float32))
    assert load_images(container(files | {"dataset.json": b'{"labels": null}'})).labels is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "must hold"),
        (b'{"labels": 3}', "must be a list"),
        (b'{"labels": [["0.png"]]}', "entry 0"),
        (b'{"labels": [[0, 1]]}', "entry 0"),
        (b'{"labels": []}', "no label for 2 of 2 images; the first is 0.png"),
        (b'{"labels": [["0.png", 1]]}', "no label for 1 of 2 images; the first is 1.png"),
        (b'{"labels": [["0.png", 1], ["0.png", 2], ["1.png", 1]]}', "two labels"),
        (b'{"labels": {"0.png": 1}}', "no label for 1 of 2 images; the first is 1.png"),
        (b'{"labels": [["0.png", 0.5], ["1.png", 1]]}', "the label of 0.png is 0.5"),
        (b'{"labels": [["0.png", [' + b"9" * 400 + b']], ["1.png", [0]]]}', "too large for a float"),
        (b'{"labels": [["0.png", ' + b"9" * 5000 + b'], ["1.png", 0]]}', "not JSON"),
        (b'{"labels": [["0.png", 1], ["1.png", "dog"]]}', "the label of 1.png is 'dog'"),
        (b'{"labels": [["0.png", 1], ["1.png", [1.0]]]}', "the label of 1.png"),
        (b'{"labels": [["0.png", true], ["1.png", 1]]}', "the label of 0.png is True"),
        (b'{"labels": [["0.png", 1], ["1.png", 1000000000000000000000]]}', "the label of 1.png"),
        (b'{"labels": [["0.png", [1.0]], ["1.png", [1.0, 2.0]]]}', "has 2 entries"),
        (b'{"labels": [["0.png", [1.0]], ["1.png", [NaN]]]}', "not finite, the first is that of 1.png"),
    ],
)
def test_labels_of_other_tools_are_left_out_with_a_note(container, content, says):
    images = pixels(2)
    files = {"0.png": encoded(images[0]), "1.png": encoded(images[1]), "dataset.json": content}
    loaded = load_images(container(files))
    np.testing.assert_array_equal(loaded.images, images)
    assert loaded.labels is None
    (note,) = loaded.notes
    assert note.startswith("labels are ignored: ")
    assert "dataset.json" in note
    assert says in note
    assert "\n" not in note
    with pytest.raises(InputError, match="--cond needs labels, but there are none that can be used") as error:
        label_dim(loaded, "--cond")
    assert says in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b'{"labels": {"0.png": 3, "1.png": 1}}',
        b'{"labels": [["0.png", "3"], ["1.png", "1"]], "classes": ["a", "b"]}',
        b'{"labels": [["0.png", 3.0], ["1.png", 1]]}',
        b'{"labels": [["0.png", [0, 0.0, 0, 1]], ["1.png", [0, 1.0, 0, 0]]]}',
    ],
)
def test_class_numbers_however_they_are_written(container, content):
    files = {"0.png": encoded(pixels(1)[0]), "1.png": encoded(pixels(1)[0]), "dataset.json": content}
    loaded = load_images(container(files))
    np.testing.assert_array_equal(loaded.labels, [3, 1])
    assert loaded.labels.dtype == np.int64
    assert not loaded.notes


def test_labels_that_cannot_be_read(container, tmp_path):
    source = container({"0.png": encoded(pixels(1)[0]), "dataset.json": b'{"labels": [["0.png", 1]]}'})
    if source.is_dir():
        (source / "dataset.json").unlink()
        (source / "dataset.json").mkdir()
        assert load_images(source).notes == ()
    else:
        data = source.read_bytes()
        at = data.index(b"dataset.json") + len(b"dataset.json") + 4
        source.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        assert "dataset.json cannot be read" in load_images(source).notes[0]


def test_nothing_to_read(container, refused, tmp_path):
    files = {"notes.txt": b"", "a/x.HEIC": b"", "a/y.heic": b"", "b/data": b"", ".hidden/z.txt": b"", "__MACOSX/w": b""}
    says = "it holds 4 files in 2 folders: .heic ×2, .txt ×1, without extension ×1"
    refused(container(files), "no images in this", says)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "it holds no visible files")
    files["0.png"] = encoded(pixels(1)[0])
    (note,) = load_images(container(files)).notes
    assert note.endswith("2 files of unsupported types were skipped (.heic ×2)")
    refused(tmp_path / "absent", "no such file or folder")
    (tmp_path / "x.mat").write_bytes(b"")
    refused(tmp_path / "x.mat", ".safetensors")


def test_one_image_file_is_a_set_of_one(tmp_path):
    image = pixels(1)
    path = tmp_path / "one.png"
    path.write_bytes(encoded(image[0]))
    loaded = load_images(path)
    assert loaded.names == ["one.png"]
    np.testing.assert_array_equal(loaded.images, image)


def test_corrupt_file_is_named_or_skipped(container, refused):
    images = pixels(5)
    files = {f"{index}.png": encoded(image) for index, image in enumerate(images)}
    files["1.png"] = files["1.png"][:-30]
    files["3.png"] = b"not an image"
    files["4.png"] = files["4.png"][:40] + bytes([files["4.png"][40] ^ 255]) + files["4.png"][41:]
    files["dataset.json"] = json.dumps({"labels": [[f"{index}.png", index] for index in range(5)]}).encode()
    source = container(files)
    refused(source, "1.png", "skip_bad=True")
    loaded = load_images(source, skip_bad=True)
    assert loaded.names == ["0.png", "2.png"]
    np.testing.assert_array_equal(loaded.images, images[[0, 2]])
    np.testing.assert_array_equal(loaded.labels, [0, 2])
    assert [item.name for item in loaded.skipped] == ["1.png", "3.png", "4.png"]
    assert all(item.reason and "\n" not in item.reason for item in loaded.skipped)


def test_first_file_bad_and_all_files_bad(container, refused):
    good = encoded(pixels(1)[0])
    assert load_images(container({"0.png": b"", "1.png": good}), skip_bad=True).names == ["1.png"]
    refused(container({"0.png": b"", "1.png": b"x"}), "none of its 2 files", "0.png", skip_bad=True)


def test_mixed_sizes_and_channels(container, refused):
    small, large = encoded(pixels(1)[0]), encoded(pixels(1, size=9)[0])
    source = container({"0.png": small, "1.png": large, "2.png": small})
    refused(source, "mixed sizes", "2 of 6×6 (0.png)", "1 of 9×9 (1.png)", "resize=N", skip_bad=True)
    assert load_images(source, resize=4).image_shape == (3, 4, 4)
    gray = encoded(pixels(1, channels=1)[0])
    source = container({"0.png": gray, "1.png": small, "2.png": small})
    refused(source, "gray and color", "2 of color (1.png)", "1 of gray (0.png)", "color='rgb'")
    assert load_images(source, color="rgb").image_shape == (3, 6, 6)
    assert load_images(source, color="grey").image_shape == (1, 6, 6)


def test_unreadable_files(tmp_path, refused):
    folder_of(tmp_path, {"1.png": encoded(pixels(1)[0])})
    (tmp_path / "2.png").symlink_to(tmp_path / "gone")
    refused(tmp_path, "2.png cannot be read: No such file")
    os.mkfifo(tmp_path / "3.png")  # must not wait for a writer
    assert [item.name for item in load_images(tmp_path, skip_bad=True).skipped] == ["2.png", "3.png"]


def test_links_between_folders(tmp_path):
    folder_of(tmp_path, {"set/a/1.png": encoded(pixels(1)[0]), "other/2.png": encoded(pixels(1)[0])})
    (tmp_path / "set/linked").symlink_to(tmp_path / "other")
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    assert load_images(tmp_path / "set").names == ["a/1.png", "linked/2.png"]


def test_names_that_are_no_text(tmp_path):
    folder_of(tmp_path, {"1.png": encoded(pixels(1)[0])})
    os.rename(os.fsencode(tmp_path / "1.png"), os.fsencode(tmp_path) + b"/\xff.png")
    assert load_images(tmp_path).names == ["\\xff.png"]


def test_truncated_zip(tmp_path, refused):
    path = zip_of(tmp_path / "set.zip", {f"{index}.png": encoded(pixels(1)[0]) for index in range(3)})
    data = path.read_bytes()
    for end in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        refused(path, str(path), "zip archive")


def test_zip_names_never_become_paths(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = encoded(pixels(1)[0])
    evil = ["../../evil.png", "/etc/evil.png", "C:\\evil.png", "a\\..\\evil.png", "a\nb.png"]
    path = zip_of(tmp_path / "set.zip", {"0.png": good} | dict.fromkeys(evil, good))
    before = sorted(tmp_path.rglob("*"))
    refused(path, "unsafe name")
    loaded = load_images(path, skip_bad=True)
    assert loaded.names == ["0.png"]
    assert {item.name for item in loaded.skipped} == {*(name.replace("\\", "/") for name in evil[:-1]), "a\\nb.png"}
    assert sorted(tmp_path.rglob("*")) == before


def test_zip_with_one_name_twice(tmp_path, refused):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", encoded(pixels(1)[0]))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("0.png", encoded(pixels(1)[0]))
    refused(path, "two entries are named 0.png")


def test_zip_entries_that_lie(tmp_path, refused):
    """Sizes, checksums and flags in the directory of the archive are not believed."""
    good = encoded(pixels(1)[0])
    data = bytearray(zip_of(tmp_path / "set.zip", {"0.png": good, "1.png": good}).read_bytes())
    directory = data.index(b"PK\1\2")
    flags, checksum, size = directory + 8, directory + 16, directory + 24

    def with_field(offset, form, value):
        changed = bytearray(data)
        struct.pack_into(form, changed, offset, value)
        (tmp_path / "set.zip").write_bytes(changed)
        return tmp_path / "set.zip"

    refused(with_field(flags, "<H", 1), "0.png is encrypted")
    refused(with_field(checksum, "<I", 0), "0.png cannot be unpacked", "checksum")
    refused(with_field(size, "<I", len(good) - 1), "0.png cannot be unpacked")
    refused(with_field(size, "<I", 2**32 - 2), "0.png declares 4,295 MB")
    refused(with_field(directory + 20, "<I", 2**30), "zip archive")  # the packed size
    assert load_images(with_field(checksum, "<I", 0), skip_bad=True).names == ["1.png"]


def test_zip_with_overlapping_entries(tmp_path, refused):
    good = encoded(pixels(1)[0])
    data = bytearray(zip_of(tmp_path / "set.zip", {"0.png": good, "1.png": good}).read_bytes())
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    struct.pack_into("<I", data, second + 42, 1)  # the second entry now begins inside the first
    (tmp_path / "set.zip").write_bytes(data)
    refused(tmp_path / "set.zip", "overlap")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods(tmp_path, method):
    image = pixels(1)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as archive:
        archive.writestr("0.png", encoded(image[0]))
    np.testing.assert_array_equal(load_images(tmp_path / "set.zip").images, image)


def test_decompression_bombs(container, refused):
    def bomb(width, height):
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(9)))
            + chunk(b"IEND", b"")
        )

    good = encoded(pixels(1)[0])
    source = container(
        {"0.png": good, "1.png": bomb(8193, 8192), "2.png": bomb(10_000, 10_000), "3.png": bomb(2**20, 2**20)}
    )
    refused(source, "1.png declares 8193×8192 pixels")
    assert len(load_images(source, skip_bad=True).skipped) == 3


def test_natural_order():
    names = ["2.png", "10.png", "1/3.png", "a2b10.png", "a2b9.png", "a02b9.png", "010.png", "b.png", "a" + "9" * 5000]
    assert sorted(names, key=natural_key) == [
        "1/3.png", "2.png", "010.png", "10.png", "a02b9.png", "a2b9.png", "a2b10.png", "a" + "9" * 5000, "b.png",
    ]  # fmt: skip


@given(st.lists(st.text("a/0129", min_size=4, max_size=4), max_size=6))
def test_names_with_digits_in_the_same_places_are_in_natural_order_as_they_are(names):
    for some in (names, [name[:2] + "/x07" for name in names], [f"a{i:03}" for i in range(12)]):
        assert in_natural_order(some) == sorted(some, key=natural_key)


@pytest.fixture
def processes(monkeypatch):
    """Makes every block but the first be decoded by two other processes; the list of those that were started."""
    started = []
    start = decode_pool._start
    monkeypatch.setattr(decode_pool, "IN_PROCESS_SECONDS", -1)
    monkeypatch.setattr(decode_pool, "_cores", lambda: 2)
    monkeypatch.setattr(decode_pool, "_start", lambda: started.append(start()) or started[-1])
    return started


def test_decoding_processes_give_the_same(tmp_path, monkeypatch, refused, processes):
    """Blocks decoded by other processes: same pixels, same names, same errors, and nothing left running."""
    images = pixels(1200, size=5)
    files = {f"{index}.png": encoded(image) for index, image in enumerate(images)} | {"1000.png": b"bad"}
    source = zip_of(tmp_path / "set.zip", files)
    calls = []
    loaded = load_images(source, skip_bad=True, color="grey", resize=3, progress=lambda *call: calls.append(call))
    assert len(processes) == 2
    assert loaded.names == [f"{index}.png" for index in range(1200) if index != 1000]
    assert [item.name for item in loaded.skipped] == ["1000.png"]
    expected = load_images(np.delete(images, 1000, axis=0), color="grey", resize=3)
    np.testing.assert_array_equal(loaded.images, expected.images)
    assert calls[0] == ("reading images", 0, 1200)
    assert calls[-1] == ("reading images", 1200, 1200)
    refused(source, "1000.png")
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("moment", ["in this process", "in the decoding processes"])
def test_interrupt_leaves_nothing_behind(tmp_path, monkeypatch, processes, moment):
    image = encoded(pixels(1)[0])
    source = zip_of(tmp_path / "set.zip", {f"{index}.png": image for index in range(3000)})
    if moment == "in this process":
        monkeypatch.setattr(decode_pool, "IN_PROCESS_SECONDS", 1e9)
    add = decode_pool._Tally.add

    def interrupted(self, *arguments):
        if self.done >= 512:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(decode_pool._Tally, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_images(source, cache=True)
    assert len(processes) == (2 if moment == "in the decoding processes" else 0)
    assert all(process.poll() is not None for process in processes)
    assert [path.name for path in tmp_path.iterdir()] == ["set.zip"]


def test_decoding_process_that_dies(tmp_path, monkeypatch, refused, processes):
    image = encoded(pixels(1)[0])
    source = zip_of(tmp_path / "set.zip", {f"{index}.png": image for index in range(600)})
    start = decode_pool._start

    def killed():
        process = start()
        process.kill()
        return process

    monkeypatch.setattr(decode_pool, "_start", killed)
    refused(source, "a decoding process died")


def test_image_set_that_is_too_large_for_memory(container, monkeypatch):
    images = pixels(10)
    source = container({f"{index}.png": encoded(image) for index, image in enumerate(images)} | {"4.png": b"bad"})
    monkeypatch.setattr("diffmem.data.storage.memory_bytes", lambda: 100)
    loaded = load_images(source, skip_bad=True)
    assert isinstance(loaded.images, np.memmap)
    np.testing.assert_array_equal(loaded.images, np.delete(images, 4, axis=0))


def test_hugging_face_dataset(tmp_path, refused):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    images = pixels(3)
    rows = {"image": [{"bytes": encoded(image), "path": None} for image in images], "label": [2, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "single")
    loaded = load_images(tmp_path / "single")
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, [2, 0, 1])
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "both")
    refused(tmp_path / "both", "train, test", "key=")
    np.testing.assert_array_equal(load_images(tmp_path / "both", key="test").images, images[[1]])
    (next((tmp_path / "single").glob("*.arrow"))).write_bytes(b"")
    refused(tmp_path / "single", "not a complete Hugging Face dataset")


def test_pixels_are_those_that_datasets_gives(tmp_path):
    """Turned by EXIF in every format, and in the mode that the column prescribes."""
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    shown, files = pixels(5), []
    for orientation, (kind, image) in enumerate(zip(["PNG", "JPEG", "WEBP", "TIFF", "AVIF"], shown, strict=True), 4):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append({"bytes": encoded(image, kind, exif=exif), "path": None})
    dataset = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
    dataset.save_to_disk(tmp_path / "oriented")
    loaded = load_images(tmp_path / "oriented")
    np.testing.assert_array_equal(loaded.images, [np.asarray(row["image"]).transpose(2, 0, 1) for row in dataset])
    np.testing.assert_array_equal(loaded.images, load_images([row["image"] for row in dataset]).images)
    assert "5 of 5 images have an EXIF orientation" in loaded.notes[0]
    half = np.concatenate([shown, np.full((5, 1, 6, 6), 128, np.uint8)], axis=1)
    for mode in ("RGB", "L"):
        dataset = datasets.Dataset.from_dict(
            {"image": [{"bytes": encoded(image), "path": None} for image in half]},
            features=datasets.Features({"image": datasets.Image(mode=mode)}),
        )
        dataset.save_to_disk(tmp_path / mode)
        given = [np.asarray(row["image"]).reshape(6, 6, -1).transpose(2, 0, 1) for row in dataset]
        np.testing.assert_array_equal(load_images(tmp_path / mode).images, given)


def test_missing_datasets_package(tmp_path, monkeypatch):
    from diffmem.errors import MissingExtraError

    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"diffmem\[datasets\]"):
        load_images(tmp_path)


def test_cifar10_jpeg(cifar10):
    loaded = load_images(cifar10 / "cifar10-test.zip", limit=2000)
    assert loaded.images.shape == (2000, 3, 32, 32)
    assert loaded.names[-1] == "00001/img00001999.jpg"
    np.testing.assert_array_equal(np.bincount(loaded.labels), np.full(10, 200))
    with zipfile.ZipFile(cifar10 / "cifar10-test.zip") as archive, archive.open(loaded.names[1234]) as file:
        np.testing.assert_array_equal(loaded.images[1234], np.asarray(Image.open(file)).transpose(2, 0, 1))


def test_image_set_is_one_line_in_print():
    assert repr(ImageSet(pixels(2))) == "ImageSet(array: uint8 [2, 3, 6, 6], no labels)"
