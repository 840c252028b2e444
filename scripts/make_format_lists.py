"""Writes tests/formats/*.txt: names and shapes of the tensors in files of every kind that users have.

They are made of models of real size, built from their configurations without weights, and where a file has other names
than diffusers' by the inverse of the conversion, which is here. Of layers that are repeated only the first are kept, and no
biases.

python scripts/make_format_lists.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    Kandinsky3UNet,
    PriorTransformer,
    T2IAdapter,
    UNet2DConditionModel,
    VQModel,
)

Shapes = dict[str, tuple[int, ...]]
FOLDER = Path(__file__).resolve().parents[1] / "tests" / "formats"
REPEATED = re.compile(
    r"(resnets|attentions|transformer_blocks|layers|resnets_in|resnets_out|resnet_blocks|transformer_layes)[._][1-9]"
    r"|(input_blocks|output_blocks)\.(?!(0|1|3|4|7)\.)|\.bias$|\.alpha$"
)
XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
XL_UP = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
REFINER: dict[str, Any] = {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
SD1 = {"cross_attention_dim": 768}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
KANDINSKY: dict[str, Any] = {
    "block_out_channels": (384, 768, 1152, 1536),
    "layers_per_block": 3,
    "out_channels": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "attention_head_dim": 64,
    "cross_attention_dim": 768,
    "resnet_time_scale_shift": "scale_shift",
}


def shapes_of(cls: Any, **config: Any) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in cls(**config).state_dict().items()}


# diffusers' names to the original ones

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}


def original(name: str, layers: int = 2) -> str:
    """The original name of a tensor of a UNet or ControlNet with so many layers a block."""
    for new, old in ENDS.items():
        if name.startswith(f"{new}."):
            return old + name[len(new) :]
    if match := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)(.*)", name):
        return f"input_hint_block.{2 * int(match[1]) + 2}{match[2]}"
    if match := re.match(r"controlnet_down_blocks\.(\d+)(.*)", name):
        return f"zero_convs.{match[1]}.0{match[2]}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_inside(match[1], match[3])}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if match is None:
        raise ValueError(f"{name} has no original name here")
    side, block, part, index = match[1], int(match[2]), match[3], int(match[4])
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{match[5].removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.2.{match[5]}"
    stem = f"input_blocks.{1 + block * (layers + 1) + index}" if side == "down" else None
    stem = stem or f"output_blocks.{block * (layers + 1) + index}"
    return f"{stem}.{int(part == 'attentions')}.{_inside(part, match[5])}"


def _inside(part: str, name: str) -> str:
    if part == "attentions":
        return name
    layer, _, rest = name.partition(".")
    return f"{RESNET[layer]}.{rest}"


def renamed(shapes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {prefix + original(name): shape for name, shape in shapes.items()}


def tencent(shapes: Mapping[str, Any], blocks: int = 2) -> dict[str, Any]:
    """A T2I-Adapter's tensors as TencentARC names them."""
    result = {}
    for name, shape in shapes.items():
        name = name.removeprefix("adapter.")
        if "adapter.body.0.out_conv.weight" in shapes:
            result[name.replace(".resnets.", ".body.")] = shape
            continue
        match = re.match(r"body\.(\d)\.(?:resnets\.(\d)\.)?(.*)", name)
        index = int(match[1]) * blocks + int(match[2] or 0) if match else 0
        result[f"body.{index}.{match[3]}" if match else name] = shape
    return result


# Files that are not networks of diffusers


def ip_adapter(unet: Shapes, width: int, kind: str) -> Shapes:
    projections = {
        "plain": {"proj.weight": (4 * width, 1024), "proj.bias": (4 * width,), "norm.weight": (width,)},
        "full": {"proj.0.weight": (1280, 1280), "proj.2.weight": (width, 1280), "proj.3.weight": (width,)},
        "plus": {"latents": (1, 16, width), "proj_in.weight": (width, 1280), "proj_out.weight": (width, width)},
        "faceid": {"proj.0.weight": (1024, 512), "proj.2.weight": (4 * width, 1024), "norm.weight": (width,)},
    }
    result = {f"image_proj.{name}": shape for name, shape in projections[kind].items()}
    for k, name in enumerate(name for name in unet if name.endswith("attn2.to_k.weight")):
        if kind == "faceid":
            result[f"ip_adapter.{2 * k}.to_q_lora.down.weight"] = (128, unet[name][0])
        result |= {f"ip_adapter.{2 * k + 1}.to_{part}_ip.weight": unet[name] for part in "kv"}
    return result


def low_rank(shapes: Mapping[str, tuple[int, ...]], style: str, rank: int = 16) -> Shapes:
    """A LoRA of the attention of a UNet, in kohya's or peft's names; or a Control-LoRA of its encoder."""
    result: Shapes = {"lora_controlnet": (0,)} if style == "control" else {}
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if style == "control":
            whole = len(shape) == 1 or name.startswith(("input_hint_block", "zero_convs", "middle_block_out"))
            names = () if whole else (f"{stem}.down", f"{stem}.up")
        elif not re.search(r"attn\d\.to_(q|k|v|out\.0)\.weight$", name):
            continue
        elif style == "kohya":
            flat = f"lora_unet_{stem.replace('.', '_')}"
            names = (f"{flat}.lora_down.weight", f"{flat}.lora_up.weight")
            result[f"{flat}.alpha"] = ()
        else:
            names = (f"unet.{stem}.lora_A.weight", f"unet.{stem}.lora_B.weight")
        if not names:
            result[name] = shape
            continue
        result[names[0]] = (rank, *shape[1:])
        result[names[1]] = (shape[0], rank, *(1 for _ in shape[2:]))
    return result


