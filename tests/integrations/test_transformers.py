"""The callback of transformers' Trainer: a training with it is the one without; what it finds is logged."""

import numpy as np
import pytest
import torch
from tiny_training import DIGITS, QUICK, TinyDenoiser, floats, loss_of

from diffmem.errors import InputError
from diffmem.models import as_denoiser
from diffmem.sampling import sample

transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
pytest.importorskip("accelerate", reason="the extra transformers is not installed")
from diffmem.integrations.transformers import MemorizationCallback  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = TinyDenoiser()

    def forward(self, images):
        return {"loss": loss_of(self.net, images)}


def train(folder, callback=None, epochs=2):
    transformers.set_seed(0)
    settings = transformers.TrainingArguments(
        folder, use_cpu=True, report_to="none", num_train_epochs=epochs, per_device_train_batch_size=20,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(Model(), settings, train_dataset=[{"images": image} for image in floats()])
    if callback is not None:
        callback.add_to(trainer)
    trainer.train()
    return trainer


def test_a_training_with_it_is_the_training_without_it(tmp_path):
    def sampler(model, seeds):
        assert not model.training
        torch.rand(1), np.random.rand()  # noqa: NPY002 (what must not move the run's generators)
        return sample(as_denoiser(model.net), seeds, QUICK).images

    callback = MemorizationCallback(DIGITS, sampler=sampler, samples=5)
    trainer, plain = train(tmp_path, callback), train(tmp_path)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name
    assert [(each.step, each.epoch, each.total) for each in callback.results] == [(2, 0, 5), (4, 1, 5)]
    logged = [entry for entry in trainer.state.log_history if "memorization/R_mem" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    images = sample(as_denoiser(trainer.model.net), range(5), QUICK).images.numpy()
    assert np.array_equal(callback.latest.audit.generated.images, images)


def test_it_stops_the_trainer_and_errors_come_before_training(tmp_path):
    copying = MemorizationCallback(DIGITS, sampler=lambda model, seeds: DIGITS.images[seeds], samples=32, stop=0.5)
    assert train(tmp_path, copying, epochs=9).state.epoch == 1
    with pytest.raises(InputError, match="nowhere"):
        train(tmp_path, MemorizationCallback(tmp_path / "nowhere"))
