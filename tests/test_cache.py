"""The step cache: exact where nothing is kept, a plain loop over the same blocks where something is, and never a feature of
other controls, of another batch or of what a callback replaced."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import (
    crossed,
    distance,
    half_mask,
    light,
    lines,
    make_adapter,
    make_controlnet,
    make_sd_unet,
    make_unet,
    picture,
    pipeline,
    sd_pipeline,
    seeds,
    unet,
)
from kandinsky_models import WIDTH, decoder22_components, unet22_hint
from test_ip_adapter import make_ip
from test_schedulers import make
from test_step import CREATIONS, SYNCS, Backend, Count, small

from diffusion_kit import Control, Kandinsky22Pipeline, SD15Pipeline, SDXLPipeline
from diffusion_kit.models.attention import Tokens
from diffusion_kit.sampling.cache import Kept, StepCache
from diffusion_kit.sampling.doors import Answer
from diffusion_kit.sampling.engines import Compiled

TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": picture(), "strength": 0.75},
    "inpaint": {"image": picture(), "mask_image": half_mask(), "strength": 0.75},
}
CALL = {"prompt": "a red fox", "num_inference_steps": 8, "guidance_scale": 8.0, "output_type": "latent"}
DEEP, SHALLOW = "mid_block", "down_blocks.0"


@pytest.fixture(scope="module")
def controls() -> list[Control]:
    adapter, controlnet = make_adapter(), make_controlnet()
    return [Control(adapter, lines(1)), Control(controlnet, lines(2), scale=0.7)]


def cached(cache: dict[str, Any] | None = None, **parts: Any) -> Any:
    pipe = pipeline(SDXLPipeline, **parts)
    if cache is not None:
        pipe.cache_steps(**cache)
    return pipe


def run(pipe: Any, controls: Any = (), task: str = "text", **more: Any) -> torch.Tensor:
    return pipe(**{**CALL, "generator": seeds(1), **TASKS[task], **more}, controls=controls).images


@contextmanager
def counts(pipe: Any, controls: list[Control]) -> Iterator[Counter]:
    """How often the deep and the shallow blocks of the UNet, and the ControlNet, run."""
    count: Counter = Counter()
    modules = {name: pipe.unet.get_submodule(name) for name in (DEEP, SHALLOW)}
    modules["controlnet"] = controls[1].model.conv_in
    hooks = [m.register_forward_hook(lambda *_, n=name: count.update([n])) for name, m in modules.items()]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("task", "reuse"), crossed(TASKS, ["reuse", "recompute"]))
def test_every_step_full_is_the_run_without_a_cache(task: str, reuse: str, controls: list[Control]) -> None:
    plain = run(cached(), controls, task)
    assert torch.equal(run(cached({"every": 1, "controls": reuse}), controls, task), plain)
    kept = run(cached({"every": 3, "controls": reuse}), controls, task)
    assert torch.isfinite(kept).all()
    assert distance(kept, plain) > 1e-2


@pytest.mark.parametrize("base", ["kandinsky", "instruct"])
def test_other_bases(base: str) -> None:
    """Blocks of another kind and a learned variance; three branches of guidance."""
    call: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 8.0, "output_type": "latent"}
    if base == "kandinsky":
        pipe = Kandinsky22Pipeline(**decoder22_components())
        call |= {name: torch.randn(1, WIDTH, generator=seeds(9)) for name in ("image_embeds", "negative_image_embeds")}
    else:
        pipe = sd_pipeline(SD15Pipeline, unet=make_sd_unet(8))
        call |= {"prompt": "make it a fox", "controls": [Control("instruct", picture(), scale=1.5)]}
    pipe.set_progress_bar_config(disable=True)
    results = []
    for every in (None, 1, 6):
        pipe.cache_steps(every)
        results.append(pipe(**call, generator=seeds(1)).images)
    assert torch.equal(results[0], results[1])
    assert distance(results[2], results[0]) > 1e-2


@pytest.mark.parametrize("kind", ["instruct", "ip_adapter", "hint"])
def test_one_branch_sees_its_own_half_of_tokens_and_channels(kind: str) -> None:
    """What runs in a step in between is the conditional half of what runs there where guidance is computed."""
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    if kind == "hint":
        pipe = Kandinsky22Pipeline(**{**decoder22_components(), "unet": unet22_hint()})
        call |= {name: torch.randn(1, WIDTH, generator=seeds(9)) for name in ("image_embeds", "negative_image_embeds")}
        call |= {"height": 64, "width": 64, "controls": [Control("hint", picture())]}
    else:
        pipe = sd_pipeline(SD15Pipeline, unet=make_sd_unet(8 if kind == "instruct" else 4))
        model = "instruct" if kind == "instruct" else make_ip(family="sd15")
        call |= {"prompt": "a fox", "controls": [Control(model, picture(5))]}
    pipe.set_progress_bar_config(disable=True)
    last: list[torch.Tensor] = []
    pipe.unet.conv_out.register_forward_hook(lambda _, given, __: last.append(given[0]))
    halves = []
    for guidance in ("reuse", "recompute"):
        pipe.cache_steps(2, guidance=guidance)
        pipe(**call, generator=seeds(1))
        halves.append(last[-1][-1:])
        assert (len(last[-1]) == 1) == (guidance == "reuse")
    assert distance(*halves) < 1e-5


def test_the_conditional_half_of_what_is_kept() -> None:
    rows = torch.arange(4.0)[:, None]  # two branches of two pictures
    tokens = {"a": (Tokens(rows, rows, torch.ones(1, 1)),)}
    kept = Kept(rows, Answer((rows,), (rows,), None, tokens, rows)).last(2)
    for value in (kept.deep, kept.answer.intra[0], kept.answer.skips[0], kept.answer.channels):
        assert value.flatten().tolist() == [2, 3]
    own = kept.answer.tokens["a"][0]
    assert own.key.flatten().tolist() == own.value.flatten().tolist() == [2, 3]
    assert own.weight.shape == (1, 1)


class Cached(torch.nn.Module):
    """Stands in for the UNet of the peer's pipelines: in one call of `every` its own forward, with adapter and ControlNet;
    in the others its shallow blocks one by one, over what went into the deepest of their up blocks."""

    def __init__(self, net: Any, every: int, depth: int, reuse: bool, controls: list[Control]):
        super().__init__()
        self.net, self.every, self.depth, self.reuse, self.calls = net, every, depth, reuse, 0
        self.history: list[list[torch.Tensor]] = []  # what is kept, of the last two full calls
        self.adapter, self.controlnet = (control.model for control in controls)
        self.config, self.dtype, self.add_embedding = net.config, net.dtype, net.add_embedding
        self.device = torch.device("cpu")

    def forward(self, x: torch.Tensor, t: Any, encoder_hidden_states: Any, added_cond_kwargs: Any, **_: Any) -> Any:
        net, text, full = self.net, encoder_hidden_states, self.calls % self.every == 0
        self.calls += 1
        if full or not self.reuse:
            image = pixels(lines(2)).repeat(len(x), 1, 1, 1)
            options = {"conditioning_scale": 0.7, "added_cond_kwargs": added_cond_kwargs, "return_dict": False}
            self.down, self.mid = self.controlnet(x, t, text, image, **options)
        features = [feature.repeat(len(x), 1, 1, 1) for feature in self.adapter(pixels(lines(1)))]
        if full:

            def keep(block: Any, args: Any, kwargs: Any) -> None:
                self.deep = kwargs["hidden_states"].clone()

            hook = net.up_blocks[-self.depth].register_forward_pre_hook(keep, with_kwargs=True)
            output = net(
                x,
                t,
                text,
                added_cond_kwargs=added_cond_kwargs,
                down_block_additional_residuals=self.down,
                mid_block_additional_residual=self.mid,
                down_intrablock_additional_residuals=features,
            ).sample
            hook.remove()
            self.history = [*self.history[-1:], [self.deep, self.mid, *self.down]]
            return (output,)
        deep, mid, *down = self.forecast((self.calls - 1) % self.every / self.every)
        down = down if self.reuse else self.down
        emb = net.time_embedding(net.get_time_embed(x, t))
        emb = emb + net.get_aug_embed(emb, text, added_cond_kwargs)
        h = net.conv_in(x)
        skips = [h]
        for block, feature in zip(net.down_blocks[: self.depth], features, strict=False):
            if hasattr(block, "attentions"):
                h, outputs = block(h, emb, text, additional_residuals=feature)
                skips += outputs
            else:
                h, outputs = block(h, emb)
                h = h + feature
                skips += [*outputs[:-1], h]
        skips = [skip + residual for skip, residual in zip(skips, down, strict=False)]
        skips = skips[: 3 * self.depth]
        h = deep
        for block in net.up_blocks[-self.depth :]:
            own, skips = tuple(skips[-3:]), skips[:-3]
            h = block(h, own, emb, text) if hasattr(block, "attentions") else block(h, own, emb)
        return (net.conv_out(net.conv_act(net.conv_norm_out(h))),)

    def forecast(self, share: float) -> list[torch.Tensor]:
        first, last = self.history[0], self.history[-1]
        return [b + 0.75 * share * (b - a) for a, b in zip(first, last, strict=True)]


def pixels(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(("depth", "reuse", "task"), crossed([1, 2], [True, False], TASKS))
def test_a_plain_loop_over_the_same_blocks(task: str, reuse: bool, depth: int, controls: list[Control]) -> None:
    peer = pipeline(
        getattr(diffusers, f"StableDiffusionXL{dict(image='Img2Img', inpaint='Inpaint').get(task, '')}Pipeline")
    )
    peer.unet = Cached(unet(), 4, depth, reuse, controls)
    want = peer(**CALL, **TASKS[task], generator=seeds(1)).images
    mode = {"controls": "reuse" if reuse else "recompute"}
    assert distance(run(cached({"every": 4, "depth": depth, **mode}), controls, task), want) < 1e-4
    assert distance(run(cached(), controls, task), want) > 1e-2
    for other in ({"every": 2}, {"depth": 3 - depth}, {"controls": "recompute" if reuse else "reuse"}):
        options = {"every": 4, "depth": depth, **mode, **other}
        assert distance(run(cached(options), controls, task), want) > 10 * 1e-4


@pytest.mark.parametrize(("every", "name"), crossed([1, 2, 3, 5, 20], ["euler", "heun", "pndm", "unipc"]))
def test_how_often_each_part_runs(name: str, every: int, controls: list[Control]) -> None:
    """A second-order sampler's step is one step, full in all its calls."""
    for mode in ("reuse", "recompute"):
        pipe = cached({"every": every, "controls": mode}, scheduler=make(name))
        with counts(pipe, controls) as count:
            run(pipe, controls)
        calls = pipe.num_timesteps
        steps = Counter(pipe_steps(pipe))
        full = sum(steps[step] for step in range(0, 8, every))
        assert (count[SHALLOW], count[DEEP]) == (calls, full)
        assert count["controlnet"] == (full if mode == "reuse" else calls)
        if calls == 8:
            assert full == math.ceil(8 / every)


