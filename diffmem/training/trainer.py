"""The trainer: network, EMA weights, optimizer and data of a run, their step, and their state."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from diffmem.data import DatasetSpec, ImageSource, read_data
from diffmem.devices import pick_device
from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.models import Denoiser, Model, WrappedDenoiser
from diffmem.precision import AUTOCAST, float32_products, measured_convolutions, warn_where_slow
from diffmem.training.augmentation import augment, augmentation_labels, draw_augmentation
from diffmem.training.config import TrainingConfig
from diffmem.training.dataset import TrainingImages
from diffmem.training.losses import Draws, denoising_loss, draw
from diffmem.training.network import buffers, networks
from diffmem.training.order import DataOrder
from diffmem.training.parallel import Ranks
from diffmem.training.passes import GraphedPass, Tensors, capture_cuda, forward_backward
from diffmem.training.run_folder.description import describe
from diffmem.training.run_folder.state import checked_tensor
from diffmem.training.seeds import seed_of
from diffmem.training.weights import FlatParameters, make_optimizer, sanitize


class _Objective(nn.Module):
    """The denoiser with its loss: the loss of each image, summed over its pixels."""

    def __init__(self, denoiser: Denoiser | WrappedDenoiser, config: TrainingConfig) -> None:
        super().__init__()
        self.denoiser, self.tikhonov = denoiser, config.tikhonov
        self.preconditioning = config.denoiser.preconditioning

    def forward(
        self,
        images: torch.Tensor,
        level: torch.Tensor,
        noise: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        loss = denoising_loss(
            self.denoiser,
            images,
            self.preconditioning,
            labels,
            augment_labels,
            draws=Draws(level, noise),
            tikhonov=self.tikhonov,
        )
        return loss.sum(dim=(1, 2, 3))


class Trainer:
    """Network, averaged network, optimizer and data of a run, and their step; arguments as for `train`."""

    def __init__(
        self,
        config: TrainingConfig,
        data: ImageSource,
        device: str | torch.device = "auto",
        batch_gpu: int | None = None,
        compile: bool | str = "auto",
        ranks: Ranks | None = None,
        data_source: DatasetSpec | None = None,
        cuda_graph: bool | str = "auto",
        model: Model | None = None,
    ):
        ranks = Ranks() if ranks is None else ranks
        for name, value in (("compile", compile), ("cuda_graph", cuda_graph)):
            if value not in (True, False, "auto"):
                raise InputError(f"{name} is {value!r}, but must be True, False or 'auto'")
        self.config, self.ranks = config, ranks
        self.device = pick_device(device)
        if cuda_graph is True and self.device.type != "cuda":
            raise InputError(f"cuda_graph is True, but the device is {self.device}: use 'auto'")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.share = config.batch // ranks.size
        self.microbatch = self.share if batch_gpu is None else batch_gpu
        if config.batch % ranks.size or self.microbatch < 1 or self.share % self.microbatch:
            raise InputError(
                f"batch {config.batch} cannot be split into passes of batch_gpu {self.microbatch} on {ranks.size} "
                "process(es): choose a divisor"
            )
        images, source = read_data(data)
        self.source = source or data_source
        self.data = TrainingImages(images, config.denoiser.network, self.device, config.xflip)
        self.order = DataOrder(len(self.data), seed_of(config.seed, "order"), config.window)
        torch.manual_seed(seed_of(config.seed, "weights"))
        denoiser, averaged = networks(config.denoiser, model)
        self.denoiser = denoiser.to(self.device).train()
        self.averaged = averaged.to(self.device).eval()
        self.buffers, self.averaged_buffers = buffers(self.denoiser), buffers(self.averaged)
        self.flat = FlatParameters(self.denoiser, gradients=True)
        self.flat_averaged = FlatParameters(self.averaged, gradients=False)
        self.optimizer = make_optimizer(config, self.flat)
        self.denoiser.autocast_dtype = AUTOCAST[config.precision]
        self.objective: Callable[..., torch.Tensor] = _Objective(self.denoiser, config)
        own = isinstance(self.denoiser, WrappedDenoiser)  # its owner knows what it can be made of
        self.compile, self.cuda_graph = (False if own and each == "auto" else each for each in (compile, cuda_graph))
        self.passes: GraphedPass | None = None
        self.generator = torch.Generator(self.device)
        self.host_generator = torch.Generator()
        self.images = 0
        self.lr = self.beta = 0.0
        # Summed on the device, read at ticks: nothing waits for it in between. Since the last tick, and snapshot.
        self.loss_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.loss_counts = [0, 0]

    def enter(self, settings: contextlib.ExitStack) -> None:
        """Sets what holds for the whole process while this run computes: how products and convolutions are formed."""
        warn_where_slow(self.config.precision, self.device.type)
        settings.enter_context(float32_products(self.config.precision))
        settings.enter_context(measured_convolutions(self.device))

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.images // self.config.batch

    @property
    def total_steps(self) -> int:
        return math.ceil(self.config.images / self.config.batch)

    @property
    def finished(self) -> bool:
        return self.steps >= self.total_steps

    @property
    def epochs(self) -> float:
        return self.images / len(self.data)

    def step(self) -> None:
        """One step of the optimizer, over the whole batch of all processes."""
        config, size = self.config, len(self.data)
        first = self.ranks.rank * self.share
        mine = slice(first, first + self.share)
        images, labels = self.data.batch(self.order.take(config.batch)[mine])
        augment_labels = None
        if config.augment:
            self.host_generator.manual_seed(seed_of(config.seed, "augmentation", self.steps))
            drawn = draw_augmentation(config.batch, config.augment, self.host_generator)[mine]
            images, augment_labels = augment(images, drawn), augmentation_labels(drawn).to(self.device)
        # For the batch of all processes: what an image is given must not depend on how many there are.
        self.generator.manual_seed(seed_of(config.seed, "noise", self.steps))
        shape = (config.batch, *images.shape[1:])
        level, noise = draw(config.denoiser.preconditioning, shape, self.device, self.generator)
        level, noise = level[mine], noise[mine]
        self.flat.gradient.zero_()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, self.share, self.microbatch):
            part = slice(start, start + self.microbatch)
            # Dropout draws from torch's own generator.
            torch.manual_seed(seed_of(config.seed, "dropout", self.steps, first + start))
            given = (images, level, noise, labels, augment_labels)
            loss += self.forward_backward(tuple(None if each is None else each[part] for each in given))
        gradient = self.flat.gradient
        self.ranks.sum(gradient)
        self.ranks.sum(loss)
        sanitize(gradient)
        self.lr = config.learning_rate(self.images, size)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.beta = config.ema.beta(self.images, config.batch, size)
        self.flat_averaged.values.data.lerp_(self.flat.values.data, 1 - self.beta)
        for name, buffer in self.buffers.items():
            self.averaged_buffers[name].copy_(buffer)
        self.loss_sums += loss
        self.loss_counts = [count + config.batch for count in self.loss_counts]
        self.images += config.batch

    def forward_backward(self, tensors: Tensors) -> torch.Tensor:
        """Adds the gradient of a part of the batch (images, level, noise, labels, augment_labels), and returns its
        summed loss."""
        if self.cuda_graph is not True:
            return forward_backward(self.objective, self.config.batch, tensors)
        if self.passes is None:
            run = partial(forward_backward, self.objective, self.config.batch)
            self.passes = GraphedPass(run, self.changing(), capture_cuda)
        return self.passes(tensors)

    def changing(self) -> list[torch.Tensor]:
        """What a pass changes: the gradient, and the network's buffers."""
        return [self.flat.gradient, *self.buffers.values()]

    def mean_losses(self) -> tuple[float, float]:
        """Mean loss per pixel since the last tick and since the last snapshot."""
        network = self.config.denoiser.network
        pixels = network.channels * network.resolution**2
        since_tick, since_snapshot = (
            value / (max(count, 1) * pixels)
            for value, count in zip(self.loss_sums.tolist(), self.loss_counts, strict=True)
        )
        return since_tick, since_snapshot

    def forget_losses(self, which: int) -> None:
        self.loss_sums[which] = 0.0
        self.loss_counts[which] = 0

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, metadata) for `save_state`."""
        tensors = {
            "weights": self.flat.to_stored(self.flat.values),
            "averaged": self.flat_averaged.to_stored(self.flat_averaged.values),
            "order": torch.from_numpy(self.order.order),
            "loss_sums": self.loss_sums,
            **{f"buffer.{name}": buffer for name, buffer in self.buffers.items()},
        }
        for name, value in self.optimizer.state[self.flat.values].items():
            if isinstance(value, torch.Tensor):
                moments = value.shape == self.flat.values.shape
                tensors[f"optimizer.{name}"] = self.flat.to_stored(value) if moments else value
        metadata = {
            "images": self.images,
            "loss_counts": self.loss_counts,
            "order": self.order.state(),
            "compiled": bool(self.compile),
            **describe(self.config, self.data, self.source),
        }
        return tensors, metadata

    def restore(self, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Continues where `state` was taken."""
        count, size = self.flat.values.numel(), len(self.order.order)
        if metadata["images"] % self.config.batch:
            raise InputError(f"the training state is after {metadata['images']:,} images, not a multiple of the batch")
        weights = checked_tensor(tensors, "weights", (count,), self.flat.values.dtype)
        averaged = checked_tensor(tensors, "averaged", (count,), self.flat_averaged.values.dtype)
        order = checked_tensor(tensors, "order", (size,), torch.int64)
        loss_sums = checked_tensor(tensors, "loss_sums", (2,), torch.float64)
        for name in tensors:
            if name.startswith("optimizer.") and name != "optimizer.step":
                checked_tensor(tensors, name, (count,), self.flat.values.dtype)
        held = {
            name: checked_tensor(tensors, f"buffer.{name}", tuple(buffer.shape), buffer.dtype)
            for name, buffer in self.buffers.items()
        }
        with parsing("the training state", "an order of this training set"):
            self.order.restore(metadata["order"], order.numpy())
        self.flat.values.data.copy_(self.flat.from_stored(weights))
        self.flat_averaged.values.data.copy_(self.flat_averaged.from_stored(averaged))
        state = {}
        for name, value in tensors.items():
            if name == "optimizer.step":
                state["step"] = value.cpu()
            elif name.startswith("optimizer."):
                state[name.removeprefix("optimizer.")] = self.flat.from_stored(value).to(self.device)
        if state:
            layout = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**layout, "state": {0: state}})
        for name, value in held.items():
            self.buffers[name].copy_(value)
            self.averaged_buffers[name].copy_(value)
        self.loss_sums.copy_(loss_sums)
        self.loss_counts = list(metadata["loss_counts"])
        self.images = metadata["images"]
        # Compiled code rounds differently: what was decided at the start holds for the whole run.
        if self.compile == "auto":
            self.compile = metadata["compiled"]
