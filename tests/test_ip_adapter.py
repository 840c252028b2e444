"""IP-Adapters: every kind beside diffusers over the same file; batches, masks and scales against single runs and counts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import (
    CROSS,
    crossed,
    distance,
    half_mask,
    lines,
    make_adapter,
    make_controlnet,
    make_sd_controlnet,
    picture,
    pipeline,
    randomise,
    sd_components,
    sd_pipeline,
    seeds,
    unet,
)
from PIL import Image
from safetensors.torch import save_file
from test_step import CREATIONS, SYNCS, counted, small
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import diffusion_kit
from diffusion_kit import Control, SD15Pipeline, SDXLPipeline
from diffusion_kit.adapters.ip_adapter import IPAdapter
from diffusion_kit.models.attention import attention_layers
from diffusion_kit.sampling.engines import Compiled

KINDS = ("plain", "plus", "full")
HIDDEN, POOLED = 64, 24  # of the image encoder
FAMILIES = {"sd15": (sd_pipeline, SD15Pipeline), "sdxl": (pipeline, SDXLPipeline)}
SAME = 1e-5


@cache
def encoder(hidden: int = HIDDEN, pooled: int = POOLED) -> Any:
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=pooled,
    )
    return randomise(CLIPVisionModelWithProjection(config), 31)


def projection(kind: str, width: int, draw: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projection in the layout of published files."""
    norm = {"weight": 1 + 0.1 * draw(width), "bias": draw(width)}
    if kind == "plain":
        parts = {"proj.weight": draw(4 * width, POOLED), "proj.bias": draw(4 * width)}
        return parts | {f"norm.{name}": value for name, value in norm.items()}
    if kind == "full":
        parts = {"proj.0.weight": draw(HIDDEN, HIDDEN), "proj.2.weight": draw(width, HIDDEN)}
        parts |= {"proj.0.bias": draw(HIDDEN), "proj.2.bias": draw(width)}
        return parts | {f"proj.3.{name}": value for name, value in norm.items()}
    inner = 64  # one head
    parts = {"latents": draw(1, 3, inner)} | {f"norm_out.{name}": value for name, value in norm.items()}
    parts |= {"proj_in.weight": draw(inner, HIDDEN), "proj_in.bias": draw(inner)}
    parts |= {"proj_out.weight": draw(width, inner), "proj_out.bias": draw(width)}
    for k in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            parts |= {f"layers.{k}.{name}.weight": 1 + 0.1 * draw(inner), f"layers.{k}.{name}.bias": draw(inner)}
        parts |= {f"layers.{k}.0.to_q.weight": draw(64, inner), f"layers.{k}.0.to_kv.weight": draw(128, inner)}
        parts |= {f"layers.{k}.0.to_out.weight": draw(inner, 64)}
        parts |= {f"layers.{k}.1.1.weight": draw(4 * inner, inner), f"layers.{k}.1.3.weight": draw(inner, 4 * inner)}
    return parts


@cache
def weights(kind: str, family: str = "sdxl", seed: int = 40) -> dict[str, torch.Tensor]:
    """A checkpoint for the tiny UNet of the family."""
    return checkpoint(unet() if family == "sdxl" else sd_components()["unet"], kind, seed)


def checkpoint(net: Any, kind: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 10)

    result = {f"image_proj.{name}": value for name, value in projection(kind, CROSS, draw).items()}
    layers = [layer for _, layer in attention_layers(net) if layer.is_cross_attention]
    for k, layer in enumerate(layers):
        for name in ("to_k_ip", "to_v_ip"):
            result[f"ip_adapter.{2 * k + 1}.{name}.weight"] = draw(layer.inner_kv_dim, CROSS)
    return result


