"""What people load onto a pipeline through diffusers' own loaders, beside the peer: LoRA, textual inversion, variants,
offloading hooks, official callbacks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import components, distance, lines, make_adapter, make_controlnet, pipeline, seeds
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import diffusion_kit
from diffusion_kit import Control, SDXLPipeline

CALL = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}


def result(pipe: Any, prompt: str = "a red fox", **more: Any) -> torch.Tensor:
    return pipe(prompt, generator=seeds(1), **{**CALL, **more}).images


def save_lora(folder: Path, name: str, seed: int, unet: Any = None) -> None:
    """A LoRA over the UNet and the first text encoder, with random weights."""
    torch.manual_seed(seed)
    net, encoder = copy.deepcopy(unet or components()["unet"]), copy.deepcopy(components()["text_encoder"])
    config = {"r": 2, "init_lora_weights": False}
    net.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **config))
    encoder.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], **config))
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(net),
        text_encoder_lora_layers=get_peft_model_state_dict(encoder),
        weight_name=f"{name}.safetensors",
    )


def both(**replaced: Any) -> list[Any]:
    """The kit's and the peer's pipeline, each over its own copy of the components."""
    own = {**components(), "tokenizer_2": copy.deepcopy(components()["tokenizer"]), **replaced}
    classes = (SDXLPipeline, diffusers.StableDiffusionXLPipeline)
    return [pipeline(cls, **copy.deepcopy(own)) for cls in classes]


@pytest.mark.parametrize("use", ["scale", "two", "fuse"])
def test_loras(use: str, tmp_path: Path) -> None:
    save_lora(tmp_path, "a", 1)
    save_lora(tmp_path, "b", 2)
    results = []
    for pipe in both():
        pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
        more = {}
        if use == "scale":
            more = {"cross_attention_kwargs": {"scale": 0.4}}
        if use == "two":
            pipe.load_lora_weights(tmp_path, weight_name="b.safetensors", adapter_name="b")
            pipe.set_adapters(["a", "b"], adapter_weights=[0.7, 0.5])
        if use == "fuse":
            pipe.fuse_lora(lora_scale=0.6)
        results.append(result(pipe, **more))
        if use == "fuse":
            pipe.unfuse_lora()
        pipe.unload_lora_weights()
    assert distance(*results) < 1e-4
    plain = result(both()[0])
    assert distance(plain, results[1]) > 1e-2
    assert distance(result(both()[0]), plain) < 1e-6


def test_textual_inversion(tmp_path: Path) -> None:
    vectors = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 32)}
    save_file(vectors, tmp_path / "learned.safetensors")
    results = []
    for pipe in both():
        for key, encoder, tokenizer in (
            ("clip_l", pipe.text_encoder, pipe.tokenizer),
            ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
        ):
            pipe.load_textual_inversion(vectors[key], token="<fox>", text_encoder=encoder, tokenizer=tokenizer)
        results.append(result(pipe, "a <fox>"))
    assert distance(*results) < 1e-4
    assert distance(result(pipeline(SDXLPipeline), "a fox"), results[1]) > 1e-2


def test_variant(tmp_path: Path) -> None:
    pipeline(SDXLPipeline).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = SDXLPipeline.from_pretrained(tmp_path, variant="fp16")
    loaded.set_progress_bar_config(disable=True)
    assert distance(result(loaded), result(pipeline(SDXLPipeline))) < 1e-4


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_hooks_are_told(kind: str) -> None:
    """The hooks of accelerate, with the CPU as the device to run on: what they do to a network they do here too."""
    from accelerate import cpu_offload, cpu_offload_with_hook

    pipe = both()[0]
    expected = result(pipe)
    device = torch.device("cpu")
    ran: list[str] = []
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        net = getattr(pipe, name)
        if kind == "sequential":
            cpu_offload(net, device)
            continue
        cpu_offload_with_hook(net, execution_device=device)
        inner = net._hf_hook.pre_forward

        def told(module: Any, *args: Any, _name: str = name, _inner: Any = inner, **kwargs: Any) -> Any:
            ran.append(_name)
            return _inner(module, *args, **kwargs)

        net._hf_hook.pre_forward = told
    result_again = pipe("a red fox", generator=seeds(1), **{**CALL, "output_type": "pt"}).images
    assert torch.isfinite(result_again).all()
    assert distance(result(pipe), expected) < 1e-5
    if kind == "model":
        assert list(dict.fromkeys(ran)) == ["text_encoder", "text_encoder_2", "unet", "vae"]
        assert ran.count("unet") == 2, "once a run, not once a step"


def test_official_callback() -> None:
    from diffusers.callbacks import SDXLCFGCutoffCallback

    cut = SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)
    ours, theirs = (
        result(pipeline(m.StableDiffusionXLPipeline), callback_on_step_end=cut, num_inference_steps=6)
        for m in (diffusion_kit, diffusers)
    )
    assert distance(ours, theirs) < 1e-4
    assert distance(result(pipeline(SDXLPipeline), num_inference_steps=6), theirs) > 1e-3


def test_networks_of_another_precision_beside_the_base() -> None:
    """bfloat16 controls on a float32 base, and a whole bfloat16 run: finite, and near the float32 picture."""
    adapter, controlnet = make_adapter(), make_controlnet()
    expected = result(pipeline(SDXLPipeline), controls=[Control(adapter, lines(1)), Control(controlnet, lines(2))])
    half = [Control(copy.deepcopy(net).bfloat16(), lines(k)) for k, net in ((1, adapter), (2, controlnet))]
    assert distance(result(pipeline(SDXLPipeline), controls=half), expected) < 0.1
    pipe = both()[0].to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    low = result(pipe, controls=half)
    assert low.dtype == torch.bfloat16
    assert distance(low.float(), expected) < 0.25
