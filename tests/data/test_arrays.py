"""Arrays, tensors and the files that hold them; streams of images from Python."""

import io
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffmem.data import ImageSet, arrays, load_images
from diffmem.errors import InputError

RNG = np.random.default_rng(11)
NCHW = RNG.integers(0, 256, (6, 3, 5, 7), dtype=np.uint8)
NHWC = np.ascontiguousarray(NCHW.transpose(0, 2, 3, 1))
LABELS = np.arange(6)[::-1].copy()


@pytest.fixture
def refused():
    """Asserts that loading fails with one line that says `what`."""

    def check(source, *what, **options):
        with pytest.raises(InputError) as error:
            load_images(source, **options)
        line = str(error.value)
        assert "\n" not in line
        for text in what:
            assert text in line, line

    return check


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("array", [NCHW, NHWC], ids=["NCHW", "NHWC"])
def test_layouts_are_told_apart(make, array):
    loaded = load_images(make(array))
    np.testing.assert_array_equal(loaded.images, NCHW)
    assert loaded.images.flags.c_contiguous
    assert load_images(make(array), limit=2).images.shape == (2, 3, 5, 7)


def test_ambiguous_and_impossible_layouts(refused, tmp_path):
    both = RNG.integers(0, 256, (2, 3, 5, 4), dtype=np.uint8)
    assert load_images(both).images.shape == (2, 3, 5, 4)  # in memory, NCHW is the convention
    assert load_images(both, layout="NHWC").images.shape == (2, 4, 3, 5)
    assert load_images(np.zeros((2, 8, 9, 9), np.uint8)).images.shape == (2, 8, 9, 9)
    np.save(tmp_path / "both.npy", both)  # a file may come from anywhere
    np.save(tmp_path / "neither.npy", np.zeros((2, 8, 8, 8), np.uint8))
    refused(tmp_path / "both.npy", "(2, 3, 5, 4)", "layout=")
    refused(tmp_path / "neither.npy", "neither axis", "layout=")
    assert load_images(tmp_path / "both.npy", layout="NHWC").images.shape == (2, 4, 3, 5)
    assert load_images(np.zeros((9, 5, 7), np.uint8)).images.shape == (9, 1, 5, 7)
    refused(np.zeros((5, 7, 3), np.uint8), "4 axes")
    refused(np.zeros(5, np.uint8), "4 axes")
    refused(np.zeros((0, 3, 5, 5), np.uint8), "no images")
    refused(np.zeros((100, 512), np.float32), "diffmem.search.TrainingIndex")


def test_dtypes(refused):
    for dtype in (np.int64, np.bool_, np.uint16, np.complex64):
        refused(NCHW.astype(dtype), str(np.dtype(dtype)), "convert")
    floats = (NCHW / 255).astype(np.float32)
    for given, kept in [(">f4", np.float32), (np.float64, np.float64), (np.float16, np.float32)]:
        loaded = load_images(floats.astype(given))
        assert loaded.images.dtype == kept
        np.testing.assert_array_equal(loaded.images, floats.astype(given))
    half = torch.from_numpy(floats).bfloat16()
    np.testing.assert_array_equal(load_images(half).images, half.float().numpy())
    refused(object(), "cannot read images from an object of type object")


def test_nan_and_infinity_are_counted_and_located(refused, tmp_path):
    floats = NHWC.astype(np.float32)
    floats[4, 1, 2, 0] = np.inf
    floats[2, 3, 6, 1] = np.nan
    refused(floats, "2 values are NaN or infinite", "image 2 (channel 1, row 3, column 6)")
    np.save(tmp_path / "x.npy", floats)
    refused(tmp_path / "x.npy", "x.npy", "image 2")
    refused(ImageSet(floats.transpose(0, 3, 1, 2)), "image 2")
    assert len(load_images(floats, limit=2)) == 2


def test_image_set_passes_through():
    images = ImageSet(NCHW, [f"{index}.png" for index in range(6)], LABELS, "somewhere")
    assert load_images(images) is images
    part = load_images(images, limit=2, color="grey")
    assert (part.names, part.source, part.images.shape) == (["0.png", "1.png"], "somewhere", (2, 1, 5, 7))
    np.testing.assert_array_equal(part.labels, LABELS[:2])


