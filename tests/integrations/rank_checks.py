"""What `test_ranks` runs on each rank."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_training import DIGITS, QUICK, TinyDenoiser, floats, loss_of

import diffmem
from diffmem.errors import InputError
from diffmem.integrations import MemorizationMonitor
from diffmem.sampling import sample

RANK = int(os.environ.get("RANK", 0))


def run(folder: str, frameworks: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in ("monitor", *frameworks):
        globals()[f"check_{name}"]()
        dist.barrier()
        Path(folder, f"{name} {RANK}").touch()
    dist.destroy_process_group()


def check_monitor() -> None:
    seen = []

    def images(seeds):
        seen.extend(seeds)
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002 (what must not move the run's generators)
        return DIGITS.images[seeds]

    # The training set is reachable on the first rank only.
    monitor = MemorizationMonitor(images, "nowhere.zip" if RANK else DIGITS, samples=7, stop=0.2)
    torch.manual_seed(RANK)
    state = torch.get_rng_state()
    result = monitor.on_epoch_end(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]][RANK]  # as many on each; the last is left out
    assert (result.count, result.total, monitor.should_stop) == (7, 7, True)
    assert (result.audit is None) == bool(RANK)

    network = TinyDenoiser()
    network.load_state_dict({name: torch.zeros_like(each) for name, each in network.state_dict().items()})
    result = MemorizationMonitor(network, DIGITS, samples=6, sampler=QUICK).look(0)
    if RANK == 0:
        assert np.array_equal(result.audit.generated.images, sample(network, range(6), QUICK).images)

    def failing(seeds):
        if RANK:
            raise RuntimeError("rank 1 cannot")
        return images(seeds)

    def look():
        return MemorizationMonitor(failing, DIGITS, samples=4, stop=0.2).look(0)

    if RANK:
        assert look() is None
    else:
        with pytest.warns(UserWarning, match="RuntimeError: rank 1 cannot"):
            assert look() is None
    with pytest.raises(InputError, match=r"nowhere\.zip"):
        MemorizationMonitor(images, DIGITS if RANK else "nowhere.zip")


def check_torchmetrics() -> None:
    from diffmem.integrations.torchmetrics import MemorizationRatio

    digits = diffmem.load_images("builtin:digits")
    training, images = digits.select(slice(0, 600)), digits.images[590:610]
    metric = MemorizationRatio(training)
    metric.update(images[13:] if RANK else images[:13])
    want = diffmem.audit(images, training).rate
    assert metric.compute() == torch.tensor(want.ratio, dtype=torch.float32)
    assert metric.rate.total == (7 if RANK else 13)
    with metric.sync_context():
        assert metric.rate == want
    other = MemorizationRatio(training, threshold="1/2" if RANK else "1/3")
    other.update(images)
    with pytest.raises(InputError, match="different training sets or rules"):
        other.compute()


def check_lightning() -> None:
    import lightning.pytorch as pl

    from diffmem.integrations.lightning import MemorizationCallback

    class Uneven(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = TinyDenoiser()

        def training_step(self, batch, _):
            if self.trainer.global_rank:
                sorted(range(100_000), reverse=True)
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    def looking(**options):
        return MemorizationCallback(DIGITS, **{"samples": 7, "sampler": QUICK, "denoiser": "net", **options})

    def fit(*callbacks, epochs=2):
        pl.seed_everything(0, verbose=False)
        module = Uneven()
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_progress_bar=False, devices=2,
            enable_model_summary=False, enable_checkpointing=False, accelerator="cpu", strategy="ddp",
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(floats(), batch_size=8, shuffle=True))
        return module.state_dict(), trainer

    without, _ = fit()
    looks = looking()
    with_it, _ = fit(looks)
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert [each.total for each in looks.results] == [7, 7]
    copying = looking(sampler=lambda _, seeds: DIGITS.images[seeds], stop=lambda rate: rate.ratio == 1)
    _, trainer = fit(copying, epochs=5)
    assert trainer.current_epoch == 1
    with pytest.raises(InputError, match=r"nowhere\.zip"):
        fit(MemorizationCallback(DIGITS if RANK else "nowhere.zip"))


def check_accelerate() -> None:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    network = TinyDenoiser()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    loader = torch.utils.data.DataLoader(floats(), batch_size=8)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    monitor = MemorizationMonitor(
        lambda seeds: DIGITS.images[seeds], DIGITS, samples=16, stop=0.5, accelerator=accelerator
    )  # fmt: skip
    for epoch in range(3):
        for images in loader:
            accelerator.backward(loss_of(network, images))
            optimizer.step()
        monitor.on_epoch_end(epoch)
        if monitor.should_stop:
            break
    assert epoch == 0
