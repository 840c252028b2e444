"""diffusion_kit: images from diffusion models under control.

The public names are imported when first used, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "diffusion_kit.adapters.control": ["Control"],
    "diffusion_kit.adapters.control_lora": ["ControlLoRA"],
    "diffusion_kit.adapters.ip_adapter": ["IPAdapter"],
    "diffusion_kit.adapters.detectors": ["detect"],
    "diffusion_kit.adapters.pictures": ["fit_image", "load_image"],
    "diffusion_kit.utils": ["make_image_grid"],
    "diffusion_kit.pipelines.auto": [
        "AutoPipelineForText2Image",
        "AutoPipelineForImage2Image",
        "AutoPipelineForInpainting",
    ],
    "diffusion_kit.pipelines.kandinsky": ["Kandinsky21Pipeline", "Kandinsky22Pipeline"],
    "diffusion_kit.pipelines.kandinsky_combined": ["Kandinsky21CombinedPipeline", "Kandinsky22CombinedPipeline"],
    "diffusion_kit.pipelines.kandinsky_prior": [
        "KandinskyPriorPipeline",
        "KandinskyV22PriorPipeline",
        "KandinskyV22PriorEmb2EmbPipeline",
    ],
    "diffusion_kit.pipelines.kandinsky_peers": [
        "KandinskyPipeline",
        "KandinskyImg2ImgPipeline",
        "KandinskyInpaintPipeline",
        "KandinskyCombinedPipeline",
        "KandinskyImg2ImgCombinedPipeline",
        "KandinskyInpaintCombinedPipeline",
        "KandinskyV22Pipeline",
        "KandinskyV22Img2ImgPipeline",
        "KandinskyV22InpaintPipeline",
        "KandinskyV22ControlnetPipeline",
        "KandinskyV22ControlnetImg2ImgPipeline",
        "KandinskyV22CombinedPipeline",
        "KandinskyV22Img2ImgCombinedPipeline",
        "KandinskyV22InpaintCombinedPipeline",
    ],
    "diffusion_kit.pipelines.kandinsky3": ["Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline"],
    "diffusion_kit.pipelines.sdxl": ["SDXLPipeline"],
    "diffusion_kit.pipelines.sd15": ["SD15Pipeline"],
    "diffusion_kit.pipelines.sd15_peers": [
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ],
    "diffusion_kit.pipelines.sdxl_peers": [
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """A public name of the kit; or a model class or scheduler of diffusers, handed on under its own name."""
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = _handed_on(name)
    globals()[name] = value
    return value


def _handed_on(name: str) -> Any:
    import diffusers

    value = getattr(diffusers, name, None)
    kinds = (diffusers.ModelMixin, diffusers.SchedulerMixin)
    if value is diffusers.DiffusionPipeline or (isinstance(value, type) and issubclass(value, kinds)):
        return value
    raise AttributeError(f"diffusion_kit has no {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
