"""Two guides to diffusers, on Kandinsky and on T2I-Adapter for SDXL: every block runs, and gives diffusers' pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import light, make_adapter, make_vae, needs, picture, pipeline, randomise, seeds
from diffusers.utils.torch_utils import TorchDeviceBackend
from guides import FAULTS, OF_THE_PEER, Block, Fault, Reader, blocks, chains
from kandinsky_models import (
    DECODER_SCHEDULE,
    decoder21_components,
    decoder22_components,
    kandinsky3_components,
    prior_components,
    unet21,
    unet22,
    unet22_hint,
)
from PIL import Image

import diffusion_kit
from diffusion_kit.adapters import pictures

KANDINSKY, T2I = chains("kandinsky.md"), chains("t2i-adapter-sdxl.md")
ADAPTERS = [
    f"TencentARC/t2i-adapter-{name}-sdxl-1.0"
    for name in ("lineart", "sketch", "canny", "depth-midas", "depth-zoe", "openpose")
]
NO_PROMPT = "KandinskyV22Pipeline reads no prompt: image_embeds say what the picture shows"
NO_OFFLOAD = "there is no accelerator: nothing is offloaded, the models run on the CPU"
NO_XFORMERS = "torch's own attention is used"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with small random models, as diffusers saves them, under the ids that the guides name."""
    root = tmp_path_factory.mktemp("hub")
    d21, d22, prior = decoder21_components(), decoder22_components(), prior_components()
    kandinsky: dict[str, tuple[str, dict[str, Any]]] = {
        "2-1-prior": ("KandinskyPriorPipeline", prior),
        "2-1": ("KandinskyPipeline", d21),
        "2-1-inpaint": ("KandinskyInpaintPipeline", {**d21, "unet": unet21(9)}),
        "2-2-prior": ("KandinskyV22PriorPipeline", prior),
        "2-2-decoder": ("KandinskyV22Pipeline", d22),
        "2-2-decoder-inpaint": ("KandinskyV22InpaintPipeline", {**d22, "unet": unet22(9)}),
        "2-2-controlnet-depth": ("KandinskyV22ControlnetPipeline", {**d22, "unet": unet22_hint()}),
    }
    for name, (cls, parts) in kandinsky.items():
        folder = root / f"kandinsky-community/kandinsky-{name}"
        getattr(diffusers, cls)(**parts).save_pretrained(folder)
        if "prior" not in name:  # a model card, as the hub has it
            (folder / "README.md").write_text(f"---\nprior:\n- {folder.parent}/kandinsky-{name[:3]}-prior\n---\n")
    for name in ("2-1", "2-2-decoder"):
        folder = root / f"kandinsky-community/kandinsky-{name}/ddpm_scheduler"
        diffusers.DDPMScheduler(**DECODER_SCHEDULE).save_pretrained(folder)
    half = {"variant": "fp16"}
    peer = diffusers.Kandinsky3Pipeline(**kandinsky3_components())
    peer.save_pretrained(root / "kandinsky-community/kandinsky-3", **half)
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    pipeline(diffusers.StableDiffusionXLPipeline).save_pretrained(root / sdxl, **half)
    make_vae().save_pretrained(root / "madebyollin/sdxl-vae-fp16-fix")
    for seed, name in enumerate(ADAPTERS):
        make_adapter(seed).save_pretrained(root / name)
    return {str(folder.relative_to(root)): str(folder) for folder in root.glob("*/*")}


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The web: pictures for URLs. A depth estimator: the picture's grey. A machine with nothing but a CPU, and an empty
    folder to write to."""

    def fetched(url: str) -> bytes:
        file = io.BytesIO()
        size = (128, 88) if "mountains" in url else (128, 128)
        picture(len(url)).resize(size).save(file, "PNG")
        return file.getvalue()

    monkeypatch.setattr(pictures, "_fetched", fetched)
    monkeypatch.setattr(diffusers.utils, "load_image", diffusion_kit.load_image)
    monkeypatch.setattr(transformers, "pipeline", lambda task: lambda image: {"depth": image.convert("L")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(TorchDeviceBackend, "_detect_device_type", staticmethod(lambda: "cpu"))
    monkeypatch.chdir(tmp_path)


def read(package: str, chain: list[Block], name: str, places: dict[str, str]) -> Reader:
    faults = FAULTS if package == "diffusion_kit" else FAULTS + OF_THE_PEER
    reader = Reader(package, places, faults)
    for block in chain:
        reader.read(block, name)
    return reader


def assert_same(ours: list[Image.Image], theirs: list[Image.Image]) -> None:
    """Bytes that differ by rounding at most, and seldom."""
    assert len(ours) == len(theirs) > 0
    for own, peers in zip(ours, theirs, strict=True):
        apart = np.abs(np.asarray(own, int) - np.asarray(peers, int))
        assert apart.max() <= 1
        assert apart.mean() < 0.255


def test_every_block_is_read() -> None:
    for guide, read_chains in (("kandinsky.md", KANDINSKY), ("t2i-adapter-sdxl.md", T2I)):
        in_chains = {block for chain in read_chains.values() for block in chain}
        assert {block for block in blocks(guide) if block.language != "bash"} == in_chains
    assert len(KANDINSKY) == 13


@pytest.mark.parametrize("fault", FAULTS + OF_THE_PEER, ids=lambda fault: f"{fault.section}: {fault.written[:30]}")
def test_faults_are_in_the_guide(fault: Fault) -> None:
    found = [block.code for name, chain in KANDINSKY.items() if name.startswith(fault.section) for block in chain]
    assert any(fault.written in code for code in found)


@pytest.mark.parametrize("name", [name for name in KANDINSKY if name and name != "Optimizations"])
def test_kandinsky(name: str, places: dict[str, str]) -> None:
    ours, theirs = (read(package, KANDINSKY[name], name, places) for package in ("diffusion_kit", "diffusers"))
    assert_same(ours.pictures, theirs.pictures)
    offloads = any("cpu_offload" in block.code for block in KANDINSKY[name])
    expected = [NO_OFFLOAD] * offloads + [NO_PROMPT] * (name == "Interpolation: Kandinsky 2.2")
    assert ours.warnings == expected


@pytest.fixture(scope="module")
def annotators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """controlnet_aux's detector of lines with random weights."""
    needs("controlnet_aux")
    from controlnet_aux.lineart import Generator

    folder = tmp_path_factory.mktemp("annotators")
    for seed, name in enumerate(("sk_model.pth", "sk_model2.pth")):
        torch.save(randomise(Generator(3, 1, 3), seed).state_dict(), folder / name)
    return {"lllyasviel/Annotators": str(folder)}


