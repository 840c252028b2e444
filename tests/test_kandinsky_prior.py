"""Kandinsky's priors: against diffusers, and where that is wrong against runs of one prompt."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import distance, picture, seeds
from kandinsky_models import WIDTH, prior_components

from diffusion_kit.models.prior import PriorDenoiser, PriorPeerDenoiser, make_prior_denoiser
from diffusion_kit.pipelines import kandinsky_prior
from diffusion_kit.sampling.doors import Answer
from diffusion_kit.sampling.engines import Compiled, Engine
from diffusion_kit.sampling.loop import Run, sample
from diffusion_kit.sampling.schedule import make_schedule

PLAIN = ["KandinskyPriorPipeline", "KandinskyV22PriorPipeline"]
EMB2EMB = "KandinskyV22PriorEmb2EmbPipeline"
ALL = [*PLAIN, EMB2EMB]
PROMPTS, NEGATIVES = ["a red fox", "the sea at night"], ["blurry", "a grey photo"]


def make(name: str, module: Any = kandinsky_prior, **replaced: Any) -> Any:
    pipe = getattr(module, name)(**{**prior_components(), **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(name: str) -> tuple[Any, Any]:
    return make(name), make(name, diffusers)


def call(pipe: Any, prompt: Any = PROMPTS[0], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return pipe(prompt, **{"num_inference_steps": 6, "generator": seeds(1), **more}).to_tuple()


def embeddings(n: int, seed: int = 6) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=seeds(seed))


def agree(ours: Any, theirs: Any) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        assert distance(own, other) < 1e-5


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guidance off": {"guidance_scale": 1.0},
    "several": {"prompt": PROMPTS, "num_images_per_prompt": 2},
    "several, guidance off": {"prompt": PROMPTS, "num_images_per_prompt": 2, "guidance_scale": 1.0},
    "negative": {"negative_prompt": NEGATIVES[0]},
    "several negative": {"prompt": PROMPTS, "negative_prompt": NEGATIVES, "num_images_per_prompt": 2},
    "latents": {"latents": embeddings(1)},
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_as_the_peer(name: str, arguments: dict[str, Any]) -> None:
    ours, theirs = (call(pipe, **arguments) for pipe in both(name))
    agree(ours, theirs)
    if arguments:
        assert distance(call(make(name))[0], theirs[0][:1]) > 1e-2


IMAGES: dict[str, dict[str, Any]] = {
    "picture": {"image": picture()},
    "pictures": {"prompt": PROMPTS, "image": [picture(), picture(1)], "num_images_per_prompt": 2},
    "tensor": {"prompt": PROMPTS, "image": torch.randn(2, 3, 32, 32, generator=seeds(5)), "negative_prompt": NEGATIVES},
    "embeddings": {"prompt": PROMPTS, "image": embeddings(2), "negative_prompt": NEGATIVES, "num_images_per_prompt": 2},
    "one for all": {"prompt": PROMPTS, "image": [embeddings(1)], "negative_prompt": NEGATIVES},
}


@pytest.mark.parametrize("arguments", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("strength", [0.34, 1.0])
def test_emb2emb_as_the_peer(arguments: dict[str, Any], strength: float) -> None:
    ours, theirs = (call(pipe, strength=strength, **arguments) for pipe in both(EMB2EMB))
    agree(ours, theirs)
    other = call(make(EMB2EMB), **{**arguments, "strength": strength, "image": picture(9)})
    assert (distance(other[0], theirs[0]) > 1e-2) == (strength < 1)  # at 1 nothing but noise is left of the picture


@pytest.mark.parametrize("name", ALL)
def test_arguments_and_components_are_the_peers(name: str) -> None:
    ours, theirs = both(name)
    for of in (type, lambda pipe: type(pipe).__call__, lambda pipe: pipe.interpolate):
        own, other = (list(inspect.signature(of(pipe)).parameters.values()) for pipe in (ours, theirs))
        assert [p.name for p in own] == [p.name for p in other]
        given = [(a.default, b.default) for a, b in zip(own, other, strict=True) if b.default is not b.empty]
        assert all(a == b for a, b in given)
    assert ours.model_cpu_offload_seq == theirs.model_cpu_offload_seq
    assert ours._exclude_from_cpu_offload == theirs._exclude_from_cpu_offload


@pytest.mark.parametrize("name", ALL)
def test_folders_are_read_by_both(name: str, tmp_path: Path) -> None:
    image = {"image": picture()} if name == EMB2EMB else {}
    pipe, peer = both(name)
    expected = call(pipe, **image)
    pipe.save_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        for module in (kandinsky_prior, diffusers):
            loaded = getattr(module, name).from_pretrained(tmp_path / folder)
            loaded.set_progress_bar_config(disable=True)
            agree(call(loaded, **image), expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("negative_prompt", [None, NEGATIVES])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_each_result_of_a_batch_is_the_one_made_alone(name: str, negative_prompt: Any, guidance_scale: float) -> None:
    pipe, images = make(name), embeddings(2)
    given = {"image": images} if name == EMB2EMB else {}
    options = {"guidance_scale": guidance_scale}
    batch = call(
        pipe,
        PROMPTS,
        negative_prompt=negative_prompt,
        num_images_per_prompt=2,
        generator=seeds(1, 2, 3, 4),
        **given,
        **options,
    )
    for k in range(4):
        prompt = k // 2
        alone = call(
            pipe,
            PROMPTS[prompt],
            negative_prompt=negative_prompt and negative_prompt[prompt],
            generator=seeds(k + 1),
            **({"image": images[prompt : prompt + 1]} if given else {}),
            **options,
        )
        agree([part[k : k + 1] for part in batch], alone)


def test_one_negative_prompt_serves_every_prompt() -> None:
    one, each = (
        call(make(PLAIN[1]), PROMPTS, negative_prompt=negative, generator=seeds(1, 2))
        for negative in (NEGATIVES[0], [NEGATIVES[0]] * 2)
    )
    agree(one, each)


ITEMS = [PROMPTS[0], picture(), torch.randn(1, 3, 32, 32, generator=seeds(8))]
NEGATIVE: list[dict[str, Any]] = [{}, {"negative_prior_prompt": NEGATIVES[0]}, {"negative_prompt": NEGATIVES[1]}]


def test_an_interpolation_is_a_call_before_which_an_engine_looks_at_weights() -> None:
    class Looking(Engine):
        looks = 0

        def renew(self) -> None:
            self.looks += 1

    pipe = make(PLAIN[0])
    pipe.engine = Looking()
    interpolate(pipe)
    assert pipe.engine.looks == 1


def interpolate(pipe: Any, items: Any = ITEMS, weights: Any = (0.3, 0.3, 0.4), **more: Any) -> Any:
    return pipe.interpolate(items, weights, num_inference_steps=4, generator=seeds(1), **more).to_tuple()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("negative", NEGATIVE)
def test_interpolation_as_the_peer(name: str, n: int, negative: dict[str, Any]) -> None:
    ours, theirs = (interpolate(pipe, num_images_per_prompt=n, **negative) for pipe in both(name))
    agree(ours, theirs)
    assert distance(interpolate(make(name), weights=[0.5, 0.1, 0.4])[0], theirs[0]) > 1e-2


def test_interpolation_of_emb2emb() -> None:
    """Pictures as the peer's; with texts, where the peer fails, and for the negative embedding, of which the peer makes
    noise, as the plain prior's."""
    ours, peer = both(EMB2EMB)
    pictures = [picture(), picture(1)]
    own, other = (interpolate(pipe, pictures, [0.6, 0.4], num_images_per_prompt=2)[0] for pipe in (ours, peer))
    assert distance(own, other) < 1e-5
    with pytest.raises(TypeError):
        interpolate(peer)
    agree(interpolate(ours), interpolate(make(PLAIN[1])))


