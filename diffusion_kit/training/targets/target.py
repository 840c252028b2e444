"""What every target is: a module whose parameters are trained and whose forward is the loss of a batch."""

from __future__ import annotations

import difflib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_kit.adapters.control import load_control_model
from diffusion_kit.pipelines.auto import AutoPipelineForText2Image
from diffusion_kit.sampling.doors import Answer
from diffusion_kit.training.bases import Base, Conditioning
from diffusion_kit.training.config import Config
from diffusion_kit.training.data.samples import Batch


class Losses(NamedTuple):
    """Of each sample of a batch: the loss (B,), weighted, and the noise level in [0, 1) that it belongs to, (B,)."""

    loss: Tensor
    level: Tensor


class Target(nn.Module, ABC):
    """
    Attributes:
        conditioned: whether it sees condition images.
        base: the frozen networks; no part of the module, so that only what is trained is saved and averaged.
        executed: networks that run through the executor, whose attention the loop installs.
    """

    conditioned: ClassVar[bool] = False
    base: Base | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @property
    def executed(self) -> list[Any]:
        return []

    @abstractmethod
    def forward(self, batch: Batch) -> Losses: ...

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what diffusers loads."""

    @property
    def scale_factor(self) -> int:
        """Pixels to a latent: what the sides of pictures are multiples of."""
        return 1 if self.base is None else int(self.base.pipe.vae_scale_factor)

    @property
    def control(self) -> Any:
        """What a `Control` takes for its model; None where the target is no control."""
        return None

    def pipeline(self) -> Any:
        """Makes pictures with the weights as they are; None where the target alone makes none."""
        return None

    def checkpoint_gradients(self) -> None:
        """Trades time for memory."""

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return dict(self.state_dict())

    def begin(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Before the first step: what is measured once over some batches."""

    def finish(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """After the last step: what is measured once over some batches."""


class Denoising(Target):
    """Learns to say what a denoising network should of noisy latents; `answer` is what the trained part adds."""

    base: Base

    @property
    def executed(self) -> list[Any]:
        return [self.base.unet]

    def forward(self, batch: Batch) -> Losses:
        base, objective = self.base, self.base.objective
        x = base.latents(batch)
        noise = objective.noise(batch.places, x.shape[1:]).to(x)
        t = objective.timesteps(batch.places).to(x.device)
        noisy = objective.add_noise(x, noise, t)
        conditioning = base.conditioning(batch)
        prediction = base.predict(noisy, t, conditioning, self.answer(batch, noisy, t, conditioning))
        error = F.mse_loss(prediction.float(), objective.target(x, noise, t), reduction="none").mean((1, 2, 3))
        return Losses(error * objective.weights(t), t / len(objective.alphas))

    def pipeline(self) -> Any:
        if self.base.prior is None:
            return self.base.pipe
        return AutoPipelineForText2Image.from_pipe(self.base.pipe, prior=self.base.prior)

    def answer(self, batch: Batch, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Answer:
        return Answer()

    def checkpoint_gradients(self) -> None:
        for net in self.executed:
            checkpoint_gradients(net)


def checkpoint_gradients(net: Any) -> None:
    """
    Raises:
        ValueError: a network that cannot compute its activations again.
    """
    if not net._supports_gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing: a {type(net).__name__} has none, set it to false")
    net.enable_gradient_checkpointing()


def built(cls: Any, settings: dict[str, Any]) -> Any:
    """A network of a class of diffusers with the settings of the configuration's `network`."""
    check_keys(cls.__init__, settings, cls.__name__)
    return cls(**settings)


def given(config: Config, cls: Any) -> Any:
    """The network that `init_from` names.

    Raises:
        ValueError: of another class, or for condition images of other channels.
    """
    net = load_control_model(str(config.init_from))
    if not isinstance(net, cls):
        raise ValueError(
            f"init_from {config.init_from} is a {type(net).__name__}; {config.target} starts from a {cls.__name__}"
        )
    takes = net.config.get("in_channels" if config.target == "t2i_adapter" else "conditioning_channels")
    if takes != config.data.condition.channels:
        raise ValueError(f"init_from {config.init_from} sees {takes} channels: set data.condition.channels={takes}")
    return net


def carry(*convs: Any) -> None:
    """Initial weights with which convolutions, SiLU between them, keep the spread of what they see: torch's own let each
    shrink it to a third, so that of a control image a thousandth comes out of a chain of six, and long nothing is learned.

    SiLU halves what is small, hence 2 / sqrt(inputs of a convolution).
    """
    for conv in convs:
        nn.init.normal_(conv.weight, std=2 / math.sqrt(conv.weight[0].numel()))
        nn.init.zeros_(conv.bias)


def check_keys(function: Any, settings: dict[str, Any], what: str) -> None:
    """
    Raises:
        ValueError: a key of `network` that the function does not take, with the nearest one.
    """
    known = [name for name in inspect.signature(function).parameters if name not in ("self", "unet")]
    if unknown := next((name for name in settings if name not in known), None):
        near = difflib.get_close_matches(unknown, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"no key network.{unknown} of a {what}; {hint}")


def in_float32(net: Any) -> Any:
    """A network that is trained: its weights in float32, whatever the base's precision."""
    return net.to(torch.float32).requires_grad_(True).train()
