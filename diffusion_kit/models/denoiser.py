"""A UNet2DConditionModel behind the signature of the sampling core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusion_kit.sampling.doors import Conditioning, Residuals, Tree, pick

from .unet import Net, decode, embeddings, encode, layout, obstacle, text_keys_values


@dataclass(frozen=True)
class UNetDenoiser:
    """Runs a UNet through the executor (encode, decode).

    The conditioning holds `prompt_embeds` (rows, tokens, width) and, where the network takes them, `add_text_embeds`
    (rows, P), `add_time_ids` (rows, k) and `timestep_cond` (rows, E). `channels` is the number of latent channels: what
    the network gives beyond them is a variance.
    """

    net: Net
    channels: int

    def prepare(self, timesteps: Tensor, conditioning: Conditioning) -> Tree:
        return prepare_embeddings(self.net, timesteps, conditioning)

    def __call__(self, tensors: Tree, x: Tensor, call: Tensor, residuals: Residuals) -> tuple[Tensor, Tensor | None]:
        emb = pick(tensors["emb"], call)[0]
        h, skips = encode(self.net, x, emb, tensors["context"], intra=residuals.intra)
        skips = [skip + r for skip, r in zip(skips, residuals.skips, strict=True)] if residuals.skips else skips
        if residuals.mid is not None:
            h = h + residuals.mid
        return split_variance(decode(self.net, h, skips, emb, tensors["context"]), self.channels)


@dataclass(frozen=True)
class PeerDenoiser:
    """Runs any UNet of diffusers' signature through its own forward.

    `kwargs` are passed on with every call (cross_attention_kwargs).
    """

    net: Net
    channels: int
    kwargs: tuple[tuple[str, Any], ...] = ()

    def prepare(self, timesteps: Tensor, conditioning: Conditioning) -> Tree:
        return {"timesteps": timesteps, **conditioning}

    def __call__(self, tensors: Tree, x: Tensor, call: Tensor, residuals: Residuals) -> tuple[Tensor, Tensor | None]:
        out = self.net(
            x,
            pick(tensors["timesteps"], call),
            encoder_hidden_states=tensors["prompt_embeds"],
            timestep_cond=tensors.get("timestep_cond"),
            added_cond_kwargs=added_conditions(tensors),
            down_intrablock_additional_residuals=list(residuals.intra) or None,
            down_block_additional_residuals=residuals.skips or None,
            mid_block_additional_residual=residuals.mid,
            return_dict=False,
            **dict(self.kwargs),
        )
        return split_variance(out[0], self.channels)


def make_denoiser(
    net: Any, channels: int, cross_attention_kwargs: dict[str, Any] | None = None
) -> UNetDenoiser | PeerDenoiser:
    """The executor where it can run the network, else the network's own forward."""
    own = {name: value for name, value in (cross_attention_kwargs or {}).items() if name != "scale"}
    if obstacle(net) is None and not own:
        return UNetDenoiser(net, channels)
    return PeerDenoiser(net, channels, (("cross_attention_kwargs", _Frozen(own)),) if own else ())


class _Frozen(dict):
    """A dict that may stand in a hashable value; equal only to itself."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def added_conditions(conditioning: Conditioning) -> dict[str, Tensor] | None:
    """diffusers' names for the pooled text and the size embedding."""
    if "add_text_embeds" not in conditioning:
        return None
    return {"text_embeds": conditioning["add_text_embeds"], "time_ids": conditioning["add_time_ids"]}


def prepare_embeddings(net: Net, timesteps: Tensor, conditioning: Conditioning) -> Tree:
    """{"emb": (n, rows, D), "context": keys and values of the text} for a UNet or a ControlNet."""
    states = conditioning["prompt_embeds"].to(net.dtype)
    added = added_conditions(conditioning) or {}
    guidance = conditioning.get("timestep_cond") if hasattr(net, "up_blocks") else None
    emb = embeddings(net, timesteps, len(states), added, guidance)
    return {"emb": emb, "context": text_keys_values(net, states)}


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """(rows, C or 2 C, H, W) -> prediction and, of a network with twice the channels, variance."""
    return (output[:, :channels], output[:, channels:]) if output.shape[1] == 2 * channels else (output, None)


def residual_fit(net: Net, size: tuple[int, int]) -> list[tuple[int, tuple[int, int]]]:
    """(channels, size) that T2I residuals must have for latents of `size`, a down block each and the middle."""
    places, intra = layout(net, size)
    return [places[k][1:] for k in intra]
