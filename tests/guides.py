"""Reads guides to diffusers as their users do: block after block, over local models, with the import lines changed.

`guides/` holds the code blocks. What is wrong in a guide itself stands in `FAULTS`.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

GUIDES = Path(__file__).parent / "guides"
PIECE = re.compile(
    r'^(?:## (?P<section>[^\n]*)|<hfoption id="(?P<option>[^\n]*)">|</hfoption>|```(?P<language>\w+)\n(?P<code>.*?)^```)$',
    re.M | re.S,
)
SIZES = {"1024": "64", "768": "128", "512": "64", "384": "64", "250": "40"}  # pixels in the guides: pixels here
FEW = {"num_inference_steps": 5, "prior_num_inference_steps": 4}
SMALL = {"height": 64, "width": 64}


class Block(NamedTuple):
    """A code block; option "" is what all options share."""

    section: str
    option: str
    language: str
    code: str


class Fault(NamedTuple):
    """What a guide has wrong, and what its reader writes in its place."""

    section: str
    written: str
    meant: str
    why: str


FAULTS = [
    Fault(
        "Image-to-image: Kandinsky 3",
        "image_embeds, negative_image_embeds = prior_pipeline(prompt, negative_prompt).to_tuple()",
        "",
        "a block for all versions calls the prior, and Kandinsky 3 has none",
    ),
    Fault(
        "Image-to-image: Kandinsky 3",
        "image=image",
        "image=original_image",
        "`image` is of the section on text-to-image",
    ),
    Fault(
        "Inpainting",
        "mask = PIL.ImageOps.invert(mask)",
        "mask = PIL.ImageOps.invert(PIL.Image.new('L', (8, 8)))\nimport numpy\nmask = numpy.asarray(mask) / 255",
        "one block inverts a mask that is nowhere made twice, as a picture and as an array",
    ),
    Fault(
        "Inpainting: Kandinsky 2.2", "image=original_image", "image=init_image", "no `original_image` in this section"
    ),
    Fault(
        "ControlNet",
        "make_image_grid([img.",
        "from diffusers.utils import make_image_grid\nmake_image_grid([img.",
        "`make_image_grid` is not imported",
    ),
]
# What diffusers itself cannot do of its guide, without an accelerator.
OF_THE_PEER = [
    Fault(
        "Interpolation: Kandinsky 2.2",
        "pipeline(prompt, **prior_out",
        "pipeline(**prior_out",
        "KandinskyV22Pipeline takes no prompt: image_embeds would be given twice",
    ),
    Fault("", ".enable_model_cpu_offload()", "", "raises without an accelerator"),
    Fault("", ".enable_xformers_memory_efficient_attention()", "", "raises without xformers and CUDA"),
]


def blocks(guide: str) -> list[Block]:
    """The blocks of a guide in order."""
    found, section, option = [], "", ""
    for piece in PIECE.finditer((GUIDES / guide).read_text()):
        if piece["section"]:
            section = piece["section"]
        elif piece["language"]:
            found.append(Block(section, option, piece["language"], piece["code"]))
        else:
            option = piece["option"] or ""
    return found


def chains(guide: str) -> dict[str, list[Block]]:
    """What a reader of one section and one option runs, under "section: option"; without the shell's commands."""
    all_blocks = [block for block in blocks(guide) if block.language != "bash"]
    options = {block.section: {""} for block in all_blocks}
    for block in all_blocks:
        options[block.section] |= {block.option}
    return {
        f"{section}: {option}" if option else section: [
            block for block in all_blocks if block.section == section and block.option in ("", option)
        ]
        for section, names in options.items()
        for option in sorted(names - {""} or {""})
    }


class Reader:
    """Runs blocks one after another in one namespace, and keeps the pictures that pipelines give and what is warned of.

    Beside the import lines only this is changed: ids of the hub are folders (`places`), cuda is the CPU in float32, sizes
    are `SIZES`, calls have `FEW` steps and, where a guide names no size and diffusers' is 512 or 1024, are `SMALL`; the
    draws of every call begin at the same seed.
    """

    def __init__(self, package: str, places: dict[str, str], faults: list[Fault]) -> None:
        self.package, self.places, self.faults = package, places, faults
        self.names: dict[str, Any] = {"called": self.called}
        self.pictures: list[Image.Image] = []
        self.warnings: list[str] = []

    def source(self, block: Block, chain: str) -> str:
        code = block.code
        if block.language == "diff":
            code = "\n".join(line[2:] for line in code.splitlines() if not line.startswith("-"))
        for fault in self.faults:
            if chain.startswith(fault.section):
                code = code.replace(fault.written, fault.meant)
        code = re.sub(r"\b\d+\b", lambda number: SIZES.get(number[0], number[0]), code)
        code = re.sub(r'"([\w.-]+/[\w.-]+)"', lambda hub: repr(self.places[hub[1]]), code)
        code = re.sub(r"\b(pipe|pipeline|prior_pipeline)\((?!\")", r"called(\1, ", code)
        code = code.replace("cuda", "cpu").replace("torch.float16", "torch.float32").replace(".half()", ".float()")
        return re.sub(r"^from diffusers\b", f"from {self.package}", textwrap.dedent(code), flags=re.M)

    def read(self, block: Block, chain: str) -> None:
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(compile(self.source(block, chain), "<guide>", "exec"), self.names)
        self.warnings += [str(warning.message) for warning in caught if warning.filename in ("<guide>", __file__)]

    def called(self, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        known = inspect.signature(type(pipe).__call__).parameters
        kwargs |= {name: value for name, value in FEW.items() if name in known}
        kwargs = {name: value for name, value in SMALL.items() if name in known} | kwargs
        torch.manual_seed(0)
        out = pipe(*args, **kwargs)
        for picture in getattr(out, "images", ()):
            asked = (kwargs["width"], kwargs["height"]) if "width" in kwargs else kwargs["image"].size
            assert picture.size == asked
            assert all(low < high for low, high in picture.getextrema()), "a constant picture"
            self.pictures.append(picture)
        return out
