"""Control-LoRA (Stability AI 2023, stabilityai/control-lora): a ControlNet whose encoder is the base's own, with a low-rank
change of its weights (Hu et al. 2021, arXiv 2106.09685); made for the base at hand, it runs as a ControlNet does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ControlNetModel
from diffusers.utils.state_dict_utils import convert_sai_sd_control_lora_state_dict_to_peft
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffusion_kit.models.sources import find_weights, tensor_shapes
from diffusion_kit.models.unet import Net, absent

from . import controlnet
from .control import Control, EncodedControl, Site
from .controlnet import hint_config

# What a file has whatever its base.
NEEDED = ("lora_controlnet", "input_hint_block.0.weight", "zero_convs.0.0.weight", "middle_block_out.0.weight")
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes as a number has


class ControlLoRA:
    """The tensors of a Control-LoRA.

    Args:
        tensors: of a file, under the names of the original UNet. name: of the file.

    Raises:
        ValueError: they are no Control-LoRA.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "this file"):
        own = any(
            key.endswith(DOWN) for key in tensors
        )  # diffusers' names, for bases that the published ones do not fit
        missing = [needed for needed in (NEEDED[:1] if own else NEEDED) if needed not in tensors]
        if missing:
            raise ValueError(f"{name} is no Control-LoRA: it has no {', '.join(missing)}")
        self.config = {"_name_or_path": name}
        converted = dict(tensors) if own else convert_sai_sd_control_lora_state_dict_to_peft(dict(tensors))
        placed = {id(value) for value in converted.values()}
        lost = [own for own, value in tensors.items() if id(value) not in placed and own != "lora_controlnet"]
        if lost:  # also a downsampler's pair without its bias, by which the peer knows it
            raise ValueError(f"{name} is no whole Control-LoRA: its {lost[0]} has no place in one")
        names = {key.removesuffix(DOWN).removesuffix(UP) for key in converted if key.endswith((DOWN, UP))}
        halves = sorted(half for name in names for half in (name + UP, name + DOWN) if half not in converted)
        if halves:
            raise ValueError(f"{name} is no whole Control-LoRA: it has no {halves[0]}")
        self.pairs = {f"{n}.weight": (converted[n + UP], converted[n + DOWN]) for n in sorted(names)}
        skipped = (DOWN, UP, NEEDED[0])
        self.whole = {n: value for n, value in converted.items() if value is not None and not n.endswith(skipped)}
        self.shapes = {name: (up.shape[0], *down.shape[1:]) for name, (up, down) in self.pairs.items()}
        self.shapes |= {name: tuple(value.shape) for name, value in self.whole.items()}
        try:
            self.hint = hint_config(self.shapes)
        except KeyError as error:
            raise ValueError(f"{name} is no whole Control-LoRA: it has no {error}") from None
        self._made: WeakKeyDictionary[Net, tuple[Tensor, Net]] = WeakKeyDictionary()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        weight_name: str | None = None,
        subfolder: str = "",
        torch_dtype: torch.dtype | None = None,
        **hub: Any,
    ) -> ControlLoRA:
        """Loads a .safetensors file, the only one or `weight_name` of a folder, or `weight_name` of a hub id.

        Args:
            torch_dtype: of the tensors that are kept; the network made of them has the base's.
            hub: revision, cache_dir, token and the like.

        Raises:
            FileNotFoundError: no such file. ValueError: a pickle, cut short, or no Control-LoRA.
        """
        file, *_ = find_weights(source, subfolder, weight_name, hub)
        tensor_shapes(file)
        return cls({name: value.to(torch_dtype or value.dtype) for name, value in load_file(file).items()}, str(file))

    @torch.no_grad()
    def network(self, unet: Net) -> Net:
        """The ControlNet for a base: W + up down where the file has a pair, and the file's tensor where it has a whole one;
        all else are the UNet's own parameters, shared. The UNet stays as it is; LoRAs that it has loaded are left out.

        It is kept with the UNet, and made anew where weights of the UNet have changed.

        Raises:
            ValueError: made for another base, or the UNet's weights are quantised or not in memory, or not whole.
        """
        unet = getattr(unet, "_orig_mod", unet)
        base = {name.replace(".base_layer.", "."): p for name, p in unet.named_parameters() if ".lora_" not in name}
        for name, weight in base.items():
            wrapped = is_traceable_wrapper_subclass(weight)
            plain = weight.is_floating_point() and weight.element_size() in INTEGERS and not wrapped
            if (away := absent(weight)) or not plain:
                kind = away or f"quantised ({type(weight.data).__name__ if wrapped else weight.dtype})"
                raise ValueError(
                    f"a Control-LoRA changes the base's weights; the UNet's {name} is {kind}: load it whole"
                )
        _check_fit({name: shape for name, shape in self.shapes.items() if not name.startswith("controlnet_")}, base)
        state = torch.stack([_sum_of_bits(base[name]) for name in self.pairs]).cpu()
        known, net = self._made.get(unet, (None, None))
        if known is None or not torch.equal(known, state):
            net = self._merged(unet, base)
            self._made[unet] = state, net
        return net

    def _merged(self, unet: Net, base: Mapping[str, Tensor]) -> Net:
        with torch.device("meta"):
            net = ControlNetModel.from_unet(unet, load_weights_from_unet=False, **self.hint)
        places = dict(net.named_parameters())
        _check_fit(self.shapes, places)
        device, dtype = unet.device, unet.dtype  # properties that go through all parameters
        made = {name: value.to(device, dtype) for name, value in self.whole.items()}
        for name, (up, down) in self.pairs.items():
            weight = base[name]
            change = up.to(weight.device).float().flatten(1) @ down.to(weight.device).float().flatten(1)
            made[name] = (weight.float() + change.view_as(weight)).to(weight.dtype)
        parameters = {**base, **{name: nn.Parameter(value, requires_grad=False) for name, value in made.items()}}
        for name in places:
            if name not in parameters:
                raise ValueError(f"{self.config['_name_or_path']} is no whole Control-LoRA: it has no {name}")
            module, _, own = name.rpartition(".")
            setattr(net.get_submodule(module), own, parameters[name])
        return net.eval()


MODELS = (ControlLoRA,)
FILES = {"control_lora": ControlLoRA.from_pretrained}


def encode(control: Control, site: Site) -> EncodedControl:
    """As a ControlNet, of the network that is made for the base."""
    return controlnet.encode(replace(control, model=control.model.network(site.unet)), site)


def _check_fit(given: Mapping[str, tuple[int, ...]], base: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: the base has another shape for a name, or none.
    """
    wrong = [name for name, shape in given.items() if name not in base or tuple(base[name].shape) != shape]
    if wrong:
        name = min(wrong, key=lambda name: name not in base)
        its = f"the base's is {tuple(base[name].shape)}" if name in base else "the base has none"
        raise ValueError(f"this Control-LoRA does not fit the base: its {name} is {given[name]}, {its}")


def _sum_of_bits(weight: Tensor) -> Tensor:
    """Differs where a number of the weight does, whoever changed it: one pass over it, no host read."""
    return weight.detach().view(INTEGERS[weight.element_size()]).sum(dtype=torch.int64)