@pytest.mark.parametrize("array", [NCHW, NHWC, np.asfortranarray(NHWC)], ids=["NCHW", "NHWC", "Fortran"])
def test_npy_stays_mapped(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    loaded = load_images(tmp_path / "x.npy", limit=5)
    np.testing.assert_array_equal(loaded.images, NCHW[:5])
    assert isinstance(loaded.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        loaded.images[0] = 0


def test_damaged_and_foreign_npy(tmp_path, refused):
    path = tmp_path / "x.npy"
    np.save(path, NCHW)
    whole = path.read_bytes()
    for end in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:end])
        refused(path, "x.npy: not a complete .npy")
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    refused(path, "x.npy: not a complete .npy")
    np.save(path, np.zeros(3, [("a", "u1")]))
    refused(path, "images must be uint8")


def test_npz_in_both_conventions(tmp_path, refused, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez(path, images=NCHW, labels=LABELS, seeds=LABELS)
    loaded = load_images(path)
    np.testing.assert_array_equal(loaded.images, NCHW)
    np.testing.assert_array_equal(loaded.labels, LABELS)
    np.savez_compressed(path, NHWC, LABELS)  # ADM's arr_0 and arr_1
    np.testing.assert_array_equal(load_images(path).images, NCHW)
    np.testing.assert_array_equal(load_images(path).labels, LABELS)
    np.savez(path, NHWC.transpose(0, 2, 1, 3)[:, :, :4])  # 7×4×3: axis 3 decides, as ADM lays down
    assert load_images(path).image_shape == (3, 7, 4)
    np.savez(path, images=np.zeros((2, 1, 4, 4), np.uint8))
    assert load_images(path).image_shape == (1, 4, 4)
    np.savez(path, a=NCHW, b=np.asfortranarray(NHWC))
    refused(path, "key=", "a, b")
    refused(path, "no 'c'", key="c")
    monkeypatch.setattr("diffmem.data.storage.memory_bytes", lambda: 100)
    for key in "ab":
        loaded = load_images(path, key=key)
        np.testing.assert_array_equal(loaded.images, NCHW)
        assert isinstance(loaded.images, np.memmap)


UNUSABLE = [
    (LABELS[:3], "labels of shape (3,)"),
    (np.full((6, 2), np.nan), "finite"),
    (np.array(["a"] * 6), "the label of image 0 is"),
    (np.linspace(0, 1, 6), "whole numbers"),
    (np.array([0, 1, 2, 3, 4, np.inf]), "whole numbers"),
    (np.zeros((6, 0)), "without entries"),
    (np.array([{}] * 6), "never loaded"),
    (np.full(6, 2**63, np.uint64), "64-bit"),
]


@pytest.mark.parametrize(("labels", "says"), UNUSABLE, ids=str)
def test_labels_that_cannot_be_used_are_left_out(tmp_path, labels, says):
    np.savez(tmp_path / "x.npz", images=NCHW, labels=labels)
    sources = [tmp_path / "x.npz", [(NCHW, labels)]]
    if labels.dtype.kind in "fu":
        torch.save((torch.from_numpy(NCHW), torch.from_numpy(labels)), tmp_path / "x.pt")
        save_file({"images": torch.from_numpy(NCHW), "labels": torch.from_numpy(labels)}, tmp_path / "x.safetensors")
        sources += [tmp_path / "x.pt", tmp_path / "x.safetensors"]
    for source in sources:
        loaded = load_images(source)
        np.testing.assert_array_equal(loaded.images, NCHW)
        assert loaded.labels is None
        assert loaded.notes[0].startswith("labels are ignored: ")
        assert says in loaded.notes[0] or source is sources[1]
    for names in (np.arange(6), np.array(["a"]), np.array([None] * 6)):
        np.savez(tmp_path / "x.npz", images=NCHW, names=names)
        assert load_images(tmp_path / "x.npz").notes[0].startswith("names are ignored: ")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
def test_one_hot_vectors_become_class_numbers_everywhere(tmp_path, dtype):
    classes = np.array([2, 0, 3, 3, 1, 0])
    vectors = np.eye(4, dtype=dtype)[classes]
    np.savez(tmp_path / "x.npz", images=NCHW, labels=vectors)
    np.savez(tmp_path / "adm.npz", NHWC, vectors)
    torch.save({"images": torch.from_numpy(NCHW), "labels": torch.from_numpy(vectors)}, tmp_path / "x.pt")
    save_file({"images": torch.from_numpy(NCHW), "labels": torch.from_numpy(vectors)}, tmp_path / "x.safetensors")
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(NCHW), torch.from_numpy(vectors))
    for source in (
        tmp_path / "x.npz", tmp_path / "adm.npz", tmp_path / "x.pt", tmp_path / "x.safetensors", dataset,
        torch.utils.data.DataLoader(dataset, batch_size=4), ImageSet(NCHW, labels=vectors),
    ):  # fmt: skip
        loaded = load_images(source)
        np.testing.assert_array_equal(loaded.labels, classes)
        assert loaded.labels.dtype == np.int64
    for others in (vectors * 0.5, vectors[:, :1] * 2.0, np.ones((6, 4)), vectors.astype(float) - 1):
        np.savez(tmp_path / "x.npz", images=NCHW, labels=others)
        np.testing.assert_array_equal(load_images(tmp_path / "x.npz").labels, others.astype(np.float32))
    for whole in (classes.astype(np.float64), classes.astype(str), classes.astype(bytes), classes[:, None]):
        np.savez(tmp_path / "x.npz", images=NCHW, labels=whole)
        np.testing.assert_array_equal(load_images(tmp_path / "x.npz").labels, classes)


