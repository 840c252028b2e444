"""Controls and adapters in the layouts that other programs read: TencentARC's of a T2I-Adapter (Mou et al. 2023, arXiv
2302.08453), the original one of a ControlNet (Zhang et al. 2023, arXiv 2302.05543), and Stability's of a Control-LoRA, also
made of a ControlNet by the singular values of its difference to the base (Eckart and Young 1936)."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffusion_kit import __version__
from diffusion_kit.adapters.control import load_control_model
from diffusion_kit.adapters.control_lora import ControlLoRA
from diffusion_kit.adapters.controlnet import count
from diffusion_kit.adapters.t2i_adapter import LEVELS
from diffusion_kit.models.formats import describe, identify
from diffusion_kit.models.sources import load_component, locate

Tensors = dict[str, Tensor]

LAYOUTS: dict[str, tuple[type, ...]] = {
    "tencentarc": (T2IAdapter,),
    "controlnet": (ControlNetModel,),
    "control-lora": (ControlLoRA, ControlNetModel),
}
RANK = 64
LAYERS = 2  # residual blocks of a level in every published base
# Parts of a network by their names in diffusers and in the original code.
PARTS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.attentions.0": "middle_block.1",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",  # where readers look, however many are before it
}
RESNETS = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
INSIDE_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OWN = ("zero_convs.", "middle_block_out.", "input_hint_block.")  # of a ControlNet, not of its base
UNET = "model.diffusion_model."  # prefix of the UNet in a whole model of one file


class Loss(NamedTuple):
    """Of a low-rank change: its relative error |change - up down| / |change| in all layers together, and the largest one of
    a layer with that layer's name."""

    error: float
    worst: float
    layer: str


def export(
    source: str | Path,
    layout: str,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, Loss | None]:
    """The tensors of a control under the names of a layout, and what a lower rank has left out.

    Args:
        source: folder, file or hub id of a T2I-Adapter, a ControlNet or a Control-LoRA.
        layout: "tencentarc", "controlnet" or "control-lora".
        base: folder, file or hub id of the model that a ControlNet was trained for; only to make a Control-LoRA of it.
        rank: of the pairs of that Control-LoRA, 64 unless given.
        dtype: of the tensors.

    Raises:
        FileNotFoundError: no such model.
        ValueError: no such layout, or a control that it does not hold; base or rank missing or needless; another base.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}: the layouts are {', '.join(LAYOUTS)}")
    net = load_control_model(source)
    if not isinstance(net, LAYOUTS[layout]):
        fitting = [name for name, kinds in LAYOUTS.items() if isinstance(net, kinds)]
        right = f"take --layout {' or '.join(fitting)}" if fitting else "there is no layout for it here"
        raise ValueError(f"{source} is a {type(net).__name__}, which layout {layout} does not hold: {right}")
    decomposed = layout == "control-lora" and isinstance(net, ControlNetModel)
    if decomposed and base is None:
        raise ValueError(f"{source} is a ControlNet: a Control-LoRA is made of it and its base, so name that (--base)")
    if not decomposed and (base is not None or rank is not None):
        raise ValueError(f"{source} is only renamed for layout {layout}: leave out --base and --rank")
    for guess in guesses(net, layout):
        warnings.warn(f"no file in layout {layout} says that {guess}", stacklevel=2)
    if decomposed:
        return control_lora_of(net, base_tensors(str(base)), RANK if rank is None else rank, dtype)
    written: dict[str, Callable[[Any], Tensors]] = {
        "tencentarc": tencentarc,
        "controlnet": controlnet,
        "control-lora": control_lora,
    }
    return {name: value.to(dtype) for name, value in written[layout](net).items()}, None


def save(tensors: Mapping[str, Tensor], file: Path, *, layout: str) -> None:
    """Writes a safetensors file, with its layout and the kit's version in its header; beside its place, then renamed."""
    beside = file.with_name(f".{file.name}.part")
    values = {name: value.contiguous() for name, value in tensors.items()}
    try:
        save_file(values, beside, {"format": "pt", "layout": layout, "diffusion_kit": __version__})
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


