"""Training sets in pieces, and an object store on this machine."""

import io
import socket
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

import diffmem


def png(image):
    file = io.BytesIO()
    Image.fromarray(np.moveaxis(image, 0, -1).squeeze()).save(file, "PNG")
    return file.getvalue()


def write_tar(path, images, first=0, damaged=()):
    """A tar of webdataset's: number.png, number.json."""
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(images, first):
            for ending, data in (("png", png(image)), ("json", b'{"label": 1}')):
                if number in damaged and ending == "png":
                    data = data[:20]
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def digits():
    return diffmem.load_images("builtin:digits", limit=230)


@pytest.fixture
def shards(tmp_path, digits):
    """A folder of webdataset's tars: 100, 100 and 30 digits."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, start in enumerate((0, 100, 200)):
        write_tar(folder / f"train-{number:03d}.tar", digits.images[start : start + 100], start)
    return folder


class Faults:
    """What goes wrong with the next answers of the store: an HTTP status, "cut" (half of the body), or "slow" (none for
    one and a half seconds)."""

    def __init__(self, application):
        self.application, self.queue, self.counts = application, [], {"GET": 0, "bytes": 0}
        self.lock = threading.Lock()

    def __call__(self, environment, start):
        with self.lock:
            read = environment["REQUEST_METHOD"] == "GET" and environment.get("HTTP_RANGE")
            fault = self.queue.pop(0) if read and self.queue else None
            self.counts["GET"] += bool(read)
        if isinstance(fault, int):
            start(f"{fault} Fault", [("Content-Length", "0")])
            return [b""]
        if fault == "slow":
            time.sleep(1.5)
        body = b"".join(self.application(environment, start))
        if read:
            self.counts["bytes"] += len(body)
        return [body[: len(body) // 2]] if fault == "cut" else [body]


@pytest.fixture(scope="session")
def store():
    """An S3-compatible server on this machine, whose bucket "train" is empty: (fsspec's options in the environment are
    set to it) its faults."""
    pytest.importorskip("s3fs", reason="the extra remote is not installed")
    pytest.importorskip("moto", reason="moto, of the extra test, is not installed")
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", port, faults, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        import s3fs

        faults.files = s3fs.S3FileSystem()
        faults.files.mkdir("train")
        faults.url = f"http://127.0.0.1:{port}"
        yield faults
    server.shutdown()
