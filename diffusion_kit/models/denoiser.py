"""A UNet2DConditionModel behind the signature of the sampling core."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_kit.sampling.doors import Answer, Conditioning, Denoiser, Prediction, Tree

from .kandinsky3 import Kandinsky3Denoiser, Kandinsky3PeerDenoiser, is_kandinsky3
from .own_forward import OwnForward
from .unet import Net, decode, embeddings, encode, layout, obstacle, project, text_tokens

# The conditioning's names, and the peer's for the same.
ADDED = {"add_text_embeds": "text_embeds", "add_time_ids": "time_ids", "image_embeds": "image_embeds"}


@dataclass(frozen=True)
class UNetDenoiser:
    """Runs a UNet through the executor (encode, decode).

    The conditioning holds `prompt_embeds` (rows, tokens, width) and, where the network takes them, `add_text_embeds`
    (rows, P), `add_time_ids` (rows, k), `image_embeds` (rows, D) and `timestep_cond` (rows, E). `channels` is the number
    of latent channels: what the network gives beyond them is a variance. `more` channels are a control's; they are zero
    where it answers nothing.

    With a `depth` a call also gives the input of the last `depth` up blocks, and the answer as far as these and as many
    down blocks take it. Where the tensors hold such an input, "deep", only those blocks run (see `sampling.cache`).
    """

    net: Net
    channels: int
    more: int = 0
    depth: int = 0

    @property
    def executed(self) -> tuple[Net, ...]:
        return (self.net,)

    def prepare(self, timesteps: Tensor, conditioning: Conditioning) -> Tree:
        return prepare_embeddings(self.net, timesteps, conditioning)

    def __call__(self, tensors: Tree, x: Tensor, answer: Answer) -> Prediction:
        net, blocks, deep = self.net, list(self.net.up_blocks), tensors.get("deep")
        top = len(blocks) - self.depth
        shallow = sum(len(block.resnets) for block in blocks[top:])  # skip connections
        context = {name: (*own, *answer.tokens.get(name, ())) for name, own in tensors["context"].items()}
        x = widened(x, answer.channels, self.more)
        full = deep is None
        emb = tensors["emb"]
        h, skips = encode(net, x, emb, context, intra=answer.intra, depth=None if full else self.depth)
        used = None if full else shallow
        skips, residuals = skips[:used], answer.skips[:used]
        skips = [skip + r for skip, r in zip(skips, residuals, strict=True)] if residuals else skips
        kept: tuple[Tree, ...] = ()
        if full:
            h = h if answer.mid is None else h + answer.mid
            deep = decode(net, blocks[:top], h, skips, emb, context)
            # Not `_replace`: the compiler of torch 2.11 cannot hand out what that makes.
            used_again = Answer(answer.intra[: self.depth], residuals[:shallow], None, answer.tokens, answer.channels)
            kept = (deep, used_again) if self.depth else ()
        output = project(net, decode(net, blocks[top:], deep, skips, emb, context))
        return *split_variance(output, self.channels), *kept


@dataclass(frozen=True)
class PeerDenoiser(OwnForward):
    """Runs any UNet of diffusers' signature through its own forward.

    `kwargs` are passed on with every call (cross_attention_kwargs). The others are as in `UNetDenoiser`.
    """

    channels: int
    more: int = 0
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, tensors: Tree, x: Tensor, answer: Answer) -> tuple[Tensor, Tensor | None]:
        if answer.tokens:
            raise ValueError("the UNet's own forward, of cross_attention_kwargs or --deepspeed, takes no IP-Adapter")
        added = added_conditions(tensors)
        if takes_hint(self.net):
            added["hint"] = answer.channels
        else:
            x = widened(x, answer.channels, self.more)
        out = self.net(
            x,
            tensors["timesteps"],
            encoder_hidden_states=tensors.get("prompt_embeds"),
            timestep_cond=tensors.get("timestep_cond"),
            added_cond_kwargs=added or None,
            down_intrablock_additional_residuals=list(answer.intra) or None,
            down_block_additional_residuals=answer.skips or None,
            mid_block_additional_residual=answer.mid,
            return_dict=False,
            **dict(self.kwargs),
        )
        return split_variance(out[0], self.channels)


def make_denoiser(net: Any, channels: int, cross_attention_kwargs: dict[str, Any] | None = None) -> Denoiser:
    """The executor where it can run the network, else the network's own forward."""
    if is_kandinsky3(net):
        return Kandinsky3Denoiser(net) if obstacle(net) is None else Kandinsky3PeerDenoiser(net)
    own = {name: value for name, value in (cross_attention_kwargs or {}).items() if name != "scale"}
    more = control_channels(net, channels)
    if obstacle(net) is None and not own:
        return UNetDenoiser(net, channels, more)
    return PeerDenoiser(net, channels, more, (("cross_attention_kwargs", _Frozen(own)),) if own else ())


