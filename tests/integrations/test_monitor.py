"""The monitor of loops of one's own, what it costs, and where its figures go."""

import csv
import logging
import time
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import DIGITS, QUICK, TinyDenoiser, floats, loss_of

import diffmem
from diffmem.errors import InputError
from diffmem.integrations import MemorizationMonitor, as_logger
from diffmem.integrations.isolation import ema_weights, find_ema
from diffmem.memorization import SequentialTest, anytime_interval
from diffmem.sampling import sample

pytestmark = pytest.mark.usefixtures("one_thread")


def copies(seeds):
    return DIGITS.images[seeds]


def half_copies(seeds):
    """Copies of even seeds, and noise."""
    images = copies(seeds)
    odd = np.array(seeds) % 2 == 1
    images = images.copy()
    images[odd] = np.random.default_rng(0).integers(0, 256, images.shape)[odd]
    return images


def test_a_look_is_an_audit_of_the_images():
    monitor = MemorizationMonitor(half_copies, DIGITS, samples=16, every=2)
    assert monitor.on_epoch_end(0) is None
    result = monitor.on_epoch_end(1, step=30)
    audit = diffmem.audit(half_copies(list(range(16))), DIGITS)
    assert result.rate == audit.rate
    assert (result.count, result.step, result.epoch) == (8, 30, 1)
    assert result.scalars()["memorization/R_mem_low"] == audit.interval[0]
    picture = result.picture()
    # Eight rows of image, nearest and second nearest, the most certain copies first, each in two frames.
    scale = picture.shape[0] // (8 * 12)
    assert picture.shape == (8 * 12 * scale, 3 * 12 * scale, 3)
    cells = picture[::scale, ::scale].reshape(8, 12, 3, 12, 3).swapaxes(1, 2)
    inner = cells[:, :, 2:-2, 2:-2]
    assert np.array_equal(inner[:, 0], inner[:, 1])
    assert np.array_equal(inner[:, 1, :, :, 0], DIGITS.images[audit.neighbors.indices[::2, 0], 0])
    assert cells[:, 0, 1, 1].tolist() == [[208, 32, 32]] * 8
    assert cells[:, 1:, 1, 1].min() == 255
    assert monitor.look(40).audit is not None
    assert monitor.results[0].audit is None  # the pictures of one look only are kept


@pytest.mark.parametrize(
    "form",
    [
        lambda images: torch.from_numpy(images).half() / 255,
        lambda images: torch.from_numpy(images).bfloat16() / 127.5 - 1,
        lambda images: images.astype(np.float64),
        lambda images: [Image.fromarray(image[0]) for image in images],
        lambda images: SimpleNamespace(images=images.transpose(0, 2, 3, 1) / np.float32(255)),
    ],
)
def test_images_in_any_form(form):
    monitor = MemorizationMonitor(lambda seeds: form(copies(seeds)), DIGITS, samples=8)
    assert monitor.look(0).count == 8


def test_training_sets_of_floats_and_detectors_that_are_shared():
    for training in (floats(), (floats() + 1) / 2, torch.utils.data.TensorDataset(floats())):
        assert MemorizationMonitor(copies, training, samples=4).look(0).count == 4
    detector = diffmem.CopyDetector(DIGITS, threshold="1/4")
    detector.update(DIGITS.images[:3])
    first, second = (MemorizationMonitor(copies, detector, samples=4) for _ in range(2))
    assert first.look(0).rate == second.look(0).rate
    assert first.latest.audit.settings["threshold"] == "1/4"
    assert (detector.total, detector.compute().total) == (3, 3)  # the caller's images are left to it
    with pytest.raises(InputError, match="remove detector"):
        MemorizationMonitor(copies, detector, detector={"flip": True})


