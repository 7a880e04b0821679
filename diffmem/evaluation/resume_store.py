"""The work folder beside an output: finished blocks of images, so that a run goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffmem.atomic_io import atomic_file, atomic_write, output_path
from diffmem.errors import InputError
from diffmem.integrity import load_arrays, read_sealed, save_arrays, sealed
from diffmem.sampling import Samples

_RUN = "run.json"
_ADVICE = "begin again with restart=True"


def work_folder(out: Path) -> Path:
    """Where the finished blocks of a run that ends in `out` are kept.

    Args:
        out: The output.
    """
    out = output_path(out)
    return out.with_name(f"{out.name}.partial")


class KeptBlocks:
    """Blocks of a run in its work folder: `run.json`, what decides the images, and one `.npz` per finished block."""

    def __init__(self, out: Path):
        self.folder = work_folder(out)

    def begin(self, identity: dict[str, Any], restart: bool) -> bool | None:
        """Makes the folder ready for the run that `identity` describes; returns `decide`'s decision where one is kept.

        Raises InputError where the folder holds blocks of a run with another identity (unless `restart`, which drops
        them), or cannot be written to.
        """
        if restart:
            self.remove()
        identity = json.loads(json.dumps(identity))  # as it reads when it comes back
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = self._run()
            if kept is None:
                self._write_run(identity, None)
                return None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror or error}") from None
        names = [name for name in {**kept["identity"], **identity} if kept["identity"].get(name) != identity.get(name)]
        if names:
            differences = ", ".join(
                f"{name} {_short(kept['identity'].get(name))} (now {_short(identity.get(name))})" for name in names
            )
            raise InputError(
                f"{self.folder} holds part of another run: {differences}; finish that one with its own settings, or "
                "begin again with restart=True"
            )
        return kept["compiled"]

    def decide(self, identity: dict[str, Any], compiled: bool) -> None:
        """Keeps whether the steps are compiled, so that every block of the run is made in the same way."""
        self._write_run(identity, compiled)

    def read(self, index: int, seeds: Sequence[int]) -> Samples | None:
        """Block `index`, or None where it is not there or not whole."""
        try:
            arrays = load_arrays(self._block(index), "it is made again")
        except InputError:
            return None
        if not {"images", "seeds"} <= set(arrays) or arrays["seeds"].tolist() != list(seeds):
            return None
        labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
        return Samples(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["seeds"]), labels)

    def write(self, index: int, samples: Samples) -> None:
        arrays = {"images": samples.images.numpy(), "seeds": samples.seeds.numpy()}
        if samples.labels is not None:
            arrays["labels"] = samples.labels.numpy()
        with atomic_file(self._block(index), durable=False) as partial, open(partial, "xb") as file:
            save_arrays(file, arrays)

    def remove(self) -> None:
        """Removes what was kept, and the folder with it unless there are other things in it."""
        for pattern in ("block-*.npz", ".*.partial", _RUN):
            for path in self.folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:06d}.npz"

    def _run(self) -> dict[str, Any] | None:
        path = self.folder / _RUN
        if not path.exists():
            if any(self.folder.iterdir()):
                raise InputError(f"{self.folder}: exists and is no part of a run; choose another output")
            return None
        kept = read_sealed(path, _ADVICE)
        if not isinstance(kept.get("identity"), dict) or kept.get("compiled") not in (None, True, False):
            raise InputError(f"{path}: damaged: {_ADVICE}")
        return {"identity": kept["identity"], "compiled": kept["compiled"]}

    def _write_run(self, identity: dict[str, Any], compiled: bool | None) -> None:
        values = sealed({"identity": identity, "compiled": compiled})
        atomic_write(self.folder / _RUN, json.dumps(values, indent=1) + "\n")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}…"
