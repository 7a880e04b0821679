"""Pipelines of diffusers: monitored in real loops, and their networks sampled and compared as others are."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny_training import DIGITS, floats

import diffmem
from diffmem.cli import main
from diffmem.errors import InputError
from diffmem.models import fingerprint, load

diffusers = pytest.importorskip("diffusers", reason="the extra diffusers is not installed")
accelerate = pytest.importorskip("accelerate", reason="the extra diffusers is not installed")
from diffusers.training_utils import EMAModel  # noqa: E402

from diffmem.integrations.diffusers import MemorizationMonitor, pipeline_images  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
STEPS = {"num_inference_steps": 2}


def tiny_unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, dropout=0.1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        **{"out_channels": 1, **options},
    )  # fmt: skip


def tiny_pipeline(**scheduler):
    return diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(num_train_timesteps=50, **scheduler))


class Tracker(accelerate.tracking.GeneralTracker):
    """What accelerate logs, in a list; a tracker of one's own as accelerate has them."""

    name, requires_logging_directory = "list", False

    def __init__(self):
        super().__init__()
        self.logged = []

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.logged.append((step, values))


def train(look=None, epochs=2):
    """The loop of diffusers' train_unconditional, on digits."""
    accelerator = accelerate.Accelerator(cpu=True, log_with=Tracker())
    accelerator.init_trackers("tests")
    unet, scheduler = tiny_unet(), diffusers.DDPMScheduler(num_train_timesteps=50)
    ema = EMAModel(unet.parameters(), decay=0.5)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-3)
    torch.manual_seed(1)
    loader = torch.utils.data.DataLoader(floats(), batch_size=20, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    monitor = None if look is None else look(accelerator, unet, scheduler, ema)
    step = 0
    for epoch in range(epochs):
        for images in loader:
            noise, times = torch.randn_like(images), torch.randint(0, 50, (len(images),))
            predicted = unet(scheduler.add_noise(images, noise, times), times).sample
            accelerator.backward(torch.nn.functional.mse_loss(predicted, noise))
            optimizer.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            step += 1
        if monitor is not None:
            monitor.on_epoch_end(epoch, step)
            if monitor.should_stop:
                break
    return unet, scheduler, ema, monitor


def test_a_monitored_training_is_the_same_and_its_images_are_those_of_the_ema_weights(tmp_path):
    def look(accelerator, unet, scheduler, ema):
        def pipeline():
            return diffusers.DDPMPipeline(unet=accelerator.unwrap_model(unet), scheduler=scheduler)

        return MemorizationMonitor(
            pipeline, DIGITS, samples=6, batch=4, call=STEPS, ema=ema, loggers=tmp_path, accelerator=accelerator
        )

    plain, _, _, _ = train()
    unet, scheduler, ema, monitor = train(look)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name]), name
    assert unet.training
    assert scheduler.num_inference_steps is None  # the loop's own scheduler is not touched
    assert [(each.step, each.total) for each in monitor.results] == [(2, 6), (4, 6)]
    averaged = copy.deepcopy(unet).eval()
    ema.copy_to(averaged.parameters())
    pipeline = diffusers.DDPMPipeline(averaged, copy.deepcopy(scheduler))
    pipeline.set_progress_bar_config(disable=True)
    one_by_one = [pipeline(generator=torch.Generator().manual_seed(seed), **STEPS).images[0] for seed in range(6)]
    expected = diffmem.load_images(one_by_one).images.astype(int)
    assert np.abs(monitor.latest.audit.generated.images - expected).max() <= 1
    assert len(list(tmp_path.glob("step-*.png"))) == 2
    assert monitor.accelerator.trackers[0].logged == [(each.step, each.scalars()) for each in monitor.results]
    monitor.accelerator.save_state(tmp_path / "checkpoint")
    first, monitor.results, monitor.looks = monitor.results, [], 0
    monitor.accelerator.load_state(tmp_path / "checkpoint")
    assert [each.to_dict() for each in monitor.results] == [each.to_dict() for each in first]
    assert monitor.looks == 2


class Prompted(diffusers.DiffusionPipeline):
    """A pipeline whose images are those of its prompts."""

    def __call__(self, prompt, generator=None, output_type="pil", guidance_scale=1.0):
        images = DIGITS.images[[int(each) for each in prompt]].transpose(0, 2, 3, 1) / np.float32(255)
        made = {"np": images, "latent": torch.randn(len(prompt), 4, 8, 8) * 2}.get(output_type)
        images = self.numpy_to_pil(images) if made is None else made
        return diffusers.ImagePipelineOutput(images=images)


