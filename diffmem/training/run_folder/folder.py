"""A run's folder as those read it who come after the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmem.data import DatasetSpec, ImageSet, ImageSource, read_data
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.models import checkpoint_path
from diffmem.progress import Progress, silent
from diffmem.recognize import is_run
from diffmem.training.config import TrainingConfig
from diffmem.training.run_folder.description import CONFIG, holds_run, read_description
from diffmem.training.run_folder.snapshots import SnapshotRecord, read_records, snapshot_folder
from diffmem.training.run_folder.stats import Stats, read_stats


@dataclass(frozen=True)
class RunFolder:
    """What `diffmem.training.train` left in a folder.

    Attributes:
        path: The folder.
        config: The run's configuration.
        data: What its training set was: `source` in words, `images`, `fingerprint`, `data_source`.
    """

    path: Path
    config: TrainingConfig
    data: dict[str, Any]

    @staticmethod
    def open(path: str | Path) -> RunFolder:
        """Raises InputError where no run lies there."""
        path = Path(path)
        if not holds_run(path):
            raise InputError(f"{path}: not a run of diffmem train (there is no file {CONFIG})")
        if not is_run(path) and is_run(whose := path.absolute().parent.parent):
            raise InputError(f"{path}: is a snapshot: give its run, {whose}")
        description = read_description(path)
        with parsing(path / CONFIG, "the description of a run"):
            try:
                return RunFolder(path, TrainingConfig.from_json(description["config"]), dict(description["data"]))
            except InputError as error:
                raise InputError(f"{path / CONFIG}: not the description of a run ({error})") from None

    @staticmethod
    def is_one(path: str | Path) -> bool:
        """Whether `path` is the folder of a run."""
        return is_run(Path(path))

    @staticmethod
    def around(path: Path) -> RunFolder | None:
        """The run whose folder `path` is, or among whose snapshots it lies; None where there is none."""
        for folder in (path, path.absolute().parent.parent):
            if is_run(folder):
                return RunFolder.open(folder)
        return None

    @property
    def dataset(self) -> DatasetSpec | None:
        """How the training set was read, where the run knows; raises InputError where that makes no sense."""
        values = self.data.get("data_source", self.data.get("found_at"))  # its name in earlier versions
        if values is None:
            return None
        with parsing(self.path / CONFIG, "the description of a run"):
            try:
                return DatasetSpec.from_json(values)
            except InputError as error:
                raise InputError(f"{self.path / CONFIG}: does not say where the training set is: {error}") from None

    def averaging(self) -> str:
        """How the EMA weights, those of the snapshots, followed training, in words."""
        return self.config.ema.describe(self.data["images"] * (2 if self.config.xflip else 1))

    def snapshots(self) -> list[SnapshotRecord]:
        """The snapshots that are still there, oldest first."""
        return [record for record in read_records(self.path) if record.kept and self.checkpoint(record).is_dir()]

    def newest(self) -> Path:
        """The checkpoint folder of the newest snapshot; raises InputError where there is none yet."""
        return checkpoint_path(self.path)

    def checkpoint(self, record: SnapshotRecord) -> Path:
        return snapshot_folder(self.path, record.images)

    def stats(self) -> list[Stats]:
        """The lines of `stats.jsonl`; a line that was cut off by a crash is left out."""
        return read_stats(self.path)

    def training_images(self, data: ImageSource | None = None, progress: Progress = silent) -> ImageSet:
        """The run's training set, read again from where it was, or from `data`.

        Raises InputError where it is not found, or is not the one that the run was trained on.
        """
        if data is None:
            data = self.dataset
            if data is None:
                raise InputError(f"{self.path}: does not record where its training set is: pass data=…")
        images, _ = read_data(data, progress)
        if images.fingerprint != self.data["fingerprint"]:
            raise InputError(
                f"{images.source}: not the {self.data['images']:,} images that {self.path} was trained on "
                f"({self.data['source']}): they differ in pixels, order or labels"
            )
        return images