def test_npz_that_lies(tmp_path, refused):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.array([None]))
    refused(path, "never loaded")

    def with_header(shape):
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", stream.getvalue() + NCHW.tobytes())
        return path

    np.testing.assert_array_equal(load_images(with_header((6, 3, 5, 7))).images, NCHW)
    refused(with_header((10**6, 3, 1000, 1000)), "needs 3,000,000,000,000 bytes")
    refused(with_header((5, 3, 5, 7)), "images: not a readable array")
    damaged = bytearray(with_header((6, 3, 5, 7)).read_bytes())
    damaged[200] ^= 0xFF
    path.write_bytes(damaged)
    refused(path, "images: not a readable array")
    path.write_bytes(damaged[:300])
    refused(path, "zip archive")


def test_torch_files(tmp_path, refused):
    path = tmp_path / "x.pt"
    images, labels = torch.from_numpy(NCHW), torch.from_numpy(LABELS)
    for content in ({"images": images, "labels": labels}, (images, labels)):
        torch.save(content, path)
        np.testing.assert_array_equal(load_images(path).images, NCHW)
        np.testing.assert_array_equal(load_images(path).labels, LABELS)
    torch.save(images, path, _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(load_images(path).images, NCHW)
    torch.save({"a": images, "b": images}, path)
    refused(path, "key=")
    assert len(load_images(path, key="b")) == 6
    torch.save([1], path)
    refused(path, "holds a list")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "x.pt")