def test_a_pipeline_with_text_encoder_and_vae(tmp_path):
    """Stable Diffusion with random weights of a few kilobytes."""
    transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
    torch.manual_seed(0)
    words = ["<|startoftext|>", "a", "<|endoftext|>", "a</w>", "d", "o", "g", "do", "dog</w>", "g</w>"]
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    files[0].write_text(json.dumps({word: number for number, word in enumerate(words)}))
    files[1].write_text("#version: 0.2\nd o\ndo g</w>\n")
    settings = transformers.CLIPTextConfig(
        bos_token_id=0, eos_token_id=2, hidden_size=8, intermediate_size=16, num_attention_heads=2,
        num_hidden_layers=1, vocab_size=10,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(4, 8), layers_per_block=1, sample_size=8, norm_num_groups=2, cross_attention_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=[4, 8], latent_channels=4, norm_num_groups=2,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        ),
        text_encoder=transformers.CLIPTextModel(settings),
        tokenizer=transformers.CLIPTokenizer(*map(str, files), model_max_length=77),
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None, image_encoder=None,
        requires_safety_checker=False,
    )  # fmt: skip
    scheduler, call = pipeline.scheduler, {"num_inference_steps": 2, "height": 16, "width": 16}
    pipeline.unet.train()
    together, single = (pipeline_images(pipeline, range(3), prompts=["a dog", "a"], batch=n, **call) for n in (3, 1))
    assert together.shape == (3, 3, 16, 16)
    assert np.abs(together - single).max() < 1e-4
    assert pipeline.unet.training
    assert (pipeline.scheduler, scheduler.num_inference_steps) == (scheduler, None)
    training = (together.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    monitor = MemorizationMonitor(pipeline, training, prompts=["a dog", "a"], samples=3, call=call, stop=0.9)
    assert monitor.look(0).count == 3
    assert not monitor.should_stop  # three images show little
    pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(InputError, match="StableDiffusionPipeline with a text_encoder: sample it with"):
        load(f"diffusers:{tmp_path / 'pipeline'}")


class Classes(diffusers.DiffusionPipeline):
    """A pipeline of classes, without generators, whose images are those of its classes."""

    def __call__(self, class_labels, output_type="pil"):
        torch.rand(1)
        return (self.numpy_to_pil(DIGITS.images[class_labels].transpose(0, 2, 3, 1) / np.float32(255)),)


def test_classes_go_around():
    images = pipeline_images(Classes(), range(5), batch=2, class_labels=[7, 8, 9])
    assert np.array_equal(images, DIGITS.images[[7, 8, 9, 7, 8]])


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_prompts_go_around_and_a_stop_is_told(output_type):
    call = {"output_type": output_type, "guidance_scale": 2.0}
    prompts = [str(number) for number in range(3, 35)]
    monitor = MemorizationMonitor(
        Prompted(), DIGITS, prompts=prompts, samples=33, batch=5, stop=0.5, call=call
    )  # fmt: skip
    assert monitor.on_epoch_end(0).count == 33
    assert monitor.should_stop
    assert monitor.latest.audit.neighbors.indices[[0, 1, 31, 32], 0].tolist() == [3, 4, 34, 3]
    state = MemorizationMonitor(Prompted(), DIGITS, prompts=["3"])
    state.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert (state.looks, state.should_stop, state.latest.rate) == (1, True, monitor.latest.rate)


def test_bad_pipelines_are_one_warning_and_training_goes_on():
    for said, prompts, call in (
        ("latents", ["1"], {"output_type": "latent"}),
        ("needs prompts", None, {}),
        ("ValueError: invalid literal", ["one"], {}),
        ("unexpected keyword", ["1"], {"steps": 3}),
    ):
        monitor = MemorizationMonitor(Prompted(), DIGITS, prompts=prompts, call=call, samples=4)
        with pytest.warns(UserWarning, match="training continues") as caught:
            assert [monitor.on_epoch_end(epoch) for epoch in range(2)] == [None, None]
        assert len(caught) == 1, [str(each.message) for each in caught]
        assert said in str(caught[0].message)
    with pytest.raises(InputError, match="takes no prompts"):
        pipeline_images(tiny_pipeline(), [0], prompts=["a"])
    half = tiny_pipeline()
    half.unet.to(torch.bfloat16)
    assert pipeline_images(half, range(3), **STEPS).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [("epsilon", "linear"), ("sample", "scaled_linear"), ("v_prediction", "squaredcos_cap_v2")],
)
def test_a_unet_denoises_as_its_scheduler_says(prediction, schedule, tmp_path):
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=50, prediction_type=prediction, beta_schedule=schedule, clip_sample=False
    )
    diffusers.DDPMPipeline(tiny_unet(num_class_embeds=3), scheduler).save_pretrained(tmp_path)
    denoiser = load(f"diffusers:{tmp_path}")
    assert (denoiser.channels, denoiser.resolution, denoiser.label_dim) == (1, 8, 3)
    unet, x, labels = denoiser.model.unet, floats()[:4], torch.tensor([0, 1, 2, 0])
    for time in (0, 7, 49):
        alpha = scheduler.alphas_cumprod[time]
        sigma = ((1 - alpha) / alpha).sqrt()
        assert denoiser.round_sigma(float(sigma) * 1.001) == pytest.approx(float(sigma))
        noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(time))
        with torch.no_grad():
            output = unet(noisy * alpha.sqrt(), torch.tensor(time), class_labels=labels).sample
            expected = scheduler.step(output, time, noisy * alpha.sqrt()).pred_original_sample
            assert torch.allclose(denoiser(noisy, sigma, labels), expected, rtol=1e-4, atol=1e-4)
            if time:
                levels = torch.full((4,), float(sigma))
                assert torch.allclose(denoiser(noisy, levels, labels), expected, rtol=1e-4, atol=1e-4)
    again = load(f"diffusers:{tmp_path / 'unet'}")
    assert fingerprint(again) == fingerprint(denoiser)


