"""Prompts: long ones, weights, several encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import components, distance, pipeline, sd_pipeline, seeds

from diffusion_kit import Control, SD15Pipeline, SDXLPipeline
from diffusion_kit.models.text import Layer, encode_text, encode_weighted, parse_weights


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a fox", [("a fox", 1.0)]),
        ("a (red) fox", [("a ", 1.0), ("red", 1.1), (" fox", 1.0)]),
        ("a (red:1.5) fox", [("a ", 1.0), ("red", 1.5), (" fox", 1.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("[red]", [("red", 1 / 1.1)]),
        (r"\(red\)", [("(", 1.0), ("red", 1.0), (")", 1.0)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("time: 10:30", [("time", 1.0), (":", 1.0), (" 10", 1.0), (":", 1.0), ("30", 1.0)]),
        ("(open", [("open", 1.1)]),
        ("close)", [("close", 1.0), (")", 1.0)]),
        ("", []),
    ],
)
def test_parse_weights(prompt: str, pieces: list[tuple[str, float]]) -> None:
    parsed = parse_weights(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces])


def test_weights_of_one_are_the_plain_encoding() -> None:
    parts = components()
    pair = (parts["tokenizer"], parts["text_encoder_2"], Layer(1, normed=False))
    plain, weighted = encode_text(["a red fox", ""], *pair), encode_weighted(["a red fox", ""], *pair)
    assert distance(weighted.states, plain.states) < 1e-6
    assert distance(weighted.pooled, plain.pooled) < 1e-6


def test_a_weight_moves_its_words_away_from_the_empty_prompt() -> None:
    parts = components()
    pair = (parts["tokenizer"], parts["text_encoder"], Layer(0, normed=True))
    empty, plain = encode_text([""], *pair).states, encode_text(["fox"], *pair).states
    double = encode_weighted(["(fox:2)"], *pair).states
    torch.testing.assert_close(double[:, 1:4], (2 * plain - empty)[:, 1:4], rtol=1e-4, atol=1e-5)
    assert distance(encode_weighted(["(fox:0)"], *pair).states[:, 1:4], empty[:, 1:4]) < 1e-5


@pytest.mark.parametrize("make", [lambda: pipeline(SDXLPipeline), lambda: sd_pipeline(SD15Pipeline)])
@pytest.mark.parametrize("side", ["prompt", "negative_prompt"])
def test_windows_are_counted_with_all_tokens_of_an_inversion(side: str, make: Any) -> None:
    pipe = make()
    pipe.maybe_convert_prompt = lambda text, tokenizer: text.replace("<x>", "x " * 90)
    call = {"prompt": "a fox", "negative_prompt": "bad", side: "a <x>"}
    states, negative, *_ = pipe.encode_prompt(**call, prompt_syntax="weighted")
    assert states.shape == negative.shape
    assert states.shape[1] == 2 * 77


def test_one_text_of_the_second_encoder_serves_all_prompts() -> None:
    pipe = pipeline(SDXLPipeline)
    both, *_ = pipe.encode_prompt(["a fox", "a cat"], prompt_2="oil")
    for k, prompt in enumerate(["a fox", "a cat"]):
        assert distance(both[k], pipe.encode_prompt(prompt, prompt_2="oil")[0][0]) < 1e-5
    with pytest.raises(ValueError, match="2 prompt_2 for 1 prompts: give one, or one for each"):
        pipe.encode_prompt("a fox", prompt_2=["oil", "ink"])


def test_without_encoder_and_tokenizer_embeddings_are_enough() -> None:
    states, negative = sd_pipeline(SD15Pipeline).encode_prompt("a fox")
    bare = sd_pipeline(SD15Pipeline, text_encoder=None, tokenizer=None)
    call = {"prompt_embeds": states, "negative_prompt_embeds": negative, "num_inference_steps": 2}
    made = bare(**call, generator=seeds(1), output_type="latent").images
    whole = sd_pipeline(SD15Pipeline)("a fox", num_inference_steps=2, generator=seeds(1), output_type="latent").images
    assert distance(made, whole) < 1e-5


def test_long_prompts_stand_in_windows_and_rows_are_as_long() -> None:
    pipe = pipeline(SDXLPipeline)
    long = "a fox jumps over " * 12
    states, negative, pooled, _ = pipe.encode_prompt(["short", long], negative_prompt="bad", prompt_syntax="weighted")
    windows = states.shape[1] // 77
    assert windows >= 2
    assert negative.shape == states.shape
    assert len(pooled) == 2
    changed, *_ = pipe.encode_prompt(["short", long + " and a hound"], negative_prompt="", prompt_syntax="weighted")
    assert distance(changed[1, : states.shape[1]], states[1]) > 1e-3, "the end of a long prompt counts"
    call = {"num_inference_steps": 2, "output_type": "latent"}
    full, cut = (
        pipe(long + end, generator=seeds(1), prompt_syntax="weighted", **call).images for end in ("", " at night")
    )
    assert distance(full, cut) > 1e-4


def test_a_cut_prompt_is_said() -> None:
    with pytest.warns(UserWarning, match="was cut after 77 tokens"):
        pipeline(SDXLPipeline).encode_prompt("a fox jumps over " * 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "give a prompt or prompt_embeds"),
        ({"prompt": 3}, "it must be text"),
        ({"prompt": []}, "it must be text"),
        ({"prompt": "a", "controls": Control("canny", None)}, "it must be a list"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 77, 48)}, "one of the two"),
        ({"prompt_embeds": torch.zeros(1, 77, 48)}, "need pooled_prompt_embeds"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "1 negative prompts for 2 prompts"),
        ({"prompt": "a", "mask_image": torch.zeros(1, 1, 8, 8)}, "needs an image"),
        ({"prompt": "a", "fit": "squeeze"}, "fit is 'squeeze'; it must be one of cover, contain, stretch"),
        ({"prompt": "a", "ip_adapter_image": 1}, "ip_adapter_image needs an IP-Adapter: call load_ip_adapter first"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "finite"),
        ({"prompt": "a", "guidance_interval": (0.7, 0.2)}, "guidance_interval is 0.7 to 0.2"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "a", "prompt_syntax": "magic"}, "'weighted' or None"),
        ({"prompt": "a", "denoising_start": 0.8, "denoising_end": 0.5}, "must lie before"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 3, 3)}, r"latents have shape \(1, 4, 3, 3\)"),
        ({"prompt": ["a", "b"], "generator": seeds(1, 2, 3)}, "3 generators for 2 images"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["sigma"]}, "callback tensors"),
    ],
)
def test_bad_calls_are_one_clear_line(call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipeline(SDXLPipeline)(**call, num_inference_steps=2)
    assert "\n" not in str(caught.value)
