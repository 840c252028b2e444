"""A Control-LoRA (Stability AI 2023) for a frozen base: a ControlNet whose encoder is the base's own with a low-rank change
of every matrix and convolution (Hu et al. 2021, arXiv 2106.09685). What is not of the base, the control image's embedding
and the output convolutions, is trained whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusion_kit.adapters.control_lora import DOWN, UP, ControlLoRA
from diffusion_kit.training.config import Config
from diffusion_kit.training.export import LAYERS, original, save

from .controlnet import ControlNetTarget, copied, hint_settings

RANK = 64
OWN = "controlnet_"  # begins the names of what is not of the base
ADAPTER = "default"  # peft's name of the only pair that a layer has


class ControlLoRATarget(ControlNetTarget):
    def network(self) -> Any:
        """The base's encoder with pairs beside its layers; its own weights are shared, not copied."""
        settings = dict(self.config.network)
        rank = int(settings.pop("rank", RANK))
        unet = self.base.unet
        own = hint_settings(self.config.model_copy(update={"network": settings}), self.base)
        net = copied(self.base, own, load_weights_from_unet=False)
        shared = dict(unet.named_parameters())
        for name in dict(net.named_parameters()):
            if name in shared:
                module, _, last = name.rpartition(".")
                setattr(net.get_submodule(module), last, shared[name])
        layers = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and not n.startswith(OWN)]
        names = "|".join(map(re.escape, layers))  # one pattern for whole names: names in a list match their ends too
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), net, ADAPTER)
        if self.config.init_from:
            fill(net, self.config.init_from)
        base = {id(weight) for weight in unet.parameters()}
        for weight in net.parameters():
            if id(weight) not in base:  # those stay frozen, in the base's precision
                weight.data = weight.data.float()
                weight.requires_grad_(True)
        return net

    def kept(self) -> dict[str, Tensor]:
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name in trained}

    @property
    def control(self) -> Any:
        return ControlLoRA(
            {name: value.clone() for name, value in self.tensors().items()}, "the Control-LoRA in training"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Of the file: diffusers' names, the pairs under peft's."""
        found = {"lora_controlnet": torch.tensor([])}
        for name, value in self.controlnet.named_parameters():
            if value.requires_grad:
                found[name.replace(f".{ADAPTER}.", ".").replace(".base_layer.", ".")] = value.detach()
        return found

    def downsampler_biases(self) -> dict[str, Tensor]:
        """The base's own, by which readers of the published layout know a downsampler."""
        places = dict(self.controlnet.named_parameters())
        names = [name for name in places if ".downsamplers." in name and name.endswith(".bias")]
        return {name.replace(".base_layer.", "."): places[name].detach() for name in names}

    def save(self, folder: Path) -> None:
        """One file: in the published layout where the base has two blocks a level, as that counts them."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.tensors()
        if self.controlnet.config.layers_per_block == LAYERS:
            marker = {"lora_controlnet": tensors.pop("lora_controlnet")}
            tensors |= self.downsampler_biases()
            names = {name: name.replace(UP, ".up").replace(DOWN, ".down") for name in tensors}
            tensors = marker | original({names[name]: value for name, value in tensors.items()})
        save(tensors, folder / "control_lora.safetensors", layout="control-lora")


def make(config: Config, device: torch.device) -> Any:
    return ControlLoRATarget(config, device)


@torch.no_grad()
def fill(net: Any, source: str) -> None:
    """Puts the tensors of a Control-LoRA into a network made for one. Where they are others than the base's own, as biases
    and norms of published ones are, the network gets parameters of its own for them.

    Raises:
        ValueError: of another rank or for another base.
    """
    given = ControlLoRA.from_pretrained(source)
    values = {name: value for name, value in given.whole.items()}
    for name, (up, down) in given.pairs.items():
        stem = name.removesuffix(".weight")
        values |= {f"{stem}.lora_B.{ADAPTER}.weight": up, f"{stem}.lora_A.{ADAPTER}.weight": down}
    places = {name.replace(".base_layer.", "."): name for name, _ in net.named_parameters()}
    for name, value in values.items():
        module, _, last = places.get(name, name).rpartition(".")
        own = getattr(net.get_submodule(module), last) if name in places else None
        if own is None or own.shape != value.shape:
            its = "has none" if own is None else f"takes {tuple(own.shape)}"
            raise ValueError(f"init_from {source} does not fit: its {name} is {tuple(value.shape)}, the network {its}")
        if not torch.equal(own, value.to(own)):
            setattr(net.get_submodule(module), last, nn.Parameter(value.to(own)))
