"""Recipes: through every kind of file and back, out of broken and hostile files, and out of other programs' pictures."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from diffusers import DPMSolverMultistepScheduler
from PIL import ExifTags, Image, ImageFile, PngImagePlugin

from diffusion_kit import load_image
from diffusion_kit.recipes import ControlRecipe, FileRef, ForeignRecipe, Recipe, files, read, save

PLAIN = Recipe(
    prompt="a red fox",
    negative_prompt=None,
    seed=7,
    steps=30,
    guidance_scale=7.5,
    width=64,
    height=48,
    model="default",
    model_hash="ab" * 32,
    scheduler="DPMSolverMultistepScheduler",
    scheduler_config={"beta_start": 0.00085, "lambda_min_clipped": float("-inf"), "trained_betas": [0.1, 0.2]},
)
NOISE = np.random.default_rng(0).bytes
RECIPES = {
    "plain": PLAIN,
    "largest seed, whole guidance": replace(PLAIN, seed=2**64 - 1, guidance_scale=5, versions={"torch": "2.9.0+cu128"}),
    "every letter": replace(
        PLAIN, prompt='狐 🦊 "é"\\\n\r\n\t\x00\x1b[31m\u2028\ud800, diffusion_kit:', negative_prompt=""
    ),
    "long": replace(PLAIN, prompt="a very red fox, " * 1250),
    "long, not Latin": replace(PLAIN, prompt="狐の絵" * 4000),
    "pictures": replace(
        PLAIN,
        strength=0.6,
        image=FileRef("photo.png", "0f" * 32),
        mask=FileRef("ma\udcffsk.png", "1f" * 32, b""),
        controls=(
            ControlRecipe("canny", FileRef("a b.png", "2f" * 32, NOISE(3000)), detect="canny", end=0.5, guidance=2.5),
            ControlRecipe(
                "owner/net",
                FileRef("/tmp/d.webp", "3f" * 32),
                hash="4f" * 32,
                scale=(1.0, 0.5, 0.0),
                start=0.1,
                mode="prompt",
                mask=FileRef("left.png", "5f" * 32, NOISE(10)),
            ),
        ),
    ),
    "later": replace(PLAIN, optimize="exact", engine="packed", low_memory=True),
    "megabytes": replace(PLAIN, image=FileRef("photo.png", "0f" * 32, NOISE(3_000_000))),
}
SCHEDULER = replace(PLAIN, scheduler_config=DPMSolverMultistepScheduler(trained_betas=np.array([0.1, 0.2])).config)


@pytest.mark.parametrize("suffix", ["png", "PNG", "webp", "jpg", "jpeg"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_saved_is_read(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    if (name, suffix[0]) in {("megabytes", "j"), ("long, not Latin", "j")}:
        with pytest.raises(ValueError, match="at most 65533 fit in a JPEG: write PNG or WEBP, or embed no pictures$"):
            save(picture(), path, RECIPES[name])
        assert not list(tmp_path.iterdir())
        return
    save(picture(), path, RECIPES[name])
    assert read(path) == RECIPES[name]
    assert list(tmp_path.iterdir()) == [path]
    difference = np.asarray(load_image(path)).astype(int) - np.asarray(picture())
    assert abs(difference).mean() < (1e-9 if suffix.lower() == "png" else 4)


def test_what_diffusers_notes_for_itself_is_no_setting() -> None:
    """It is a set, in another order in each process."""
    orders = [["a", "b"], ["b", "a"]]
    first, second = (
        replace(PLAIN, scheduler_config={**PLAIN.scheduler_config, "_use_default_values": own}) for own in orders
    )
    assert first == second == PLAIN
    assert first.to_json() == PLAIN.to_json()


def test_settings_of_a_real_scheduler_come_back() -> None:
    config = Recipe.from_json(SCHEDULER.to_json()).scheduler_config
    again = DPMSolverMultistepScheduler.from_config(config)
    assert again.config["lambda_min_clipped"] == float("-inf")
    assert list(again.config["trained_betas"]) == [0.1, 0.2]


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_picture_without_a_recipe(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    save(picture(), path)
    assert Image.open(path).size == picture().size
    with pytest.raises(ValueError, match="a.* carries no recipe: it was not made by diffusion-kit, AUTOMATIC1111 or"):
        read(path)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_reading_decodes_no_pixels(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.{suffix}"
    save(picture(), path, PLAIN)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    assert read(path) == PLAIN


def test_reading_imports_no_models() -> None:
    code = "import sys, diffusion_kit.recipes; print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    save(picture(), path, PLAIN)
    whole = path.read_bytes()
    code = (
        "import resource, sys; from PIL import Image; from diffusion_kit.recipes import read, save; "
        "path, room = sys.argv[1:]; picture, recipe = Image.open(path).copy(), read(path); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room))); save(picture, path, recipe)"
    )
    for room in (0, 100, len(whole) // 2):  # at none, between and within the pieces in which PIL writes
        run = subprocess.run([sys.executable, "-c", code, str(path), str(room)], capture_output=True, text=True)
        assert run.stderr.strip().endswith("File too large"), run.stderr
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == whole


def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="a.gif must end in .png, .jpg, .jpeg, .webp"):
        save(picture(), tmp_path / "a.gif", PLAIN)
    monkeypatch.setattr(files, "LARGEST", 1_000_000)
    with pytest.raises(ValueError, match=r"takes 4 MB .*; at most 1 MB are kept in a picture"):
        save(picture(), tmp_path / "a.webp", RECIPES["megabytes"])
    for wrong in ({"guidance_scale": float("nan")}, {"steps": True}, {"seed": -1}, {"model": None}):
        with pytest.raises(ValueError, match=f"^recipe.*{'NaN' if 'guidance_scale' in wrong else [*wrong][0]}"):
            save(picture(), tmp_path / "a.png", replace(PLAIN, **wrong))
    with pytest.raises(TypeError, match="a recipe cannot hold object"):
        save(picture(), tmp_path / "a.png", replace(PLAIN, scheduler_config={"a": object()}))
    assert not list(tmp_path.iterdir())


def test_description_shows_every_value_and_no_control_character() -> None:
    for recipe in RECIPES.values():
        text = recipe.describe()
        assert all(line.isprintable() for line in text.split("\n"))
        for value in ("7.5" if recipe.guidance_scale == 7.5 else "5", recipe.seed, "64 x 48", "abababababab…", "-inf"):
            assert str(value) in text
    everything = RECIPES["pictures"].describe()
    for part in ("photo.png (sha256 0f0f0f0f0f0f…)", "a b.png (sha256 2f2f2f2f2f2f…, embedded), through canny",
                 "owner/net (hash 4f4f4f4f4f4f…)", "scale (1.0, 0.5, 0.0), from 0.1 to 1.0, mode prompt",
                 "left.png", "strength        0.6", r"ma\udcffsk.png"):  # fmt: skip
        assert part in everything
    forged = replace(PLAIN, prompt="a fox\nseed             8\x1b[2K").describe()
    assert "\nseed             8" not in forged  # a line break in a value cannot make a line of its own
    assert r"seed             8\x1b[2K" in forged


def test_files_by_their_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(b"one")
    plain, embedded = FileRef.of("photo.png"), FileRef.of(Path("photo.png"), embed=True)
    assert plain == replace(embedded, data=None)
    assert plain.open() == embedded.open() == b"one"
    Path("photo.png").write_bytes(b"two")
    advice = "; give it again with its option, or make pictures with --embed-controls$"
    with pytest.raises(
        ValueError, match=f"photo.png, which has changed since .sha256 was 7692.*…, is 3fc4.*….{advice}"
    ):
        plain.open()
    Path("photo.png").unlink()
    with pytest.raises(ValueError, match=f"photo.png, which is not there any more{advice}"):
        plain.open()
    assert embedded.open() == b"one"
    with pytest.raises(FileNotFoundError, match="^no file photo.png$"):
        FileRef.of("photo.png")
    with pytest.raises(ValueError, match="is no regular file$"):
        FileRef.of(tmp_path, embed=True)
    with pytest.raises(ValueError, match="is not there any more") as caught:
        FileRef("/dev/zero\n\x1b", "00").open()
    assert str(caught.value).isprintable()


def changed(**fields: Any) -> str:
    """JSON of a recipe with other values for some fields; without those that are `...`."""
    content = json.loads(RECIPES["pictures"].to_json()) | fields
    return json.dumps({key: value for key, value in content.items() if value is not ...})


CONTROL = {"kind": "canny", "image": {"path": "a.png", "sha256": "00"}}
BROKEN = {
    "": "recipe is broken: Expecting value",
    "{": "recipe is broken: Expecting property name",
    "[1]": "recipe is broken: it is no JSON object with a format number",
    "[" * 100_000: "recipe is broken: maximum recursion depth",
    '{"format": ' + "9" * 5000 + "}": "recipe is broken: Exceeds the limit",
    changed(format=...): "recipe is broken: it is no JSON object with a format number",
    changed(format=True): "recipe is broken: it is no JSON object with a format number",
    changed(format=2): "recipe has format 2; this diffusion-kit reads format 1: update it",
    changed(seed=...): "recipe has no seed",
    changed(seed="1\n2"): r'recipe.seed is "1\\n2"; it must be a whole number',
    changed(seed=1.0): "recipe.seed is 1.0; it must be a whole number",
    changed(seed=2**64): "recipe.seed is 18446744073709551616, which is out of range",
    changed(steps=True): "recipe.steps is true; it must be a whole number",
    changed(prompt=None): "recipe.prompt is null; it must be text",
    changed(prompt=["x" * 1000]): "recipe.prompt is a list; it must be text",
    changed(guidance_scale=float("nan")): "recipe is broken: NaN",
    changed(scheduler_config={"a": [float("nan")]}): "recipe is broken: NaN",
    changed(guidance_scale=float("inf")): "recipe.guidance_scale is Infinity, which is out of range",
    changed(guidance_scale=10**400): "recipe.guidance_scale is 1000.*, which is out of range",
    changed(strength={}): "recipe.strength is an object; it must be a number or null",
    changed(scheduler_config=[]): "recipe.scheduler_config is a list; it must be an object",
    changed(versions={"a\nb": 1}): "an entry of recipe.versions is 1; it must be text",
    changed(image="a.png"): 'recipe.image is "a.png"; it must be an object or null',
    changed(mask={"path": "a.png"}): "recipe.mask has no sha256",
    changed(image={"path": "a.png", "sha256": "", "data": "%"}): "recipe.image.data is no base64",
    changed(controls={}): "recipe.controls is an object; it must be a list",
    changed(controls=[CONTROL, 5]): r"recipe.controls\[1\] is 5; it must be an object",
    changed(controls=[CONTROL | {"scale": "1"}]): r'recipe.controls\[0\].scale is "1"; it must be a number or a list',
    changed(controls=[CONTROL | {"scale": [1, None]}]): r"recipe.controls\[0\].scale\[1\] is null; it must be a number",
}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_recipe_is_one_clear_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"a.png: {BROKEN[text]}") as caught:
        read(png(tmp_path, diffusion_kit=text))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_unknown_fields_are_ignored_and_optional_ones_may_lack() -> None:
    assert Recipe.from_json(changed(later=[1])) == RECIPES["pictures"]
    optional = {name: ... for name in ("strength", "image", "mask", "controls", "fit", "dtype", "device", "versions")}
    assert Recipe.from_json(changed(**optional)) == PLAIN


def test_a_recipe_keeps_its_text_when_there_are_new_fields() -> None:
    """By which the history knows that a picture is the one that its user marked."""
    assert "low_memory" not in PLAIN.to_json()
    assert json.loads(RECIPES["later"].to_json())["low_memory"] is True


def png(folder: Path, **texts: str) -> Path:
    """A PNG of 80 x 60 pixels with uncompressed texts, as other programs write them."""
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    picture().resize((80, 60)).save(folder / "a.png", pnginfo=chunks)
    return folder / "a.png"


def bomb(path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"zTXt", b"diffusion_kit\0\0" + zlib.compress(b" " * 50_000_000))
    picture().save(path, pnginfo=chunks)


def huge(path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    picture().save(path)
    path.write_bytes(start + path.read_bytes()[len(start) :])


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "no image file .*a.png$"),
    "folder": (lambda path: path.mkdir(), "no image file .*a.png$"),
    "empty": (lambda path: path.write_bytes(b""), "a.png is not a PNG, JPEG or WEBP image$"),
    "text": (lambda path: path.write_text("hello"), "a.png is not a PNG, JPEG or WEBP image$"),
    "gif": (lambda path: picture().save(path, "GIF"), "a.png is not a PNG, JPEG or WEBP image$"),
    "bomb of text": (bomb, "a.png cannot be read as an image: Decompressed data too large"),
    "bomb of pixels": (huge, "a.png cannot be read as an image: Image size .2500000000 pixels. exceeds"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_picture_is_one_clear_line(name: str, tmp_path: Path) -> None:
    make, message = FILES[name]
    make(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "a.png")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged_files_are_read_or_refused_in_one_line(suffix: str, tmp_path: Path) -> None:
    path, chance = tmp_path / f"a.{suffix}", random.Random(0)
    save(picture(size=8), path, PLAIN)
    whole, refused = path.read_bytes(), list[str]()
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(3):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 2, 3, 255, chance.randrange(256)))
        path.write_bytes(data[: chance.choice((len(data), chance.randrange(len(data))))])
        try:
            read(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(message.isprintable() for message in refused)


def test_damaged_exif_does_not_hide_the_texts_of_a_png(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("diffusion_kit", PLAIN.to_json())
    picture().save(tmp_path / "a.png", pnginfo=chunks, exif=b"Exif\0\0nonsense")
    assert read(tmp_path / "a.png") == PLAIN


SETTINGS = (
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1234567890, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, "
    'Lora hashes: "a: 1, Seed: 2, b: \\"Steps: 3\\"", Version: v1.10.1'
)
QUOTED = '"a, b: \\"狐\\""'
FOX = ForeignRecipe("AUTOMATIC1111", "a fox", None, 1234567890, 20, 7.0, 512, 768, "Euler a", "v1-5")
A1111 = {
    "plain": (f"a fox\n{SETTINGS}", FOX),
    "negative": (f"a fox\nNegative prompt: bad\n{SETTINGS}", replace(FOX, negative_prompt="bad")),
    "no prompt": (SETTINGS, replace(FOX, prompt="")),
    "negative only": (f"Negative prompt: bad\n{SETTINGS}", replace(FOX, prompt="", negative_prompt="bad")),
    "many lines": (
        f"a fox, (red:1.2),\n\nSteps: 9, of stone\n狐\nNegative prompt: bad,\nworse: 5\n{SETTINGS}",
        replace(FOX, prompt="a fox, (red:1.2),\n\nSteps: 9, of stone\n狐", negative_prompt="bad,\nworse: 5"),
    ),
    "lines of extensions": (f"a fox\n{SETTINGS}\nTemplate: a {{fox|cat}}\nNegative Template: x", FOX),
    "schedule": (
        f"a fox\n{SETTINGS.replace('Euler a', 'DPM++ 2M, Schedule type: Karras')}",
        replace(FOX, sampler="DPM++ 2M Karras"),
    ),
    "quoted": (f"a fox\n{SETTINGS.replace('v1-5', QUOTED)}", replace(FOX, model='a, b: "狐"')),
    "no size": (f"a fox\n{SETTINGS.replace('Size', 'Hires resize')}", replace(FOX, width=80, height=60)),
    "unreadable": (
        "a fox\nSteps: x, Sampler: Euler a, CFG scale: nan, Seed: " + "1" * 5000 + ", Size: 512x768, Model: v1-5",
        replace(FOX, steps=None, guidance_scale=None, seed=None),
    ),
    "a name again": (f"a fox\n{SETTINGS}, Seed: 5, Size: 8x8", FOX),
    "unclosed": (f'a fox\n{SETTINGS}, Last: "never closed, ', FOX),
}


@pytest.mark.parametrize("name", A1111)
def test_texts_of_automatic1111(name: str, tmp_path: Path) -> None:
    text, expected = A1111[name]
    assert read(png(tmp_path, parameters=text)) == expected


@pytest.mark.parametrize("suffix", ["webp", "jpg"])
@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"UNICODE\0" + text.encode("utf-16-be"),
        lambda text: b"UNICODE\0" + text.encode("utf-16-le"),
        lambda text: b"UNICODE\0\xff\xfe" + text.encode("utf-16-le"),
        lambda text: b"ASCII\0\0\0" + text.encode(),
        lambda text: b"\0" * 8 + text.encode(),
    ],
)
def test_comments_of_automatic1111_in_every_code(encode: Callable[[str], bytes], suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = encode(f"a fox 狐\n{SETTINGS}")
    picture().save(tmp_path / f"a.{suffix}", exif=exif)
    assert read(tmp_path / f"a.{suffix}") == replace(FOX, prompt="a fox 狐")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


# The default graph; the others replace nodes of it. "9" is the sampler, "5" the latents, "6" and "7" the texts.
DEFAULT = {
    "4": node("CheckpointLoaderSimple", ckpt_name="v1-5.safetensors"),
    "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
    "6": node("CLIPTextEncode", text="a fox", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="bad", clip=["4", 1]),
    "9": node("KSampler", seed=42, steps=20, cfg=8.0, sampler_name="euler", scheduler="karras", denoise=1.0,
              model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
    "10": node("VAEDecode", samples=["9", 0], vae=["4", 2]),
    "11": node("SaveImage", filename_prefix="ComfyUI", images=["10", 0]),
}  # fmt: skip
SAMPLER = DEFAULT["9"]["inputs"]
COMFY = ForeignRecipe("ComfyUI", "a fox", "bad", 42, 20, 8.0, 512, 768, "euler karras", "v1-5.safetensors")
CUSTOM = {
    "9": node("SamplerCustomAdvanced", noise=["20", 0], guider=["21", 0], sampler=["22", 0], sigmas=["23", 0],
              latent_image=["5", 0]),
    "20": node("RandomNoise", noise_seed=42),
    "21": node("CFGGuider", model=["4", 0], positive=["6", 0], negative=["7", 0], cfg=8.0),
    "22": node("KSamplerSelect", sampler_name="euler"),
    "23": node("SplitSigmas", sigmas=["24", 0], step=5),
    "24": node("BasicScheduler", scheduler="karras", steps=20, denoise=1.0, model=["4", 0]),
}  # fmt: skip
GRAPHS: dict[str, tuple[dict[str, Any], ForeignRecipe]] = {
    "default": ({}, COMFY),
    "NaN": ({"12": node("Note", value=float("nan")) | {"is_changed": [float("nan")]}}, COMFY),
    "advanced": (
        {
            "9": node("KSamplerAdvanced", **{k: v for k, v in SAMPLER.items() if k not in ("seed", "denoise")},
                      noise_seed=42, add_noise="enable", start_at_step=0, end_at_step=16),
            "12": node("KSamplerAdvanced", **SAMPLER | {"latent_image": ["9", 0], "steps": 25, "noise_seed": 0}),
            "10": node("VAEDecode", samples=["12", 0], vae=["4", 2]),
        },
        COMFY,
    ),
    "second pass over pixels": (
        {
            "12": node("ImageScale", image=["10", 0], width=1024, height=1536),
            "13": node("VAEEncode", pixels=["12", 0], vae=["4", 2]),
            "14": node("KSampler", **SAMPLER | {"latent_image": ["13", 0], "seed": 5, "steps": 7}),
            "11": node("SaveImage", filename_prefix="ComfyUI", images=["14", 0]),
        },
        COMFY,
    ),
    "another sampler that is not saved": ({"1": node("KSampler", **SAMPLER | {"seed": 1})}, COMFY),
    "custom": (CUSTOM, COMFY),
    "custom, one node": (
        CUSTOM | {"9": node("SamplerCustom", add_noise=True, noise_seed=42, cfg=8.0, sampler=["22", 0],
                            sigmas=["24", 0], **{k: SAMPLER[k] for k in SAMPLER if isinstance(SAMPLER[k], list)})},
        COMFY,
    ),
    "distilled guidance": (
        CUSTOM | {
            "21": node("BasicGuider", model=["4", 0], conditioning=["25", 0]),
            "25": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
            "6": node("CLIPTextEncodeFlux", clip_l="a fox", t5xxl="a fox", guidance=9.0, clip=["4", 1]),
        },
        replace(COMFY, guidance_scale=3.5, negative_prompt=None),
    ),
    "two texts of SDXL": (
        {"6": node("CLIPTextEncodeSDXL", width=1, height=1, text_g="a fox", text_l="red", clip=["4", 1])},
        replace(COMFY, prompt="a fox\nred"),
    ),
    "through controls": (
        {
            "9": node("KSampler", **SAMPLER | {"positive": ["12", 0], "negative": ["12", 1]}),
            "12": node("ControlNetApplyAdvanced", positive=["13", 0], negative=["15", 0], strength=1.0, image=["16", 0]),
            "13": node("ConditioningCombine", conditioning_1=["14", 0], conditioning_2=["17", 0]),
            "14": node("ControlNetApply", conditioning=["6", 0], strength=1.0, image=["16", 0]),
            "15": node("Reroute", **{"": ["7", 0]}),
            "16": node("LoadImage", image="photo.png", text="not this"),
            "17": node("CLIPTextEncode", text="red", clip=["4", 1]),
        },
        replace(COMFY, prompt="red\na fox"),
    ),
    "primitives": (
        {
            "9": node("KSampler", **SAMPLER | {"seed": ["12", 0], "steps": ["13", 0], "cfg": ["15", 0]}),
            "12": node("Seed (rgthree)", seed=42),
            "13": node("Reroute", any=["14", 0]),
            "14": node("PrimitiveInt", value=20),
            "15": node("PrimitiveFloat", value=8),
            "5": node("EmptySD3LatentImage", width=["16", 0], height=768, batch_size=1),
            "16": node("PrimitiveInt", value=512),
            "6": node("CLIPTextEncode", text=["17", 0], clip=["4", 1]),
            "17": node("PrimitiveStringMultiline", value="a fox"),
        },
        COMFY,
    ),
    "made by a run": (
        {
            "9": node("KSampler", **SAMPLER | {"seed": ["12", 0], "positive": ["13", 0]}),
            "12": node("SimpleMath", value="a / 2", a=["14", 0]),
            "14": node("PrimitiveInt", value=20),
            "13": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["17", 0]),
            "17": node("CLIPTextEncode", text=["15", 0], clip=["4", 1]),
            "15": node("StringConcatenate", string_a="a", string_b="fox", delimiter=" "),
            "5": node("VAEEncode", pixels=["16", 0], vae=["4", 2]),
            "16": node("LoadImage", image="photo.png"),
        },
        replace(COMFY, seed=None, prompt=None, width=80, height=60),
    ),
    "zeroed": (
        {
            "9": node("KSampler", **SAMPLER | {"negative": ["12", 0]}),
            "12": node("ConditioningZeroOut", conditioning=["6", 0]),
        },
        replace(COMFY, negative_prompt=None),
    ),
    "circles": (
        {
            "9": node("KSampler", **SAMPLER | {"positive": ["12", 0], "latent_image": ["10", 0], "seed": ["14", 0]}),
            "12": node("ConditioningCombine", conditioning_1=["13", 0], conditioning_2=["6", 0]),
            "13": node("ConditioningCombine", conditioning_1=["12", 0], conditioning_2=["13", 0]),
            "14": node("Reroute", value=["14", 0]),
        },
        replace(COMFY, seed=None, width=80, height=60),
    ),
    "nonsense": (
        {
            "9": node("KSampler", **SAMPLER | {"seed": {}, "steps": "x", "cfg": float("nan"), "positive": ["99", 0],
                                               "negative": [[], 0], "sampler_name": 5}),
            "5": node("EmptyLatentImage", width=-1, height=1e999),
            "12": 5, "13": {"inputs": {}}, "14": {"class_type": "A"}, "15": {"class_type": 1, "inputs": []},
        },
        ForeignRecipe("ComfyUI", width=80, height=60, sampler="karras", model="v1-5.safetensors"),
    ),
    "no sampler": ({"9": node("Other")}, ForeignRecipe("ComfyUI", width=80, height=60)),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_comfyui(name: str, tmp_path: Path) -> None:
    changes, expected = GRAPHS[name]
    assert read(png(tmp_path, prompt=json.dumps(changes | DEFAULT | changes), workflow='{"nodes": []}')) == expected


@pytest.mark.parametrize("suffix", ["webp", "jpg"])
def test_a_graph_of_comfyui_in_exif(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = f"prompt:{json.dumps(DEFAULT)}"
    exif[ExifTags.Base.Make] = 'workflow:{"nodes": []}'
    picture().save(tmp_path / f"a.{suffix}", exif=exif)
    assert read(tmp_path / f"a.{suffix}") == COMFY


@pytest.mark.parametrize("text", ["a fox", "{}", "[]", "5", '{"1": {}}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_texts_of_still_other_programs_are_no_recipe(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a.png carries no recipe"):
        read(png(tmp_path, prompt=text, parameters=text))


def test_description_of_a_foreign_recipe_leaves_out_what_is_unknown() -> None:
    lines = replace(COMFY, prompt="a fox\n\x1b[2K", seed=None, width=None).describe().split("\n")
    assert lines[:3] == ["made with        ComfyUI", "prompt           a fox", r"                 \x1b[2K"]
    assert not [line for line in lines if line.startswith(("seed", "size"))]
