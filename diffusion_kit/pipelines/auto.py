"""Factories: the pipeline of a model, whatever its family."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from diffusion_kit.models.formats import describe, identify
from diffusion_kit.models.sources import locate, one_line, read_json

from . import kandinsky, kandinsky3, kandinsky_combined, kandinsky_peers, sd15, sd15_peers, sdxl, sdxl_peers
from .base import ControlledPipeline

# Family of each class name that a model_index.json may hold, and its peer-named classes by (adapter, task).
PEERS: dict[type[ControlledPipeline], ModuleType] = {
    sdxl.SDXLPipeline: sdxl_peers,
    sd15.SD15Pipeline: sd15_peers,
    kandinsky.Kandinsky21Pipeline: kandinsky_peers,
    kandinsky.Kandinsky22Pipeline: kandinsky_peers,
    kandinsky3.Kandinsky3Pipeline: kandinsky3,
}
FAMILIES: dict[str, type[ControlledPipeline]] = {
    name: family
    for family, module in PEERS.items()
    for name, cls in vars(module).items()
    if isinstance(cls, type) and issubclass(cls, family)
}
WITH_ADAPTER: dict[tuple[type, str, str], type[ControlledPipeline]] = {
    (family, adapter, task): getattr(PEERS[family], f"{prefix}{name}Pipeline")
    for family, prefix in ((sdxl.SDXLPipeline, "StableDiffusionXL"), (sd15.SD15Pipeline, "StableDiffusion"))
    for adapter, task, name in (
        ("adapter", "text", "Adapter"),
        ("controlnet", "text", "ControlNet"),
        ("controlnet", "image", "ControlNetImg2Img"),
        ("controlnet", "inpaint", "ControlNetInpaint"),
    )
}
FAMILIES |= {
    "StableDiffusionInstructPix2PixPipeline": sd15.SD15Pipeline,
    "StableDiffusionXLInstructPix2PixPipeline": sdxl.SDXLPipeline,
}
# Families that make pictures of a prior's embeddings, and the same with their prior.
WITH_PRIOR: dict[type, type[kandinsky_combined.WithPrior]] = {
    kandinsky.Kandinsky21Pipeline: kandinsky_combined.Kandinsky21CombinedPipeline,
    kandinsky.Kandinsky22Pipeline: kandinsky_combined.Kandinsky22CombinedPipeline,
}
# Pipeline of a single file, by the base that its header shows.
SINGLE_FILES = {
    "SDXL": "StableDiffusionXLPipeline",
    "SDXL's refiner": "StableDiffusionXLImg2ImgPipeline",
    "SD 1.x": "StableDiffusionPipeline",
    "SD 2.x": "StableDiffusionPipeline",
}


class _AutoPipeline:
    """`from_pretrained(source, ...)` and `from_pipe(pipe, ...)`.

    With `adapter=` or `controlnet=` the result answers the peer's call arguments; without, it is the family, which takes
    `controls=` and does all three tasks by what it is given. A decoder of Kandinsky 2.x comes with its prior: the one that
    its folder or model card names, or `prior=`, a folder, an id or a pipeline.
    """

    task: ClassVar[str]

    def __init__(self) -> None:
        raise TypeError(f"use {type(self).__name__}.from_pretrained(source) or .from_pipe(pipe)")

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> Any:
        """The pipeline of "default", a folder, a .safetensors file or a hub id.

        Raises:
            FileNotFoundError: no such model. ValueError: a family that the kit does not have.
        """
        return cls._class(class_name(source), kwargs, str(source)).from_pretrained(source, **kwargs)

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **kwargs: Any) -> Any:
        """A pipeline over the same components, of the kit's or the peer's pipeline; nothing is loaded."""
        name = getattr(pipe, "peer_name", "") or type(pipe).__name__
        if (prior := kwargs.pop("prior", None)) is not None:
            kwargs |= kandinsky_combined.prior_parts(prior)
        own = {key: getattr(pipe, key) for key in ("adapter", "controlnet") if hasattr(pipe, key)}
        takes = {key for _, key, task in WITH_ADAPTER if task == cls.task}
        chosen = {**{key: value for key, value in own.items() if key in takes}, **kwargs}
        target = cls._class(name, chosen, name)
        if issubclass(target, kandinsky_combined.WithPrior) and not {"prior_prior"} & {*kwargs, *pipe.components}:
            target = FAMILIES[name]
        return target.from_pipe(pipe, **chosen)

    @classmethod
    def _class(cls, name: str, kwargs: dict[str, Any], source: str) -> type[ControlledPipeline]:
        if name not in FAMILIES:
            prior = "a decoder's prior: give the decoder, and this as prior=" if "Prior" in name else f"a {name}"
            raise ValueError(f"{source} is {prior}; the families of this version are {_known()}")
        family = FAMILIES[name]
        for adapter in ("adapter", "controlnet"):
            if adapter in kwargs and (family, adapter, cls.task) not in WITH_ADAPTER:
                raise ValueError(f"{source} takes no {adapter}=: pass controls=[Control({adapter}, image)] to the call")
            if adapter in kwargs:
                return WITH_ADAPTER[family, adapter, cls.task]
        return WITH_PRIOR.get(family, family)


class AutoPipelineForText2Image(_AutoPipeline):
    task = "text"


class AutoPipelineForImage2Image(_AutoPipeline):
    task = "image"


class AutoPipelineForInpainting(_AutoPipeline):
    task = "inpaint"


def class_name(source: str | Path) -> str:
    """The pipeline class that a model's index names, or that the keys of a single file show.

    Raises:
        FileNotFoundError: no such model. ValueError: a file of another kind, or cut short.
    """
    place = locate(source)
    if isinstance(place, Path) and place.is_file():
        found = identify(place)
        base = (found.base or "").partition(",")[0]
        if found.kind != "checkpoint" or base not in SINGLE_FILES:
            raise ValueError(f"{place} is {describe(place)}; the families of this version are {_known()}")
        return SINGLE_FILES[base]
    if isinstance(place, Path):
        return str(read_json(place / "model_index.json", "model folder").get("_class_name"))
    with one_line(source, "model"):
        return str(DiffusionPipeline.load_config(place)["_class_name"])


def _known() -> str:
    return ", ".join(sorted({family.__name__.removesuffix("Pipeline") for family in FAMILIES.values()}))