def test_steps_go_on_as_between_the_last_two_full_ones() -> None:
    cache, tensors = StepCache(every=4, guidance="reuse"), [torch.randn(4, 2, generator=seeds(k)) for k in range(3)]

    def full(step: int, scale: float) -> None:
        assert cache.recall(step, "a", 2) is None
        deep, residual, offset = (scale * value for value in tensors)
        cache.keep(deep, Answer(skips=(residual,), mid=residual), offset[:2])

    full(0, 1.0)
    first = cache.recall(3, "a", 2)
    assert first is not None
    assert torch.equal(first.deep, tensors[0][-2:]), "nothing to go by"
    full(4, 3.0)
    full(4, 3.0)  # another call of the same step
    for step, factor in ((5, 1 / 4), (7, 3 / 4)):
        kept = cache.recall(step, "a", 2)
        assert kept is not None
        scale = 3 + 0.75 * factor * (3 - 1)
        own = (kept.deep, kept.answer.mid, kept.answer.skips[0], kept.offset)
        wanted = (tensors[0][-2:], tensors[1][-2:], tensors[1][-2:], tensors[2][:2])
        for a, b in zip(own, wanted, strict=True):
            torch.testing.assert_close(a, scale * b)
    assert cache.recall(8, "a", 2) is None
    assert cache.recall(9, "b", 2) is None, "other controls"


