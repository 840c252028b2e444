"""What the studio copies makes the same pixels: as a command and as Python."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import light, make_controlnet
from PIL import Image

from diffusion_kit.adapters.pictures import fit_image
from diffusion_kit.cli import main
from diffusion_kit.ledger import Recorder
from diffusion_kit.making.job import Job as Wanted
from diffusion_kit.recipes import ControlRecipe, FileRef
from diffusion_kit.studio.config import StudioConfig
from diffusion_kit.studio.library import Library
from diffusion_kit.studio.queue import Job
from diffusion_kit.studio.requests import checked, settings_of
from diffusion_kit.studio.workshop import Result, Workshop

REF = FileRef.of


def workshop(model: Path, tmp_path: Path) -> Workshop:
    config = StudioConfig(models=(str(model),), controls=(str(model / "more"),), output=tmp_path / "studio")
    return Workshop(config, Library(config.models, config.controls), Recorder(print))


def made(shop: Workshop, wanted: Wanted, **settings: Any) -> Result:
    own = settings_of(shop.config, shop.config.models[0])
    changed = type(own)(**{**vars(own), "steps": 2, "size": (64, 64), **settings})
    return shop.make(checked(wanted, changed, 7, shop.config), Job("a", lambda job: None))


CASES: dict[str, Any] = {
    "text": lambda net: (Wanted("", "a 'red' fox, \"$HOME\"", None, None, ()), {"negative_prompt": "blue; rm"}),
    "two controls": lambda net: (
        Wanted(
            "",
            "a fox",
            None,
            None,
            (
                ControlRecipe("canny", REF("photo.png"), detect="auto", scale=(0.5, 1.0, 0.8, 1.0), end=0.5),
                ControlRecipe(net, REF("lines.png"), detect="none", scale=0.7, mask=REF("mask.png"), mode="prompt"),
            ),
        ),
        {"scheduler": "EulerAncestralDiscreteScheduler", "fit": "contain"},
    ),
    "inpainting": lambda net: (
        Wanted("", "a fox", REF("photo.png"), REF("mask.png"), ()),
        {
            "strength": 0.8,
            "fit": "stretch",
            "optimize": "exact",
            "engine": "packed",
            "low_memory": True,
            "size": (128, 96),
        },
    ),
}


@pytest.mark.parametrize("case", light(CASES, "inpainting"))
def test_command_and_python_make_the_same_pixels(
    case: str, model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = workshop(model, work)
    wanted, settings = CASES[case](str(model / "more" / "net"))
    result = made(shop, wanted, **settings)
    arguments = shlex.split(result.command.replace("\\\n", " "))
    assert arguments[0] == "diffusion-kit"
    assert ("--low-memory" in arguments) == settings.get("low_memory", False), "large pictures are decoded in tiles"
    assert main([*arguments[1:], "--out", "command.png"]) == 0
    exec(compile(result.python, "python", "exec"), {})  # noqa: S102
    pictures = [np.asarray(Image.open(file)) for file in (result.file, "command.png", "picture.png")]
    assert np.ptp(pictures[0]) > 20, "a picture, and not one grey"
    np.testing.assert_array_equal(pictures[1], pictures[0])
    np.testing.assert_array_equal(pictures[2], pictures[0])


def test_what_a_control_will_see_is_what_it_sees(model: Path, work: Path) -> None:
    """At the picture's size: a detector finds other edges in a photo of another."""
    shop = workshop(model, work)
    wanted, _ = CASES["two controls"](str(model / "more" / "net"))
    result = made(shop, wanted)
    own = settings_of(shop.config, shop.config.models[0])
    asked = checked(wanted, type(own)(**{**vars(own), "size": (64, 64)}), 7, shop.config)
    for number in range(2):
        before = shop.control_image(asked, number)
        used = fit_image(Image.open(result.shown[number]).convert("RGB"), 64, 64)
        np.testing.assert_array_equal(np.asarray(before), np.asarray(used))
        assert np.ptp(np.asarray(before)) > 20


def test_a_control_of_another_shape_is_shown_and_measured_as_it_was_cut(model: Path, work: Path) -> None:
    shop = workshop(model, work)
    wide = Image.open("lines.png").convert("RGB").resize((128, 64))
    wide.save("wide.png")
    result = made(shop, Wanted("", "a fox", None, None, (ControlRecipe("canny", REF("wide.png"), detect="none"),)))
    (seen,) = (np.asarray(Image.open(file)) for file in result.shown)
    np.testing.assert_array_equal(seen, np.asarray(fit_image(wide, 64, 64)))


def test_words_that_begin_with_a_dash_are_no_options(model: Path, work: Path) -> None:
    shop = workshop(model, work)
    result = made(shop, Wanted("", "-fox", None, None, ()), negative_prompt="-blue")
    assert main([*shlex.split(result.command.replace("\\\n", " "))[1:-2], "--out", "command.png", "--", "-fox"]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open("command.png")), np.asarray(Image.open(result.file)))


def test_models_and_schedulers_are_swapped_and_let_go(model: Path, work: Path, tmp_path: Path) -> None:
    shop = workshop(model, work)
    wanted = Wanted("", "a fox", None, None, ())
    first = made(shop, wanted)
    other = made(shop, wanted, scheduler="DDIMScheduler")
    assert other.recipe.scheduler == "DDIMScheduler"
    again = made(shop, wanted)
    np.testing.assert_array_equal(np.asarray(Image.open(again.file)), np.asarray(Image.open(first.file)))
    net = make_controlnet(seed=9)
    net.save_pretrained(model / "more" / "other")
    control = ControlRecipe(str(model / "more" / "net"), REF("lines.png"), detect="none")
    made(shop, Wanted("", "a fox", None, None, (control,)))
    other_control = ControlRecipe("other", REF("lines.png"), detect="none")
    made(shop, Wanted("", "a fox", None, None, (other_control,)))
    assert list(shop.pipe.__dict__["_base_controls"]) == [str(model / "more" / "other")], "the one before was let go"
    shop.release()
    assert shop.pipe is None
    with pytest.raises(ValueError, match="no control '/etc' here"):
        made(shop, Wanted("", "a fox", None, None, (ControlRecipe("/etc", REF("lines.png")),)))


def test_more_pixels_than_the_studio_makes_are_refused(model: Path, work: Path) -> None:
    shop = workshop(model, work)
    with pytest.raises(ValueError, match="makes 4 megapixels at most"):
        made(shop, Wanted("", "a fox", None, None, ()), size=(4096, 4096))