def test_an_index_of_features_gives_pictures_and_one_of_vectors_is_refused(tmp_path):
    diffmem.build_index("builtin:digits", tmp_path / "hash", features="hash")
    result = MemorizationMonitor(copies, tmp_path / "hash", samples=4).look(0)
    assert result.count == 4
    rows = result.audit.neighbors.indices[:, 0]
    nearest = result.audit.training.originals.read(rows)
    np.testing.assert_array_equal([nearest[row] for row in rows.tolist()], result.audit.generated.images)
    first, second = result.picture()[:60, :60], result.picture()[:60, 60:120]
    assert (first[16:44, 16:44] == second[16:44, 16:44]).all()  # an image and what it copies, within their frames
    assert first[16:44, 16:44].min() < first.max()
    np.save(tmp_path / "vectors.npy", np.eye(8, dtype=np.float32))
    diffmem.build_index(tmp_path / "vectors.npy", tmp_path / "vectors", features="precomputed")
    with pytest.raises(InputError, match="holds vectors that were computed elsewhere"):
        MemorizationMonitor(copies, tmp_path / "vectors", samples=4)


def test_a_stop_keeps_its_error_over_all_looks():
    monitor = MemorizationMonitor(half_copies, DIGITS, samples=30, stop=SequentialTest(0.2, 0.9))
    for look in range(1, 8):
        stop = monitor.look(look).stop
        # Of the error of 0.1, look k may spend 1/(k(k + 1)).
        assert stop == (anytime_interval(15, 30, 1 - 0.1 / (look * (look + 1)))[0] >= 0.2)
    assert not stop  # what showed at first is not enough after many looks
    assert monitor.should_stop


def test_random_states_modes_and_weights_are_left_alone():
    network = TinyDenoiser()
    network.layers[2].eval()  # one part is in another mode
    before = {name: each.clone() for name, each in network.state_dict().items()}
    averages = torch.optim.swa_utils.AveragedModel(network)
    averages.module.load_state_dict({name: torch.zeros_like(each) for name, each in before.items()})
    monitor = MemorizationMonitor(network, DIGITS, samples=4, sampler=QUICK, ema=averages)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    result = monitor.look(0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert (network.training, network.layers[0].training, network.layers[2].training) == (True, True, False)
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())
    assert np.array_equal(result.audit.generated.images, sample(averages.module, range(4), QUICK).images)


class Shadows:
    """EMA weights as diffusers' EMAModel has them."""

    def __init__(self, parameters):
        self.shadow_params = [torch.zeros_like(each) for each in parameters]

    def store(self, parameters):
        self.stored = [each.detach().clone() for each in parameters]

    def copy_to(self, parameters):
        for each, shadow in zip(parameters, self.shadow_params, strict=True):
            each.data.copy_(shadow)

    def restore(self, parameters):
        for each, stored in zip(parameters, self.stored, strict=True):
            each.data.copy_(stored)


class Scoped(torch.nn.Module):
    """A module that puts its averages in place itself, as latent diffusion's do."""

    def __init__(self):
        super().__init__()
        self.net = TinyDenoiser()

    @contextmanager
    def ema_scope(self):
        shadows = Shadows(self.net.parameters())
        shadows.store(self.net.parameters())
        shadows.copy_to(self.net.parameters())
        yield
        shadows.restore(self.net.parameters())


def test_averaged_weights_of_a_part_are_in_place_and_taken_out_again():
    module = Scoped()
    before = {name: each.clone() for name, each in module.state_dict().items()}
    assert find_ema(module) is module
    for ema in (Shadows(module.net.parameters()), module):
        with ema_weights(ema, module) as given:
            assert given is module
            assert not any(each.any() for each in module.net.parameters())
        assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    with pytest.raises(RuntimeError, match="within"), ema_weights(Shadows(module.net.parameters()), module):
        raise RuntimeError("within")
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    with pytest.raises(InputError, match="no part of Scoped"), ema_weights(Shadows([torch.zeros(3)]), module):
        pass