@pytest.mark.parametrize("mode", ["reuse", "recompute"])
def test_guidance_is_kept(mode: str, controls: list[Control]) -> None:
    """One branch runs in the steps between; with nothing between the run is the same, and without guidance, too."""
    results = {}
    for guidance in ("reuse", "recompute"):
        pipe = cached({"every": 3, "controls": mode, "guidance": guidance})
        seen: list[int] = []
        with pipe.unet.get_submodule(SHALLOW).register_forward_hook(
            lambda _, args, __, own=seen: own.append(len(args[0]))
        ):
            results[guidance] = run(pipe, controls)
        assert seen == [2 if step % 3 == 0 or guidance == "recompute" else 1 for step in range(8)]
        results[guidance, 1] = run(pipe, controls, guidance_scale=1.0)
        pipe.cache_steps(1, controls=mode, guidance=guidance)
        assert torch.equal(run(pipe, controls), run(cached(), controls))
    assert distance(results["reuse"], results["recompute"]) > 1e-3
    assert torch.equal(results["reuse", 1], results["recompute", 1])


def test_another_guidance_scale_makes_a_full_step() -> None:
    """What was added under the old one must not be carried on, let alone continued."""
    full: dict[str, list[int]] = {}
    for guidance in ("reuse", "recompute"):
        pipe, rows = cached({"every": 3, "guidance": guidance}), full.setdefault(guidance, [])

        def lower(pipe: Any, k: int, *_: Any) -> dict[str, Any]:
            if k == 3:
                pipe._guidance_scale = 2.0
            return {}

        with pipe.unet.get_submodule(DEEP).register_forward_hook(lambda *_, own=rows: own.append(1)):
            run(pipe, [], callback_on_step_end=lower)
    assert len(full["recompute"]) == 3, "steps 0, 3 and 6 of 8"
    assert len(full["reuse"]) == 4, "step 4 as well, and three behind it"


