"""The paper's factors as studies, and studies of one's own."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from studies.tiny import TINY

from diffmem.errors import InputError
from diffmem.models import PRESETS, Denoiser
from diffmem.studies import Study, load_study
from diffmem.studies.presets import CIFAR10, NAMES, SCALES, WITHOUT_IMAGES, build, core_seconds
from diffmem.studies.report import published
from diffmem.studies.study import at_sizes
from diffmem.training import EMA, images_of


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_study_is_whole(name, scale):
    study = build(name, scale)
    trials = study.trials()
    assert len({trial.key for trial in trials}) == len(trials)
    assert Study.from_json(study.to_json()) == study
    assert study.published is None or study.published in published()
    assert study.questions or study.law
    assert all(study.contrast(question) for question in study.questions)
    if scale.startswith("digits"):  # its data are here: every variant can be trained
        for variant in study.variants if name not in WITHOUT_IMAGES else ():
            size = (variant.sizes or study.sizes)[0]
            images = variant.setting.training_set(size)
            assert len(images) == size
            variant.setting.config(images)


def test_published_runs_are_those_of_the_fast_scale():
    """Their keys are found again by today's studies, so that nothing that was run is run again."""
    with open(Path(__file__).parents[2] / "benchmarks/results/studies/digits-fast/runs.csv", newline="") as file:
        published_keys = {row["key"] for row in csv.DictReader(file)}
    fast = [trial.key for name in NAMES for trial in replace(build(name, "digits-fast"), repetitions=3).trials()]
    assert published_keys <= set(fast)


def test_the_cifar16_scale_fits_one_core(cifar10):
    study = build("size", "cifar16", str(cifar10 / "cifar10-test.zip"))
    setting = study.variants[0].setting
    images = setting.training_set(study.sizes[0])
    config = setting.config(images)
    assert images.image_shape == (1, 16, 16)
    assert 300_000 <= sum(parameter.numel() for parameter in Denoiser(config.denoiser).parameters()) <= 1_000_000
    assert (config.batch, setting.level_off is not None, set(setting.length)) == (64, True, {"epochs"})
    longest = max(setting.config(setting.training_set(size)).images for size in study.sizes)
    assert core_seconds(replace(study, repetitions=1), "cifar16") >= 0.0026 * longest
    assert core_seconds(build("size", "cifar10"), "cifar10") is None
    in_color = build("size", "cifar16", str(cifar10 / "cifar10-test.zip"), color="rgb").variants[0].setting
    assert in_color.training_set(20).image_shape == (3, 16, 16)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_IMAGES])
def test_variants_of_one_repetition_share_images_and_seed(name):
    """So that their runs can be compared in pairs; but where the factor is the images, which the study says."""
    study = build(name, "digits")
    for repetition in (0, 1):
        images: dict[object, set[bytes]] = {}
        for variant in study.variants:
            size = (variant.sizes or study.sizes)[0]
            training = variant.setting.training_set(size, repetition)
            assert variant.setting.config(training, repetition).seed == repetition
            images.setdefault((size, training.image_shape), set()).add(training.images.tobytes())
        assert all(len(each) == 1 for each in images.values()) == (not study.unpaired)
    assert bool(study.unpaired) == (name in ("classes", "diversity"))


def test_the_cifar10_scale_is_the_protocol(cifar10):
    setting = build("size", "cifar10", str(cifar10 / "cifar10-test.zip")).variants[0].setting
    images = setting.training_set(1000)
    config = setting.config(images)
    assert config.denoiser == PRESETS["ddpmpp_cifar10"]
    assert (config.batch, config.lr, config.betas, config.warmup_epochs) == (512, 2e-4, (0.9, 0.999), 200)
    assert config.images == 40_000 * 1000
    assert (config.ema, config.weight_decay, config.augment, config.window) == (EMA("compensated"), 0, 0, 0)
    sampling = setting.sample_settings()
    assert (sampling.solver, sampling.steps, setting.samples) == ("heun", 18, 10_000)


def test_factors_change_what_they_are_named_after():
    wide = build("width", "cifar10").variants
    assert [variant.setting.network["model_channels"] for variant in wide] == [128, 192, 256, 320]
    batches = build("batch", "cifar10").variants
    assert [v.setting.training["batch"] for v in batches] == list(range(128, 897, 128))
    assert batches[3].setting == CIFAR10
    assert batches[0].setting.training["lr"] == pytest.approx(5e-5)
    for scale in SCALES:
        runs = [variant.setting for variant in build("batch-steps", scale).variants]
        steps = {round(images_of(50, **each.length) / each.training["batch"]) for each in runs}
        assert len(steps) == 1
        assert runs[-1] == build("batch", scale).variants[-1].setting
    unique = build("unique-labels", "cifar10").variants[1].setting
    assert (unique.data.labels, unique.length, unique.network["num_blocks"]) == ("unique", {"duration": 600}, 4)
    skips = {variant.name: variant.setting.network.get("skips") for variant in build("skips", "cifar10").variants}
    assert skips["16.1 only"] == ["16.1"]
    assert skips["none"] == []


def test_own_studies_from_json_and_python(tmp_path):
    values = {
        "name": "rates",
        "title": "Learning rates",
        "factor": "learning rate",
        "setting": TINY.to_json(),
        "variants": [{"name": "slow"}, {"name": "fast", "changes": {"training.lr": 1e-2}, "sizes": [30]}],
        "sizes": [20],
        "questions": [{"text": "fast learning memorizes more", "higher": "fast", "lower": "slow"}],
    }
    (tmp_path / "rates.json").write_text(json.dumps(values))
    study = load_study(tmp_path / "rates.json")
    assert [trial.size for trial in study.trials()] == [20, 30]
    assert study.trials()[1].setting.training["lr"] == 1e-2
    (tmp_path / "rates.py").write_text(f"study = {values!r}")
    assert load_study(tmp_path / "rates.py") == study
    assert [trial.size for trial in at_sizes(study, (40,), 2).trials()] == [40, 40, 40, 40]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ('{"name": "a"}', "variants"),
        ('{"name": "a", "title": "", "factor": "", "variants": [{"name": "v"}], "sizes": [20]}', "give it a setting"),
    ],
)
def test_a_study_that_is_none_is_refused(text, words, tmp_path):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(InputError, match=words):
        load_study(tmp_path / "own.json")
    with pytest.raises(InputError, match="no such study"):
        load_study(tmp_path / "other.json")
