"""The callback leaves a real training alone, to the bit, and says what an audit of its samples says."""

import csv
import warnings

import numpy as np
import pytest
import torch
from tiny_training import DIGITS, QUICK, TinyDenoiser, floats, loss_of

import diffmem
from diffmem.errors import InputError
from diffmem.models import as_denoiser
from diffmem.sampling import sample

pl = pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from diffmem.integrations.lightning import MemorizationCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Consider setting `persistent_workers:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = TinyDenoiser()

    def training_step(self, batch, _):
        return loss_of(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def fit(callbacks, epochs=3, ema=None, logger=False, folder=None, checkpoint=None):
    pl.seed_everything(0, verbose=False)
    module = Module()
    if ema is not None:
        module.ema = ema
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=logger, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=folder is not None, default_root_dir=folder, accelerator="cpu", log_every_n_steps=1,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(floats(), batch_size=16, shuffle=True)
    trainer.fit(module, loader, ckpt_path=checkpoint, **({"weights_only": False} if checkpoint else {}))
    return module, trainer


def weights(module) -> bytes:
    return b"".join(tensor.detach().numpy().tobytes() for tensor in module.state_dict().values())


def looking(**options) -> MemorizationCallback:
    return MemorizationCallback(DIGITS, **{"samples": 8, "sampler": QUICK, "denoiser": "net", **options})


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_with_it_is_the_run_without_it(averaged, tmp_path):
    def others():
        return [EMAWeightAveraging(decay=0.5)] if averaged else []

    without, _ = fit(others())
    callback = looking(every=2, unit="step")
    with_it, trainer = fit([*others(), callback], logger=CSVLogger(tmp_path))
    assert weights(with_it) == weights(without)
    assert len(callback.results) == 4
    assert [result.step for result in callback.results] == [2, 4, 6, 8]
    assert trainer.callback_metrics["memorization/R_mem"] == callback.latest.ratio


def test_it_samples_the_averaged_weights_and_judges_as_an_audit_does():
    averaging, callback = EMAWeightAveraging(decay=0.5), looking()
    module, _ = fit([averaging, callback])
    # At the end of training Lightning puts the EMA weights in the module's place.
    images = sample(as_denoiser(module.net), range(8), QUICK).images
    assert np.array_equal(callback.latest.audit.generated.images, images)
    audit = diffmem.audit(images, DIGITS)
    assert callback.latest.rate == audit.rate
    assert callback.latest.median == np.median(audit.scores)
    averages = torch.optim.swa_utils.AveragedModel(TinyDenoiser())
    for ema in (None, averages):
        callback = looking()
        module, _ = fit([callback], epochs=1, ema=ema)
        network = module.net if ema is None else averages.module
        assert np.array_equal(callback.latest.audit.generated.images, sample(network, range(8), QUICK).images)


class Storing:
    """EMA weights as diffusers and taming have them: put in the place of others, and taken out again."""

    def store(self, parameters):
        self.stored = [each.detach().clone() for each in parameters]

    def copy_to(self, parameters):
        with torch.no_grad():
            for each in parameters:
                each.zero_()

    def restore(self, parameters):
        with torch.no_grad():
            for each, stored in zip(parameters, self.stored, strict=True):
                each.copy_(stored)


def test_stored_weights_come_back_and_a_function_samples():
    seen = []

    def from_module(module, seeds):
        seen.append((float(module.net.layers[0].weight.abs().sum()), module.training))
        torch.rand(3), np.random.rand(3)  # noqa: NPY002 (what must not move the run's generators)
        return DIGITS.images[seeds].astype(np.float32) / 127.5 - 1

    callback = looking(sampler=from_module, denoiser=None)
    with_it, _ = fit([callback], ema=Storing())
    assert seen == [(0.0, False)] * 3
    assert callback.latest.count == 8
    assert weights(with_it) == weights(fit([])[0])


def test_it_resumes_with_the_trainer_and_stops_it(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    first = looking()
    fit([first, saving], epochs=2, folder=tmp_path)
    resumed = looking()
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit([resumed, saving], epochs=4, folder=tmp_path, checkpoint=tmp_path / "epoch=1.ckpt")
    assert [each.to_dict() for each in resumed.results[:2]] == [each.to_dict() for each in first.results]
    assert [each.epoch for each in resumed.results] == [0, 1, 2, 3]
    copying = looking(sampler=lambda _, seeds: DIGITS.images[seeds], stop=0.5, samples=32)
    _, trainer = fit([copying], epochs=50)
    assert (len(copying.results), trainer.current_epoch) == (1, 1)


def test_figures_and_pictures_reach_the_loggers_and_one_that_raises_is_told_of_once(tmp_path):
    class Raising(CSVLogger):
        def log_metrics(self, metrics, step=None):
            raise ConnectionError("no network")

    kept = CSVLogger(tmp_path, version="kept")
    with pytest.warns(UserWarning, match="Raising could not log the audit; training continues.*no network") as said:
        fit([looking(loggers=tmp_path / "own")], logger=[Raising(tmp_path, version="lost"), kept])
    assert len([each for each in said if "could not log" in str(each.message)]) == 1
    with open(tmp_path / "lightning_logs" / "kept" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("memorization/R_mem")]
    assert len(rows) == 3
    assert len(list((tmp_path / "lightning_logs" / "kept" / "memorization").glob("*.png"))) == 3
    with open(tmp_path / "own" / "memorization.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "6", "9"]


def test_what_goes_wrong_in_a_look_is_a_warning_and_before_training_an_error(tmp_path):
    def broken(seeds):
        raise RuntimeError("out of memory\nat some place")

    failing = {
        "sampling failed: RuntimeError: out of memory at some place": broken,
        "made 3 images for 8 seeds": lambda seeds: DIGITS.images[:3],
        "are 16x16": lambda seeds: np.zeros((len(seeds), 1, 16, 16), np.uint8),
        "NaN": lambda seeds: torch.full((len(seeds), 1, 8, 8), torch.nan),
        "made no images": lambda seeds: [],
        "latents": lambda seeds: torch.linspace(-9, 9, len(seeds) * 256).reshape(len(seeds), 4, 8, 8),
    }
    kinds = [*failing.values(), broken, broken]
    callback = looking(sampler=lambda module, seeds: kinds[module.current_epoch](seeds))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, trainer = fit([callback], epochs=len(kinds))
    messages = [str(each.message) for each in caught if str(each.message).startswith("diffmem")]
    assert len(messages) == len(failing)  # the same is said once
    for message, said in zip(messages, failing, strict=True):
        assert said in message
        assert "\n" not in message
    assert trainer.current_epoch == len(kinds)
    assert callback.results == []
    for callback, said in (
        (MemorizationCallback(tmp_path / "nowhere"), "nowhere"),
        (looking(denoiser="netz"), "no attribute netz"),
        (looking(detector={"threshold": 2}), "threshold"),
    ):
        with pytest.raises(InputError, match=said):
            fit([callback])
