"""The UNet as two functions over diffusers' own blocks, and what of it need not be computed in every step.

`encode` runs conv_in, the down blocks and the middle, `decode` the up blocks, `project` conv_out. A ControlNet has the same
encoder, so `encode` runs it as well. Embeddings of all timesteps (`embeddings`) and keys and values of the text
(`text_tokens`) are made before the loop. It is the UNet of Stable Diffusion, of SDXL and of Kandinsky 2.x.

A network that is not of the plain kind (`obstacle` says why) runs through its own forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from torch import Tensor, nn

from . import kandinsky3
from .attention import OWN, XFORMERS, Context, Net, Tokens, attention_layers, changed, joint, split_heads

BLOCKS = {
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    # of Kandinsky 2.x
    "ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "UNetMidBlock2DSimpleCrossAttn",
    "SimpleCrossAttnUpBlock2D",
    "ResnetUpsampleBlock2D",
}
EMBEDDINGS = (None, "text_time", "image", "image_hint", "text_image")
PROJECTIONS = (None, "image_proj", "text_image_proj")


def encode(
    net: Net,
    x: Tensor,
    emb: Tensor,
    context: Context,
    *,
    hint: Tensor | None = None,
    intra: Sequence[Tensor] = (),
    depth: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """conv_in, down blocks, middle.

    Args:
        net: UNet2DConditionModel or ControlNetModel.
        x: (B, C, H, W) model input.
        emb: (B, D) time and added embedding.
        context: what cross-attention sees.
        hint: added after conv_in (a ControlNet's embedded control image).
        intra: one residual for each down block, then the middle; it may be shorter.
        depth: only so many down blocks, and not the middle.

    Returns:
        The last output and every skip connection, conv_in's first.
    """
    h = net.conv_in(x)
    if hint is not None:
        h = h + hint
    skips = [h]
    residuals = list(intra)
    for block in list(net.down_blocks)[:depth]:
        added = residuals.pop(0) if residuals else None
        own: dict[str, Any] = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        if adds_inside(block):
            own["additional_residuals"] = added
        h, outputs = block(h, emb, **own)
        skips += outputs
        if added is not None and not adds_inside(block):
            h = h + added  # the peer adds in place, so the block's last skip, the same tensor, has it too
            skips[-1] = h
    if net.mid_block is not None and depth is None:
        with_text = getattr(net.mid_block, "has_cross_attention", False)
        h = net.mid_block(h, emb, encoder_hidden_states=context) if with_text else net.mid_block(h, emb)
        if residuals and residuals[0].shape[1:] == h.shape[1:]:
            h = h + residuals[0]
    return h, skips


def decode(net: Net, blocks: Sequence[Net], h: Tensor, skips: list[Tensor], emb: Tensor, context: Context) -> Tensor:
    """Up blocks of the network, which take the skip connections that they use from the end of the list."""
    resize = any(size % 2**net.num_upsamplers for size in skips[0].shape[-2:]) if skips else False
    for block in blocks:
        used = tuple(skips[-len(block.resnets) :])
        del skips[-len(block.resnets) :]
        size = skips[-1].shape[2:] if resize and skips else None
        if getattr(block, "has_cross_attention", False):
            h = block(h, used, emb, encoder_hidden_states=context, upsample_size=size)
        else:
            h = block(h, used, emb, upsample_size=size)
    return h


def project(net: Net, h: Tensor) -> Tensor:
    """Output convolution: the prediction (B, C, H, W)."""
    if net.conv_norm_out:
        h = net.conv_act(net.conv_norm_out(h))
    return net.conv_out(h)


def adds_inside(block: nn.Module) -> bool:
    """Whether a T2I residual enters before the block's downsampler; elsewhere it is added to what the block gives."""
    return isinstance(block, CrossAttnDownBlock2D)


def layout(net: Net, size: tuple[int, int]) -> tuple[list[tuple[int, int, tuple[int, int]]], list[int]]:
    """Level, channels and spatial size of each skip and of the middle, for latents of `size`; and the position, in that
    list, of the tensors to which T2I residuals are added. Level k is down block k, the last level the middle."""
    if kandinsky3.is_kandinsky3(net):
        return kandinsky3.layout(net, size)
    channels = net.conv_in.out_channels
    places, intra = [(0, channels, size)], []
    for level, block in enumerate(net.down_blocks):
        channels = block.resnets[-1].out_channels
        places += [(level, channels, size)] * len(block.resnets)
        intra.append(len(places) - 1)
        if block.downsamplers is not None:
            size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
            places.append((level, channels, size))
            if not adds_inside(block):
                intra[-1] = len(places) - 1
    places.append((len(net.down_blocks), channels, size))
    return places, [*intra, len(places) - 1]


def embeddings(
    net: Net, timesteps: Tensor, rows: int, added: Mapping[str, Tensor], timestep_cond: Tensor | None = None
) -> Tensor:
    """Time plus added embedding of every timestep, (n, rows, D).

    Args:
        timesteps: (n,), or (n, rows) of which each row has its own.
        added: "text_embeds" (rows, P), "time_ids" (rows, k), "image_embeds" (rows, D), those that the network takes.
        timestep_cond: (rows, E) embedding of the guidance scale, for networks distilled with it.
    """
    dtype = net.dtype
    table = timesteps if timesteps.ndim == 2 else timesteps[:, None]
    sinusoids = net.time_proj(table.flatten()).to(dtype).unflatten(0, table.shape).expand(-1, rows, -1)
    condition = None if timestep_cond is None else timestep_cond.to(dtype).expand(len(timesteps), -1, -1)
    emb = net.time_embedding(sinusoids, condition)
    kind = net.config.addition_embed_type
    if kind == "text_time":
        sizes = net.add_time_proj(added["time_ids"].flatten()).reshape(rows, -1)
        emb = emb + net.add_embedding(torch.cat([added["text_embeds"], sizes.to(added["text_embeds"])], -1).to(dtype))
    elif kind == "text_image":
        emb = emb + net.add_embedding(added["text_embeds"].to(dtype), added["image_embeds"].to(dtype))
    elif kind in ("image", "image_hint"):
        emb = emb + net.add_embedding.image_norm(net.add_embedding.image_proj(added["image_embeds"].to(dtype)))
    if getattr(net, "time_embed_act", None) is not None:
        emb = net.time_embed_act(emb)
    return emb


def text_tokens(net: Net, states: Tensor) -> Context:
    """The text's states (B, tokens, width) as every cross-attention layer of the network sees them."""
    layers = [(name, layer) for name, layer in attention_layers(net) if joint(layer) or layer.is_cross_attention]
    projections = {
        name: (layer.add_k_proj, layer.add_v_proj) if joint(layer) else (layer.to_k, layer.to_v)
        for name, layer in layers
    }
    return {
        name: (Tokens(*(split_heads(layer, project(states)) for project in projections[name])),)
        for name, layer in layers
    }


def obstacle(net: Net) -> str | None:
    """Why a network has to run through its own forward; None if the executor can run it."""
    if (why := getattr(net, "own_forward_only", None)) is not None:
        return str(why)
    if kandinsky3.is_kandinsky3(net):
        return kandinsky3.obstacle(net)
    if (why := changed(net)) is not None:
        return why
    config = net.config
    blocks = [*net.down_blocks, net.mid_block, *getattr(net, "up_blocks", ())]
    unknown = {type(block).__name__ for block in blocks if block is not None} - BLOCKS
    if unknown:
        return f"it has blocks of another kind: {', '.join(sorted(unknown))}"
    if config.get("addition_embed_type") not in EMBEDDINGS or config.get("class_embed_type") is not None:
        return "it has embeddings of another kind"
    if net.class_embedding is not None or config.get("center_input_sample"):
        return "it has inputs of another kind"
    if config.get("encoder_hid_dim_type") not in PROJECTIONS:
        return f"it projects its text: {config.encoder_hid_dim_type}"
    if getattr(net, "position_net", None) is not None:
        return "it has GLIGEN layers"
    if not all(_stock(layer) for _, layer in attention_layers(net)):
        return "it has attention processors of its own"
    return None


def absent(weight: Tensor) -> str | None:
    """What a weight is that this process does not hold whole; None where it does."""
    if weight.is_meta:
        return "offloaded"
    if weight.numel() < getattr(weight, "ds_numel", 0):
        return f"spread over the processes (ZeRO), with a placeholder of {weight.numel()} numbers here"
    return None


def _stock(layer: Attention) -> bool:
    extras = [layer.spatial_norm, layer.norm_cross, layer.norm_q, layer.norm_k]
    if not joint(layer):
        extras.append(layer.group_norm)
    return (
        type(layer.processor) in (AttnAddedKVProcessor2_0 if joint(layer) else AttnProcessor2_0, *XFORMERS, *OWN)
        and all(extra is None for extra in extras)
        and not (layer.residual_connection or layer.fused_projections)
        and layer.rescale_output_factor == 1.0
        and layer.scale_qk
    )