class Malicious:
    """Touches a file when it is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_torch_file_executes_nothing(tmp_path, refused):
    touched = tmp_path / "touched"
    torch.save({"images": Malicious(touched)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "io.open", "nothing in it was executed", "save a tensor")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Malicious(touched)))
    refused(tmp_path / "y.pt", "io.open", "nothing in it was executed")
    assert not touched.exists()


def test_safetensors(tmp_path, refused):
    path = tmp_path / "x.safetensors"
    save_file({"images": torch.from_numpy(NCHW), "labels": torch.from_numpy(LABELS)}, path)
    np.testing.assert_array_equal(load_images(path).images, NCHW)
    np.testing.assert_array_equal(load_images(path).labels, LABELS)
    save_file({"x": torch.from_numpy(NHWC)}, path)
    np.testing.assert_array_equal(load_images(path).images, NCHW)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "not a complete safetensors file")


def test_torch_datasets_and_loaders(refused):
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(NCHW), torch.from_numpy(LABELS))
    for source in (dataset, torch.utils.data.DataLoader(dataset, batch_size=4)):
        loaded = load_images(source)
        np.testing.assert_array_equal(loaded.images, NCHW)
        np.testing.assert_array_equal(loaded.labels, LABELS)
        part = load_images(source, limit=5)
        np.testing.assert_array_equal(part.labels, LABELS[:5])
        assert part.images.shape == (5, 3, 5, 7)
    np.testing.assert_array_equal(load_images(torch.utils.data.TensorDataset(torch.from_numpy(NHWC))).images, NCHW)


def test_iterables(monkeypatch, refused):
    batches = [NCHW[:4], torch.from_numpy(NHWC[4:])]
    np.testing.assert_array_equal(load_images(batches).images, NCHW)
    np.testing.assert_array_equal(load_images(iter(batches), limit=3).images, NCHW[:3])
    mappings = ({"images": NCHW[a:b], "label": LABELS[a:b]} for a, b in [(0, 1), (1, 6)])
    np.testing.assert_array_equal(load_images(mappings).labels, LABELS)
    pairs = [(Image.fromarray(image), int(label)) for image, label in zip(NHWC, LABELS, strict=True)]
    np.testing.assert_array_equal(load_images(pairs).images, NCHW)
    np.testing.assert_array_equal(load_images(pairs).labels, LABELS)
    mixed = [*(image for image, _ in pairs), Image.fromarray(NHWC[0, ..., 0]).resize((3, 3))]
    refused(mixed, "image 6 is uint8 (1, 3, 3), those before are uint8 (3, 5, 7)", "resize=N")
    assert load_images(mixed, resize=4, color="rgb").images.shape == (7, 3, 4, 4)
    refused([], "no images")
    for source, says in (
        ([(NCHW, LABELS), NCHW], "some images have labels and some have none"),
        ([(NCHW, LABELS[:2])], "labels of shape (2,)"),
        ([(NCHW, LABELS), (NCHW, np.eye(2)[LABELS % 2])], "labels of different shapes"),
        ([(image, {"boxes": [[1, 2], [3]]}) for image in NCHW], "the label of image 0 is"),
        ([(image, [[1, 2], [3]]) for image in NCHW], "neither a number nor a vector"),
    ):
        loaded = load_images(source)
        assert loaded.labels is None
        assert len(loaded) in (6, 12)
        assert says in loaded.notes[0]
    refused([(NCHW, LABELS, 1)], "3 parts")
    refused([{"x": NCHW}], "'image'")
    refused([Image.fromarray(NHWC[0]).convert("RGBA").rotate(30)], "item 0", "transparent")
    refused([np.zeros((4, 9), np.float32)], "TrainingIndex")
    monkeypatch.setattr("diffmem.data.storage.memory_bytes", lambda: 5000)
    loaded = load_images(NCHW[index : index + 1] for index in range(6))
    assert isinstance(loaded.images, np.memmap)
    np.testing.assert_array_equal(loaded.images, NCHW)


def test_full_temporary_disk(monkeypatch, refused):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffmem.data.storage.memory_bytes", lambda: 100)
    monkeypatch.setattr("os.posix_fallocate", no_space)
    refused(NCHW, "TMPDIR", "No space left", resize=9)


def header(descr="|u1", shape="(6, 3, 5, 7)", fortran="False", version=1, length=None):
    """The start of an `.npy` file that says whatever it likes."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + size.to_bytes(2 if version == 1 else 4, "little") + text


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01",
        b"\x93NUMPY\x09\x00\x10\x00",
        header(version=2),
        header(version=3),
        header(length=60_000),
        header(version=2, length=2**32 - 1),
        header(version=3, length=2**31),
        header(shape="(" * 3000 + ")" * 3000),
        header(shape="(" + "9" * 400 + ",)"),
        header(shape="(" + "9" * 5000 + ",)"),
        header(shape="(-6, 3, 5, 7)"),
        header(shape="(-6, -3, 5, 7)"),
        header(shape="(6.0, 3, 5, 7)"),
        header(shape="(True, 3, 5, 7)"),
        header(shape="(4611686018427387904, 4, 5, 7)"),
        header(shape="(0, 4611686018427387904, 3, 3)"),
        header(shape="()"),
        header(shape="5"),
        header(shape=str((1,) * 70)),
        header(shape="(6, 3, 5, 8)"),
        header(fortran="2"),
        header("|O"),
        header("|V2000000000"),
        header("<U500000000"),
        header("|V0"),
        header([("a", "|u1")]),
        header([("a", "|O")]),
        header([("a", "|u1", (2**40,))]),
        header("no dtype"),
        header("|u1")[:-5],
        header("<M8[ns]"),
        header("__import__('os')"),
    ],
    ids=lambda start: repr(start[6:60]),
)
def test_npy_headers(start, tmp_path, refused):
    content = start + NCHW.tobytes()
    if start in (header(version=2), header(version=3)):
        (tmp_path / "x.npy").write_bytes(content)
        np.testing.assert_array_equal(load_images(tmp_path / "x.npy").images, NCHW)
        return
    (tmp_path / "x.npy").write_bytes(content)
    refused(tmp_path / "x.npy", "x.npy: ")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", content)
    refused(tmp_path / "x.npz", "x.npz: ")