def test_commands_read_what_a_pipeline_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained("pipeline")

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main(list(words))
        return end.value.code, "".join(capsys.readouterr())

    status, said = run("sample", "diffusers:pipeline", "--seeds", "0-3", "--steps", "2", "--out", "made.npz",
                       "--audit", "builtin:digits")  # fmt: skip
    assert status == 0, said
    assert np.load("made.npz")["images"].shape == (4, 1, 8, 8)
    few = ("--noisy-images", "4", "--levels", "3", "--seeds", "0-3", "--steps", "2", "--out", "compare")
    status, said = run("optimum", "compare", "builtin:digits", "diffusers:pipeline/unet", "--size", "20", *few)
    assert status == 0, said
    images = diffusers.DDPMPipeline.from_pretrained("pipeline", low_cpu_mem_usage=False)(batch_size=3, **STEPS).images
    for number, image in enumerate(images):
        image.save(tmp_path / f"made-{number}.png")
    (tmp_path / "images").mkdir()
    for path in tmp_path.glob("made-*.png"):
        path.rename(tmp_path / "images" / path.name)
    status, said = run("audit", "images", "builtin:digits")
    assert (status, "of 3 images" in said) == (0, True), said
    status, said = run("sample", "pipeline", "--seeds", "0-3", "--out", "other.npz")
    assert status == 1
    assert "write diffusers:pipeline" in said


def test_folders_that_are_no_such_pipeline_are_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "good")

    def changed(name, file, change):
        folder = tmp_path / name
        diffusers.DDPMPipeline.from_pretrained(tmp_path / "good", low_cpu_mem_usage=False).save_pretrained(folder)
        path = folder / file
        if change is None:
            path.unlink()
        elif isinstance(change, bytes):
            path.write_bytes(change)
        else:
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        return folder

    weights = "unet/diffusion_pytorch_model.safetensors"
    for folder, said in (
        (tmp_path / "nothing", "no such folder"),
        (tmp_path, "no model_index.json or config.json"),
        (
            changed("text", "model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}),
            "with a vae: sample it with its own",
        ),
        (changed("class", "unet/config.json", {"_class_name": "UNet2DConditionModel"}), "only UNet2DModel is read"),
        (changed("pickled", weights, None), "save the pipeline again with `save_pretrained`, which writes safetensors"),
        (changed("cut", weights, b"\x08\0\0\0\0\0\0\0{}"), "not a complete safetensors file"),
        (changed("flow", "scheduler/scheduler_config.json", {"prediction_type": "flow"}), "prediction_type is 'flow'"),
        (changed("alone", "scheduler/scheduler_config.json", None), "no scheduler/scheduler_config.json"),
        (changed("json", "unet/config.json", b"{"), "not JSON"),
    ):
        with pytest.raises(InputError, match=said) as error:
            load(f"diffusers:{folder}")
        assert "\n" not in str(error.value)
