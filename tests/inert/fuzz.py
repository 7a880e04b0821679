"""Valid files, changed at random and read again: nothing but a declared error or success may come of it.

`python tests/inert/fuzz.py SECONDS [SEED]` runs for so long and names what it found; the suite runs a little of it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
MEMORY = 10**9


class Patch:
    """As much of pytest's monkeypatch as the pretended modules need."""

    def setitem(self, target, name, value):
        target[name] = value


def seeds() -> dict[str, bytes]:
    """Small valid files by name."""
    sys.path.insert(0, str(HERE.parent))
    from edm_snapshots import network, pretended_edm_modules, snapshot
    from safetensors.torch import save as safetensors

    from diffmem.models import Denoiser
    from diffmem.models.config import DenoiserConfig, UNetConfig
    from diffmem.models.preconditioning import VP

    config = UNetConfig(
        resolution=4, channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=()
    )
    tensors = Denoiser(DenoiserConfig(config, VP())).state_dict()
    arguments = {
        "img_resolution": 4, "img_channels": 1, "label_dim": 0, "model_channels": 4, "channel_mult": [1],
        "num_blocks": 1, "attn_resolutions": [], "model_type": "SongUNet", "dropout": 0.1,
    }  # fmt: skip
    edm = pretended_edm_modules(Patch(), "nowhere")
    net = network(edm, "VPPrecond", arguments, tensors)
    files = {f"snapshot-{protocol}.pkl": pickle.dumps(snapshot(edm, net), protocol) for protocol in (2, 4)}
    for name, zipped in (("zip", True), ("legacy", False)):
        stream = io.BytesIO()
        torch.save({"net": net}, stream, _use_new_zipfile_serialization=zipped)
        files[f"state-{name}.pkl"] = stream.getvalue()
        stream = io.BytesIO()
        images = torch.arange(120, dtype=torch.uint8).reshape(2, 3, 4, 5)
        torch.save({"images": images, "labels": torch.tensor([0, 1])}, stream, _use_new_zipfile_serialization=zipped)
        files[f"images-{name}.pt"] = stream.getvalue()
    array = images.numpy()
    for name, save in (
        ("x.npy", np.save),
        ("x.npz", lambda stream, array: np.savez(stream, images=array, labels=[0, 1])),
    ):
        save(stream := io.BytesIO(), array)
        files[name] = stream.getvalue()
    files["x.safetensors"] = safetensors({"images": images, "labels": torch.tensor([0, 1])})
    batch = {
        b"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], "filenames": ["a.png", "b.png"],
        "batch_label": b"test",
    }  # fmt: skip
    for protocol in (0, 2, 4):
        files[f"batch-{protocol}-test_batch.tar"] = tar(pickle.dumps(batch, protocol))
    return files


def tar(content: bytes) -> bytes:
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1, 2**40]
OPCODES = b"()]}0212NRtbuse\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94\x81\x92hjqrcQ.I\x8a\x8cXBTUVSLFGK"


def mutate(content: bytes, rng: random.Random) -> bytes:
    """The content with one to eight changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        place = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 32))
        kind = rng.randrange(8)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = rng.randrange(256)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = rng.randbytes(length)
        elif kind == 4:
            start = rng.randrange(len(data) + 1)
            data[place:place] = data[start : start + rng.choice((4, 16, 64, 256))] * rng.choice((1, 1, 2, 50))
        elif kind == 5:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTERESTING) % 2 ** (8 * size)
            data[place : place + size] = value.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 6:
            data[place : place + 1] = bytes([rng.choice(OPCODES)]) * rng.choice((1, 1, 2, 40))
        elif rng.random() < 0.2:
            del data[place:]
        if not data:
            break
    return bytes(data)


def mutation(name: str, content: bytes, rng: random.Random) -> bytes:
    """A changed file; half of the archives are changed inside, so that their checksums fit."""
    if rng.random() < 0.6 and content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        chosen = rng.choice([entry for entry in entries if entry.endswith((".pkl", ".npy"))])
        entries[chosen] = mutate(entries[chosen], rng)
        with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
            for entry, value in entries.items():
                archive.writestr(entry, value)
        return stream.getvalue()
    if rng.random() < 0.8 and name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            return tar(mutate(archive.extractfile(archive.getmembers()[0]).read(), rng))
    return mutate(content, rng)


def run(count: int | None, seconds: float, seed: int) -> types.SimpleNamespace:
    """Reads so many changed files, or for so long; returns how many were read and refused, and what went wrong."""
    rng, files = random.Random(seed), seeds()
    found = types.SimpleNamespace(read=0, refused=0, wrong=[], slowest=0.0, memory=0, intact=0)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        end, reader, done = time.monotonic() + seconds, None, 0
        for name, content in files.items():
            (folder / name).write_bytes(content)

        def start():
            command = [sys.executable, HERE / "reader.py"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
            )
            # Valid ones first: they are read, once what is imported late was imported (which runs modules).
            for name in files:
                ask(process, folder / name)
            found.intact = sum(ask(process, folder / name)["outcome"] == "read" for name in files)
            return process

        while done < count if count is not None else time.monotonic() < end:
            reader = reader or start()
            name = rng.choice(list(files))
            content = mutation(name, files[name], rng)
            path = folder / f"changed-{name}"
            path.write_bytes(content)
            answer = ask(reader, path)
            done += 1
            outcome = answer["outcome"]
            if outcome == "read":
                found.read += 1
            elif outcome == "refused" and str(path) in answer["message"]:
                found.refused += 1
            else:
                found.wrong.append((answer, content))
            if answer.get("memory", 0) > MEMORY:
                found.wrong.append((answer, content))
                reader.kill()
            found.slowest = max(found.slowest, answer.get("seconds", 0.0))
            found.memory = max(found.memory, answer.get("memory", 0))
            if reader.poll() is not None:
                reader = None
        if reader is not None:
            reader.communicate()
    return found


def ask(process, path) -> dict:
    try:
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        return {"path": str(path), "outcome": f"died ({process.wait()})", "message": ""}
    return json.loads(line)


def main():
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found = run(None, seconds, seed)
    print(f"{found.read} read, {found.refused} refused, {len(found.wrong)} wrong, slowest {found.slowest:.2f} s, "
          f"{found.memory >> 20} MB, {found.intact} valid ones read")  # fmt: skip
    for number, (answer, content) in enumerate(found.wrong[:30]):
        kept = Path(tempfile.gettempdir()) / f"fuzz-{seed}-{number}-{Path(answer['path']).name}"
        kept.write_bytes(content)
        print(kept, answer)


if __name__ == "__main__":
    main()
