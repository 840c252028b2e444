"""Small random-weight models of the SDXL architecture, and pictures.

Every parameter that starts at zero is randomised: a zero-initialised output would make a parity test pass for nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from functools import cache
from itertools import count, product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_kit import SDXLPipeline

SCRATCH = tempfile.TemporaryDirectory()  # what tests share; it goes with them
os.environ["DIFFUSION_KIT_HOME"] = f"{SCRATCH.name}/home"  # no test writes into the history of who runs it
diffusers.utils.logging.set_verbosity_error()
torch.set_grad_enabled(False)
torch.set_num_threads(1)  # the nets are tiny: threads only wait for each other


def pytest_configure(config: pytest.Config) -> None:
    """What a CPU gives is the reference: a GPU is seen by `pytest -m cuda` only."""
    if "cuda" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_unconfigure(config: pytest.Config) -> None:
    SCRATCH.cleanup()


def scratch() -> Path:
    """An empty folder."""
    return Path(tempfile.mkdtemp(dir=SCRATCH.name))


def needs(module: str, script: str = "readme") -> Any:
    """A module that not everyone has; without it a test is skipped, and says which script installs it and runs it."""
    return pytest.importorskip(module, reason=f"{module} is not installed: scripts/verify {script} installs it")


NUMBERS = count()


@pytest.fixture(autouse=True)
def own_history(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every test has a history of its own; its folder is made when something is written."""
    monkeypatch.setenv("DIFFUSION_KIT_HOME", f"{tmp_path_factory.getbasetemp()}/history-{next(NUMBERS)}")
    monkeypatch.delenv("DIFFUSION_KIT_LEDGER", raising=False)


