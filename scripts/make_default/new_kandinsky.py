"""The small Kandinsky 2.2 before its training: decoder and prior with random weights, at 64 px.

`python scripts/make_default/new_kandinsky.py` writes `runs/make_default/kandinsky/new_decoder/` and `new_prior/`, over the
trained MoVQ and the text encoder of the trained base. The image encoder learns along with the decoder.
"""

from __future__ import annotations

import shutil

import torch
from diffusers import (
    DDIMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from new_base import SCHEDULE, TOKENIZER, WORK
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

FOLDER = WORK / "kandinsky"
WIDTHS = (64, 96, 96)
EMBED = 128  # width of image and text embeddings
SIZE = 64  # pixels


def make_unet(channels: int) -> UNet2DConditionModel:
    """Twice the latents' channels come out, as the pipelines expect; the second half is not used."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=channels,
        out_channels=2 * channels,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=32,
        cross_attention_dim=EMBED,
        encoder_hid_dim=EMBED,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
    )


def make_vision() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=EMBED,
        intermediate_size=4 * EMBED,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=EMBED,
    )
    return CLIPVisionModelWithProjection(config)


def main() -> None:
    torch.manual_seed(0)
    movq = VQModel.from_pretrained(FOLDER / "movq/result")
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    decoder = KandinskyV22Pipeline(
        unet=make_unet(movq.config.latent_channels),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False),
        movq=movq,
    )
    prior = KandinskyV22PriorPipeline(
        prior=PriorTransformer(
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=4,
            embedding_dim=EMBED,
            num_embeddings=tokenizer.model_max_length,
        ),
        image_encoder=make_vision(),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(WORK / "wide/result/text_encoder_2"),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
    )
    for pipe, name in ((decoder, "new_decoder"), (prior, "new_prior")):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        pipe.save_pretrained(FOLDER / name, safe_serialization=True)
        parts = {n: part for n, part in pipe.components.items() if hasattr(part, "parameters")}
        print(", ".join(f"{n} {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M" for n, part in parts.items()))


if __name__ == "__main__":
    main()