def test_tensors_of_other_kinds(tmp_path, refused):
    images = torch.from_numpy(NCHW).float() / 255
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are on their way out
        quantized = torch.quantize_per_tensor(images, 1 / 255, 0, torch.quint8)
    other = {
        "sparse": images.to_sparse(),
        "float8": images.to(torch.float8_e4m3fn),
        "meta": images.to("meta"),
        "complex": images.to(torch.complex64),
        "uint16": torch.from_numpy(NCHW).to(torch.uint16),
        "quantized": quantized,
        "scalar": torch.tensor(1.0),
    }
    for name, tensor in other.items():
        refused(tensor)
        path = tmp_path / f"{name}.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save({"images": tensor}, path)
        refused(path, f"{name}.pt")
        if name in ("float8", "complex", "uint16", "scalar"):
            save_file({"images": tensor}, tmp_path / f"{name}.safetensors")
            refused(tmp_path / f"{name}.safetensors", f"{name}.safetensors")
    view = torch.from_numpy(NCHW).repeat(3, 1, 1, 1)[6:12].transpose(2, 3)
    torch.save({"images": view}, tmp_path / "view.pt")
    loaded = load_images(tmp_path / "view.pt")
    np.testing.assert_array_equal(loaded.images, NCHW.transpose(0, 1, 3, 2))
    torch.save({"images": torch.from_numpy(NCHW)}, tmp_path / "mapped.pt")
    with pytest.raises(ValueError, match="read-only"):
        load_images(tmp_path / "mapped.pt").images[0] = 0


def test_an_array_packed_as_in_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((600, 3, 64, 64), np.uint8))
    assert len(load_images(tmp_path / "bomb.npz")) == 600  # small enough to be nobody's attack
    monkeypatch.setattr(arrays, "LARGE", 2**20)
    monkeypatch.setattr(arrays, "allocate", lambda *_: pytest.fail("space was made for it"))
    with pytest.raises(InputError, match=r"images.*compressed into 0\.0 MB, as in a zip bomb"):
        load_images(tmp_path / "bomb.npz")


def test_medmnist(tmp_path, refused):
    gray = NHWC[..., 0]
    splits = {
        "train_images": gray, "train_labels": LABELS[:, None].astype(np.uint8),
        "val_images": gray[:2], "val_labels": LABELS[:2, None].astype(np.uint8),
        "test_images": gray[3:], "test_labels": LABELS[3:, None].astype(np.uint8),
    }  # fmt: skip
    path = tmp_path / "pathmnist.npz"
    np.savez(path, **splits)
    loaded = load_images(path)
    np.testing.assert_array_equal(loaded.images[:, 0], gray)
    np.testing.assert_array_equal(loaded.labels, LABELS)
    assert load_images(path, key="val").names == ["val-000000", "val-000001"]
    np.testing.assert_array_equal(load_images(path, key="all").labels, np.concatenate([LABELS, LABELS[:2], LABELS[3:]]))
    np.testing.assert_array_equal(load_images(path, key="test_images").images[:, 0], gray[3:])
    refused(path, "train, val, test, all", key="x")
    np.savez(path, **{**splits, "train_images": NHWC, "train_labels": np.eye(3)[LABELS % 3] + 1})
    color = load_images(path)
    np.testing.assert_array_equal(color.images, NCHW)
    assert color.labels.shape == (6, 3)
    refused(path, "different shapes", key="all")
    np.savez(path, train_images=np.zeros((2, 8, 8, 8), np.uint8))
    refused(path, "volumes")
