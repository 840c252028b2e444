"""What a single safetensors file is, known from its header: the names and shapes of its tensors. No weights are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .sources import tensor_shapes

Shapes = Mapping[str, tuple[int, ...]]


class Format(NamedTuple):
    """What a file holds.

    Attributes:
        kind: "checkpoint", "t2i_adapter", "controlnet", ...; "unknown" for tensors of no kind that is known.
        layout: whose names its tensors have, or which variant it is.
        base: the models it is made for or part of, where its shapes tell.
    """

    kind: str
    layout: str = ""
    base: str | None = None


# Kind, layout and patterns that are all found among the names of the tensors. The first row that fits counts, so a row may
# be told from those below it by what only it has.
RULES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("controlnet", "original", (r"^control_model\.input_hint_block\.",)),
    ("checkpoint", "original", (r"^model\.diffusion_model\.", r"^(first_stage_model|cond_stage_model|conditioner)\.")),
    ("unet", "original", (r"^model\.diffusion_model\.",)),
    ("control_lora", "Stability", (r"^lora_controlnet$",)),
    ("control_lora", "Stability", (r"^input_blocks\..*\.down$", r"^zero_convs\.")),
    ("controlnet_union", "diffusers", (r"^task_embedding$", r"^controlnet_down_blocks\.")),
    ("controlnet_union", "original", (r"task_embedding$", r"zero_convs\.")),
    ("controlnet", "original", (r"^input_hint_block\.", r"^zero_convs\.")),
    ("controlnet", "diffusers", (r"^controlnet_cond_embedding\.", r"^controlnet_down_blocks\.")),
    ("ip_adapter", "FaceID", (r"^image_proj\.", r"_ip\.weight$", r"perceiver_resampler|to_k_lora|to_q_lora")),
    ("ip_adapter", "plus", (r"^image_proj\.latents$", r"_ip\.weight$")),
    ("ip_adapter", "full-face", (r"^image_proj\.proj\.3\.", r"_ip\.weight$")),
    ("ip_adapter", "FaceID", (r"^image_proj\.proj\.0\.", r"_ip\.weight$")),
    ("ip_adapter", "plain", (r"^image_proj\.proj\.weight$", r"_ip\.weight$")),
    ("t2i_adapter", "diffusers", (r"^adapter\.body\.0\.resnets\.",)),
    ("t2i_adapter", "TencentARC", (r"^body\.0\.(body\.0\.)?block1\.",)),
    ("lora", "kohya", (r"^lora_(unet|te\d?)_.*\.lora_down\.",)),
    ("lora", "peft", (r"\.lora_A\.",)),
    ("lycoris", "LyCORIS", (r"\.(hada_w1_a|lokr_w1(_a)?)$",)),
    ("lllite", "kohya", (r"^lllite_unet_",)),
    ("lora", "diffusers, old", (r"_lora\.down\.|\.lora\.down\.",)),
    ("textual_inversion", "AUTOMATIC1111", (r"^emb_params$",)),
    ("textual_inversion", "SDXL", (r"^clip_l$", r"^clip_g$")),
    ("prior", "diffusers", (r"^prd_embedding$", r"^clip_mean$")),
    ("movq", "diffusers", (r"^quantize\.embedding\.", r"^decoder\.up_blocks\.")),
    ("vae", "diffusers", (r"^encoder\.down_blocks\.", r"^decoder\.up_blocks\.")),
    ("vae", "original", (r"(^|\.)encoder\.down\.0\.", r"(^|\.)decoder\.up\.0\.")),
    ("unet", "diffusers", (r"^conv_in\.", r"^down_blocks\.", r"^up_blocks\.")),
    ("unet", "original", (r"^input_blocks\.", r"^output_blocks\.")),
)
LABELS = {
    "checkpoint": "a whole model",
    "control_lora": "a Control-LoRA",
    "controlnet_union": "a ControlNet-Union",
    "controlnet": "a ControlNet",
    "ip_adapter": "an IP-Adapter",
    "t2i_adapter": "a T2I-Adapter",
    "lora": "a LoRA",
    "lycoris": "a LoRA of another kind, which this version does not load",
    "lllite": "a ControlNet-LLLite, which this version does not load",
    "textual_inversion": "a textual inversion",
    "prior": "a prior of Kandinsky",
    "movq": "an autoencoder of Kandinsky",
    "vae": "an autoencoder",
    "unet": "a UNet",
    "unknown": "tensors of no kind that is known",
}
USES = {  # how a file is used; those that are parts of a model have no use alone
    "checkpoint": "AutoPipelineForText2Image.from_pretrained({file!r})",
    "controlnet_union": "Control({file!r}, {{'canny': image}})",
    "lora": "pipe.load_lora_weights({file!r})",
    "textual_inversion": "pipe.load_textual_inversion({file!r})",
} | dict.fromkeys(("control_lora", "controlnet", "ip_adapter", "t2i_adapter"), "Control({file!r}, image)")
# Width of the text that cross-attention reads.
TEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL's refiner"}
READS_TEXT = re.compile(
    r"(attn2[._]to_k(\.weight|\.down|_lora\.down\.weight|\.lora(_A|_down|\.down)?\.weight)|to_k_ip\.weight)$"
)
INPUTS = {9: ", inpainting", 8: ", instruct-pix2pix"}  # channels of a UNet's input that are not 4
KANDINSKY = (
    (r"^add_time_condition\.", "Kandinsky 3"),
    (r"^add_embedding\.input_hint_block\.", "Kandinsky 2.2, with a hint"),
    (r"^add_embedding\.image_norm\.", "Kandinsky 2.2"),
    (r"^add_embedding\.text_norm\.", "Kandinsky 2.1"),
)


def identify(file: Path) -> Format:
    """What a safetensors file is.

    Raises:
        ValueError: it is cut short, or no safetensors file.
    """
    return format_of(tensor_shapes(file))


def format_of(shapes: Shapes) -> Format:
    """What tensors of these names and shapes are."""
    names = "\n".join(shapes)
    for kind, layout, patterns in RULES:
        if all(re.search(pattern, names, re.MULTILINE) for pattern in patterns):
            return Format(kind, layout, _base(kind, shapes, names))
    widths = {shape[-1] for shape in shapes.values() if 0 < len(shape) < 3}
    if len(shapes) == 1 and widths & TEXT_WIDTHS.keys():  # the one tensor has the name of its token
        return Format("textual_inversion", "diffusers", TEXT_WIDTHS[widths.pop()])
    return Format("unknown")


def _base(kind: str, shapes: Shapes, names: str) -> str | None:
    if kind == "t2i_adapter":
        return {8: "SD 1.x", 16: "SDXL"}.get(unshuffled(shapes)[0])
    if kind == "prior":
        return {768: "Kandinsky 2.1", 1280: "Kandinsky 2.2"}.get(shapes["clip_mean"][-1])
    if kind == "textual_inversion":
        return "SDXL" if "clip_g" in shapes else TEXT_WIDTHS.get(shapes["emb_params"][-1])
    if kind == "unet":
        own = next((base for pattern, base in KANDINSKY if re.search(pattern, names, re.MULTILINE)), None)
        if own is not None:
            return own
    width = next((shape[1] for name, shape in shapes.items() if READS_TEXT.search(name) and len(shape) > 1), None)
    base = None if width is None else TEXT_WIDTHS.get(width)
    if base is None or kind not in ("checkpoint", "unet"):
        return base
    entries = ("model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight")
    return base + next((INPUTS.get(shapes[name][1], "") for name in entries if name in shapes), "")


def unshuffled(shapes: Shapes) -> tuple[int, int]:
    """Downscale factor and picture channels of a T2I-Adapter, whose first convolution reads factor^2 x channels; (0, 0) if
    that is neither a greyscale nor a colour picture's."""
    firsts = ("conv_in.weight", "body.0.in_conv.weight")
    reads = next((shape[1] for name, shape in shapes.items() if name.endswith(firsts)), 0)
    fits = ((factor, channels) for factor in (4, 8, 16) for channels in (1, 3) if factor**2 * channels == reads)
    return next(fits, (0, 0))


def describe(file: Path) -> str:
    """One line: what a file is, for which models, its size, and how it is used.

    Raises:
        ValueError: it is cut short, or no safetensors file.
    """
    shapes = tensor_shapes(file)
    found = format_of(shapes)
    about = f" ({found.layout})" if found.layout else f", the first is {next(iter(shapes), 'none')}"
    base = f" of {found.base}" if found.base and found.kind in ("checkpoint", "unet") else f" for {found.base}"
    parameters = sum(math.prod(shape) for shape in shapes.values())
    size = f"{parameters / 1e6:.1f} M parameters, {file.stat().st_size / 1e6:.1f} MB"
    use = USES.get(found.kind, "").format(file=str(file))
    if found.layout == "FaceID":
        use = "needs insightface, which is not supported"
    return f"{LABELS[found.kind]}{about}{base if found.base else ''}: {size}" + (f"; {use}" if use else "")
