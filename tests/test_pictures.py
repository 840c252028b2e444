"""Pictures on the way in and out: files, decoding, previews, callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZE, components, distance, make_unet, make_vae, picture, pipeline, seeds
from PIL import Image, ImageCms, ImageOps

from diffusion_kit import SDXLPipeline, detect, load_image
from diffusion_kit.adapters.pictures import fit_image, picture_tensor
from diffusion_kit.models.vae import decode_latents, encode_picture, preview_matrix


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    picture().save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path / f"a.{suffix}")
    assert (loaded.mode, loaded.size) == ("RGB", (SIZE, SIZE))


def test_grey_in_32_bits_is_as_in_16(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE)
    wide, narrow = (Image.fromarray(values.astype(own)) for own in (np.int32, np.uint16))
    assert (wide.mode, narrow.mode) == ("I", "I;16")
    for fit in ("cover", "contain", "stretch"):
        assert np.array_equal(*(np.asarray(fit_image(own, 32, 48, fit)) for own in (wide, narrow)))
    assert np.array_equal(*(np.asarray(detect("canny", own)) for own in (wide, narrow)))


def test_a_profile_is_applied_whatever_the_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageCms, "profileToProfile", lambda picture, *_, **__: ImageOps.invert(picture))
    own, profile = picture().quantize(8), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("P", "RGB", "RGBA"):
        own.convert(mode).save(tmp_path / f"{mode}.png", icc_profile=profile)
    found = [np.asarray(load_image(tmp_path / f"{mode}.png")) for mode in ("P", "RGB", "RGBA")]
    assert np.array_equal(found[1], 255 - np.asarray(own.convert("RGB")))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[2], found[1])


def test_rotation_transparency_and_depth(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture().resize((40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(tmp_path / "clear.png", background="black").getpixel((0, 0)) == (0, 0, 0)
    depth = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(depth).save(tmp_path / "depth.png")
    loaded = load_image(tmp_path / "depth.png")
    assert np.array_equal(np.asarray(loaded), depth)
    values = picture_tensor(loaded, 8, 8, channels=3)
    torch.testing.assert_close(values[0, 0], torch.from_numpy(depth / 65535).float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "is not a PNG, JPEG or WEBP image"),
        (b"", "is not a PNG, JPEG or WEBP image"),
        ("cut", "cannot be read as an image"),
        ("gif", "is not a PNG, JPEG or WEBP image"),
        ("huge", "at most"),
        (None, "no image file"),
    ],
)
def test_broken_files_are_one_clear_line(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if content == "gif":
        picture().save(path, format="GIF")
    elif content == "huge":
        Image.new("1", (20_000, 20_000)).save(path)
    elif content == "cut":
        picture(size=256).save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:2000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import functools
    import threading
    from http.server import HTTPServer, SimpleHTTPRequestHandler

    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = HTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(load_image(f"{url}/a.png")), np.asarray(picture()))
        with pytest.raises(ValueError, match="/none.png cannot be fetched: HTTP Error 404"):
            load_image(f"{url}/none.png")
        monkeypatch.setattr("diffusion_kit.adapters.pictures.LARGEST", 1000)
        with pytest.raises(ValueError, match="is larger than 0 MB"):
            load_image(f"{url}/a.png")
    finally:
        server.shutdown()
    with pytest.raises(ValueError, match="cannot be fetched"):
        load_image("https://")


def test_the_same_picture_in_every_form() -> None:
    array = np.asarray(picture())
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    byte_tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [picture(), array, array / np.float32(255), tensor, tensor[None], [picture()], byte_tensor]
    for form in forms:
        torch.testing.assert_close(picture_tensor(form, SIZE, SIZE), tensor[None])
    grey = picture_tensor(picture().convert("L"), SIZE, SIZE, channels=3)
    assert torch.equal(grey[:, 0], grey[:, 2])
    luma = picture_tensor(tensor, SIZE, SIZE, channels=1)
    torch.testing.assert_close(luma, picture_tensor(picture(), SIZE, SIZE, channels=1), atol=4e-3, rtol=0)


def test_canny() -> None:
    square = Image.new("RGB", (64, 64))
    square.paste((255, 255, 255), (16, 16, 48, 48))
    edges = np.asarray(detect("canny", square))[..., 0]
    assert set(np.unique(edges)) == {0, 255}
    assert edges[32, 14:18].any()
    assert not edges[24:40, 24:40].any()
    with pytest.raises(ValueError, match="no detector 'cany'; did you mean 'canny'"):
        detect("cany", square)


def test_overflow_in_the_decoder_is_an_error_and_no_black_picture() -> None:
    vae = make_vae()
    vae.decoder.conv_out.bias.data[:] = float("inf")
    pipe = pipeline(SDXLPipeline, vae=vae)
    with pytest.raises(RuntimeError, match="the VAE overflowed in float32"):
        pipe("a fox", num_inference_steps=1)


def test_latents_that_are_not_finite_are_not_blamed_on_the_decoder() -> None:
    with pytest.raises(RuntimeError, match="the latents are not finite"):
        decode_latents(make_vae(), torch.full((1, 4, 8, 8), float("nan")))


def test_sixteen_bits_and_bytes_as_the_start_picture() -> None:
    grey = np.asarray(picture().convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    array = np.asarray(picture())
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)[None]

    def run(image: Any) -> torch.Tensor:
        call = {"strength": 0.5, "num_inference_steps": 4, "output_type": "latent", "generator": seeds(1)}
        return pipeline(SDXLPipeline)("a fox", image=image, **call).images

    assert torch.equal(run(deep), run(Image.fromarray(grey)))
    assert distance(run(array), run(picture())) < 1e-5
    assert distance(run(tensor), run(picture())) < 1e-5


def test_half_precision_vae_is_upcast_and_put_back() -> None:
    vae = make_vae()
    latents = torch.randn(1, 4, 8, 8)
    expected = decode_latents(vae, latents)
    vae.register_to_config(force_upcast=True)
    vae.half()
    assert distance(decode_latents(vae, latents), expected) < 1e-2
    assert vae.dtype == torch.float16


def test_statistics_of_the_latents_are_applied_both_ways() -> None:
    vae, pixels = make_vae(), torch.rand(1, 3, 64, 64) * 2 - 1
    plain = encode_picture(vae, pixels, seeds(1), torch.float32)
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    shifted = encode_picture(vae, pixels, seeds(1), torch.float32)
    expected = (plain / 0.5 - torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)) * 0.5
    torch.testing.assert_close(shifted, expected / torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1))
    back = decode_latents(vae, shifted)
    vae.register_to_config(latents_mean=None, latents_std=None)
    torch.testing.assert_close(back, decode_latents(vae, plain), rtol=1e-4, atol=1e-4)


def test_previews_are_the_affine_map_nearest_to_the_encoder() -> None:
    vae = components()["vae"]
    matrix = preview_matrix(vae)
    assert matrix.shape == (5, 3)
    assert preview_matrix(vae) is matrix
    shown: list[torch.Tensor] = []

    def look(pipe: Any, k: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shown.append(tensors["preview"])
        return {}

    call = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["preview"]}
    pipeline(SDXLPipeline)("a fox", num_inference_steps=3, generator=seeds(1), **call)
    assert [tuple(p.shape) for p in shown] == [(1, 3, 16, 16)] * 3
    assert all(p.min() >= 0 and p.max() <= 1 for p in shown)


def test_what_previews_need_is_made_before_the_loop() -> None:
    """In the loop, an autoencoder that is offloaded would come to the device in the place of the UNet."""
    vae, unet, looks = make_vae(), make_unet(), []
    vae.encoder.register_forward_hook(lambda *_: looks.append("encoded"))
    unet.conv_in.register_forward_hook(lambda *_: looks.append("step"))
    call = {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["preview"]}
    pipeline(SDXLPipeline, vae=vae, unet=unet)("a fox", num_inference_steps=2, generator=seeds(1), **call)
    assert looks == ["encoded", "step", "step"]


def test_callbacks_change_latents_and_the_old_one_is_called() -> None:
    seen: list[int] = []

    def old(step: int, t: Any, latents: torch.Tensor) -> None:
        seen.append(step)

    def zero(pipe: Any, k: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])} if k == 3 else {}

    pipe, call = pipeline(SDXLPipeline), {"num_inference_steps": 4, "output_type": "latent"}
    result = pipe("a fox", generator=seeds(1), callback=old, callback_steps=2, callback_on_step_end=zero, **call)
    assert seen == [0, 2]
    assert not result.images.any()


@pytest.mark.parametrize("output", ["pil", "np", "pt", "latent"])
def test_output_types(output: str) -> None:
    result = pipeline(SDXLPipeline)("a fox", num_inference_steps=1, output_type=output, return_dict=False)[0]
    shapes = {"np": (1, 64, 64, 3), "pt": (1, 3, 64, 64), "latent": (1, 4, 16, 16)}
    if output == "pil":
        assert result[0].size == (64, 64)
    else:
        assert tuple(result.shape) == shapes[output]


def test_tiny_autoencoder_tiling_and_slicing() -> None:
    import diffusers

    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), latent_channels=4,
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    pipe = pipeline(SDXLPipeline, vae=tiny)
    assert pipe("a fox", image=picture(), strength=0.5, num_inference_steps=2).images[0].size == (64, 64)
    pipe = pipeline(SDXLPipeline)
    call = {"num_inference_steps": 1, "num_images_per_prompt": 2, "output_type": "pt"}
    plain = pipe("a fox", generator=seeds(1), **call).images
    pipe.vae.enable_slicing()
    torch.testing.assert_close(pipe("a fox", generator=seeds(1), **call).images, plain, rtol=1e-4, atol=1e-4)
    pipe.vae.disable_slicing()
    pipe.vae.enable_tiling()
    assert pipe("a fox", generator=seeds(1), **call, width=128).images.shape[-1] == 128
    pipe.vae.disable_tiling()
