"""ControlNet-Union: beside diffusers' pipelines where they are right, else beside a plain loop over its networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import (
    CHANNELS,
    CROSS,
    crossed,
    distance,
    half_mask,
    light,
    lines,
    make_adapter,
    make_controlnet,
    picture,
    pipeline,
    randomise,
    sd_components,
    sd_pipeline,
    seeds,
    unet,
)
from test_step import CREATIONS, SYNCS, counted

from diffusion_kit import Control, SDXLPipeline, StableDiffusionPipeline
from diffusion_kit.adapters.control import load_control_model
from diffusion_kit.adapters.controlnet_union import FILES, TYPES
from diffusion_kit.sampling.engines import Engine

CALL = {"prompt": "a red fox", "num_inference_steps": 3, "guidance_scale": 4.0}
PEER = "StableDiffusionXLControlNetUnion{}Pipeline"
TASKS: dict[str, dict[str, Any]] = {
    "": {},
    "Img2Img": {"image": picture(), "strength": 0.9},
    "Inpaint": {"image": picture(), "mask_image": half_mask(), "strength": 0.9},
}


@cache
def union(types: int = 6, seed: int = 7, **config: Any) -> diffusers.ControlNetUnionModel:
    shared = ("down_block_types", "layers_per_block", "transformer_layers_per_block", "attention_head_dim")
    shared += ("use_linear_projection", "addition_embed_type", "norm_num_groups", "block_out_channels")
    shared += ("cross_attention_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    own = {
        "num_control_type": types,
        "num_trans_channel": CHANNELS[0],
        "num_proj_channel": CHANNELS[0],
        "num_trans_head": 4,
        "conditioning_embedding_out_channels": (8, 16, 16),
    }
    net = diffusers.ControlNetUnionModel(**{name: unet().config[name] for name in shared} | own | config)
    net = randomise(net, seed)
    net.spatial_ch_projs.weight *= 8  # what the transformer says is loud
    return net


def run(controls: Any = (), pipe: Any = None, **more: Any) -> torch.Tensor:
    call = {**CALL, "generator": seeds(1), **more}
    return (pipe or pipeline(SDXLPipeline))(**call, controls=controls, output_type="latent").images


@pytest.mark.parametrize(
    ("shown", "scale", "end", "task"),
    crossed([({"canny": 1}, 0.7, 0.75), ({1: 2, "openpose": 3}, [0.9, 0.3], 1.0)], TASKS),
)
def test_latents_are_the_peers(task: str, shown: dict[Any, int], scale: Any, end: float) -> None:
    images = {name: lines(seed) for name, seed in shown.items()}
    ours = run([Control(union(), images, scale=scale, end=end)], **TASKS[task])
    feature = {
        "control_image": list(images.values()),
        "control_mode": [{"canny": 3, "openpose": 0}.get(name, name) for name in images],
        "controlnet_conditioning_scale": scale,
        "control_guidance_end": end,
    }
    peer = pipeline(getattr(diffusers, PEER.format(task)), controlnet=union())
    theirs = peer(**CALL, **TASKS[task], **feature, generator=seeds(1), output_type="latent").images
    assert distance(ours, theirs) < 1e-4
    assert distance(run(**TASKS[task]), theirs) > 1e-2, "the control does nothing"
    other = {**images, next(iter(images)): picture(9)}
    assert distance(run([Control(union(), other, scale=scale, end=end)], **TASKS[task]), theirs) > 1e-2


class WithUnion(torch.nn.Module):
    """Stands in for the peer's UNet: the same network, a Union's residuals on the conditional half of every call."""

    def __init__(self, images: dict[int, Any], scales: list[float], faded: bool):
        super().__init__()
        self.net, self.images, self.scales, self.faded = unet(), images, scales, faded
        self.config, self.dtype, self.add_embedding = self.net.config, self.net.dtype, self.net.add_embedding
        self.device = torch.device("cpu")

    def forward(self, x: torch.Tensor, t: Any, **kwargs: Any) -> Any:
        skips, mid = union()(
            x[1:],
            t,
            kwargs["encoder_hidden_states"][1:],
            list(self.images.values()),
            torch.tensor([[float(k in self.images) for k in range(6)]]),
            list(self.images),
            self.scales,
            added_cond_kwargs={name: value[1:] for name, value in kwargs["added_cond_kwargs"].items()},
            guess_mode=self.faded,
            return_dict=False,
        )
        return self.net(
            x,
            t,
            **kwargs,
            down_block_additional_residuals=[torch.cat([torch.zeros_like(skip), skip]) for skip in skips],
            mid_block_additional_residual=torch.cat([torch.zeros_like(mid), mid]),
        )


@pytest.mark.parametrize(("scales", "mode"), crossed([[0.8], [0.8, 0.4]], ["prompt", "control"]))
def test_modes_are_a_plain_loop(mode: Any, scales: list[float]) -> None:
    pixels = [torch.rand(1, 3, 64, 64, generator=seeds(k)) for k in (3, 4)]
    images = dict(zip([2, 5][: len(scales)], pixels, strict=False))
    peer = pipeline(diffusers.StableDiffusionXLPipeline)
    peer.unet = WithUnion(images, scales, mode == "prompt")
    theirs = peer(**CALL, generator=seeds(1), output_type="latent").images
    by_mode = {
        each: run([Control(union(), images, scale=scales, mode=each)])  # type: ignore[arg-type]
        for each in ("balanced", "prompt", "control")
    }
    if len(scales) == 1:
        by_mode = {m: run([Control(union(), images, scale=0.8, mode=m)]) for m in by_mode}  # type: ignore[arg-type]
    assert distance(by_mode[mode], theirs) < 1e-4
    assert all(distance(other, theirs) > 1e-2 for name, other in by_mode.items() if name != mode)


def test_reductions() -> None:
    images = {"depth": lines(1), "seg": lines(2)}
    full, nothing = run([Control(union(), images)]), run()
    black, white = half_mask().point(lambda _: 0), half_mask().point(lambda _: 255)
    for off in ({"scale": 0}, {"mask": black}, {"start": 0.5, "end": 0.5}):
        assert torch.equal(run([Control(union(), images, **off)]), nothing)
    for same in ({"scale": 1}, {"scale": [1, 1.0]}, {"mask": white}):
        assert distance(run([Control(union(), images, **same)]), full) < 1e-5
    assert distance(run([Control(union(), dict(reversed(images.items())))]), full) < 1e-5, "order matters"
    for other in ({"scale": 2}, {"scale": [1, 0]}, {"mask": half_mask()}, {"end": 0.5}):
        assert distance(run([Control(union(), images, **other)]), full) > 1e-3
    one = {"tile": lines(1)}
    pro = union(8)
    assert distance(run([Control(pro, one, scale=[1.0] * 4)]), run([Control(pro, one)])) < 1e-5
    assert distance(run([Control(pro, one, scale=[1.0, 0, 0, 0])]), run([Control(pro, one)])) > 1e-3


def test_every_name_of_a_type_is_its_number() -> None:
    pro = union(8)
    by_index = [run([Control(pro, {index: lines()})], num_inference_steps=1) for index in range(8)]
    for index, names in enumerate(TYPES):
        assert all(distance(by_index[index], other) > 1e-4 for other in by_index[:index])
        for name in names:
            assert torch.equal(run([Control(pro, {name: lines()})], num_inference_steps=1), by_index[index])


def beside(k: int) -> list[Control]:
    return [Control(make_adapter(), lines(20 + k), scale=0.5), Control(make_controlnet(), lines(30 + k), scale=0.3)]


@pytest.mark.parametrize("task", light(TASKS, "inpaint"))
def test_picture_k_of_a_batch_is_the_picture_made_alone(task: str) -> None:
    prompts, poses = ["a red fox", "two blue boats"], [lines(1), lines(2)]
    batch = run(
        [Control(union(), {"openpose": poses, "normal": lines(3)}, scale=[0.8, 0.4], mask=half_mask()), *beside(0)],
        prompt=prompts,
        num_images_per_prompt=2,
        generator=seeds(1, 2, 3, 4),
        **TASKS[task],
    )
    for k in range(4):
        own = Control(union(), {"openpose": poses[k // 2], "normal": lines(3)}, scale=[0.8, 0.4], mask=half_mask())
        alone = run([own, *beside(0)], prompt=prompts[k // 2], generator=seeds(k + 1), **TASKS[task])
        assert distance(batch[k : k + 1], alone) < 1e-4, f"picture {k}"


def test_where_the_peer_is_wrong() -> None:
    """The pictures of a batch change one another, several types of scale 0 still act, and a whole number is refused."""
    x, text, time = torch.randn(1, 4, 16, 16), torch.randn(1, 7, CROSS), torch.tensor(500)
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.rand(1, 6) * 64}
    images, black = torch.rand(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)

    def forward(rows: int, shown: list[torch.Tensor], scale: Any) -> torch.Tensor:
        types = torch.ones(rows, 6) * torch.tensor([float(k < len(shown)) for k in range(6)])
        more = {name: value.expand(rows, -1) for name, value in added.items()}
        given = x.expand(rows, -1, -1, -1), time, text.expand(rows, -1, -1), shown, types, list(range(len(shown)))
        return union()(*given, scale, added_cond_kwargs=more).mid_block_res_sample

    assert distance(forward(2, [torch.cat([images, black])], 1.0)[:1], forward(1, [images], 1.0)) > 1e-3
    assert not forward(1, [images], 0.0).any()
    assert forward(1, [images, black], [0.0, 0.0]).abs().max() > 1
    with pytest.raises(TypeError):
        forward(1, [images], 1)


def test_a_network_with_processors_of_its_own_runs_its_own_forward() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    call = {"prompt": ["a red fox", "two boats"], "generator": seeds(1, 2)}

    def results() -> list[torch.Tensor]:
        shown = [
            ({"canny": [lines(1), lines(2)]}, 0.7, "prompt"),
            ({"canny": [lines(1), lines(2)], 4: lines(3)}, [1, 0.5], "balanced"),
        ]
        call["generator"] = seeds(1, 2)
        return [run([Control(union(), images, scale=s, mode=m)], **call) for images, s, m in shown]  # type: ignore[arg-type]

    fast, before = results(), union().attn_processors
    union().set_attn_processor(AttnProcessor())
    try:
        slow = results()
    finally:
        union().set_attn_processor(dict(before))
    assert all(distance(a, b) < 1e-4 for a, b in zip(fast, slow, strict=True))


def test_what_is_shown_and_how_much_is_no_other_step() -> None:
    """For engines that have a graph, or a conversion, for each."""
    steps: set[Any] = set()

    class Looking(Engine):
        def __call__(self, step: Any, state: torch.Tensor, tensors: Any) -> Any:
            steps.add(step)
            return step

    pipe = pipeline(SDXLPipeline)
    pipe.engine = Looking()
    net = union()
    first, other = (
        run([Control(net, {0: lines(1), k: lines(2)}, scale=[0.8, scale])], pipe) for k, scale in ((1, 0.4), (2, 0.7))
    )
    assert distance(first, other) > 1e-2
    assert len(steps) == 1


def test_all_that_is_constant_is_made_once() -> None:
    seen: list[str] = []
    net = union()
    parts = {
        "image": net.controlnet_cond_embedding,
        "fuser": net.transformer_layes[0],
        "types": net.control_add_embedding,
    }
    hooks = [part.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, part in parts.items()]
    try:
        control = Control(net, {"canny": lines(1), "depth": lines(2)})
        steps = counted(SDXLPipeline, {"controls": [control]}, {}).steps
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(seen) == ["fuser", "fuser", "image", "image", "types"]
    for operations in steps:
        assert not (SYNCS | CREATIONS) & set(operations)
        assert len(operations) == len(steps[0])


def test_loads_from_a_folder_and_from_a_file(tmp_path: Path) -> None:
    wide = union(
        8,
        block_out_channels=(64, 128, 128),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=32,
        num_trans_channel=64,
        num_proj_channel=64,
    )
    wide.save_pretrained(tmp_path / "union")
    file = (tmp_path / "union" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "union.safetensors")
    wide.save_pretrained(tmp_path / "union")
    for net in (load_control_model(tmp_path / "union"), load_control_model(file)):
        assert type(net) is diffusers.ControlNetUnionModel
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in wide.state_dict().items())
        for name in ("attention_head_dim", "transformer_layers_per_block", "down_block_types", "layers_per_block"):
            assert tuple(torch.utils._pytree.tree_leaves(net.config[name])) == tuple(
                torch.utils._pytree.tree_leaves(wide.config[name])
            )
    assert FILES["controlnet_union"](file, torch_dtype=torch.float16).dtype == torch.float16
    union().save_pretrained(tmp_path / "small")
    loaded = run([Control(str(tmp_path / "small"), {"canny": lines()})])
    assert torch.equal(loaded, run([Control(union(), {"canny": lines()})]))
    make_controlnet().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="is no ControlNet-Union .* it has no 'task_embedding'"):
        FILES["controlnet_union"](tmp_path / "plain" / "diffusion_pytorch_model.safetensors")


def sd(control: Control) -> Any:
    pipe = sd_pipeline(StableDiffusionPipeline, unet=sd_components()["unet"])
    return pipe("a", num_inference_steps=1, controls=[control])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: run([Control(union(), lines())]), r"shown images by their type, such as .*; its image is Image"),
        (lambda: run([Control(union(), torch.rand(2, 3, 64, 64))]), "its image is Tensor"),
        (lambda: run([Control(union(), {})]), "its image is an empty one"),
        (lambda: run([Control(union(), {6: lines()})]), "has 6 types, 0 to 5; it has no 6"),
        (lambda: run([Control(union(), {-1: lines()})]), "has 6 types, 0 to 5; it has no -1"),
        (lambda: run([Control(union(), {"tile": lines()})]), "has 6 types, 0 to 5; it has no 'tile', number 6"),
        (lambda: run([Control(union(), {"cany": lines()})]), "no type 'cany'; did you mean 'canny'?"),
        (
            lambda: run([Control(union(), {0: lines(), 1: lines()}, scale=[1, 2, 3])]),
            "lists 3 types .* its image has 2",
        ),
        (lambda: run([Control(union(), {0: [lines()] * 3})]), "3 entries of a control's image for 1 prompts"),
        (lambda: sd(Control(union(cross_attention_dim=99), {0: lines()})), "text of width 99, the base's is 48"),
        (
            lambda: run([Control(union(block_out_channels=(32, 32, 64)), {0: lines()})]),
            "does not fit the base.*32, 32, 64",
        ),
    ],
)
def test_errors_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_polarity_is_checked_by_the_type() -> None:
    white = picture().point(lambda _: 255)
    with pytest.warns(UserWarning, match="canny expects edges, white on black"):
        run([Control(union(), {"canny": white})], num_inference_steps=1)
