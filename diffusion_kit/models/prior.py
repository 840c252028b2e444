"""The transformer that turns a text into an image embedding (Ramesh et al. 2022, arXiv 2204.06125, section 2.2), behind the
signature of the sampling core.

It reads the tokens (text, pooled text, time, noisy embedding, answer), each of which sees only those before it. So what the
text's tokens become is the same in every step, and each step runs three tokens of eighty-one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from diffusion_kit.sampling.doors import Answer, Conditioning, Denoiser, Tree

from .attention import OWN, Net, Tokens, attend, attention_layers, changed, split_heads
from .own_forward import OwnForward

HIDDEN = -10000.0  # added to the score of a token that is not seen
MOVING = 3  # tokens that change from step to step, the last ones


@dataclass(frozen=True)
class PriorDenoiser:
    """Runs a PriorTransformer's own blocks; the latents are image embeddings (rows, D, 1, 1).

    The conditioning holds `prompt_embeds` (rows, D), `text_encoder_hidden_states` (rows, tokens, D) and `text_mask` (rows,
    tokens), true where there is text.
    """

    net: Net

    @property
    def executed(self) -> tuple[Net, ...]:
        return (self.net,)

    def prepare(self, timesteps: Tensor, conditioning: Conditioning) -> Tree:
        net = self.net
        pooled = conditioning["prompt_embeds"].to(net.dtype)
        if net.embedding_proj_norm is not None:
            pooled = net.embedding_proj_norm(pooled)
        states = net.encoder_hidden_states_proj(conditioning["text_encoder_hidden_states"].to(net.dtype))
        fixed = torch.cat([states, net.embedding_proj(pooled)[:, None]], 1)
        padding = F.pad(HIDDEN * (1 - conditioning["text_mask"].to(net.dtype)), (0, 1 + MOVING))
        bias = (padding[:, None] + net.causal_attention_mask)[:, None].to(net.dtype)  # (rows, 1, tokens, tokens)
        n = fixed.shape[1]
        _, seen = run(net, fixed, bias[..., :n, :n])
        table = timesteps if timesteps.ndim == 2 else timesteps[:, None]  # of which each row has its own
        emb = net.time_embedding(net.time_proj(table.flatten()).to(net.dtype)).unflatten(0, table.shape)
        return {"emb": emb, "seen": seen, "bias": bias[..., n:, :]}

    def __call__(self, tensors: Tree, x: Tensor, answer: Answer) -> tuple[Tensor, Tensor | None]:
        net, rows = self.net, len(x)
        emb = tensors["emb"][:, None].expand(rows, -1, -1)
        moving = torch.cat([emb, net.proj_in(x[:, :, 0, 0])[:, None], net.prd_embedding.expand(rows, -1, -1)], 1)
        h, _ = run(net, moving, tensors["bias"], tensors["seen"])
        return net.proj_to_clip_embeddings(net.norm_out(h[:, -1]))[:, :, None, None], None


def run(net: Net, x: Tensor, bias: Tensor, before: Tree = ()) -> tuple[Tensor, Tree]:
    """The blocks over tokens (B, n, width), which also attend to the keys and values of those `before`: their states, and
    keys and values of all in every block."""
    first = before[0][0].shape[2] if before else 0
    x = x + net.positional_embedding[:, first : first + x.shape[1]].to(x.dtype)
    x = x if net.norm_in is None else net.norm_in(x)
    seen = []
    for k, block in enumerate(net.transformer_blocks):
        layer, h = block.attn1, block.norm1(x)
        pair = [split_heads(layer, project(h)) for project in (layer.to_k, layer.to_v)]
        if before:
            pair = [torch.cat(both, 2) for both in zip(before[k], pair, strict=True)]
        out = attend(split_heads(layer, layer.to_q(h)), Tokens(*pair, bias=bias))
        x = x + layer.to_out[0](out.transpose(1, 2).flatten(2))
        x = x + block.ff(block.norm3(x))
        seen.append(tuple(pair))
    return x, tuple(seen)


@dataclass(frozen=True)
class PriorPeerDenoiser(OwnForward):
    """Runs any PriorTransformer through its own forward; latents and conditioning as in `PriorDenoiser`."""

    def __call__(self, tensors: Tree, x: Tensor, answer: Answer) -> tuple[Tensor, Tensor | None]:
        text = (tensors[name] for name in ("prompt_embeds", "text_encoder_hidden_states", "text_mask"))
        (embedding,) = self.net(x[:, :, 0, 0], tensors["timesteps"], *text, return_dict=False)
        return embedding[:, :, None, None], None


def obstacle(net: Net) -> str | None:
    """Why the network has to run through its own forward; None if `PriorDenoiser` can run it."""
    if any(type(layer.processor) not in (AttnProcessor2_0, *OWN) for _, layer in attention_layers(net)):
        return "it has attention processors of its own"
    if None in (net.prd_embedding, net.encoder_hidden_states_proj) or net.config.additional_embeddings != 1 + MOVING:
        return "it has tokens of another kind"
    return changed(net)


def make_prior_denoiser(net: Net) -> Denoiser:
    """The blocks with the text's part made once, where that is possible; else the network's own forward."""
    return PriorDenoiser(net) if obstacle(net) is None else PriorPeerDenoiser(net)