def test_what_guidance_adds_is_its_last_difference(controls: list[Control]) -> None:
    """A UNet that does not look at the noise answers the same in every step, so what is kept is what would be computed."""
    results = []
    for guidance in ("reuse", "recompute"):
        pipe = cached({"every": 4, "guidance": guidance}, unet=make_unet())
        for layer in (pipe.unet.conv_in, pipe.unet.time_embedding.linear_1):
            layer.weight.zero_()
        results.append(run(pipe, [controls[0]], guidance_rescale=0.5))
    assert distance(*results) < 1e-4


def pipe_steps(pipe: Any) -> list[int]:
    """The sampling step of every call."""
    from diffusion_kit.sampling.schedule import make_schedule

    return list(make_schedule(pipe.scheduler, 8).step_of_call)


def replaced(name: str, at: int) -> dict[str, Any]:
    """A callback that replaces a tensor by an equal one after a step."""

    def callback(pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensors[name].clone()} if k == at else {}

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [name]}


FULL: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    "undisturbed": ({}, {}, [0, 6]),
    "window": ({"end": 0.5}, {}, [0, 4]),
    "start": ({"start": 0.25}, {}, [0, 2]),
    "guidance": ({}, {"guidance_interval": (0.0, 0.5)}, [0, 4]),
    "prompt": ({}, replaced("prompt_embeds", 2), [0, 3]),
    "latents": ({}, replaced("latents", 2), [0, 3]),
    "watching": ({}, {"callback_on_step_end": lambda *_: {}}, [0, 6]),
}


