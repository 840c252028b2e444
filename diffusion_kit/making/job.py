"""`Job` and `Settings`: what a picture is asked to be, before a model has said the rest. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffusion_kit.recipes import ControlRecipe, FileRef, Recipe

AUTO = "auto"  # the detector is the control's own, where it comes with the base
DTYPES = ("float32", "float16", "bfloat16")
HALVED = ("half", "fast")  # levels of `pipe.optimize` that say the number type themselves


@dataclass(frozen=True)
class Job:
    """What differs from picture to picture: `name` is that of the files in folders, empty without any."""

    name: str
    prompt: str
    image: FileRef | None
    mask: FileRef | None
    controls: tuple[ControlRecipe, ...]

    @property
    def files(self) -> list[FileRef]:
        """The pictures that it is made from."""
        refs = [self.image, self.mask, *(ref for c in self.controls for ref in (c.image, c.mask))]
        return [ref for ref in refs if ref is not None]


@dataclass(frozen=True)
class Settings:
    """What is the same for all pictures of a call: given, or of the recipe, or by default; None where the model says.

    Attributes:
        old: the recipe of --again. other_model: a model was given, which may be another than the recipe's.
    """

    model: str
    negative_prompt: str | None
    steps: int | None
    guidance_scale: float | None
    seed: int
    size: tuple[int, int] | None
    strength: float | None
    fit: str
    dtype: str
    device: str | None
    scheduler: str | None
    old: Recipe | None
    other_model: bool
    optimize: str | None = None
    engine: str | None = None
    low_memory: bool = False


def without_auto(control: ControlRecipe, own: list[str]) -> ControlRecipe:
    """The control with its detector settled: where it comes with the base, the one that its name says."""
    from diffusion_kit.adapters.maps import detector_of

    if control.detect == AUTO:
        return replace(control, detect=detector_of(control.kind) if control.kind in own else None)
    return replace(control, detect=None) if control.detect == "none" else control