def make_ip(kind: str = "plain", family: str = "sdxl", seed: int = 40, **more: Any) -> IPAdapter:
    return IPAdapter(weights(kind, family, seed), **{"image_encoder": encoder(), **more}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out as the published repository is."""
    root = tmp_path_factory.mktemp("IP-Adapter")
    (root / "models").mkdir()
    for family in FAMILIES:
        for kind in KINDS:
            for seed in (40, 41):
                save_file(weights(kind, family, seed), root / "models" / f"{kind}_{family}_{seed}.safetensors")
    encoder().save_pretrained(root / "models" / "image_encoder")
    return root


CALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}


def own(family: str, cls: Any = None, **parts: Any) -> Any:
    """A pipeline over a UNet of its own, which the peer may change."""
    make, kit = FAMILIES[family]
    net = copy.deepcopy(unet() if family == "sdxl" else sd_components()["unet"])
    parts = {"image_encoder": encoder(), "feature_extractor": extractor(), **parts}
    return make(cls or kit, unet=net, **parts)


@cache
def extractor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size=32, crop_size=32)


def run(controls: Any = (), pipe: Any = None, **more: Any) -> torch.Tensor:
    pipe = pipe or pipeline(SDXLPipeline)
    return pipe(**{"prompt": "a red fox", "generator": seeds(1), **CALL, **more}, controls=controls).images


def names(kind: str, family: str, seeds: tuple[int, ...] = (40,)) -> list[str]:
    return [f"{kind}_{family}_{seed}.safetensors" for seed in seeds]


@pytest.mark.parametrize(
    ("family", "kind", "guidance"), crossed(FAMILIES, [("plain", 4.0), ("plus", 4.0), ("full", 4.0), ("plus", 1.0)])
)
def test_text_to_image_is_the_peers(kind: str, family: str, guidance: float, folder: Path) -> None:
    name = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[family]
    theirs, ours = own(family, getattr(diffusers, name)), own(family, getattr(diffusion_kit, name))
    results = []
    for pipe in (theirs, ours):
        pipe.load_ip_adapter(str(folder), subfolder="models", weight_name=names(kind, family)[0])
        pipe.set_ip_adapter_scale(0.8)
        call = {"generator": seeds(1), **CALL, "guidance_scale": guidance}
        results.append(pipe("a red fox", ip_adapter_image=picture(5, 50), **call).images)
    assert distance(results[1], results[0]) < 1e-4
    control = Control(make_ip(kind, family), picture(5, 50), scale=0.8)
    assert distance(run([control], own(family), guidance_scale=guidance), results[0]) < 1e-4
    assert distance(run([], own(family), guidance_scale=guidance), results[0]) > 1e-2


@pytest.mark.parametrize(
    ("family", "name", "call"),
    [
        ("sdxl", "StableDiffusionXLImg2ImgPipeline", {"image": picture(), "strength": 0.7}),
        ("sdxl", "StableDiffusionXLInpaintPipeline", {"image": picture(), "mask_image": half_mask(), "strength": 0.8}),
        ("sd15", "StableDiffusionImg2ImgPipeline", {"image": picture(), "strength": 0.7}),
        ("sdxl", "StableDiffusionXLAdapterPipeline", {"image": lines()}),
        ("sdxl", "StableDiffusionXLControlNetPipeline", {"image": lines()}),
        ("sd15", "StableDiffusionControlNetPipeline", {"image": lines()}),
        ("sdxl", "StableDiffusionXLControlNetImg2ImgPipeline", {"image": picture(), "control_image": lines()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tasks_and_other_controls_beside_it_are_the_peers(family: str, name: str, call: Any, folder: Path) -> None:
    parts: dict[str, Any] = {}
    if "ControlNet" in name:
        parts["controlnet"] = make_controlnet() if family == "sdxl" else make_sd_controlnet()
    if "Adapter" in name:
        parts["adapter"] = make_adapter()
    call, results = {**CALL, **call, "num_inference_steps": 4}, []
    for cls in (getattr(diffusers, name), getattr(diffusion_kit, name)):
        pipe = own(family, cls, **parts)
        pipe.load_ip_adapter(str(folder), subfolder="models", weight_name=names("plus", family)[0])
        pipe.set_ip_adapter_scale(0.7)
        results.append(pipe("a red fox", ip_adapter_image=picture(5), generator=seeds(1), **call).images)
    assert distance(results[1], results[0]) < 1e-4
    assert distance(pipe("a red fox", generator=seeds(1), **call).images, results[0]) > 1e-2


BLOCKS = {"down": {"block_2": [0.0, 0.9]}, "up": {"block_0": [0.2, 1.0, 0.0]}}


@pytest.mark.parametrize("scale", [[0.5, 0.9], [BLOCKS, 0.4], [BLOCKS, {"mid": 0.8, "up": 0.3}]])
def test_two_adapters_and_several_pictures_are_the_peers(scale: Any, folder: Path) -> None:
    images = [[picture(5), picture(6)], picture(7)]
    results = []
    for cls in (diffusers.StableDiffusionXLPipeline, diffusion_kit.StableDiffusionXLPipeline):
        pipe = own("sdxl", cls)
        pipe.load_ip_adapter(str(folder), "models", [names("plain", "sdxl")[0], names("plus", "sdxl", (41,))[0]])
        pipe.set_ip_adapter_scale(copy.deepcopy(scale))
        results.append(pipe("a red fox", ip_adapter_image=images, generator=seeds(1), **CALL).images)
    assert distance(results[1], results[0]) < 1e-4
    pipe.set_ip_adapter_scale([scale[0], 0.0])
    assert distance(pipe("a red fox", ip_adapter_image=images, generator=seeds(1), **CALL).images, results[0]) > 1e-2


@pytest.mark.parametrize(("scale", "kind"), crossed([0.7, [[0.9, 0.4]]], ["plain", "plus"]))
def test_masked_pictures_are_the_peers(kind: str, scale: Any, folder: Path) -> None:
    """Masks of whole blocks, for which areas and the peer's bicubic samples agree."""
    left, masks = half_mask(), diffusers.image_processor.IPAdapterMaskProcessor()
    right = Image.eval(left, lambda value: 255 - value)
    both = masks.preprocess([left, right], height=64, width=64)
    results = []
    for cls in (diffusers.StableDiffusionXLPipeline, diffusion_kit.StableDiffusionXLPipeline):
        pipe = own("sdxl", cls)
        pipe.load_ip_adapter(str(folder), subfolder="models", weight_name=names(kind, "sdxl")[0])
        pipe.set_ip_adapter_scale(scale)
        call = {"ip_adapter_image": [[picture(5), picture(6)]], **CALL}
        areas = {"ip_adapter_masks": [both.reshape(1, 2, 64, 64)]}
        results.append(pipe("a red fox", cross_attention_kwargs=areas, generator=seeds(1), **call).images)
    assert distance(results[1], results[0]) < 1e-4
    ip, (first, second) = make_ip(kind), scale[0] if isinstance(scale, list) else (scale, scale)
    apart = [Control(ip, picture(5), mask=left, scale=first), Control(ip, picture(6), mask=right, scale=second)]
    assert distance(run(apart), results[0]) < 1e-4
    swapped = [dataclasses.replace(control, mask=mask) for control, mask in zip(apart, (right, left), strict=True)]
    assert distance(run(swapped), results[0]) > 1e-2


@pytest.mark.parametrize(("guidance", "kind"), crossed([4.0, 1.0], KINDS))
def test_ready_embeddings_are_the_peers_and_give_the_same(kind: str, guidance: float, folder: Path) -> None:
    call = {**CALL, "guidance_scale": guidance}
    results, embeds = [], []
    for cls in (diffusers.StableDiffusionXLPipeline, diffusion_kit.StableDiffusionXLPipeline):
        pipe = own("sdxl", cls)
        pipe.load_ip_adapter(str(folder), subfolder="models", weight_name=names(kind, "sdxl")[0])
        images = [[picture(5), picture(6)]]
        embeds.append(pipe.prepare_ip_adapter_image_embeds(images, None, torch.device("cpu"), 1, guidance > 1)[0])
        results.append(pipe("a red fox", ip_adapter_image_embeds=embeds[:1], generator=seeds(1), **call).images)
    torch.testing.assert_close(*embeds)
    assert distance(results[1], results[0]) < 1e-4
    shown = pipe("a red fox", ip_adapter_image=images, generator=seeds(1), **call).images
    assert distance(shown, results[0]) < 1e-4
    assert distance(run([Control(make_ip(kind), embeds[0])], guidance_scale=guidance), results[0]) < 1e-4


def test_a_picture_is_looked_at_once_where_calls_share() -> None:
    ip, pipe, looks = make_ip("plus"), pipeline(SDXLPipeline), []
    ip.image_encoder = copy.deepcopy(ip.image_encoder)
    ip.image_encoder.register_forward_hook(lambda *_: looks.append(1))
    plain = [run([Control(ip, picture(k))], prompt=f"fox {k}", pipe=pipe) for k in (3, 4)]
    looks.clear()
    with pipe.sharing():
        for k, number in ((3, 1), (4, 2), (3, 2)):
            assert torch.equal(run([Control(ip, picture(k))], prompt=f"fox {k}", pipe=pipe), plain[k - 3])
            assert len(looks) == number


@pytest.mark.parametrize(("kind", "together"), [("plain", False), ("plus", True)])
def test_picture_k_of_a_batch_is_the_picture_made_alone(kind: str, together: bool) -> None:
    ip, prompts = make_ip(kind), ["a red fox", "a blue bird"]
    shown: list[Any] = [[picture(5), picture(6)], [picture(7), picture(8)]] if together else [picture(5), picture(6)]
    mask = [half_mask(), Image.eval(half_mask(), lambda value: 255 - value)]
    batch = run([Control(ip, shown, mask=mask)], prompt=prompts, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4))
    for k in range(4):
        alone = Control(ip, [shown[k // 2]], mask=mask[k // 2])
        one = run([alone], prompt=prompts[k // 2], generator=seeds(k + 1))
        assert distance(batch[k : k + 1], one) < 1e-4, f"picture {k}"
    everyone = run([Control(ip, [[picture(5), picture(6)]])], prompt=prompts, generator=seeds(1, 2))
    other = run([Control(ip, [[picture(5), picture(6)]])], prompt=prompts[1], generator=seeds(2))
    assert distance(everyone[1:], other) < 1e-4, "one list serves all prompts"


@pytest.mark.parametrize("task", ["text", "inpaint"])
def test_reductions_and_mixtures(task: str) -> None:
    more: dict[str, Any] = {} if task == "text" else {"image": picture(), "strength": 0.8}
    more |= {"mask_image": half_mask()} if task == "inpaint" else {}
    ip, white, black = make_ip(), Image.new("L", (64, 64), 255), Image.new("L", (64, 64), 0)
    nothing, full = run(**more), run([Control(ip, picture(5))], **more)
    assert distance(nothing, full) > 1e-2
    for off in ({"scale": 0.0}, {"mask": black}, {"start": 0.5, "end": 0.5}, {"scale": {"up_blocks": 0.0}}):
        assert torch.equal(run([Control(ip, picture(5), **off)], **more), nothing)
    for same in ({"mask": white}, {"scale": [1.0] * 4}, {"scale": {"down_": 1.0, "mid_": 1.0, "up_": 1.0}}):
        assert distance(run([Control(ip, picture(5), **same)], **more), full) < SAME
    controls = [Control(ip, picture(5)), Control(make_adapter(), lines(1)), Control(make_controlnet(), lines(2))]
    every = run(controls, **more)
    assert distance(run(controls[::-1], **more), every) < SAME, "order matters"
    for k in range(3):
        assert distance(run([*controls[:k], *controls[k + 1 :]], **more), every) > 1e-3


def test_levels_and_halves_of_a_mask_add_up() -> None:
    """A scale by level is the same scale on the layers of the blocks of that size; masks that add up to white are none."""
    ip, mask = make_ip(), half_mask()
    blocks = [("down_blocks.0", "up_blocks.2"), ("down_blocks.1", "up_blocks.1"), ("down_blocks.2", "up_blocks.0")]
    results = []
    for level, parts in enumerate([*blocks, ("mid_block",)]):
        scale = [0.7 * (k == level) for k in range(4)]
        results.append(run([Control(ip, picture(5), scale=scale)]))
        if level == 0:  # SDXL's first level has no attention
            assert distance(results[0], run()) < SAME
            continue
        assert distance(results[-1], run([Control(ip, picture(5), scale=dict.fromkeys(parts, 0.7))])) < SAME
        assert all(distance(results[-1], other) > 1e-3 for other in results[:-1])
    grey = Image.new("L", (64, 64), 85)
    halves = [Control(ip, picture(5), mask=m) for m in (mask, Image.eval(mask, lambda value: 255 - value))]
    full = run([Control(ip, picture(5))])
    assert distance(run(halves), full) < SAME
    assert distance(run([Control(ip, picture(5), mask=grey)]), run([Control(ip, picture(5), scale=1 / 3)])) < SAME
    assert distance(run(halves[:1]), full) > 1e-2


def test_a_mask_is_averaged_over_the_area_of_each_query() -> None:
    """Weights of a mask of single pixels against means of blocks, at every layer's own grid."""
    from diffusion_kit.adapters.control import Site, encode_control

    site = Site(unet(), 64, 64, (16, 16), 1, 1, torch.tensor([500.0]), torch.device("cpu"))
    values = torch.rand(1, 1, 64, 64, generator=seeds(3))
    encoded = encode_control(Control(make_ip(), picture(5), mask=values, scale=0.5), site)
    for name, (tokens,) in encoded.tensors({}, 2).items():
        side = 4 if name.startswith(("down_blocks.2", "mid", "up_blocks.0")) else 8
        blocks = values.view(side, 64 // side, side, 64 // side).mean((1, 3)).flatten()
        torch.testing.assert_close(tokens.weight, 0.5 * blocks[None, None, :, None])
    middle = encode_control(Control(make_ip(), picture(5), scale={"mid_block": 0.5}), site)
    assert {name.split(".")[0] for name in middle.tensors({}, 2)} == {"mid_block"}, "the others attend to nothing more"


def test_window_and_guidance_interval() -> None:
    """A window's halves make up the whole, and steps without guidance have one branch."""
    ip = make_ip("plus")
    halves = [Control(ip, picture(5), end=0.5), Control(ip, picture(5), start=0.5)]
    assert distance(run(halves), run([Control(ip, picture(5))])) < SAME
    assert distance(run(halves[:1]), run(halves[1:])) > 1e-3
    assert torch.isfinite(run(halves, guidance_interval=(0.5, 1.0))).all()


def test_the_unet_is_as_it_was_after_a_run_and_after_an_error() -> None:
    pipe = own("sdxl")
    net = pipe.unet
    before, processors = copy.deepcopy(net.state_dict()), dict(net.attn_processors)

    def fail(*_: Any) -> Any:
        raise RuntimeError("stop")

    run([Control(make_ip(), picture(5))], pipe)
    with pytest.raises(RuntimeError, match="stop"):
        run([Control(make_ip(), picture(5))], pipe, callback_on_step_end=fail)
    assert net.attn_processors == processors
    assert net.config.encoder_hid_dim_type is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_step_reads_nothing_on_the_host_and_is_one_graph() -> None:
    others, net = small()
    ip = IPAdapter(checkpoint(net, "plus", 40), encoder())
    controls = [Control(ip, picture(5), mask=half_mask()), *others]
    steps = counted(SDXLPipeline, {"controls": controls}, {"unet": net}).steps
    for operations in steps:
        assert not (SYNCS | CREATIONS) & set(operations)
        assert len(operations) == len(steps[0])
    pipe, plain = pipeline(SDXLPipeline, unet=net), pipeline(SDXLPipeline, unet=net)
    pipe.engine = Compiled(backend="eager")
    assert distance(run(controls, pipe), run(controls, plain)) < 1e-4
    run([Control(ip, picture(6), mask=half_mask(), scale=0.3), *others], pipe)
    assert len(pipe.engine.graphs) == 1, "picture and scale are tensors"
    assert not pipe.engine.notes


@pytest.mark.parametrize("place", ["file", "folder", "subfolder"])
def test_sources_and_image_encoders(place: str, tmp_path: Path) -> None:
    inside = tmp_path / "models"
    inside.mkdir()
    save_file(weights("plain"), inside / "adapter.safetensors")
    encoder().save_pretrained(inside / "image_encoder")
    source, more = {
        "file": (inside / "adapter.safetensors", {}),
        "folder": (str(inside), {"weight_name": "adapter.safetensors"}),
        "subfolder": (tmp_path, {"subfolder": "models", "weight_name": "adapter.safetensors"}),
    }[place]
    loaded = IPAdapter.from_pretrained(source, **more)
    assert distance(run([Control(loaded, picture(5))]), run([Control(make_ip(), picture(5))])) < SAME
    shared = IPAdapter.from_pretrained(source, image_encoder=encoder(), torch_dtype=torch.bfloat16, **more)
    assert shared.image_encoder is encoder()
    assert encoder().dtype == torch.float32
    assert shared.to_k_ip[0].weight.dtype == torch.bfloat16
    assert distance(run([Control(shared, picture(5))]), run([Control(make_ip(), picture(5))])) < 0.1


def test_of_two_image_encoders_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    """SDXL's adapters for the smaller encoder lie beside a larger one."""
    (tmp_path / "sdxl_models").mkdir()
    file = tmp_path / "sdxl_models" / "plus.safetensors"
    save_file(weights("plus"), file)
    encoder(32, 48).save_pretrained(tmp_path / "sdxl_models" / "image_encoder")
    assert IPAdapter.from_pretrained(file).image_encoder is None
    encoder().save_pretrained(tmp_path / "models" / "image_encoder")
    inside = {"subfolder": "sdxl_models", "weight_name": "plus.safetensors"}
    for found in (IPAdapter.from_pretrained(file), IPAdapter.from_pretrained(tmp_path, **inside)):
        assert found.image_encoder.config.hidden_size == HIDDEN


def test_the_pipeline_registers_saves_and_forgets_the_image_encoder(folder: Path, tmp_path: Path) -> None:
    pipe = own("sdxl", image_encoder=None, feature_extractor=None)
    pipe.load_ip_adapter(str(folder), subfolder="models", weight_name=names("plain", "sdxl")[0])
    shown = run((), pipe, ip_adapter_image=picture(5))
    assert distance(shown, run([Control(make_ip(), picture(5))])) < SAME
    again = diffusion_kit.AutoPipelineForImage2Image.from_pipe(pipe)
    assert distance(run((), again, ip_adapter_image=picture(5)), shown) < SAME, "from_pipe carries the adapters along"
    pipe.save_pretrained(tmp_path)
    saved = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert saved.image_encoder.config.projection_dim == POOLED
    assert saved.unet.encoder_hid_proj is None
    pipe.unload_ip_adapter()
    assert pipe.image_encoder is None
    assert pipe.feature_extractor is None
    assert distance(run((), pipe), run()) < SAME
    with pytest.raises(ValueError, match="call load_ip_adapter first"):
        run((), pipe, ip_adapter_image=picture(5))


def test_a_callback_may_set_the_scale_as_the_peers_does(folder: Path) -> None:
    cutoff = diffusers.callbacks.IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    call = {"ip_adapter_image": picture(5), "num_inference_steps": 4, "prompt": "a red fox", "output_type": "latent"}
    results = []
    for module in (diffusers, diffusion_kit):
        pipe = own("sdxl", module.StableDiffusionXLPipeline)
        pipe.load_ip_adapter(str(folder), subfolder="models", weight_name=names("plain", "sdxl")[0])
        whole = pipe(**call, generator=seeds(1)).images
        results.append(pipe(**call, generator=seeds(1), callback_on_step_end=cutoff).images)
        assert distance(results[-1], whole) > 1e-3
    assert distance(results[1], results[0]) < 1e-4

    def begin(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.5)
        return {}

    pipe.set_ip_adapter_scale(0.0)
    with pytest.raises(ValueError, match="was 0 when the call began: begin with a small one"):
        pipe(**call, callback_on_step_end=begin)
    pipe(**{**call, "ip_adapter_image": None}, callback_on_step_end=begin)  # nothing is shown, nothing to scale


def test_a_reference_is_seen_whole_whatever_the_fit_of_the_call(folder: Path) -> None:
    wide = Image.new("RGB", (128, 64))
    wide.paste(picture(5), (0, 0))
    wide.paste(picture(6), (64, 0))
    control = Control(make_ip(), wide)
    assert distance(run([control], fit="cover"), run([control])) < SAME
    net = pipeline(diffusion_kit.StableDiffusionXLControlNetPipeline, controlnet=make_controlnet())
    named = Control(str(folder / "models" / names("plain", "sdxl")[0]), wide)
    first, second = (run([each], net, image=lines(1), fit="cover") for each in (control, named))
    assert distance(second, first) < SAME, "beside a class's own control, too, where the network is named"
    call = {"image": picture(), "mask_image": half_mask(), "padding_mask_crop": 8, "output_type": "pil"}
    first, second = (run([Control(make_ip(), shown)], **call)[0] for shown in (wide, picture(7)))
    assert first != second


def loaded(**more: Any) -> Any:
    pipe = own("sdxl", **more)
    pipe._ip_adapters, pipe._ip_scales = [make_ip()], [1.0]
    return pipe


def masked(count: int) -> dict[str, Any]:
    return {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, count, 64, 64)]}}


def with_processors() -> Any:
    pipe = own("sdxl")
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    return pipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: run([Control(make_ip(), picture(), mode="prompt")]), "its mode is 'balanced', not 'prompt'"),
        (lambda: run([Control(make_ip(), picture())], with_processors()), "attention processors of its own"),
        (lambda: run([Control(make_ip(), picture())], cross_attention_kwargs={"x": 1}), "cross_attention_kwargs"),
        (lambda: run([Control(make_ip(), torch.zeros(2, 1, 9))]), r"\(2, 1, 9\); this one takes \(2 N, pictures, 24\)"),
        (lambda: run([Control(make_ip(), torch.zeros(1, 1, POOLED))]), r"takes \(2 N, pictures, 24\)"),
        (lambda: run([Control(make_ip("plus"), torch.zeros(2, 1, HIDDEN))]), r"\(2 N, pictures, patches, 64\)"),
        (lambda: run([Control(make_ip(image_encoder=None), picture())]), "no image encoder: give image_encoder=.*24"),
        (lambda: make_ip(image_encoder=encoder(32, 48)), "its projection_dim is 48, the adapter takes 24"),
        (lambda: run([Control(make_ip("plain", "sd15"), picture())]), "does not fit the base: it is for .* layers"),
        (lambda: run([Control(make_ip(), [picture()] * 3)]), "3 entries of an IP-Adapter's image for 1 prompts"),
        (
            lambda: run([Control(make_ip(), [[picture()], [picture()] * 2])], prompt=["a", "b"]),
            r"lists \[1, 2\] pictures",
        ),
        (lambda: run([Control(make_ip(), [])]), r"lists \[\] pictures"),
        (lambda: run([Control(make_ip(), "fox.png")]), "a PIL image, not str"),
        (lambda: run([Control(make_ip(), picture(), scale={"up_block": 1, "tail": 1})]), "names 'tail'"),
        (lambda: run([Control(make_adapter(), lines(), scale={"up_blocks": 1.0})]), "only an IP-Adapter"),
        (lambda: run((), ip_adapter_image=picture()), "call load_ip_adapter first"),
        (lambda: run((), loaded(), ip_adapter_image=[picture()] * 2), "2 images for 1 loaded IP-Adapters"),
        (lambda: run((), loaded(), ip_adapter_image=1, ip_adapter_image_embeds=[1]), "one of the two"),
        (lambda: run((), loaded(), ip_adapter_image=picture(), **masked(2)), "2 masks, 1 scales for 1 pictures"),
        (lambda: loaded().set_ip_adapter_scale([1.0, 2.0]), "2 scales for 1 loaded IP-Adapters"),
    ],
)
def test_errors_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_an_adapter_for_a_text_of_another_width_names_both() -> None:
    wide = {name: value.repeat(1, 2) if name.startswith("ip_") else value for name, value in weights("plain").items()}
    with pytest.raises(ValueError, match=f"tokens have width {2 * CROSS}, the base's text {CROSS}"):
        run([Control(IPAdapter(wide, encoder()), picture())])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: v for n, v in w.items() if "proj.3" not in n} | {"image_proj.norm.weight": v_of(w)}, "FaceID"),
        (lambda w: w | {"image_proj.perceiver_resampler.proj_in.weight": v_of(w)}, "FaceID"),
        (lambda w: {n: v for n, v in w.items() if "image_proj" not in n}, "is no IP-Adapter"),
        (lambda w: {n: v for n, v in w.items() if "image_proj" in n}, "is no IP-Adapter"),
    ],
)
def test_other_files_are_refused(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file(change(weights("full")), file)
    with pytest.raises(ValueError, match=message) as caught:
        IPAdapter.from_pretrained(file)
    assert "\n" not in str(caught.value)
    assert "other.safetensors" in str(caught.value)


def v_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["image_proj.proj.3.bias"].clone()


def test_missing_files_and_pickles_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        IPAdapter.from_pretrained(tmp_path, weight_name="nothing.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path} has no .safetensors file: say weight_name="):
        IPAdapter.from_pretrained(tmp_path)
    for source, name in (("h94/IP-Adapter", None), (tmp_path, "old.bin")):
        with pytest.raises(ValueError, match=f"weight_name is {name!r}; it must name a .safetensors file of {source}"):
            IPAdapter.from_pretrained(source, weight_name=name)
