"""Gives trained UNets attention at their first level, which adds nothing at first.

`python scripts/make_default/widen.py` reads `runs/make_default/base/result/` and writes `runs/make_default/wide_base/`, for
`configs/default/wide_base.yaml`: T2I-Adapters can then be heard at 16 x 16 rather than 8 x 8. With `kandinsky` it reads
`runs/make_default/kandinsky/decoder/result/` and writes `wide_decoder/` beside, for `kandinsky/wide_decoder.yaml`: what the
embedding says is then heard at 8 x 8 rather than 4 x 4.
"""

from __future__ import annotations

import sys

import torch
from diffusers import KandinskyV22Pipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from new_base import WORK
from torch import nn

SILENT = ("proj_out.", "to_out.")  # the last layers of attention


@torch.no_grad()
def widened(unet: UNet2DConditionModel, **blocks: tuple[str, ...]) -> UNet2DConditionModel:
    """The same function, in blocks of these types: what the UNet does not have adds nothing."""
    torch.manual_seed(0)
    wide = UNet2DConditionModel.from_config({**unet.config, **blocks})
    missing, unexpected = wide.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected
    assert all(".attentions." in name for name in missing)
    for name in missing:
        if ".transformer_blocks." not in name and any(part in name for part in SILENT):
            nn.init.zeros_(wide.get_parameter(name))
    return wide


def base() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(WORK / "base/result", add_watermarker=False)
    blocks = ("CrossAttnDownBlock2D", *pipe.unet.config.down_block_types[1:])
    pipe.register_modules(unet=widened(pipe.unet, down_block_types=blocks))
    pipe.save_pretrained(WORK / "wide_base", safe_serialization=True)


def kandinsky() -> None:
    pipe = KandinskyV22Pipeline.from_pretrained(WORK / "kandinsky/decoder/result")
    levels = len(pipe.unet.config.down_block_types)
    down, up = ("SimpleCrossAttnDownBlock2D",) * levels, ("SimpleCrossAttnUpBlock2D",) * levels
    pipe.register_modules(unet=widened(pipe.unet, down_block_types=down, up_block_types=up))
    pipe.save_pretrained(WORK / "kandinsky/wide_decoder", safe_serialization=True)


if __name__ == "__main__":
    {"": base, "kandinsky": kandinsky}["".join(sys.argv[1:])]()
