"""What is asked for: prompt, model, schedule, pictures and controls, as parts of a page, and from their values to a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from diffusion_kit.adapters.detectors import detectors
from diffusion_kit.making.job import AUTO, Job
from diffusion_kit.models.card import recommended
from diffusion_kit.models.sources import locate
from diffusion_kit.recipes import ControlRecipe, FileRef, Recipe
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.queue import Full
from diffusion_kit.studio.requests import MOST_CONTROLS, Asked, checked, settings_of
from diffusion_kit.studio.styles import NONE, styled, styles

Values = Mapping[Any, Any]  # of components
OWN = "the model's own"
AS_IT_IS, BY_KIND = "a control image", "a photo (own detector)"
DETECTORS = {BY_KIND: AUTO, AS_IT_IS: "none"}
SCHEDULERS = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "UniPCMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "LCMScheduler",
)
USUAL = (30, 7.5)  # steps and guidance where the model's card does not say


@dataclass
class Settings:
    """Parts that every tab has which makes pictures."""

    core: Core
    prompt: Any
    negative: Any
    style: Any
    model: Any
    steps: Any
    guidance: Any
    seed: Any
    randomise: Any
    scheduler: Any
    width: Any
    height: Any
    again: Any  # looks for models and adapters again

    @property
    def parts(self) -> list[Any]:
        return [part for name, part in vars(self).items() if name not in ("core", "again")]

    def asked(self, values: Values, job: Job, strength: float | None = None, fit: str = "cover") -> Asked:
        """
        Raises:
            ValueError: what cannot be made, in one line.
        """
        prompt, negative = styled(values[self.style], values[self.prompt] or "", values[self.negative] or "")
        width, height = int(values[self.width] or 0), int(values[self.height] or 0)
        if bool(width) != bool(height):
            raise ValueError("give width and height, or leave both at 0 for the model's own size")
        settings = replace(
            settings_of(self.core.config, self.core.library.model(values[self.model])),
            negative_prompt=negative,
            steps=int(values[self.steps]),
            guidance_scale=float(values[self.guidance]),
            scheduler=None if values[self.scheduler] == OWN else values[self.scheduler],
            size=(width, height) if width else None,
            strength=strength,
            fit=fit,
        )
        seed = None if values[self.randomise] else int(values[self.seed] or 0)
        return checked(replace(job, prompt=prompt), settings, seed, self.core.config)

    def filled(self, recipe: Recipe) -> dict[Any, Any]:
        """Updates that show a recipe's settings."""
        label = next((own for own, source in self.core.library.find_models().items() if source == recipe.model), None)
        return {
            self.prompt: recipe.prompt,
            self.negative: recipe.negative_prompt or "",
            self.style: NONE,
            self.model: gr.skip() if label is None else label,
            self.steps: min(recipe.steps, self.steps.maximum),
            self.guidance: min(max(recipe.guidance_scale, 0), self.guidance.maximum),
            self.seed: recipe.seed,
            self.randomise: False,
            self.scheduler: recipe.scheduler if recipe.scheduler in SCHEDULERS else OWN,
            self.width: recipe.width,
            self.height: recipe.height,
        }


def settings(core: Core, tab: str) -> Settings:
    models = list(core.library.find_models())
    steps, guidance = of_model(core, models[0])
    prompt = gr.Textbox(label="Prompt", lines=2, elem_id=f"{tab}-prompt", placeholder="what the picture shows")
    with gr.Row():
        negative = gr.Textbox(label="Negative prompt", lines=1, elem_id=f"{tab}-negative", scale=2)
        style = gr.Dropdown([NONE, *styles()], value=NONE, label="Style", scale=1, min_width=120)
    with gr.Accordion("Settings", open=False):
        with gr.Row(equal_height=True):
            model = gr.Dropdown(models, value=models[0], label="Model", elem_id=f"{tab}-model", scale=4)
            again = gr.Button("Look again", size="sm", scale=1, min_width=100)
        with gr.Row():
            steps_part = gr.Slider(1, 150, steps, step=1, label="Steps", elem_id=f"{tab}-steps")
            guidance_part = gr.Slider(0, 20, guidance, step=0.1, label="Guidance", elem_id=f"{tab}-guidance")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{tab}-seed", min_width=100)
            randomise = gr.Checkbox(True, label="Another seed each time", elem_id=f"{tab}-randomise", min_width=100)
            scheduler = gr.Dropdown([OWN, *SCHEDULERS], value=OWN, label="Scheduler", min_width=160)
        with gr.Row():
            size: dict[str, Any] = {"precision": 0, "minimum": 0, "step": 8, "min_width": 100}
            width = gr.Number(0, label="Width (0: the model's)", elem_id=f"{tab}-width", **size)
            height = gr.Number(0, label="Height", elem_id=f"{tab}-height", **size)
    model.input(lambda name: of_model(core, name), model, [steps_part, guidance_part], show_progress="hidden")
    again.click(lambda: gr.update(choices=list(core.library.find_models())), None, model, show_progress="hidden")
    head = (core, prompt, negative, style, model, steps_part, guidance_part)
    return Settings(*head, seed, randomise, scheduler, width, height, again)


