"""Sources decoded in forked processes: the same images, the same refusals, and nothing is left behind.

In a process of its own, since this one holds PyTorch, beside which nothing is forked.
"""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")

SCRIPT = """
import json, os, sys, time
from contextlib import closing
from diffmem.data import decode_forks, decode_pool, load_images
from diffmem.data.load import Loading
from diffmem.errors import InputError

decode_pool.IN_FORKS_SECONDS, decode_pool._BLOCK_IMAGES = -1, 8
decode_pool._cores = lambda: 3
said = {}

def forked(source, **options):
    with decode_forks.allowed(), closing(Loading(source, **options)) as loading:
        assert loading._begun.decoding._forks is not None
        return loading.result(), loading

folder, archive, damaged, again = sys.argv[1:]
for name, options in {folder: {}, archive: {"resize": 6, "color": "gray"}, damaged: {"skip_bad": True}}.items():
    ours, _ = forked(name, **options)
    theirs = load_images(name, **options)
    assert (ours.images == theirs.images).all() and ours.images.dtype == theirs.images.dtype
    assert (ours.names, ours.notes, ours.skipped) == (theirs.names, theirs.notes, theirs.skipped)
    said[name] = [len(ours), len(ours.skipped), list(ours.notes)]
    ours.images[0] = 0  # it is an array like any other

for way in (forked, load_images):
    try:
        way(damaged)
    except InputError as error:
        said.setdefault("refused", []).append(str(error))

# The copy is made of what was decoded meanwhile, and used by the next one.
first, _ = forked(again, cache=True)
with decode_forks.allowed(), closing(Loading(again, cache=True)) as loading:
    assert loading._begun is None
    second = loading.result()
assert (first.images == second.images).all() and first.names == second.names
with closing(Loading(again, cache=True)) as loading:
    loading.check_meanwhile()
    assert loading._checking.result() is loading.result() is not None
    assert (first.images == loading.result().images).all() and first.names == loading.result().names
with open(again, "r+b") as file:  # the copy is no longer one of it, which is said as ever
    file.write(b"??")
with closing(Loading(again, cache=True)) as loading:
    loading.check_meanwhile()
    assert loading._checking.result() is None
    try:
        loading.result()
    except InputError as error:
        assert again in str(error)
    else:
        raise AssertionError("a damaged archive was read")

decode = decode_pool.Decoding._decode
decode_pool.Decoding._decode = lambda self, block: os._exit(1) if block.start > 16 else decode(self, block)
try:
    forked(folder)
except InputError as error:
    said["died"] = str(error)
decode_pool.Decoding._decode = lambda self, block: time.sleep(50) if block.start > 8 else decode(self, block)
with decode_forks.allowed(), closing(Loading(folder)):
    pass  # as after an interrupt: nobody waits
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    said["children"] = 0
said["torch"] = "torch" in sys.modules
print(json.dumps(said))
"""


def test_forked_processes_decode_what_this_one_does(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (60, 12, 10, 3), dtype=np.uint8)
    folder, archive, damaged, again = (tmp_path / name for name in ("f", "a.zip", "d.zip", "again.zip"))
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for i, image in enumerate(images):
            path = folder / f"{i}.{'jpg' if i % 3 else 'png'}"
            Image.fromarray(image).save(path, **({"exif": exif} if i % 20 == 1 else {}))
            file.write(path, path.name)
    again.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(damaged, "w") as file:
        for i in range(60):
            file.writestr(f"{i}.png", b"not a picture" if i == 37 else (folder / f"{i}.jpg").read_bytes() if i % 3 else
                          (folder / f"{i}.png").read_bytes())  # fmt: skip
    script = [sys.executable, "-W", "error", "-c", SCRIPT]
    done = subprocess.run([*script, folder, archive, damaged, again], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said[str(folder)][:2] == [60, 0]
    assert "3 of 60 images have an EXIF orientation" in said[str(folder)][2][0]
    assert said[str(damaged)][:2] == [59, 1]
    assert "37.png is not an image" in said["refused"][0]
    assert said["refused"][0] == said["refused"][1]
    assert "a decoding process died somewhere between" in said["died"]
    assert said["children"] == 0
    assert not said["torch"]