@pytest.mark.parametrize(("name", "mode"), crossed(FULL, ["reuse", "recompute"]))
def test_what_changes_the_features_makes_a_full_step(name: str, mode: str, controls: list[Control]) -> None:
    window, call, full = FULL[name]
    own = [controls[0], Control(controls[1].model, lines(2), scale=0.7, **window)]
    pipe = cached({"every": 6, "controls": mode})
    deep: list[bool] = []  # of each step
    hooks = [
        pipe.unet.get_submodule(SHALLOW).register_forward_hook(lambda *_: deep.append(False)),
        pipe.unet.get_submodule(DEEP).register_forward_hook(lambda *_: deep.__setitem__(-1, True)),
    ]
    try:
        run(pipe, own, **call)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(deep) == 8
    assert [step for step in range(8) if deep[step]] == full


def test_nothing_is_left_after_a_run(controls: list[Control]) -> None:
    pipe = cached()
    plain, processors = run(pipe, controls), dict(pipe.unet.attn_processors)
    pipe.cache_steps(every=4)
    first = run(pipe, controls)
    assert distance(first, plain) > 1e-2
    assert torch.equal(run(pipe, controls), first), "features of another run"
    assert pipe.unet.attn_processors == processors
    assert pipe.step_cache == StepCache(every=4), "features are kept in a run, not in the pipeline"
    pipe.cache_steps(None)
    assert torch.equal(run(pipe, controls), plain)


def test_a_batch_is_single_runs(controls: list[Control]) -> None:
    prompts = ["a red fox", "two blue boats"]
    pipe = cached({"every": 3})
    batch = run(pipe, controls, prompt=prompts, generator=seeds(1, 2))
    for k, prompt in enumerate(prompts):
        assert distance(batch[k], run(pipe, controls, prompt=prompt, generator=seeds(k + 1))[0]) < 1e-4


@pytest.mark.parametrize(
    ("mode", "backend"), light([("reuse", "aot_eager"), ("recompute", Backend())], ("reuse", "aot_eager"))
)
def test_full_and_reusing_steps_are_two_graphs(mode: str, backend: Any) -> None:
    controls, net = small()
    pipe, plain = (cached({"every": 2, "controls": mode}, unet=net) for _ in range(2))
    pipe.engine = Compiled(backend=backend)
    results = [run(p, controls, num_inference_steps=4) for p in (pipe, plain)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(pipe.engine.graphs) == 2
    assert not pipe.engine.notes


def test_no_host_read_and_no_new_tensor_in_a_step(controls: list[Control]) -> None:
    pipe = cached({"every": 2})
    with Count() as count:

        def mark(*_: Any) -> dict[str, Any]:
            count.mark()
            return {}

        run(pipe, controls, callback_on_step_end=mark)
    for operations in count.steps:
        assert not (SYNCS | CREATIONS) & set(operations)
    reusing, full = len(count.steps[0]), len(count.steps[1])
    assert reusing < 0.4 * full


def own_forward() -> Any:
    net = make_unet()
    net.forward = partial(net.forward)
    return net


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; it must be 1 or more"),
        ({"depth": 0}, "depth is 0; for this UNet it must be 1 to 2"),
        ({"depth": 3}, "depth is 3; for this UNet it must be 1 to 2"),
        ({"controls": "never"}, "it must be 'reuse' or 'recompute'"),
        ({"guidance": "never"}, "step cache guidance is 'never'; it must be 'reuse' or 'recompute'"),
    ],
)
def test_errors_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        cached(options)
    assert "\n" not in str(error.value)


def test_a_unet_that_does_not_run_block_by_block_has_no_cache() -> None:
    kandinsky = diffusers.Kandinsky3UNet(block_out_channels=(32, 32), groups=8, cross_attention_dim=16)
    for net in (own_forward(), kandinsky):
        pipe = cached()
        pipe.unet = net
        with pytest.raises(ValueError, match="no step cache for this network"):
            pipe.cache_steps()
    pipe = cached({})
    with pytest.raises(ValueError, match=r"no step cache for this network: .*cache_steps\(None\)"):
        run(pipe, cross_attention_kwargs={"gligen": 1})


def test_explained() -> None:
    pipe = cached()
    assert "cache      off" in pipe.explain()
    pipe.cache_steps(every=5, depth=2, controls="recompute")
    assert "cache      every 5 steps, depth 2, controls: recompute" in pipe.explain()
