"""Kandinsky's pipelines as folders, both ways with diffusers; decoders that find their prior; wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import distance, half_mask, light, picture
from kandinsky_models import prior_components, unet22
from PIL import Image
from test_kandinsky import CALL, CASES, COMBINED, EMBEDS, HINT, MASK, build, components, embeds, run

import diffusion_kit
from diffusion_kit import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image, Control

PRIORS = ("KandinskyPriorPipeline", "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
NAMES = sorted({case[0] for case in CASES.values()})


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", light([*NAMES, *PRIORS], *NAMES[::4], PRIORS[1]))
def test_folders_both_ways(name: str, tmp_path: Path) -> None:
    parts = prior_components() if name in PRIORS else components(name)
    ours = getattr(diffusion_kit, name)(**parts)
    ours.save_pretrained(tmp_path / "ours")
    read = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(read) is getattr(diffusers, name)
    getattr(diffusers, name)(**parts).save_pretrained(tmp_path / "theirs")
    own = getattr(diffusion_kit, name).from_pretrained(tmp_path / "theirs")
    assert set(own.components) == set(ours.components) == set(read.components)
    for key, part in own.components.items():
        if isinstance(part, torch.nn.Module):
            assert all(torch.equal(a, b) for a, b in zip(part.parameters(), parts[key].parameters(), strict=True)), key
    for value in own.to(torch.bfloat16).components.values():
        assert not isinstance(value, torch.nn.Module) or value.dtype == torch.bfloat16
    for part in parts.values():  # it was saved, never shared
        assert not isinstance(part, torch.nn.Module) or part.dtype == torch.float32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prior, decoder (its card names the prior), inpaint (its index does), hint (nothing does)."""
    root = tmp_path_factory.mktemp("kandinsky")
    diffusers.KandinskyV22PriorPipeline(**prior_components()).save_pretrained(root / "prior")
    parts = {
        "decoder": "KandinskyV22Pipeline",
        "inpaint": "KandinskyV22InpaintPipeline",
        "hint": "KandinskyV22ControlnetPipeline",
        "old": "KandinskyPipeline",
    }
    for folder, name in parts.items():
        getattr(diffusers, name)(**components(name)).save_pretrained(root / folder)
    for folder in ("decoder", "old"):
        (root / folder / "README.md").write_text(f"---\nprior:\n- {root / 'prior'}\n---\nA decoder.\n")
    index = json.loads((root / "inpaint" / "model_index.json").read_text())
    (root / "inpaint" / "model_index.json").write_text(json.dumps({**index, "prior": "../prior"}))
    return root


def test_a_decoder_finds_its_prior(folders: Path) -> None:
    reference = build(diffusers, "KandinskyV22CombinedPipeline")
    pipe = quiet(AutoPipelineForText2Image.from_pretrained(folders / "decoder"))
    assert isinstance(pipe, diffusion_kit.Kandinsky22CombinedPipeline)
    assert distance(run(pipe, **COMBINED), run(reference, **COMBINED)) < 1e-3
    image = quiet(AutoPipelineForImage2Image.from_pretrained(folders / "old"))
    theirs = build(diffusers, "KandinskyImg2ImgCombinedPipeline")
    call = {**COMBINED, "image": picture(1), "strength": 0.5}
    assert distance(run(image, **call), run(theirs, **call)) < 1e-3
    inpaint = quiet(AutoPipelineForInpainting.from_pretrained(folders / "inpaint"))
    theirs = build(diffusers, "KandinskyV22InpaintCombinedPipeline")
    assert distance(run(inpaint, **COMBINED, **MASK), run(theirs, **COMBINED, **MASK)) < 1e-3


