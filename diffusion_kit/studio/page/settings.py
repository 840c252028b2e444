"""Prompt, model, schedule and size, in every tab that makes pictures: their parts, and from values to a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from diffusion_kit.making.job import Job
from diffusion_kit.models.card import recommended
from diffusion_kit.models.sources import locate
from diffusion_kit.recipes import Recipe
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.requests import Asked, checked, settings_of
from diffusion_kit.studio.styles import NONE, styled, styles

from .events import QUIET

Values = Mapping[Any, Any]  # of components
OWN = "the model's own"
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
EXACT = 2**53  # above it a browser rounds whole numbers
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

    def filled(self, recipe: Recipe, gone: list[str]) -> dict[Any, Any]:
        """Updates that show a recipe's settings.

        Args:
            gone: to which is added what cannot be shown.
        """
        label, steps = self.core.library.label(recipe.model), min(recipe.steps, self.steps.maximum)
        guidance = min(max(recipe.guidance_scale, 0), self.guidance.maximum)
        scheduler = recipe.scheduler if recipe.scheduler in SCHEDULERS else OWN
        gone += [f"the model {recipe.model}, which is not here"] if label is None else []
        gone += [f"{recipe.steps} steps"] if steps != recipe.steps else []
        gone += [f"a guidance of {recipe.guidance_scale:g}"] if guidance != recipe.guidance_scale else []
        gone += [f"the seed {recipe.seed}, which a page rounds"] if recipe.seed > EXACT else []
        gone += [f"the scheduler {recipe.scheduler}"] if scheduler != recipe.scheduler else []
        return {
            self.prompt: recipe.prompt,
            self.negative: recipe.negative_prompt or "",
            self.style: NONE,
            self.model: gr.skip() if label is None else label,
            self.steps: steps,
            self.guidance: guidance,
            self.seed: recipe.seed,
            self.randomise: False,
            self.scheduler: scheduler,
            self.width: recipe.width,
            self.height: recipe.height,
        }


def add_settings(core: Core, tab: str) -> Settings:
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
            seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=EXACT, elem_id=f"{tab}-seed", min_width=100
            )
            randomise = gr.Checkbox(True, label="Another seed each time", elem_id=f"{tab}-randomise", min_width=100)
            scheduler = gr.Dropdown([OWN, *SCHEDULERS], value=OWN, label="Scheduler", min_width=160)
        with gr.Row():
            size: dict[str, Any] = {"precision": 0, "minimum": 0, "step": 8, "min_width": 100}
            width = gr.Number(0, label="Width (0: the model's)", elem_id=f"{tab}-width", **size)
            height = gr.Number(0, label="Height", elem_id=f"{tab}-height", **size)
    model.input(lambda name: of_model(core, name), model, [steps_part, guidance_part], **QUIET)
    again.click(lambda: found(core), None, [model, style], **QUIET)
    head = (core, prompt, negative, style, model, steps_part, guidance_part)
    return Settings(*head, seed, randomise, scheduler, width, height, again)


def found(core: Core) -> list[Any]:
    """Models and styles that may be picked, as their folders and file are now."""
    return [gr.update(choices=own) for own in (list(core.library.find_models()), [NONE, *styles()])]


def of_model(core: Core, label: str) -> tuple[int, float]:
    """Steps and guidance that a model's card recommends."""
    place = locate(core.library.model(label))
    steps, guidance = recommended(place)
    return steps or USUAL[0], USUAL[1] if guidance is None else guidance