def with_kept_features(denoiser: Denoiser | None, depth: int) -> UNetDenoiser:
    """The denoiser for a step cache of that depth.

    Raises:
        ValueError: it does not run block by block, or has no such depth.
    """
    if not isinstance(denoiser, UNetDenoiser):
        why = "it runs through its own forward, or is of another kind (Kandinsky 3, a prior)"
        raise ValueError(f"no step cache for this network: {why}; use cache_steps(None)")
    most = len(denoiser.net.down_blocks) - 1
    if not 1 <= depth <= most:
        raise ValueError(f"step cache depth is {depth}; for this UNet it must be 1 to {most}")
    return replace(denoiser, depth=depth)


def takes_hint(net: Net) -> bool:
    return net.config.get("addition_embed_type") == "image_hint"


def own_control(net: Net, channels: int) -> str | None:
    """Name of the control that enters through input channels of the network's own, for latents of `channels`: "hint" of
    Kandinsky 2.2's ControlNet, "instruct" of instruct-pix2pix, or None."""
    if takes_hint(net):
        return "hint"
    return "instruct" if net.config.in_channels == 2 * channels else None


def control_channels(net: Net, channels: int) -> int:
    """How many of the network's input channels are its own control's."""
    return net.config.in_channels - channels if own_control(net, channels) else 0


def widened(x: Tensor, channels: Tensor | None, more: int) -> Tensor:
    """The model input with a control's channels behind it, or zeros in their place."""
    if channels is not None:
        return torch.cat([x, channels.to(x)], 1)
    return F.pad(x, (0, 0, 0, 0, 0, more)) if more else x


class _Frozen(dict):
    """A dict that may stand in a hashable value; equal only to itself."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def added_conditions(conditioning: Conditioning) -> dict[str, Tensor | None]:
    """What the conditioning holds beside the text, under diffusers' names."""
    return {name: conditioning[own] for own, name in ADDED.items() if own in conditioning}


def text_states(net: Net, conditioning: Conditioning) -> Tensor:
    """What the network's cross-attention sees, (rows, tokens, width): the text, projected where the network does that, and
    image embeddings as tokens."""
    kind = net.config.get("encoder_hid_dim_type")
    if kind == "image_proj":
        return net.encoder_hid_proj(conditioning["image_embeds"].to(net.dtype))
    states = conditioning["prompt_embeds"].to(net.dtype)
    if kind == "text_image_proj":
        return net.encoder_hid_proj(states, conditioning["image_embeds"].to(net.dtype))
    return states


def prepare_embeddings(net: Net, timesteps: Tensor, conditioning: Conditioning) -> Tree:
    """{"emb": (n, rows, D), "context": what attention sees of the text} for a UNet or a ControlNet."""
    states = text_states(net, conditioning)
    guidance = conditioning.get("timestep_cond") if hasattr(net, "up_blocks") else None
    emb = embeddings(net, timesteps, len(states), added_conditions(conditioning), guidance)  # type: ignore[arg-type]
    return {"emb": emb, "context": text_tokens(net, states)}


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """(rows, C or 2 C, H, W) -> prediction and, of a network with twice the channels, variance."""
    return (output[:, :channels], output[:, channels:]) if output.shape[1] == 2 * channels else (output, None)


def residual_fit(net: Net, size: tuple[int, int]) -> list[tuple[int, tuple[int, int]]]:
    """(channels, size) that T2I residuals must have for latents of `size`, a down block each and the middle."""
    places, intra = layout(net, size)
    return [places[k][1:] for k in intra]
