"""Pictures of another shape than the result, and control images of the wrong polarity."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZE, distance, half_mask, lines, make_adapter, make_controlnet, picture, pipeline, seeds
from PIL import Image

from diffusion_kit import Control, MultiAdapter, SDXLPipeline, StableDiffusionXLAdapterPipeline
from diffusion_kit.adapters.maps import KNOWN, expected_map
from diffusion_kit.adapters.pictures import FITS, fit_image


def wide(mode: str = "RGB") -> Image.Image:
    """Four bars across a picture of 80 x 20: dark, red, blue, light."""
    strip = Image.new("RGB", (80, 20))
    for k, colour in enumerate(("black", "red", "blue", "white")):
        strip.paste(colour, (20 * k, 0, 20 * k + 20, 20))
    if mode == "I;16":
        return Image.fromarray(np.asarray(strip.convert("L")).astype(np.uint16) * 257)
    return strip.convert(mode)


def test_bars_are_black_and_colours_kept_in_every_mode() -> None:
    for source in (wide().convert("P"), wide().convert("CMYK"), wide().convert("RGBA")):
        result = np.asarray(fit_image(source, 40, 40, "contain"))
        assert not result[2].any()
        assert tuple(result[20, 15]) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("size", [(40, 40), (33, 70), (200, 10), (80, 20), (1, 1)])
def test_every_fit_gives_the_size_and_keeps_the_mode(mode: str, size: tuple[int, int]) -> None:
    for fit in FITS:
        result = fit_image(wide(mode), *size, fit)
        assert (result.size, result.mode) == (size, mode)


def test_what_each_fit_keeps() -> None:
    cover, contain, stretch = (np.asarray(fit_image(wide(), 40, 40, fit)) for fit in ("cover", "contain", "stretch"))
    assert tuple(cover[20, 5]) == (255, 0, 0), "the middle of the picture, whole height"
    assert tuple(cover[20, 34]) == (0, 0, 255)
    assert not contain[:14].any(), "bars above"
    assert not contain[26:].any(), "and below"
    assert tuple(contain[20, 35]) == (255, 255, 255), "everything is inside"
    assert tuple(stretch[2, 35]) == tuple(stretch[37, 35]) == (255, 255, 255)


@pytest.mark.parametrize("side", [48, 64, 96])
def test_no_size_is_cut_outside_of_the_picture(side: int) -> None:
    """Rounding made the part that is kept a hair higher than the picture: 910 pixels for 64, among others."""
    for height in range(1, 1200):
        thin = Image.new("L", (1, height))
        for picture_, size in ((thin, (1, side)), (thin.transpose(Image.Transpose.ROTATE_90), (side, 1))):
            assert fit_image(picture_, *size, "cover").size == size


def test_a_fit_of_the_same_shape_changes_nothing() -> None:
    results = [fit_image(picture(size=96), 48, 48, fit) for fit in FITS]
    assert all(np.array_equal(np.asarray(result), np.asarray(results[0])) for result in results)
    with pytest.raises(ValueError, match="fit is 'squeeze'; it must be one of cover, contain, stretch"):
        fit_image(picture(), 8, 8, "squeeze")


def run(**call: Any) -> torch.Tensor:
    more = {"num_inference_steps": 2, "output_type": "latent", "generator": seeds(1)}
    return pipeline(SDXLPipeline)("a fox", **more, **call).images


@pytest.mark.parametrize("fit", ["cover", "contain"])
def test_the_calls_fit_is_that_of_all_its_pictures(fit: str) -> None:
    """Picture, mask, control image and a control's mask: as if each had been fitted before."""
    start, mask = picture(size=128).crop((0, 0, 128, 50)), half_mask(128).crop((30, 0, 128, 40))
    edges, area = lines(size=96).crop((0, 0, 40, 96)), half_mask(90).crop((0, 0, 90, 33))

    def call(**more: Any) -> torch.Tensor:
        def own(image: Image.Image) -> Image.Image:
            return image if more else fit_image(image, SIZE, SIZE, fit)

        control = Control(make_controlnet(), own(edges), mask=own(area))
        given = {"image": own(start), "mask_image": own(mask), "strength": 1.0, "controls": [control]}
        return run(**given, height=SIZE, width=SIZE, **more)

    assert torch.equal(call(fit=fit), call())
    assert distance(call(fit="stretch"), call()) > 1e-2


def test_peer_named_classes_take_it_too_and_stretch_by_default() -> None:
    pipe = pipeline(StableDiffusionXLAdapterPipeline, adapter=make_adapter())
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "output_type": "latent"}
    edges = lines(size=96).crop((0, 0, 40, 96))

    def result(image: Image.Image, **more: Any) -> torch.Tensor:
        return pipe("a fox", image=image, generator=seeds(1), **call, **more).images

    assert torch.equal(result(edges, fit="cover"), result(fit_image(edges, SIZE, SIZE, "cover")))
    assert torch.equal(result(edges), result(fit_image(edges, SIZE, SIZE, "stretch")))