def of_model(core: Core, label: str) -> tuple[int, float]:
    """Steps and guidance that a model's card recommends."""
    place = locate(core.library.model(label))
    steps, guidance = recommended(place)
    return steps or USUAL[0], USUAL[1] if guidance is None else guidance


@dataclass
class Slot:
    """One control of a page."""

    group: Any
    kind: Any
    image: Any
    detect: Any
    masked: Any
    scale: Any
    start: Any
    end: Any
    mode: Any
    guidance: Any
    type: Any
    shown: Any  # how many of all slots are, the same of each

    @property
    def parts(self) -> list[Any]:
        return [part for name, part in vars(self).items() if name not in ("group", "shown")]

    def recipe(self, values: Values, core: Core, name: str) -> ControlRecipe | None:
        """The control of the values; None where it has no picture.

        Raises:
            ValueError: it cannot be used, in one line.
        """
        image, mask = drawn(values[self.image])
        if image is None or not values[self.kind]:
            return None
        if values[self.masked] and mask is None:
            raise ValueError(f"{name} is to act where its picture is painted, and nothing is: paint, or untick it")
        detect = values[self.detect] or BY_KIND
        return ControlRecipe(
            values[self.kind],
            core.inputs.add_picture(image, name),
            detect=DETECTORS.get(detect, detect),
            scale=float(values[self.scale]),
            start=float(values[self.start]),
            end=float(values[self.end]),
            mode=values[self.mode],
            mask=core.inputs.add_picture(mask, name) if values[self.masked] and mask is not None else None,
            guidance=float(values[self.guidance]) if values[self.guidance] else None,
            type=values[self.type] or None,
        )


def slots(core: Core, tab: str, settings: Settings) -> list[Slot]:
    """Controls, of which the first is there and a button shows the next; what may be picked follows the model."""
    shown = gr.State(1)
    made = [slot(core, tab, number, shown) for number in range(1, MOST_CONTROLS + 1)]
    more = gr.Button("Add a control", size="sm", elem_id=f"{tab}-more")

    def add(count: int) -> list[Any]:
        return [min(count + 1, MOST_CONTROLS), *(gr.update(visible=k <= count) for k in range(MOST_CONTROLS))]

    more.click(add, shown, [shown, *(own.group for own in made)], show_progress="hidden", api_visibility="private")
    follow_model(core, settings, [own.kind for own in made])
    return made


def follow_model(core: Core, settings: Settings, parts: list[Any]) -> None:
    """Adapters that may be picked are those of the chosen model and of the folders, as these are now."""

    def look(label: str, *chosen: str) -> list[Any]:
        found = kinds(core, label)
        return [gr.update(choices=found, value=own if own in found else next(iter(found), None)) for own in chosen]

    same: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([settings.model.change, settings.again.click], look, [settings.model, *parts], parts, **same)


def controls(core: Core, own: list[Slot], values: Values) -> tuple[ControlRecipe, ...]:
    """Of the slots that have a picture.

    Raises:
        ValueError: one cannot be used, in one line.
    """
    named = (slot.recipe(values, core, f"control {k}") for k, slot in enumerate(own, 1))
    return tuple(control for control in named if control is not None)


def kinds(core: Core, label: str | None = None) -> list[str]:
    """Controls that come with a model, by default the first, and those of the library."""
    place = locate(core.library.model(label or core.library.first))
    own = (
        sorted(path.parent.name for path in Path(place).glob("controls/*/*.safetensors"))
        if isinstance(place, Path)
        else []
    )
    return list(dict.fromkeys([*own, *core.library.find_controls()]))


def slot(core: Core, tab: str, number: int, shown: Any) -> Slot:
    where, choices = f"{tab}-control-{number}", kinds(core)
    with gr.Accordion(f"Control {number}", open=True, visible=number == 1, elem_id=where) as group:
        with gr.Row():
            kind = gr.Dropdown(
                choices, value=choices[0] if choices else None, label="Adapter", elem_id=f"{where}-kind", min_width=120
            )
            detect = gr.Dropdown(
                [*DETECTORS, *detectors()],
                value=BY_KIND,
                label="The picture is",
                elem_id=f"{where}-detect",
                min_width=160,
            )
        image = gr.ImageMask(
            label="Picture (paint where the control is to act)",
            type="pil",
            image_mode="RGBA",
            elem_id=f"{where}-image",
            height=260,
            layers=False,
            transforms=(),
        )
        with gr.Row():
            scale = gr.Slider(0, 2, 1, step=0.05, label="Scale", elem_id=f"{where}-scale", min_width=120)
            start = gr.Slider(0, 1, 0, step=0.05, label="From", min_width=100)
            end = gr.Slider(0, 1, 1, step=0.05, label="Until (factor)", elem_id=f"{where}-end", min_width=100)
        with gr.Accordion("More", open=False), gr.Row():
            masked = gr.Checkbox(False, label="Only where painted", elem_id=f"{where}-masked", min_width=120)
            mode = gr.Dropdown(["balanced", "prompt", "control"], value="balanced", label="Mode", min_width=120)
            guidance = gr.Number(0, label="Guidance of its own (0: none)", minimum=0, step=0.5, min_width=120)
            type_ = gr.Textbox(label="Type (for a ControlNet-Union)", min_width=120)
        preview = gr.Button("Show what the network will see", size="sm", elem_id=f"{where}-preview")
        seen = gr.Image(
            label="Control image", interactive=False, visible=False, height=200, elem_id=f"{where}-seen", buttons=[]
        )
    made = Slot(group, kind, image, detect, masked, scale, start, end, mode, guidance, type_, shown)

    def show(values: dict[Any, Any]) -> Any:
        return gr.update(value=detected(core, made, values), visible=True)

    preview.click(show, {kind, image, detect}, seen)
    return made


