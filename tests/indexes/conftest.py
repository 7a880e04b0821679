"""Training sets in pieces, and an object store on this machine."""

import hashlib
import io
import json
import re
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import numpy as np
import pytest
from PIL import Image
from processes import free_port

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


class Elsewhere(BaseHTTPRequestHandler):
    """What gcsfs and huggingface_hub ask for when they list, look at and read files: Google's JSON API, with the bucket
    "train", and the Hub's, with the dataset "me/train". The server has `files`, by name, and counts `bytes`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        files, about = self.server.files, self.server.about
        if (name := after(path, "/storage/v1/b/train/o/")) in files:
            self.answer(about(name))
        elif path == "/storage/v1/b/train/o":
            names = [name for name in sorted(files) if name.startswith(asked.get("prefix", ""))]
            self.answer({"items": [about(name) for name in names]})
        elif path.startswith("/api/datasets/me/train/tree/main"):
            folder = unquote(after(path, "/api/datasets/me/train/tree/main").strip("/"))
            names = [name for name in sorted(files) if name.startswith(f"{folder}/" if folder else "")]
            inner = {name: name[len(folder) :].strip("/").partition("/")[0] for name in names}
            flat = asked.get("recursive") != "false"
            folders = {
                f"{folder}/{first}".strip("/") for name, first in inner.items() if not f"/{name}".endswith(f"/{first}")
            }
            found = [about(name) for name in names if flat or f"/{name}".endswith(f"/{inner[name]}")]
            self.answer(found + [{"type": "directory", "path": each, "oid": "0"} for each in sorted(folders)])
        elif path in ("/api/datasets/me/train", "/api/datasets/me/train/revision/main"):
            self.answer({"id": "me/train", "sha": "0" * 40, "siblings": []})
        else:
            name = after(path, "/download/storage/v1/b/train/o/") or after(path, "/datasets/me/train/resolve/main/")
            found = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers.get("Range", ""))
            if name in files and found:
                self.answer(files[name][int(found[1]) : int(found[2]) + 1], 206)
            else:
                self.answer({"error": {"message": "not found", "code": 404}}, 404)

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
        self.answer([self.server.about(name) for name in names if name in self.server.files])

    def answer(self, body, status=200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.server.bytes += len(data)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if data is body else "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def after(path, beginning):
    return unquote(path.removeprefix(beginning)) if path.startswith(beginning) else ""


@pytest.fixture
def elsewhere():
    """A server on this machine that is Google's store and the Hugging Face Hub for what is in its `files`."""

    def about(name):
        data = server.files[name]
        version = hashlib.sha1(data).hexdigest()
        return {
            "name": name, "bucket": "train", "size": len(data), "etag": version, "md5Hash": version, "type": "file",
            "path": name, "oid": version, "generation": "1",
        }  # fmt: skip

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    server.files, server.about, server.bytes = {}, about, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


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
    port = free_port()
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