def test_an_interpolation_is_the_sum_of_its_parts() -> None:
    pipe = make(PLAIN[1])
    whole = interpolate(pipe, [PROMPTS[0], picture(), embeddings(1)], [0.5, 2.0, -1.0])[0]
    text = call(pipe, num_inference_steps=4)[0]
    assert distance(0.5 * text + 2 * pipe.embed(picture()) - embeddings(1), whole) < 1e-5


def test_callbacks_see_and_replace_the_peers_tensors() -> None:
    names = ["latents", "prompt_embeds", "text_encoder_hidden_states", "text_mask"]
    shown: list[list[Any]] = []

    def callback(pipe: Any, k: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shown[-1].append((k, int(t), [(name, tuple(value.shape)) for name, value in tensors.items()]))
        return {name: value.flip(-1) if name == "prompt_embeds" else value for name, value in tensors.items()}

    results = []
    for pipe in both(PLAIN[1]):
        shown.append([])
        results.append(call(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names))
    assert shown[0] == shown[1]
    agree(*results)
    assert distance(call(make(PLAIN[1]))[0], results[1][0]) > 1e-2


def test_a_callback_stops_the_run() -> None:
    steps = []

    def callback(pipe: Any, k: int, t: Any, tensors: Any) -> dict[str, Any]:
        steps.append(k)
        pipe._interrupt = k == 2
        return {}

    call(make(PLAIN[1]), callback_on_step_end=callback)
    assert steps == [0, 1, 2]


def test_output_types() -> None:
    pipe = make(PLAIN[1])
    tensors, arrays = call(pipe), call(pipe, output_type="np")
    assert all(
        isinstance(own, np.ndarray) and (own == other.numpy()).all() for own, other in zip(arrays, tensors, strict=True)
    )
    agree(pipe(PROMPTS[0], num_inference_steps=6, generator=seeds(1), return_dict=False), tensors)


def test_a_long_prompt_warns_of_what_is_cut() -> None:
    with pytest.warns(UserWarning, match="the prompt was cut after 77 tokens; lost: "):
        call(make(PLAIN[1]), "fox " * 40, num_inference_steps=2)


# The network


def test_the_text_is_run_once() -> None:
    """The blocks see every token once, and then three a step; the result is that of the network's own forward."""
    prior = copy.deepcopy(prior_components()["prior"])
    seen: list[int] = []
    prior.transformer_blocks[0].norm1.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    pipe = make(PLAIN[1], prior=prior)
    ours = call(pipe)
    assert seen == [78, 3, 3, 3, 3, 3, 3]
    assert "made once" in pipe.explain()
    prior.register_forward_pre_hook(lambda *_: None)
    assert "its own forward: it has hooks" in pipe.explain()
    agree(call(pipe), ours)
    assert seen[7:] == [81] * 6


def test_which_networks_run_their_own_forward() -> None:
    net = prior_components()["prior"]
    assert isinstance(make_prior_denoiser(net), PriorDenoiser)
    processed = copy.deepcopy(net)
    processed.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    other = diffusers.PriorTransformer(2, 8, 1, WIDTH, 77, additional_embeddings=3, added_emb_type=None)
    for own in (processed, other):
        assert isinstance(make_prior_denoiser(own), PriorPeerDenoiser)


def test_a_whole_step_compiles() -> None:
    pipe = make(PLAIN[1])
    expected = call(pipe)
    compiled = pipe.engine = Compiled(backend="eager")
    agree(call(pipe), expected)
    assert len(compiled.graphs) == 1
    assert not compiled.notes


def test_the_prior_is_optimised_too() -> None:
    pipe = make("KandinskyV22PriorPipeline", **copy.deepcopy(prior_components()))
    before = call(pipe)
    pipe.optimize(engine="eager")
    agree(call(pipe), before)


# Schedulers

UNCLIP: list[dict[str, Any]] = [
    {"prediction_type": prediction, "variance_type": variance, **clip}
    for prediction in ("sample", "epsilon")
    for variance in ("fixed_small_log", "learned_range")
    for clip in ({"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 1.5})
]


@pytest.mark.parametrize("config", UNCLIP, ids=str)
@pytest.mark.parametrize("strength", [None, 0.5])
def test_unclip_is_told_the_next_timestep(config: dict[str, Any], strength: float | None) -> None:
    """The loop over a linear network, against the scheduler's own steps; as a matrix, unless clipping at a signal of 1e-9
    is more than float32 can show."""
    scheduler = diffusers.UnCLIPScheduler(**config)
    schedule = make_schedule(scheduler, 8, strength=strength)
    hard = strength is None and config["prediction_type"] == "epsilon" and config["clip_sample"]
    assert (schedule.transition is None) == hard
    weight = torch.randn(8, 4, generator=seeds(3)) / 2
    learned = config["variance_type"] == "learned_range"

    class Linear:
        executed = ()

        def prepare(self, timesteps: Any, conditioning: Any) -> Any:
            return None

        def __call__(self, tensors: Any, x: Any, answer: Answer) -> Any:
            out = torch.einsum("oc,bchw->bohw", weight, x)
            return out[:, :4], out[:, 4:].tanh() if learned else None

    start = torch.randn(2, 4, 8, 8, generator=seeds(4))
    ours = sample(Run(schedule, Linear(), {}, generator=seeds(5)), start)
    scheduler.set_timesteps(8)
    times = scheduler.timesteps[4 if strength else 0 :]

    def by_hand(next_of: Any) -> torch.Tensor:
        generator, x = seeds(5), start
        for k, t in enumerate(times):
            prediction, variance = Linear()(None, x, Answer())
            out = torch.cat([prediction, variance], 1) if learned else prediction
            x = scheduler.step(out, t, x, prev_timestep=next_of(k), generator=generator).prev_sample
        return x

    listed = by_hand(lambda k: times[k + 1] if k + 1 < len(times) else None)
    assert distance(ours, listed) < 1e-5
    assert distance(by_hand(lambda k: None), listed) > 1e-2


@pytest.mark.parametrize("cls", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_any_scheduler_works(cls: str) -> None:
    """Against a plain loop over the peer's network: the peer's prior takes no scheduler but unCLIP's."""
    scheduler = getattr(diffusers, cls)(prediction_type="sample")
    pipe = make(PLAIN[1], scheduler=scheduler)
    ours = call(pipe, guidance_scale=3.0)[0]
    text, states, mask = make(PLAIN[1], diffusers)._encode_prompt([PROMPTS[0]], "cpu", 1, True)
    scheduler.set_timesteps(6)
    generator = seeds(1)
    x = torch.randn(1, WIDTH, generator=generator) * scheduler.init_noise_sigma
    more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t).repeat(2, 1)
        away, towards = pipe.prior(seen, t, text, states, mask, return_dict=False)[0].chunk(2)
        x = scheduler.step(away + 3.0 * (towards - away), t, x, **more).prev_sample
    assert distance(ours, pipe.prior.post_process_latents(x)) < 1e-4


# Errors

ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 3}, "prompt is 3; it must be text or a list of texts"),
    ({"prompt": ["a", None]}, "prompt is .'a', None.; it must be text"),
    ({"prompt": []}, "prompt is ..; it must be text"),
    ({"negative_prompt": 3}, "negative_prompt is 3; it must be text"),
    ({"prompt": PROMPTS, "negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
    ({"latents": embeddings(2)}, r"latents have shape \(2, 32\); this call needs \(1, 32\)"),
    ({"latents": embeddings(1)[:, :9]}, r"latents have shape \(1, 9\); this call needs \(1, 32\)"),
    ({"output_type": "pil"}, "output_type is 'pil'; it must be 'pt' or 'np'"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"num_inference_steps": 1}, "UnCLIPScheduler needs 2 steps or more, not 1"),
    ({"generator": seeds(1, 2)}, "2 generators for 1 images"),
    ({"callback_on_step_end_tensor_inputs": ["text"]}, r"callback tensors \['text'\] are unknown"),
    ({"controls": [1]}, "a prior takes no controls"),
]
IMAGE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "KandinskyV22PriorEmb2EmbPipeline needs image="),
    ({"strength": 1.5}, r"strength is 1.5; it must lie in \[0, 1\]"),
    ({"strength": 0.1}, "no step is left"),
    ({"image": embeddings(1)[:, :9]}, r"image embeddings have shape \(1, 9\); this prior takes \(N, 32\)"),
    ({"image": torch.zeros(9)}, r"image is a tensor of shape \(9,\); it must be a PIL picture"),
    ({"image": "fox.png"}, "image is str; it must be a PIL picture"),
    ({"image": embeddings(3), "prompt": PROMPTS}, "3 entries of image for 2 prompts: give 1 or 2"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [*((PLAIN[1], *case) for case in ERRORS), *((EMB2EMB, *case) for case in IMAGE_ERRORS)],
)
def test_errors(name: str, arguments: dict[str, Any], message: str) -> None:
    image = {"image": picture()} if name == EMB2EMB else {}
    with pytest.raises(ValueError, match=f"^{message}") as error:
        call(make(name), **{**image, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("items", "weights", "message"),
    [
        (ITEMS, [1.0], "1 weights for 3 texts and pictures: give each its own"),
        ([PROMPTS[0], 3], [0.5, 0.5], "image is int; it must be a PIL picture"),
    ],
)
def test_errors_of_interpolation(items: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        interpolate(make(PLAIN[1]), items, weights)


def test_an_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="takes no argument 'guidance_scal'; did you mean 'guidance_scale'"):
        make(PLAIN[0])("a", guidance_scal=1.0)
    with pytest.raises(TypeError, match="takes no argument 'image'"):
        make(PLAIN[1])("a", image=picture())


def test_a_prior_has_no_step_cache() -> None:
    with pytest.raises(ValueError, match="no step cache for this network") as error:
        kandinsky_prior.KandinskyV22PriorPipeline(**prior_components()).cache_steps(2)
    assert "\n" not in str(error.value)
