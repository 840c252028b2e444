"""Gives the trained base attention at its first level, where T2I-Adapters can then be heard: at 16 x 16 rather than 8 x 8.

`python scripts/make_default/widen.py` reads `runs/make_default/base/result/` and writes `runs/make_default/wide_base/`,
from which `configs/default/wide_base.yaml` goes on. The new layers add nothing at first.
"""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from new_base import WORK
from torch import nn


@torch.no_grad()
def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same function, with attention in the first block."""
    torch.manual_seed(0)
    blocks = ("CrossAttnDownBlock2D", *unet.config.down_block_types[1:])
    wide = UNet2DConditionModel.from_config({**unet.config, "down_block_types": blocks})
    missing, unexpected = wide.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("down_blocks.0.attentions.") for name in missing)
    for attention in wide.down_blocks[0].attentions:
        nn.init.zeros_(attention.proj_out.weight)
        nn.init.zeros_(attention.proj_out.bias)
    return wide


def main() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(WORK / "base/result", add_watermarker=False)
    pipe.register_modules(unet=widened(pipe.unet))
    pipe.save_pretrained(WORK / "wide_base", safe_serialization=True)


if __name__ == "__main__":
    main()