def test_only_pil_pictures_can_be_fitted() -> None:
    with pytest.raises(ValueError, match="fit='cover' needs PIL pictures, not Tensor"):
        run(image=torch.rand(1, 3, 64, 80), strength=1.0, height=SIZE, width=SIZE, fit="cover")


def test_sizes_are_rounded_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="is 62 x 64, sides must be multiples of 4: the result is 64 x 64"):
        assert torch.equal(run(width=62, height=64), run(width=64, height=64))
    with pytest.warns(UserWarning, match="is 60 x 64, sides must be multiples of 8: the result is 64 x 64"):
        run(width=60, height=64, controls=[Control(make_adapter(), lines())])
    with pytest.warns(UserWarning, match="the picture is 66 x 66, .* the result is 64 x 64"):
        run(image=picture(size=66), strength=1.0)
    with pytest.raises(ValueError, match="the picture is 3 x 3 pixels; give height= and width=, multiples of 4"):
        run(image=picture(size=3), strength=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(width=64, height=68)


@pytest.mark.parametrize(
    ("name", "detector", "polarity"),
    [
        ("TencentARC/t2i-adapter-canny-sdxl-1.0", "canny", "white on black"),
        ("TencentARC/t2i-adapter-sketch-sdxl-1.0", "sketch", "white on black"),
        ("TencentARC/t2i-adapter-lineart-sdxl-1.0", "lineart", "white on black"),
        ("TencentARC/t2i-adapter-depth-zoe-sdxl-1.0", "depth", None),
        ("TencentARC/t2i-adapter-openpose-sdxl-1.0", "openpose", None),
        ("TencentARC/t2iadapter_color_sd14v1", "palette", None),
        ("TencentARC/t2iadapter_seg_sd14v1", "none", None),
        ("lllyasviel/control_v11p_sd15_softedge", "hed", "white on black"),
        ("lllyasviel/control_v11p_sd15_scribble", "sketch", "white on black"),
        ("lllyasviel/control_v11p_sd15s2_lineart_anime", "lineart_anime", "white on black"),
        ("lllyasviel/control_v11p_sd15_mlsd", "mlsd", "white on black"),
        ("lllyasviel/control_v11p_sd15_normalbae", "normal", None),
        ("lllyasviel/control_v11f1e_sd15_tile", "tile", None),
        ("lllyasviel/control_v11e_sd15_shuffle", "shuffle", None),
        ("DionTimmer/controlnet_qrcode-control_v1p_sd15", "none", "black on white"),
        ("SubMaroon/ControlNet-anime-colorize", "lineart_anime", "black on white"),
        ("/models/my-canny/", "canny", "white on black"),
    ],
)
def test_what_an_adapter_expects_is_known_by_its_name(name: str, detector: str, polarity: str | None) -> None:
    known = expected_map(name)
    assert known is not None
    assert (known.detector, known.polarity) == (detector, polarity)


def test_names_that_say_nothing() -> None:
    assert expected_map("finished-textile") is None
    assert expected_map("my-adapter") is None
    assert expected_map("canny-folder/net") is None, "only the last part is the adapter's name"


def test_detectors_that_are_named_are_there() -> None:
    from diffusion_kit.adapters.detectors import detectors

    assert {known.detector for _, known in KNOWN} <= {"none", *detectors()}


@pytest.mark.parametrize(
    "image",
    [
        np.asarray(lines()).astype(float),
        np.asarray(lines()).astype(int),
        torch.full((3, 8, 8), -1.0),
        torch.ones(8, 8) * 3,
    ],
)
def test_values_out_of_range_are_an_error(image: Any) -> None:
    with pytest.raises(ValueError, match="give bytes, or values in"):
        run(controls=[Control(make_adapter(), image)])


def test_scales_are_numbers() -> None:
    for wrong in ([], True, [1.0, True], "1"):
        with pytest.raises(ValueError, match="it must be a finite number, or a list of them"):
            Control("canny", lines(), scale=wrong)  # type: ignore[arg-type]
    assert Control("canny", lines(), scale=np.float32(0.5)).scales == (0.5,)


def named(name: str, seed: int = 3) -> Any:
    net = make_adapter(seed)
    net.register_to_config(_name_or_path=name)
    return net


def test_an_inverted_map_of_lines_is_told() -> None:
    dark = Image.fromarray(255 - np.asarray(lines()))
    with pytest.warns(UserWarning, match="my-canny expects edges, white on black; its control image seems to be black"):
        run(controls=[Control(named("my-canny"), dark)])
    with pytest.warns(UserWarning, match="my-qrcode expects dark marks on a light ground, black on white"):
        run(controls=[Control(named("my-qrcode"), lines())])
    both = MultiAdapter([named("a-depth"), named("b-sketch", 4)])
    with pytest.warns(UserWarning, match="b-sketch expects strokes, white on black"):
        run(controls=[Control(both, [dark, dark])])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(controls=[Control(named("my-canny"), lines()), Control(named("my-qrcode"), dark)])
        run(controls=[Control(named("my-depth"), dark), Control(named("mine"), dark)])
