"""Detectors that need no weights: what holds for all of them, and what each is for."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageDraw, ImageOps

from diffusion_kit.adapters.detectors import _networks, detect, detector, detectors, inverted, missing, options_of

LEARNED = {"depth", "hed", "lineart_anime", "mlsd", "normal", "openpose", "pidinet", "pose"}
NAMES = sorted(set(detectors()) - LEARNED)
LINES = ("canny", "lineart", "sketch")
FACTORS = {"apart": 4}  # by which an option is changed so that it shows
OPTIONS = [(name, option) for name in NAMES for option in options_of(detector(name)) if option != "model"]
SIZES = [(64, 64), (70, 53), (1, 1), (1, 300)]


@functools.cache
def photo(size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Things on a smooth background, with the grain of a camera."""
    image = picture().resize((192, 144), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 90, 100), "firebrick")
    draw.rectangle((110, 40, 170, 120), "ivory")
    draw.line((0, 130, 192, 110), "black", 3)
    grain = np.random.default_rng(1).normal(0, 3, (144, 192, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).resize(size)


@functools.cache
def made(name: str) -> Image.Image:
    return detect(name, photo())


def square(ground: str, colour: str) -> Image.Image:
    image = Image.new("RGB", (256, 256), ground)
    image.paste(colour, (64, 64, 192, 192))
    return image


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def other(name: str, option: str) -> Any:
    """A value of an option that is not its default."""
    default = options_of(detector(name))[option].default
    return not default if isinstance(default, bool) else type(default)(FACTORS.get(option, 1.5) * default + 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_any_size_gives_rgb_of_that_size(name: str, size: tuple[int, int]) -> None:
    for image in (detect(name, photo(size)), detector(name).detect(photo(size))):
        assert (image.size, image.mode) == (size, "RGB")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_photo_gives_the_same_picture_and_is_left_alone(name: str) -> None:
    before = photo().tobytes()
    assert detect(name, photo()) == made(name)
    assert photo().tobytes() == before
    assert values(made(name)).std() > 5
    assert missing(name) is None


@pytest.mark.parametrize("name", NAMES)
def test_resolutions_are_lengths_of_the_shorter_side(name: str, monkeypatch: Any) -> None:
    module, seen = detector(name), []

    @functools.wraps(module.detect)
    def spy(image: Image.Image, **options: Any) -> Image.Image:
        seen.append(image.size)
        return run(image, **options)

    run = module.detect
    monkeypatch.setattr(module, "detect", spy)
    assert detect(name, photo(), detect_resolution=48).size == (96, 72)
    assert detect(name, photo(), image_resolution=36).size == (48, 36)
    assert detect(name, photo(), detect_resolution=144, image_resolution=18).size == (24, 18)
    own = getattr(module, "RESOLUTION", 72)
    assert seen == [(64, 48), (round(own * 4 / 3), own), (192, 144)]
    for option in ("detect_resolution", "image_resolution"):
        with pytest.raises(ValueError, match=f"{option} is 0; it must be 1 or more"):
            detect(name, photo(), **{option: 0})


@pytest.mark.parametrize("name", NAMES)
def test_inverting_twice_changes_nothing(name: str) -> None:
    negative = detect(name, photo(), invert=True)
    assert negative == ImageOps.invert(made(name))
    assert inverted(negative) == made(name)


def test_inverting_keeps_sixteen_bits() -> None:
    deep = Image.fromarray(np.arange(0, 65536, 16, np.uint16).reshape(64, 64))
    assert inverted(deep).getpixel((0, 0)) == 65535
    assert inverted(inverted(deep)) == deep


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_are_not_cut(name: str) -> None:
    grey = photo().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert detect(name, deep) == detect(name, grey)


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_counts(name: str, option: str) -> None:
    assert detect(name, photo(), **{option: other(name, option)}) != made(name)


@pytest.mark.parametrize("value", [-1, float("nan")])
@pytest.mark.parametrize(("name", "option"), [pair for pair in OPTIONS if not isinstance(other(*pair), bool)])
def test_a_value_out_of_range_is_one_line(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}.* is {value}|{option} {value}") as caught:
        detect(name, photo(), **{option: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "option", "least", "most"),
    [
        ("blur", "radius", 0.1, 1000),
        ("canny", "low", 0, 200),
        ("canny", "high", 100, 2040),
        ("palette", "blocks", 1, 10**6),
        ("regions", "colours", 2, 256),
        ("regions", "apart", 0, 1000),
        ("sketch", "threshold", 1e-6, 1e6),
        ("tile", "factor", 1, 1e6),
    ],
)
def test_the_ends_of_a_range_work(name: str, option: str, least: float, most: float) -> None:
    for value in (least, most):
        assert detect(name, photo(), **{option: value}).size == photo().size


@pytest.mark.parametrize("name", NAMES)
def test_wrong_options_and_names_are_one_line(name: str) -> None:
    with pytest.raises(TypeError, match=f"detector '{name}' takes no option 'xyz'; it takes") as wrong:
        detect(name, photo(), xyz=1)
    with pytest.raises(TypeError, match="did you mean 'image_resolution'") as misspelt:
        detect(name, photo(), image_resolutoin=64)
    with pytest.raises(ValueError, match=f"did you mean '{name}'") as unknown:
        detect(f"{name}x", photo())
    assert all("\n" not in str(caught.value) for caught in (wrong, misspelt, unknown))


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("colours", [("black", "white"), ("white", "black"), ("teal", "orange"), ("#555", "#999")])
def test_lines_are_white_and_lie_where_edges_are(name: str, colours: tuple[str, str]) -> None:
    lines = values(detect(name, square(*colours)))[..., 0]
    rows, columns = np.mgrid[:256, :256] + 0.5
    off = abs(np.maximum(abs(rows - 128), abs(columns - 128)) - 64)  # pixels between a place and the square's edge
    assert lines[off > 6].max() == 0
    for middle in (lines[128, 58:70], lines[128, 186:198], lines[58:70, 128], lines[186:198, 128]):
        assert middle.max() > 200


@pytest.mark.parametrize("name", LINES)
def test_a_flat_photo_has_no_lines(name: str) -> None:
    grain = np.random.default_rng(0).normal(128, 2, (256, 256, 3)).astype(np.uint8)
    assert values(detect(name, Image.new("RGB", (64, 48), "olive"))).max() == 0
    assert values(detect(name, Image.fromarray(grain))).mean() < 10


@pytest.mark.parametrize("name", ["lineart", "sketch"])
def test_lines_do_not_depend_on_contrast(name: str) -> None:
    faint = Image.fromarray((values(photo()) * 0.5 + 60).round().astype(np.uint8))
    lines, again = values(made(name)), values(detect(name, faint))
    assert np.corrcoef(lines.ravel(), again.ravel())[0, 1] > 0.9


def test_sketch_has_no_greys_at_its_own_resolution() -> None:
    strokes = values(detect("sketch", photo(), detect_resolution=72))
    assert set(np.unique(strokes)) == {0, 255}


def test_blur_keeps_the_mean_and_takes_the_detail() -> None:
    spreads = [values(detect("blur", photo(), radius=radius)).std((0, 1)).sum() for radius in (2, 8, 32, 128)]
    assert spreads == sorted(spreads, reverse=True)
    assert np.allclose(values(made("blur")).mean((0, 1)), values(photo()).mean((0, 1)), atol=3)


def test_tile_is_the_photo_but_for_its_detail() -> None:
    assert detect("tile", photo(), factor=1) == photo()
    small = (12, 9)
    reduced = [image.resize(small, Image.Resampling.BOX) for image in (photo(), made("tile"))]
    assert abs(values(reduced[0]) - values(reduced[1])).mean() < 6
    assert len(np.unique(values(detect("tile", photo(), factor=1000)).reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_palette_has_blocks_of_the_mean_colour(blocks: int) -> None:
    image = photo((48 * blocks, 24 * blocks))
    means = values(image).reshape(blocks, 24, 2 * blocks, 24, 3).mean((1, 3))
    assert abs(values(detect("palette", image, blocks=blocks))[::24, ::24] - means).max() <= 1
    for size in (16 * blocks, 24 * blocks, 36 * blocks):
        result = values(detect("palette", image, blocks=blocks, image_resolution=size))
        assert len(np.unique(result.reshape(-1, 3), axis=0)) <= 2 * blocks**2


def test_greyscale_is_luma() -> None:
    luma = values(photo()) @ [0.299, 0.587, 0.114]
    assert abs(values(made("greyscale")) - luma[..., None]).max() <= 1


@pytest.mark.parametrize("colours", [2, 8, 32])
def test_regions_have_few_colours_and_no_others(colours: int) -> None:
    result = values(detect("regions", photo(), colours=colours, image_resolution=200)).reshape(-1, 3)
    assert 2 <= len(np.unique(result, axis=0)) <= colours


def test_regions_of_flat_areas_are_these_areas() -> None:
    image = Image.new("RGB", (512, 512), "navy")
    image.paste("gold", (0, 0, 256, 512))
    image.paste("seagreen", (128, 200, 400, 512))
    result = detect("regions", image, colours=3)
    assert len(result.getcolors()) == 3
    assert (values(result) == values(image)).all(2).mean() > 0.999  # all but the tips of corners


def test_regions_are_not_split_by_shading_or_grain() -> None:
    ball = np.linspace(0.7, 1, 256)[:, None, None] * np.array([220, 40, 30])
    image = np.full((256, 512, 3), [40, 60, 200.0])
    image[:, 128:384] = ball
    grain = np.random.default_rng(0).normal(0, 2, image.shape)
    maps = [detect("regions", Image.fromarray((image + own).round().astype(np.uint8))) for own in (0, grain)]
    assert [len(own.getcolors()) for own in maps] == [2, 2]
    assert (abs(values(maps[0]) - values(maps[1])).max(2) < 5).mean() > 0.99
    assert len(detect("regions", Image.fromarray(image.round().astype(np.uint8)), apart=0).getcolors()) > 2


def test_regions_of_a_muted_picture_are_those_of_a_vivid_one() -> None:
    muted = Image.fromarray((0.3 * values(photo()) + 90).round().astype(np.uint8))
    vivid, faint = (len(detect("regions", own).getcolors()) for own in (photo(), muted))
    assert faint >= vivid > 2


def test_a_small_sketch_is_as_white_as_a_large_one() -> None:
    disc = Image.new("RGB", (64, 64), "olive")
    ImageDraw.Draw(disc).ellipse((12, 12, 51, 51), fill="gold")
    strokes = values(detect("sketch", disc))[..., 0]
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    ring = [strokes[round(31.5 + 19.5 * np.sin(a)), round(31.5 + 19.5 * np.cos(a))] for a in angles]
    assert np.mean(np.array(ring) > 128) > 0.9
    assert (strokes > 128).mean() < 0.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(96, 72), (200, 50)])
def test_shuffle_keeps_colours_and_moves_them(seed: int, size: tuple[int, int]) -> None:
    before, after = values(photo(size)), values(detect("shuffle", photo(size), seed=seed))
    palette = {tuple(colour) for colour in before.reshape(-1, 3)}
    assert {tuple(colour) for colour in after.reshape(-1, 3)} <= palette
    distribution = [np.sort(image.reshape(-1, 3), 0) for image in (before, after)]
    assert abs(distribution[0] - distribution[1]).mean() < 20
    assert abs(before - after).mean() > 20
    torn = np.random.default_rng(0).permutation(after)  # its rows in any order
    assert abs(np.diff(after, axis=0)).mean() < abs(np.diff(torn, axis=0)).mean()


def test_shuffle_is_the_same_on_every_machine() -> None:
    numbered = Image.fromarray(np.arange(40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8))
    assert zlib.crc32(detect("shuffle", numbered, seed=7).tobytes()) == 1201874210


def test_with_a_model_the_networks_draw(monkeypatch: Any) -> None:
    calls: list[Any] = []

    def drawn(image: Image.Image, *given: Any, **options: Any) -> Image.Image:
        calls.append((image.size, given, options))
        return Image.new("RGB", image.size)

    monkeypatch.setattr(_networks, "learned_sketch", drawn)
    monkeypatch.setattr(_networks, "learned_lineart", drawn)
    detect("sketch", photo(), model="weights")
    detect("lineart", photo(), model="weights", coarse=True)
    assert calls == [((683, 512), ("weights",), {}), ((683, 512), ("weights",), {"coarse": True})]


@pytest.mark.parametrize("name", ["lineart", "sketch"])
def test_missing_weights_are_told_beforehand(name: str) -> None:
    reason = missing(name, "/no/such/folder")
    assert reason is not None
    assert "\n" not in reason


def test_a_fraction_where_a_whole_number_belongs_names_the_option() -> None:
    with pytest.raises(ValueError, match="colours is 8.5; it must be a whole number"):
        detect("regions", Image.new("RGB", (8, 8)), colours=8.5)
    detect("blur", Image.new("RGB", (8, 8)), radius=1.5)