def detected(core: Core, own: Slot, values: Values) -> Image.Image:
    """The control image of a slot's picture, made on the queue.

    Raises:
        gr.Error: it cannot be, in one line.
    """
    from diffusion_kit.adapters.detectors import detect
    from diffusion_kit.adapters.maps import detector_of

    image, _ = drawn(values[own.image])
    if image is None:
        raise gr.Error("give a picture first")
    chosen = values[own.detect] or BY_KIND
    name = detector_of(values[own.kind] or "") if chosen == BY_KIND else DETECTORS.get(chosen, chosen)
    if name in (None, "none"):
        return image
    try:
        job = core.queue.submit("", lambda job: detect(str(name), image))
    except Full as error:
        raise gr.Error(str(error), title="busy") from None
    job.wait()
    if job.error:
        raise gr.Error(job.error)
    picture, job.result = job.result, None  # the queue remembers jobs for a while: not pictures, too
    return picture


def drawn(value: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture of an editor, and what was painted on it: white there; None where there is nothing."""
    if not value:
        return None, None
    background = value.get("background")
    layers = [layer for layer in value.get("layers") or () if layer is not None]
    if background is None or background.getextrema()[-1] == (0, 0):
        return None, None
    painted = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in layers]
    mask = np.logical_or.reduce(painted) if painted else np.zeros(background.size[::-1], bool)
    if background.mode == "RGBA":
        background = Image.alpha_composite(Image.new("RGBA", background.size, "white"), background)
    return background.convert("RGB"), Image.fromarray((mask * 255).astype(np.uint8)) if mask.any() else None


def opened(core: Core, ref: FileRef) -> Image.Image | None:
    """A recipe's picture, if it may be read: one of the studio's own, or any where there is one user, at the machine."""
    from diffusion_kit.making.pictures import opened as open_ref

    if ref.data is None and not core.config.is_own(ref.path) and core.config.users is not None:
        return None
    try:
        return open_ref(ref)
    except ValueError:  # moved or changed since
        return None


def painted(picture: Image.Image, mask: Image.Image | None) -> dict[str, Any]:
    """An editor's value: the picture, and what is painted on it."""
    if mask is None:
        return {"background": picture, "layers": [], "composite": picture}
    layer = Image.new("RGBA", picture.size, "black")
    layer.putalpha(mask.convert("L").resize(picture.size).point(lambda value: 255 * (value > 127)))
    whole = Image.alpha_composite(picture.convert("RGBA"), layer)
    return {"background": picture, "layers": [layer], "composite": whole}


def lost(recipe: Recipe) -> list[str]:
    """What of a recipe the form has no place for."""
    own = recipe.controls
    found = ["the mask of the inpainting (History sends pictures to Inpaint)"] if recipe.mask is not None else []
    found += ["scales for each level"] if any(isinstance(control.scale, tuple) for control in own) else []
    found += ["the background of a control"] if any(control.background for control in own) else []
    return found + ([f"controls after the {MOST_CONTROLS}th"] if len(own) > MOST_CONTROLS else [])


def filled_slots(core: Core, own: list[Slot], recipe: Recipe) -> Iterator[tuple[Any, Any]]:
    """Updates that show a recipe's controls."""
    labels = {source: label for label, source in core.library.find_controls().items()}
    yield own[0].shown, min(max(1, len(recipe.controls)), len(own))
    for k, part in enumerate(own):
        control = recipe.controls[k] if k < len(recipe.controls) else None
        yield part.group, gr.update(visible=k <= max(0, len(recipe.controls) - 1))
        if control is None:
            yield part.image, None
            continue
        picture = opened(core, control.image)
        mask = None if control.mask is None else opened(core, control.mask)
        yield part.kind, labels.get(control.kind, control.kind)
        yield part.detect, control.detect or AS_IT_IS
        yield part.image, None if picture is None else painted(picture, mask)
        scale = sum(control.scale) / len(control.scale) if isinstance(control.scale, tuple) else control.scale
        yield part.scale, min(max(scale, 0), part.scale.maximum)
        yield part.start, control.start
        yield part.end, control.end
        yield part.mode, control.mode
        yield part.guidance, control.guidance or 0
        yield part.type, control.type or ""
        yield part.masked, picture is not None and mask is not None
