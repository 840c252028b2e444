"""Kandinsky 3's UNet as two functions over diffusers' own blocks, as `unet` has them for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import Kandinsky3UNet
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from diffusion_kit.sampling.doors import Answer, Conditioning, Tree

from .attention import OWN, Context, Net, Tokens, attend, attention_layers, changed, split_heads
from .own_forward import OwnForward

POOLING = "add_time_condition."  # attention that pools the text, outside the blocks


def encode(
    net: Net, x: Tensor, emb: Tensor, context: Context, *, intra: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """conv_in and down blocks: the last block's output, and those of the others. `intra` is added to them."""
    h, outputs = net.conv_in(x), []
    residuals = list(intra)
    for block in net.down_blocks:
        h = block(h, emb, context)
        if residuals:
            h = h + residuals.pop(0)
        outputs.append(h)
    return h, outputs[:-1]


def decode(net: Net, h: Tensor, skips: Sequence[Tensor], emb: Tensor, context: Context) -> Tensor:
    """Up blocks and output convolution: the prediction (B, C, H, W)."""
    first, *others = net.up_blocks
    h = first(h, emb, context)
    for block, skip in zip(others, reversed(skips), strict=True):
        h = block(torch.cat([h, skip], 1), emb, context)
    return net.conv_out(net.conv_act_out(net.conv_norm_out(h)))


def layout(net: Net, size: tuple[int, int]) -> tuple[list[tuple[int, int, tuple[int, int]]], list[int]]:
    """Level, channels and spatial size of what each down block gives; and all positions: T2I residuals go to each."""
    places = []
    for level, block in enumerate(net.down_blocks):
        last = block.resnets_out[-1]
        if isinstance(last.shortcut_down_sample, torch.nn.Conv2d):
            size = (size[0] // 2, size[1] // 2)
        places.append((level, last.resnet_blocks[-1].projection.out_channels, size))
    return places, list(range(len(places)))


def is_kandinsky3(net: Net) -> bool:
    return isinstance(getattr(net, "_orig_mod", net), Kandinsky3UNet)  # a caller may have compiled it


def obstacle(net: Net) -> str | None:
    """Why the network has to run through its own forward; None if the executor can run it."""
    if any(type(layer.processor) not in (AttnProcessor2_0, *OWN) for _, layer in attention_layers(net)):
        return "it has attention processors of its own"
    return changed(net)


def text_tokens(net: Net, states: Tensor, bias: Tensor) -> Context:
    """The projected text (B, tokens, width) as cross-attention sees it. A block's first attention is to itself."""
    return {
        name: (Tokens(split_heads(layer, layer.to_k(states)), split_heads(layer, layer.to_v(states)), bias=bias),)
        for name, layer in attention_layers(net)
        if not name.startswith(POOLING) and ".attentions.0." not in name
    }


def pooled(net: Net, states: Tensor, bias: Tensor, spans: Tensor) -> Tensor:
    """What the text adds to the time embedding, (B, D): attention of its mean, over its own span (B, tokens), to it."""
    layer = net.add_time_condition.attention
    mean = (states * spans[..., None]).sum(1, keepdim=True) / spans.sum(1)[:, None, None]
    query = split_heads(layer, layer.to_q(mean))
    tokens = Tokens(split_heads(layer, layer.to_k(states)), split_heads(layer, layer.to_v(states)), bias=bias)
    return layer.to_out[0](attend(query, tokens).transpose(1, 2).flatten(2))[:, 0]


@dataclass(frozen=True)
class Kandinsky3Denoiser:
    """Runs the UNet through the executor.

    The conditioning holds `prompt_embeds` (rows, tokens, width), `attention_mask` (rows, tokens), the tokens that are seen,
    and `spans` (rows, tokens), those that a row would have in a batch of its own: the UNet takes the mean over them.
    """

    net: Net

    @property
    def executed(self) -> tuple[Net, ...]:
        return (self.net,)

    def prepare(self, timesteps: Tensor, conditioning: Conditioning) -> Tree:
        net = self.net
        states = net.encoder_hid_proj(conditioning["prompt_embeds"].to(net.dtype))
        bias = ((1 - conditioning["attention_mask"].to(states)) * -10000.0)[:, None, None]
        times = net.time_embedding(net.time_proj(timesteps).to(net.dtype))  # (n, D)
        emb = times[:, None] + pooled(net, states, bias, conditioning["spans"].to(states))
        return {"emb": emb, "context": text_tokens(net, states, bias)}

    def __call__(self, tensors: Tree, x: Tensor, answer: Answer) -> tuple[Tensor, None]:
        emb, context = tensors["emb"], tensors["context"]
        h, skips = encode(self.net, x, emb, context, intra=answer.intra)
        return decode(self.net, h, skips, emb, context), None


@dataclass(frozen=True)
class Kandinsky3PeerDenoiser(OwnForward):
    """Runs the UNet through its own forward, which takes no residuals, and one span for all rows."""

    def __call__(self, tensors: Tree, x: Tensor, answer: Answer) -> tuple[Tensor, None]:
        if answer.intra:
            raise ValueError("Kandinsky 3's own forward takes no controls; `pipe.explain()` says why it is used")
        timestep = tensors["timesteps"]
        states, mask = tensors["prompt_embeds"].to(x), tensors["attention_mask"]
        return self.net(x, timestep, states, encoder_attention_mask=mask, return_dict=False)[0], None
