"""Small random-weight models of the Kandinsky architectures: priors, decoders of 2.1 and 2.2, Kandinsky 3."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import diffusers
from conftest import make_unet, randomise, text_encoder, tokenizer
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

WIDTH = 32  # of image and text embeddings
CROSS = 32  # of what the UNets attend to; Kandinsky 2.1 has one width for both
HIDDEN = 24  # of the states of Kandinsky 2.1's text encoder
LETTERS = "▁" + string.ascii_letters + string.digits + string.punctuation
CHANNELS = (16, 32, 32)
DECODER_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": True, "clip_sample_range": 2.0}


@cache
def prior_components() -> dict[str, Any]:
    """Components of the priors, which are the same for 2.1 and 2.2."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=WIDTH, num_embeddings=77
    )
    return {
        "prior": randomise(prior, 21),
        "image_encoder": randomise(CLIPVisionModelWithProjection(vision), 22),
        "text_encoder": text_encoder(CLIPTextModelWithProjection, WIDTH, 23),
        "tokenizer": tokenizer(),
        "scheduler": diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    }


@cache
def movq(levels: int = 4) -> diffusers.VQModel:
    """Pixels to latents 2^(levels - 1) times smaller."""
    net = diffusers.VQModel(
        block_out_channels=(32,) * levels,  # SpatialNorm has 32 groups
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        latent_channels=4,
        num_vq_embeddings=16,
        layers_per_block=1,
        norm_num_groups=4,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    net = randomise(net, 24)
    net.decoder.conv_out.weight.data *= 0.35  # pixels mostly inside [-1, 1]
    return net


def make_kandinsky_unet(in_channels: int, **more: Any) -> diffusers.UNet2DConditionModel:
    return make_unet(
        in_channels,
        out_channels=8,
        sample_size=8,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=CROSS,
        use_linear_projection=False,
        projection_class_embeddings_input_dim=None,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=4,
        **more,
    )


@cache
def unet22(in_channels: int = 4) -> diffusers.UNet2DConditionModel:
    return make_kandinsky_unet(
        in_channels, encoder_hid_dim=WIDTH, encoder_hid_dim_type="image_proj", addition_embed_type="image"
    )


@cache
def unet22_hint() -> diffusers.UNet2DConditionModel:
    return make_kandinsky_unet(
        8, encoder_hid_dim=WIDTH, encoder_hid_dim_type="image_proj", addition_embed_type="image_hint"
    )


@cache
def unet21(in_channels: int = 4) -> diffusers.UNet2DConditionModel:
    return make_kandinsky_unet(
        in_channels, encoder_hid_dim=HIDDEN, encoder_hid_dim_type="text_image_proj", addition_embed_type="text_image"
    )


@cache
def xlm_tokenizer() -> XLMRobertaTokenizer:
    """XLM-Roberta's tokenizer over single letters."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [(name, 0.0) for name in special] + [(letter, -1.0) for letter in LETTERS] + [("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocab, model_max_length=77)


@cache
def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer over single letters."""
    special = ["<pad>", "</s>", "<unk>"]
    vocab = [(name, 0.0) for name in special] + [(letter, -1.0) for letter in LETTERS]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


@cache
def mclip() -> MultilingualCLIP:
    config = MCLIPConfig(
        transformerDimSize=HIDDEN,
        imageDimSize=CROSS,
        vocab_size=len(xlm_tokenizer()),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,
        pad_token_id=1,
    )
    return randomise(MultilingualCLIP(config), 25)


@cache
def decoder21_components() -> dict[str, Any]:
    return {
        "text_encoder": mclip(),
        "tokenizer": xlm_tokenizer(),
        "unet": unet21(),
        "scheduler": diffusers.DDIMScheduler(**DECODER_SCHEDULE, set_alpha_to_one=False, steps_offset=1),
        "movq": movq(),
    }


@cache
def decoder22_components() -> dict[str, Any]:
    return {
        "unet": unet22(),
        "scheduler": diffusers.DDPMScheduler(**DECODER_SCHEDULE, variance_type="learned_range"),
        "movq": movq(),
    }


@cache
def kandinsky3_components() -> dict[str, Any]:
    unet = diffusers.Kandinsky3UNet(
        time_embedding_dim=32,
        groups=2,
        attention_head_dim=8,
        layers_per_block=3,
        block_out_channels=(16, 16, 32, 32),
        cross_attention_dim=32,
        encoder_hid_dim=32,
    )
    t5 = T5Config(vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": randomise(T5EncoderModel(t5), 26),
        "unet": randomise(unet, 27),
        "scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True),
        "movq": movq(),
    }