# Names


def tencentarc(net: T2IAdapter) -> Tensors:
    """A T2I-Adapter's tensors as TencentARC names them: residual blocks of a full adapter are counted through all levels,
    those of a light one in each."""
    each = net.config.num_res_blocks

    def place(match: re.Match) -> str:
        return f"body.{int(match[1]) * each + int(match[2] or 0)}."

    names = {name: name.removeprefix("adapter.") for name in net.state_dict()}
    if net.config.adapter_type == "light_adapter":
        names = {name: old.replace(".resnets.", ".body.") for name, old in names.items()}
    else:
        names = {name: re.sub(r"^body\.(\d+)\.(?:resnets\.(\d+)\.)?", place, old) for name, old in names.items()}
    return {names[name]: value for name, value in net.state_dict().items()}


def controlnet(net: ControlNetModel) -> Tensors:
    """A ControlNet's tensors in the original layout."""
    return {f"control_model.{name}": value for name, value in original(net.state_dict()).items()}


def control_lora(lora: ControlLoRA) -> Tensors:
    """A Control-LoRA's tensors in Stability's layout."""
    pairs = {
        name.removesuffix("weight") + half: value
        for name, pair in lora.pairs.items()
        for half, value in zip(("up", "down"), pair, strict=True)
    }
    return {"lora_controlnet": torch.tensor([])} | original(pairs | lora.whole)