def light(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Cases of a test, of which those that are not `kept` run with scripts/verify heavy: together they take minutes."""
    return [
        case if case in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.heavy)
        for case in cases
    ]


def crossed(*axes: Iterable[Any]) -> list[Any]:
    """Every combination of a value of each axis (a tuple is several arguments). A diagonal, in which each value stands at
    least once, is the suite's; the rest runs with scripts/verify heavy."""
    values = [list(axis) for axis in axes]
    diagonal = {tuple(k % len(axis) for axis in values) for k in range(max(map(len, values)))}
    cases = []
    for index in product(*(range(len(axis)) for axis in values)):
        chosen = (axis[k] for axis, k in zip(values, index, strict=True))
        arguments = [part for value in chosen for part in (value if isinstance(value, tuple) else (value,))]
        cases.append(pytest.param(*arguments, marks=[] if index in diagonal else [pytest.mark.heavy]))
    return cases


CHANNELS = (32, 64, 64)
CROSS = 48  # 16 + 32, the widths of the two text encoders
SIZE = 64  # pixels; latents 16 x 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


LOUD = {"attn2.to_out": 12.0, "controlnet_": 3.0, "adapter.": 2.0, "condition_encoder": 4.0}


def randomise(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights that are a function of the seed: matrices of unit gain, norms about 1, biases about 0, nothing zero.

    What conditions the result is loud, so that it is seen there.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            gain = next((value for part, value in LOUD.items() if part in name), 1.0)
            parameter.data = noise * (gain / parameter[0].numel() ** 0.5)
        else:
            parameter.data = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
    return net.eval()


@cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer over single bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    names = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder = scratch()
    (folder / "vocab.json").write_text(json.dumps({name: k for k, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def text_encoder(kind: Any, width: int, seed: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return randomise(kind(config), seed)


def make_unet(in_channels: int = 4, ids: int = 6, **more: Any) -> diffusers.UNet2DConditionModel:
    config = dict(
        sample_size=SIZE // 4,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=CROSS,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 8 * ids,
        norm_num_groups=8,
    )
    return randomise(diffusers.UNet2DConditionModel(**{**config, **more}), 1)


def make_vae(levels: int = 3) -> diffusers.AutoencoderKL:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, *(16,) * (levels - 1)),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.5,
        force_upcast=False,
    )
    vae = randomise(vae, 2)
    vae.decoder.conv_out.weight.data *= 0.35  # pixels mostly inside [-1, 1]
    return vae


def make_adapter(seed: int = 3, kind: str = "full_adapter_xl", downscale: int = 8, channels: Any = None) -> Any:
    channels = list(channels or (*CHANNELS, CHANNELS[-1]))
    return randomise(diffusers.T2IAdapter(3, channels, 1, downscale, kind), seed)


def make_controlnet(seed: int = 4, of: Any = None, **config: Any) -> diffusers.ControlNetModel:
    net = diffusers.ControlNetModel.from_unet(of or unet(), conditioning_embedding_out_channels=(8, 16, 16))
    net.register_to_config(**config)
    return randomise(net, seed)


@cache
def unet() -> diffusers.UNet2DConditionModel:
    return make_unet()


@cache
def components() -> dict[str, Any]:
    """Components of an SDXL base; tests that change one copy it first."""
    return {
        "vae": make_vae(),
        "text_encoder": text_encoder(CLIPTextModel, 16, 5),
        "text_encoder_2": text_encoder(CLIPTextModelWithProjection, 32, 6),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": unet(),
        "scheduler": diffusers.EulerDiscreteScheduler(**SCHEDULE),
    }


@cache
def sd_components() -> dict[str, Any]:
    """Components of Stable Diffusion 1.5: one text encoder, attention in the first levels, no added embeddings."""
    return {
        "vae": make_vae(),
        "text_encoder": text_encoder(CLIPTextModel, CROSS, 5),
        "tokenizer": tokenizer(),
        "unet": make_sd_unet(),
        "scheduler": diffusers.EulerDiscreteScheduler(**SCHEDULE),
        "safety_checker": None,
        "feature_extractor": None,
    }


def make_sd_unet(in_channels: int = 4, **more: Any) -> diffusers.UNet2DConditionModel:
    return make_unet(
        in_channels,
        addition_embed_type=None,
        projection_class_embeddings_input_dim=None,
        transformer_layers_per_block=1,
        use_linear_projection=False,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    )


def make_sd_controlnet(seed: int = 4, **config: Any) -> diffusers.ControlNetModel:
    return make_controlnet(seed, of=sd_components()["unet"], **config)


def sd_pipeline(cls: Any, **replaced: Any) -> Any:
    pipe = cls(**{**sd_components(), "requires_safety_checker": False, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(cls: Any, **replaced: Any) -> Any:
    """A pipeline of the kit or of the peer over the same components."""
    pipe = cls(**{**components(), **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    """A smooth random colour picture."""
    values = np.random.default_rng(seed).uniform(0, 255, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def lines(seed: int = 0, size: int = SIZE) -> Image.Image:
    """White lines on black, as an edge map has."""
    values = np.random.default_rng(seed).uniform(0, 1, (size, size)) > 0.9
    return Image.fromarray((values * 255).astype(np.uint8)).convert("RGB")


def half_mask(size: int = SIZE) -> Image.Image:
    """White on the left half."""
    values = np.zeros((size, size), np.uint8)
    values[:, : size // 2] = 255
    return Image.fromarray(values)


def seeds(*numbers: int) -> Any:
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    return generators[0] if len(generators) == 1 else generators


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small random-weight SDXL with controls."""
    path = tmp_path_factory.mktemp("model")
    pipeline(SDXLPipeline).save_pretrained(path)
    make_adapter().save_pretrained(path / "controls" / "canny")
    make_controlnet().save_pretrained(path / "more" / "net")
    return path


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a photo, line art, a mask, and a file that is no picture."""
    monkeypatch.chdir(tmp_path)
    picture(size=96).save("photo.png")
    lines().save("lines.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    Path("text.png").write_text("no picture")
    return tmp_path