def test_the_index_is_built_once_and_a_look_costs_little_beyond_sampling(monkeypatch):
    """An epoch of a real training on all digits takes a hundred times what a look adds to its sampling; CPU seconds, so
    that other processes do not count."""
    made, search = [], diffmem.search.TrainingIndex

    def counted(*words, **options):
        made.append(1)
        return search(*words, **options)

    monkeypatch.setattr("diffmem.memorization.matching.TrainingIndex", counted)
    digits = diffmem.load_images("builtin:digits")
    from diffmem.models import Denoiser, preset

    network = Denoiser(preset("ddpmpp_8", channels=1, model_channels=16))
    monitor = MemorizationMonitor(lambda seeds: digits.images[seeds], digits, samples=64, stop=0.9)
    monitor.look(0)
    looks = []
    for step in range(1, 4):
        began = time.process_time()
        monitor.look(step)
        looks.append(time.process_time() - began)
    images = torch.from_numpy(digits.images[:128]) / 127.5 - 1
    began = time.process_time()
    loss_of(network, images).backward()
    batch = time.process_time() - began
    epoch = batch * len(digits) / 128
    assert min(looks) < 0.05 * epoch, (looks, epoch)
    assert len(made) == 1


def test_what_goes_wrong_is_said_once(tmp_path):
    def raising(result):
        raise OSError("disk full")

    raising.name = "mine"
    monitor = MemorizationMonitor(copies, DIGITS, samples=4, loggers=[raising, tmp_path / "kept"])
    with pytest.warns(UserWarning, match=r"OSError: disk full") as caught:
        assert [monitor.look(step).count for step in range(3)] == [4, 4, 4]
    assert len(caught) == 1
    assert (tmp_path / "kept" / "memorization.csv").read_text().count("\n") == 4
    for options, said in (
        ({"samples": 0}, "samples is 0"), ({"every": 0.5}, "every is 0.5"), ({"stop": 1.5}, "between 0 and 1"),
        ({"loggers": 3}, "a int is not a logger"), ({"ema": TinyDenoiser()}, "ema is for denoisers"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            MemorizationMonitor(copies, DIGITS, **options)
    with pytest.raises(InputError, match="nowhere"):
        MemorizationMonitor(copies, tmp_path / "nowhere")


def test_what_speaks_against_a_verdict_is_said_once(caplog):
    monitor = MemorizationMonitor(lambda seeds: np.zeros((len(seeds), 1, 8, 8), np.uint8), DIGITS, samples=16)
    with pytest.warns(UserWarning, match="of the look at step 0: ") as caught:
        assert [monitor.look(step).count for step in range(3)] == [0, 0, 0]
    assert len(caught) == len(monitor.latest.audit.warnings)
    assert not caplog.records
    # Copies that are all one image show that it is copied, not how often: no stop.
    one = MemorizationMonitor(lambda seeds: DIGITS.images[[5] * len(seeds)], DIGITS, samples=64, stop=0.5)
    with pytest.warns(UserWarning, match="they count as one sample"):
        assert one.look(0).count == 64
    assert not one.should_stop


def monitored(*loggers):
    monitor = MemorizationMonitor(copies, DIGITS, samples=8, loggers=list(loggers))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in (3, 6):
            monitor.look(step, epoch=step // 3)
    return monitor.latest


def test_records_in_a_folder(tmp_path):
    monitored(tmp_path / "first")
    result = monitored(tmp_path / "first")  # a run that resumes adds its lines
    with open(tmp_path / "first" / "memorization.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6", "3", "6"]
    assert [float(rows[-1][name]) for name in ("ratio", "low", "high")] == [1.0, *result.interval]
    picture = np.asarray(Image.open(tmp_path / "first" / "step-000000006.png"))
    assert np.array_equal(picture, result.picture())
    assert as_logger(as_logger(tmp_path)).folder == tmp_path


def test_records_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    monitored(writer)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in events.Scalars("memorization/R_mem")] == [(3, 1.0), (6, 1.0)]
    assert len(events.Images("memorization/copies")) == 2


def test_records_in_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    run = wandb.init(mode="offline", dir=tmp_path, project="tests")
    try:
        monitored(run)
        assert run.summary["memorization/R_mem"] == 1.0
        assert run.summary["memorization/step"] == 6
    finally:
        run.finish()
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/memorization/*.png"))) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*loader strategy is deprecated")
def test_records_in_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run() as run:
        monitored(mlflow)
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run.info.run_id, "memorization/R_mem")
    assert [(each.step, each.value) for each in history] == [(3, 1.0), (6, 1.0)]
    assert len(client.list_artifacts(run.info.run_id, "memorization")) == 2