def test_t2i_adapter(places: dict[str, str], annotators: dict[str, str]) -> None:
    """With the adapter of the article's blocks, and with each of the others that it names. The article's `varient="fp16"`
    is a slip: `T2IAdapter` is diffusers' class, which drops a keyword that it does not know."""
    ((name, chain),) = T2I.items()
    results = []
    for adapter in ADAPTERS:
        own = {**places, **annotators, ADAPTERS[0]: places[adapter]}
        ours, theirs = (read(package, chain, name, own) for package in ("diffusion_kit", "diffusers"))
        assert_same(ours.pictures, theirs.pictures)
        assert not ours.warnings
        assert Image.open("out_lin.png").size == (64, 64)
        results.append(ours.pictures[0].tobytes())
    assert len(set(results)) == len(ADAPTERS)


EMBEDS = {
    name: torch.randn(1, 32, generator=seeds(seed))
    for seed, name in enumerate(("image_embeds", "negative_image_embeds"))
}
OPTIMIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "DiffusionPipeline": ("KandinskyPipeline", {"prompt": "a cat", **EMBEDS}),
    "Kandinsky21Pipeline": ("KandinskyPipeline", {"prompt": "a cat", **EMBEDS}),
    "KandinskyCombinedPipeline": ("KandinskyCombinedPipeline", {"prompt": "a cat"}),
    "KandinskyV22Pipeline": ("KandinskyV22Pipeline", EMBEDS),
}


@pytest.mark.parametrize("name", light(OPTIMIZED, "KandinskyV22Pipeline"))
def test_optimizations(name: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After every block of the section the picture is that of diffusers' plain pipeline. `DiffusionPipeline` is its own
    class, handed on; the others are the kit's in its place."""
    peer, call = OPTIMIZED[name]
    hub = "kandinsky-community/kandinsky-2-2-decoder" if "V22" in name else "kandinsky-community/kandinsky-2-1"
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, mode, **options: compiled(net, backend=backend, **options))
    handed_on = name == "DiffusionPipeline"
    own = {**places, "kandinsky-community/kandinsky-2-1": places[hub]}
    reader = Reader("diffusion_kit", own, OF_THE_PEER if handed_on else [])
    ddpm = {"scheduler": diffusers.DDPMScheduler.from_pretrained(places[hub], subfolder="ddpm_scheduler")}
    plain, replaced = (
        reader.called(getattr(diffusers, peer).from_pretrained(places[hub], **parts), **call).images
        for parts in ({}, ddpm)
    )
    section = KANDINSKY["Optimizations"]
    for block in section:
        code = block.code.replace("DiffusionPipeline", name)
        reader.read(block._replace(code=code), "Optimizations")
        pipe = reader.names["pipe"]
        assert type(pipe).__module__.startswith("diffusers" if handed_on else "diffusion_kit")
        assert_same(reader.called(pipe, **call).images, replaced if block is section[-1] else plain)
    assert graphs, "the UNet ran compiled"
    assert plain[0].tobytes() != replaced[0].tobytes()
    said = " ".join(reader.warnings)
    assert handed_on or (NO_XFORMERS in said and NO_OFFLOAD in said)
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_xformers_memory_efficient_attention"])
def test_what_the_machine_lacks_is_a_warning_where_diffusers_raises(method: str) -> None:
    with pytest.raises((RuntimeError, ModuleNotFoundError, ValueError)):
        getattr(pipeline(diffusers.StableDiffusionXLPipeline), method)()
    pipe = pipeline(diffusion_kit.SDXLPipeline)
    before = pipe.unet.attn_processors
    with pytest.warns(UserWarning, match=f"{NO_OFFLOAD}|{NO_XFORMERS}") as caught:
        getattr(pipe, method)()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert pipe.unet.attn_processors == before