def test_combined_with_a_hint_in_three_tasks(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no prior: give prior="):
        AutoPipelineForText2Image.from_pretrained(folders / "hint")
    pipe = quiet(AutoPipelineForText2Image.from_pretrained(folders / "hint", prior=folders / "prior"))
    for task in ({}, {"image": picture(1), "strength": 0.6}, MASK):
        made = [run(pipe, **COMBINED, **task, controls=[Control("hint", hint)]) for hint in (HINT, HINT.flip(-1))]
        assert distance(*made) > 1e-2
    pipe.save_pretrained(tmp_path / "whole")
    again = quiet(AutoPipelineForInpainting.from_pretrained(tmp_path / "whole"))
    call = {**COMBINED, **MASK, "controls": [Control("hint", HINT)]}
    assert torch.equal(run(again, **call), run(pipe, **call))


def test_from_pipe(folders: Path) -> None:
    decoder = quiet(diffusion_kit.KandinskyV22Pipeline.from_pretrained(folders / "decoder"))
    alone = AutoPipelineForImage2Image.from_pipe(decoder)
    assert type(alone) is diffusion_kit.KandinskyV22Pipeline or isinstance(alone, diffusion_kit.Kandinsky22Pipeline)
    prior = diffusion_kit.KandinskyV22PriorPipeline.from_pretrained(folders / "prior")
    both = AutoPipelineForImage2Image.from_pipe(decoder, prior=prior)
    assert isinstance(both, diffusion_kit.Kandinsky22CombinedPipeline)
    assert both.unet is decoder.unet
    assert isinstance(AutoPipelineForInpainting.from_pipe(both), diffusion_kit.Kandinsky22CombinedPipeline)
    assert both.decoder_pipe.unet is decoder.unet
    assert both.prior_pipe.prior is prior.prior


def test_prompts_of_a_combined_batch_are_those_made_alone() -> None:
    pipe = build(diffusion_kit, "KandinskyCombinedPipeline")
    call = {**COMBINED, "negative_prompt": None}
    prompts = ["a red fox", "two blue boats"]
    from conftest import seeds

    both = run(pipe, **{**call, "prompt": prompts}, generator=seeds(1, 2))
    for k in range(2):
        assert distance(run(pipe, seed=k + 1, **{**call, "prompt": prompts[k]}), both[k : k + 1]) < 1e-3


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("KandinskyV22Pipeline", {"image_embeds": torch.zeros(1, 7)}, r"shape \(1, 7\), this UNet takes \(N, 32\)"),
        ("KandinskyV22Pipeline", {"image_embeds": torch.zeros(3, 1, 32)}, r"image_embeds have shape \(3, 1, 32\)"),
        ("KandinskyV22Pipeline", {"image_embeds": None}, "give image_embeds, of a prior"),
        ("KandinskyV22Pipeline", {"negative_image_embeds": None}, "needs negative_image_embeds; the prior gives them"),
        ("KandinskyV22Pipeline", {"negative_image_embeds": embeds(1, 3)}, "3 entries of negative_image_embeds for 1"),
        ("KandinskyV22Pipeline", {"controls": [Control("hint", HINT)]}, "takes no hint"),
        ("KandinskyV22Pipeline", {"latents": torch.zeros(1, 4, 9, 9)}, r"latents have shape \(1, 4, 9, 9\)"),
        ("KandinskyV22ControlnetPipeline", {"hint": None}, "needs hint="),
        ("Kandinsky22Pipeline", {"image": picture(), "mask_image": half_mask(), "strength": 2.0}, "strength is 2.0"),
        ("KandinskyV22Img2ImgPipeline", {"image": None}, "needs image="),
        ("KandinskyV22InpaintPipeline", {**MASK, "mask_image": None}, "needs mask_image="),
        ("KandinskyPipeline", {"prompt": None}, "give a prompt"),
        ("KandinskyPipeline", {"prompt": "a", "negative_prompt": ["x", "y"]}, "2 negative prompts for 1 prompts"),
        ("Kandinsky3Pipeline", {"prompt": None}, "give a prompt or prompt_embeds"),
        ("Kandinsky3Pipeline", {"prompt_embeds": torch.zeros(1, 5, 32)}, "prompt_embeds need attention_mask"),
    ],
)
def test_wrong_input_is_one_line(name: str, call: dict[str, Any], message: str) -> None:
    pipe = build(diffusion_kit, name)
    given = {**CALL, **({} if name.startswith("Kandinsky3") else EMBEDS), **call}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        pipe(**given)
    assert "\n" not in str(error.value)


def test_a_hint_base_needs_a_hint() -> None:
    pipe = diffusion_kit.Kandinsky22Pipeline(**components("KandinskyV22ControlnetPipeline"))
    with pytest.raises(ValueError, match="hint"):
        pipe(**CALL, **EMBEDS)


def test_a_prompt_that_is_not_read_is_a_warning() -> None:
    pipe = build(diffusion_kit, "KandinskyV22Pipeline")
    with pytest.warns(UserWarning, match="reads no prompt"):
        positional = run_with(pipe, "", **EMBEDS)
    with pytest.warns(UserWarning, match="reads no prompt"):
        named = run_with(pipe, prompt="a cat", **EMBEDS)
    assert torch.equal(positional, named)


def run_with(pipe: Any, *args: Any, **call: Any) -> torch.Tensor:
    return torch.as_tensor(
        pipe(*args, **CALL, **call, output_type="np", generator=torch.Generator().manual_seed(0)).images
    )


def test_a_prior_is_no_model_of_its_own(folders: Path) -> None:
    with pytest.raises(ValueError, match="a decoder's prior: give the decoder"):
        AutoPipelineForText2Image.from_pretrained(folders / "prior")


def test_unets_of_another_kind_are_refused() -> None:
    pipe = build(diffusion_kit, "KandinskyV22Pipeline", unet=unet22(9))
    with pytest.raises(ValueError, match="takes 9 input channels, as those made for inpainting do: give image= and"):
        pipe(**CALL, **EMBEDS)


def test_the_size_is_what_the_model_was_made_for(folders: Path) -> None:
    pipe = quiet(AutoPipelineForText2Image.from_pretrained(folders / "decoder"))
    pipe.unet.register_to_config(sample_size=16)
    call = {name: value for name, value in COMBINED.items() if name not in ("height", "width")}
    wide = Image.new("RGB", (320, 192))
    for task in ({}, {"image": wide, "strength": 0.5}):
        assert run(pipe, **call, **task).shape[1:3] == (16 * pipe.vae_scale_factor,) * 2
    assert run(pipe, **call, height=64).shape[1:3] == (64, 16 * pipe.vae_scale_factor)
