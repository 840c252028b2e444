"""What one micro-batch takes: bytes of activations and operations, by a forward and a backward without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from diffusion_kit.models.attention import installed
from diffusion_kit.models.live import Live
from diffusion_kit.training.bases import DTYPES
from diffusion_kit.training.config import Config
from diffusion_kit.training.data.samples import Batch, Sample, collate
from diffusion_kit.training.keyed import Place
from diffusion_kit.training.targets.target import Target

aten = torch.ops.aten
FINE = ("group_norm", "layer_norm", "softmax")
FLASH = {  # which torch does not count by itself
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class Rising(Live):
    """Counts gradients of weights, too, which rise while activations fall.

    Attributes:
        lean: most bytes at once without gradients of weights, which `aside` takes out.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__(known)
        self.gradients = self.lean = 0

    def see(self, storage: Any) -> None:
        super().see(storage)
        self.lean = max(self.lean, self.now - self.gradients)

    def aside(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self.gradients += weight.grad.untyped_storage().nbytes()


@dataclass(frozen=True)
class Trace:
    """Of a micro-batch.

    Attributes:
        activations: most bytes at once beside weights and their gradients.
        rising: the same with the gradients, which rise while the activations fall.
        flops: of forward and backward, a multiplication and an addition counted as two.
    """

    activations: float
    rising: float
    flops: float

    def times(self, other: Trace, size: int) -> Trace:
        """Of `size` pictures, from this one of 1 and another of 2: activations and operations are straight lines, and with
        the gradients they are the higher of two."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("activations", "rising", "flops")]
        activations, rising, flops = (one + (two - one) * (size - 1) for one, two in pairs)
        return Trace(activations, max(rising, activations), flops)


def trace(target: Target, config: Config, size: int, *, cpu: bool) -> Trace:
    """One micro-batch of `size` pictures, inside of `weightless`; `cpu` where it is to run on one."""
    weights = [weight for weight in target.parameters() if weight.requires_grad]
    live = Rising(tensors_of(target))
    hooks = [weight.register_post_accumulate_grad_hook(live.aside) for weight in weights]
    counter = FlopCounterMode(display=False, custom_mapping=FLASH)
    try:
        with torch.enable_grad(), installed(*target.executed), arithmetic(config, cpu=cpu):
            batch = blank(target, config, size)
            with live, counter:
                with torch.autocast("cpu", DTYPES[config.precision], enabled=config.precision != "no"):
                    loss = target(batch).loss.float().sum()
                loss.backward()
                del loss
    finally:
        for hook in hooks:
            hook.remove()
        target.zero_grad(set_to_none=True)
    return Trace(live.lean, live.peak, counter.get_total_flops())


@contextmanager
def arithmetic(config: Config, *, cpu: bool) -> Iterator[None]:
    """In half precision: attention as the trainer's loop has it on a CPU; or norms and softmax as on CUDA, whose autocast
    computes them in float32."""
    with ExitStack() as stack:
        if config.precision != "no" and cpu:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        elif config.precision != "no":
            for name in FINE:
                stack.enter_context(mock.patch.object(F, name, fine(getattr(F, name))))
        yield


def fine(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of float32."""

    def own(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args, **kwargs)

    return own


def tensors_of(target: Target) -> list[Tensor]:
    """Weights and buffers of everything that a target holds."""
    return [own for net in networks(target) for own in (*net.parameters(), *net.buffers())]


def networks(target: Target) -> list[Any]:
    """The target and the networks beside it."""
    pipes = [getattr(target.base, "pipe", None), getattr(target.base, "prior", None), getattr(target, "pipe", None)]
    parts = [part for pipe in pipes if pipe is not None for part in pipe.components.values()]
    return [target, *(part for part in parts if isinstance(part, torch.nn.Module))]


def blank(target: Target, config: Config, size: int) -> Batch:
    """Samples of the configuration's size, with what a cache keeps where there is one."""
    own, side, base = config.cache, config.data.resolution, target.base
    cached = own.folder is not None and base is not None
    place, ids = Place(0, 0, 0), torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)
    condition = torch.zeros(config.data.condition.channels, side, side) if target.conditioned else None
    moments = embed = None
    pixels: Tensor | None = torch.zeros(3, side, side)
    if cached and own.latents and base is not None:
        latent = side // target.scale_factor
        moments, pixels = torch.zeros(2 * base.vae.config.latent_channels, latent, latent), None
        embed = torch.zeros(base.prior.image_encoder.config.projection_dim) if base.prior is not None else None
    text = texts(target) if cached and own.text else None
    sample = Sample(place, "", 1.0, pixels, condition, "", False, False, ids, moments, embed, text)
    return collate([sample] * size)


def texts(target: Target) -> dict[str, Tensor] | None:
    """One text's embeddings, where its encoders do not learn."""
    base = target.base
    if base is None or not base.encoders or any(p.requires_grad for _, net in base.encoders for p in net.parameters()):
        return None
    with torch.no_grad():
        return {name: value[0] for name, value in base.text([""], [False]).items()}