def original(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of the encoder of a UNet, or of a ControlNet, under the names of the original code.

    Raises:
        ValueError: one has no name there.
    """
    levels, layers = count(tensors, "down_blocks."), count(tensors, "down_blocks.0.resnets.")
    resnets, parts = dict(RESNETS), dict(PARTS)
    for level in range(levels):
        first = 1 + level * (layers + 1)  # behind conv_in, and in each level before it the blocks and a downsampler
        for k in range(layers):
            resnets[f"down_blocks.{level}.resnets.{k}"] = f"input_blocks.{first + k}.0"
            parts[f"down_blocks.{level}.attentions.{k}"] = f"input_blocks.{first + k}.1"
        parts[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    parts |= {f"{a}.{b}": f"{resnets[a]}.{old}" for a in resnets for b, old in INSIDE_RESNET.items()}
    parts |= {f"controlnet_down_blocks.{k}": f"zero_convs.{k}.0" for k in range(levels * (layers + 1))}
    hints = count(tensors, "controlnet_cond_embedding.blocks.")
    parts |= {f"controlnet_cond_embedding.blocks.{k}": f"input_hint_block.{2 * k + 2}" for k in range(hints)}
    renamed = {}
    for name, value in tensors.items():
        part = next((part for part in parts if name.startswith(f"{part}.")), None)
        if part is None:
            raise ValueError(f"{name} has no place in the original layout")
        renamed[parts[part] + name.removeprefix(part)] = value
    return renamed


def guesses(net: Any, layout: str) -> list[str]:
    """What no tensor in a layout shows and readers take for something else than it is in this network, a line each."""
    config: dict[str, Any] = dict(net.config)
    taken: dict[str, Any] = {}
    if isinstance(net, T2IAdapter) and config["adapter_type"] != "light_adapter":
        config["levels"] = len(config["channels"])
        taken = {
            "levels": LEVELS,
            "adapter_type": "full_adapter_xl" if config["downscale_factor"] == 16 else "full_adapter",
        }
    if isinstance(net, ControlNetModel):
        taken = {
            "global_pool_conditions": False,
            "controlnet_conditioning_channel_order": "rgb",
            "layers_per_block": LAYERS,
        }
    if isinstance(net, ControlLoRA):
        config["layers_per_block"] = count(net.shapes, "down_blocks.0.resnets.")
        taken = {"layers_per_block": LAYERS}
    if layout == "controlnet":
        attentions = [module for name, module in net.named_modules() if name.endswith(".attn1")]
        config["heads"] = [module.heads for module in attentions]
        linear = config["use_linear_projection"]
        taken |= {
            "norm_num_groups": 32,
            "heads": [module.inner_dim // 64 if linear else 8 for module in attentions],
        }
    return [f"{k} is {config[k]}; readers take it for {value}" for k, value in taken.items() if config[k] != value]


# A ControlNet as a change of its base


def base_tensors(source: str | Path) -> Tensors:
    """The tensors of a base's UNet under original names, where they have one: of its encoder.

    Raises:
        FileNotFoundError: no such model. ValueError: it is of another kind.
    """
    place = locate(source)
    if isinstance(place, Path) and place.is_file():
        if identify(place).kind != "checkpoint":
            raise ValueError(f"{place} is no base: it is {describe(place)}")
        with safe_open(place, "pt") as file:
            names = [name for name in file.keys() if name.startswith(UNET)]  # noqa: SIM118
            return {name.removeprefix(UNET): file.get_tensor(name) for name in names}
    if isinstance(place, Path):  # its own folder: without one the peer takes what is beside
        unet = load_component(UNet2DConditionModel, place.absolute() / "unet")
    else:
        unet = load_component(UNet2DConditionModel, place, subfolder="unet")
    decoder = ("up_blocks.", "conv_norm_out.", "conv_out.")
    return original({name: value for name, value in unet.state_dict().items() if not name.startswith(decoder)})


@torch.no_grad()
def control_lora_of(
    net: ControlNetModel, base: Mapping[str, Tensor], rank: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensors, Loss]:
    """A Control-LoRA of a ControlNet: a pair for every matrix and convolution of its encoder; biases, norms and what the
    base does not have are kept whole.

    Args:
        base: tensors of the base's UNet under original names.
        rank: of a pair; less where a matrix has less.
        dtype: of the result.

    Raises:
        ValueError: no rank; the ControlNet is no change of this base.
    """
    if rank < 1:
        raise ValueError(f"--rank is {rank}; it must be 1 or more")
    weights = original(net.state_dict())
    encoder = {name: weight for name, weight in weights.items() if not name.startswith(OWN)}
    for name, weight in encoder.items():
        if name not in base or base[name].shape != weight.shape:
            its = f"the base's is {tuple(base[name].shape)}" if name in base else "the base has none"
            raise ValueError(f"this ControlNet is not made for the base: its {name} is {tuple(weight.shape)}, {its}")
    matrices = {name: weight for name, weight in encoder.items() if weight.ndim > 1}
    tensors: Tensors = {"lora_controlnet": torch.tensor([], dtype=dtype)}
    tensors |= {name: weight.to(dtype) for name, weight in weights.items() if name not in matrices}
    squares: dict[str, tuple[float, float]] = {}
    for name, weight in tqdm(matrices.items(), "layers", disable=None):
        change, stem = weight.float() - base[name].float(), name.removesuffix(".weight")
        up, down = (half.to(dtype) for half in low_rank(change, rank))
        tensors |= {f"{stem}.up": up, f"{stem}.down": down}
        left = change.flatten(1) - up.float().flatten(1) @ down.float().flatten(1)
        squares[stem] = left.square().sum().item(), change.square().sum().item()
    return tensors, _loss(squares)


def _loss(squares: Mapping[str, tuple[float, float]]) -> Loss:
    """Of the sums of squares of what is left of each layer's change, and of the change."""
    errors = {name: math.sqrt(left / whole) if whole else 0.0 for name, (left, whole) in squares.items()}
    left, whole = (sum(sums) for sums in zip(*squares.values(), strict=True))
    worst = max(errors, key=errors.__getitem__)
    return Loss(math.sqrt(left / whole) if whole else 0.0, errors[worst], worst)


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair whose product up down is the nearest of its rank to a change (out, in) or (out, in, h, w): up (out, rank) or
    (out, rank, 1, 1), down (rank, in) or (rank, in, h, w)."""
    u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
    root = s[:rank].sqrt()  # in both halves, so that neither is lost in half precision
    up = (u[:, :rank] * root).reshape(len(change), -1, *(1,) * (change.ndim - 2))
    return up, (root[:, None] * v[:rank]).reshape(-1, *change.shape[1:])