def lists() -> dict[str, Shapes]:
    """All lists by the name of their file."""
    units = {"sd1": SD1, "sd2": SD2, "sdxl": XL}
    unets = {
        key: shapes_of(UNet2DConditionModel, **config, **(XL_UP if key == "sdxl" else {}))
        for key, config in units.items()
    }
    unets |= {
        "sdxl_inpainting": shapes_of(UNet2DConditionModel, **XL, **XL_UP, in_channels=9),
        "refiner": shapes_of(UNet2DConditionModel, **{**XL, **REFINER}),
        "sd1_inpainting": shapes_of(UNet2DConditionModel, **SD1, in_channels=9),
        "sd1_instruct": shapes_of(UNet2DConditionModel, **SD1, in_channels=8),
    }
    vae = shapes_of(
        AutoencoderKL,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    first_stage = {"first_stage_model.encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3)}
    first_stage["first_stage_model.decoder.up.0.block.0.conv1.weight"] = (128, 256, 3, 3)
    result = {f"unet_{key}_diffusers": shapes for key, shapes in unets.items()}
    result |= {
        f"checkpoint_{key}": renamed(shapes, "model.diffusion_model.") | first_stage for key, shapes in unets.items()
    }
    controlnets = {key: shapes_of(ControlNetModel, **config) for key, config in units.items()}
    result |= {f"controlnet_{key}_diffusers": shapes for key, shapes in controlnets.items()}
    result |= {f"controlnet_{key}_original": renamed(shapes, "control_model.") for key, shapes in controlnets.items()}
    result["controlnet_sd1_bare"] = renamed(controlnets["sd1"])
    result["controlnet_union_sdxl"] = shapes_of(
        ControlNetUnionModel, **XL, conditioning_embedding_out_channels=(48, 96, 192, 384)
    )
    for key in ("sd1", "sdxl"):
        result[f"control_lora_{key}"] = low_rank(renamed(controlnets[key]), "control")
        result[f"lora_{key}_kohya"] = low_rank(unets[key], "kohya")
        result[f"lora_{key}_peft"] = low_rank(unets[key], "peft")
        for kind in ("plain", "plus", "full", "faceid"):
            result[f"ip_adapter_{key}_{kind}"] = ip_adapter(unets[key], units[key]["cross_attention_dim"], kind)
    adapters = {
        "sd1_full": {"adapter_type": "full_adapter"},
        "sd1_light": {"adapter_type": "light_adapter", "num_res_blocks": 4, "channels": (320, 640, 1280)},
        "sd1_grey": {"adapter_type": "full_adapter", "in_channels": 1},
        "sdxl_full": {"adapter_type": "full_adapter_xl", "downscale_factor": 16},
    }
    for key, config in adapters.items():
        shapes = shapes_of(T2IAdapter, **config)
        result |= {f"t2i_adapter_{key}_diffusers": shapes, f"t2i_adapter_{key}_tencent": tencent(shapes)}
    result |= {
        "vae_diffusers": vae,
        "vae_original": {name.removeprefix("first_stage_model."): shape for name, shape in first_stage.items()},
        "movq": shapes_of(VQModel, norm_type="spatial"),
        "textual_inversion_sd1": {"emb_params": (4, 768)},
        "textual_inversion_sdxl": {"clip_l": (4, 768), "clip_g": (4, 1280)},
        "prior_21": shapes_of(PriorTransformer, embedding_dim=768, num_layers=2),
        "prior_22": shapes_of(PriorTransformer, embedding_dim=1280, num_layers=2),
        "unet_kandinsky3": shapes_of(Kandinsky3UNet),
        "textual_inversion_sd2_diffusers": {"<fox>": (1024,)},
        "unet_sd1_original": renamed(unets["sd1"], "model.diffusion_model."),
        "checkpoint_with_controlnet": renamed(controlnets["sd1"], "control_model.") | result["checkpoint_sd1"],
        "lycoris": {"lora_unet_down_blocks_1_attentions_0_proj_in.hada_w1_a": (320, 8)},
        "lllite": {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": (32, 640)},
        "t2i_adapter_odd": {
            "adapter.conv_in.weight": (320, 100, 3, 3),
            "adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3),
        },
        "somebody_elses": {"layers.0.weight": (7, 7), "layers.0.bias": (7,)},
    }
    hidden: dict[str, Any] = {"encoder_hid_dim": 1280, "encoder_hid_dim_type": "image_proj"}
    result["unet_kandinsky22"] = shapes_of(UNet2DConditionModel, **KANDINSKY, **hidden, addition_embed_type="image")
    result["unet_kandinsky22_hint"] = shapes_of(
        UNet2DConditionModel, **KANDINSKY, **hidden, addition_embed_type="image_hint", in_channels=8
    )
    hidden = {"encoder_hid_dim": 1024, "encoder_hid_dim_type": "text_image_proj"}
    result["unet_kandinsky21"] = shapes_of(
        UNet2DConditionModel, **KANDINSKY, **hidden, addition_embed_type="text_image"
    )
    return result


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, shapes in lists().items():
        kept = {tensor: shape for tensor, shape in shapes.items() if not REPEATED.search(tensor)}
        head = f"# {len(kept)} of {len(shapes)} tensors, by scripts/make_format_lists.py\n"
        lines = [f"{tensor} {'x'.join(map(str, shape)) or 'scalar'}\n" for tensor, shape in sorted(kept.items())]
        (FOLDER / f"{name}.txt").write_text(head + "".join(lines))


if __name__ == "__main__":
    main()
