"""How faithfully a control is followed: its condition is extracted again from what was made, and compared.

The protocol of ControlNet++ (Li et al., 2024, arXiv:2404.07987): several seeds a condition, the same detector with the same
settings on both sides. Every figure stands beside the same one without the control, and beside that of the same pictures
against another picture's condition.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from diffusion_kit.adapters.control import Control
from diffusion_kit.adapters.detectors import detect, detector, inverted, missing
from diffusion_kit.adapters.pictures import fit_image, load_image
from diffusion_kit.models.card import settled

from .intervals import bootstrap
from .measures import Measure, measures_of
from .quality import quality_measures
from .report import Figure, Line, Report, Shown

STEPS, GUIDANCE = 20, 7.5  # of full-size bases, where their card says nothing
POSES = ("openpose", "pose")
GALLERY = 64  # conditions at most, of which pictures are kept to be shown
MakeControls = Callable[[list[Image.Image], float], Sequence[Control]]


@dataclass(frozen=True, eq=False)
class Condition:
    """What a picture is asked for.

    Attributes:
        image: the control image (PIL, or a file's path); where there is none, the detector makes it from `photo`.
        photo: what the control image was made from, likewise; FID, KID and LPIPS compare with it.
    """

    name: str
    prompt: str
    image: Any = None
    photo: Any = None


@dataclass(frozen=True)
class Arm:
    """One way to make all pictures.

    Attributes:
        scale: of the control; 0 is without it.
        neutral: the control is given a picture without content.
        guidance: of the control, see `Control`.
    """

    name: str
    scale: float
    neutral: bool = False
    guidance: float | None = None


@dataclass
class Found:
    """What an arm's pictures show.

    Attributes:
        own, shuffled: comparisons of each measure, condition by condition, in each seed by seed.
        pictures: of each condition's first seed, and what was extracted from it.
    """

    own: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    shuffled: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    pictures: list[tuple[Image.Image, Image.Image | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What is the same in every arm: see `evaluate`."""

    pipe: Any
    make_controls: MakeControls
    conditions: Sequence[Condition]
    detector: str
    settings: Mapping[str, Any]
    seeds: int
    seed: int
    batch: int
    call: Mapping[str, Any]
    fidelity: Sequence[Measure]
    quality: Sequence[Measure]

    def compare(self, measure: Measure, made: Image.Image, wanted: Image.Image) -> Any:
        """White on black, whatever the control was given."""
        if self.settings.get("invert"):
            made, wanted = inverted(made), inverted(wanted)
        return measure.compare(made, wanted)


def evaluate(
    pipe: Any,
    make_controls: MakeControls,
    conditions: Sequence[Condition],
    *,
    detector: str,
    settings: Mapping[str, Any] | None = None,
    scales: Sequence[float] = (1.0,),
    seeds: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 8,
    dropped: bool = False,
    control_guidance: float | None = None,
    quality: Sequence[Measure] | None = None,
) -> Report:
    """Makes every condition's pictures without the control and with it at every scale, and measures them.

    A condition's pictures start from the same noise in every arm, other noise for each of its seeds and each condition.

    Args:
        make_controls: from control images, one for each prompt of a call, and a scale to the call's controls; of scale 0
            they do nothing.
        conditions: pictures of another size than those that are made are brought to it (fit "cover").
        detector: its name, see `measures.MEASURES`; where it lacks its weights, its measures are "not measured".
        settings: the detector's options, those with which the conditions were made.
        seeds: pictures for each condition and arm; their noise is drawn from `seed`, see `noise_of`.
        steps, guidance: by default as the model's card says, see `models.card`.
        size: (width, height) of the pictures in pixels; by default the model's own.
        batch: pictures made in one call.
        dropped: also with the control at its last scale given a picture without content: black, or white if inverted.
        control_guidance: also with the control at its last scale under a guidance of its own, see `Control`.
        quality: see `quality.quality_measures`; by default those, which then are "not measured".

    Raises:
        ValueError: no conditions, two of one name, one that the measures cannot use, a number out of range.
    """
    for name, value in (("seeds", seeds), ("batch", batch), ("number of conditions", len(conditions))):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    if twice := [name for name, n in Counter(condition.name for condition in conditions).items() if n > 1]:
        raise ValueError(f"two conditions have the name {twice[0]!r}")
    settings = dict(settings or {})
    known = measures_of(detector)
    width, height = size or pipe.native_size[::-1]
    ready = [fitted(condition, (width, height), detector, settings) for condition in conditions]
    lack = lacking(detector, settings, ready[0].image)
    folder = pipe.config.get("_name_or_path", "")
    steps, guidance = settled(folder, (steps, guidance), (STEPS, GUIDANCE))
    plan = Plan(
        pipe=pipe,
        make_controls=make_controls,
        conditions=ready,
        detector=detector,
        settings=settings,
        seeds=seeds,
        seed=seed,
        batch=batch,
        call={
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "width": width,
            "height": height,
        },
        fidelity=[replace(measure, reason=lack) for measure in known],
        quality=measurable(quality_measures() if quality is None else quality, ready),
    )
    check(plan)
    arms = [Arm("without", 0.0), *(Arm(f"scale {scale:g}", scale) for scale in dict.fromkeys(scales) if scale)]
    last = arms[-1].scale
    if not last and (dropped or control_guidance is not None):
        raise ValueError("scales has none but 0, with which a control has no guidance and no neutral picture")
    if control_guidance is not None:
        arms.append(Arm(f"guidance {control_guidance:g}", last, guidance=control_guidance))
    if last:
        attempt(plan, arms[-1])
    arms += [Arm("neutral", last, neutral=True)] if dropped else []
    return measured(plan, arms)


def measured(plan: Plan, arms: Sequence[Arm]) -> Report:
    """Runs the arms one after the other; of their pictures only those that are shown are kept."""
    lines: list[Line] = []
    shown: list[list[Any]] = [[] for _ in plan.conditions[:GALLERY]]
    with tqdm(total=len(arms) * len(plan.conditions) * plan.seeds, unit="picture", disable=None) as bar:
        for arm in arms:
            found = run(plan, arm, bar.update)
            lines += figures(plan, arm, found)
            for pictures, pair in zip(shown, found.pictures, strict=True):
                pictures.append((arm.name, *pair))
    not_measured = {m.name: m.reason for m in (*plan.fidelity, *plan.quality) if m.reason is not None}
    gallery = [Shown(c.name, c.prompt, c.image, made) for c, made in zip(plan.conditions, shown, strict=False)]
    return Report(about(plan), lines, not_measured, gallery)


def lacking(name: str, settings: Mapping[str, Any], picture: Image.Image) -> str | None:
    """Why nothing can be measured of what a detector would find; it is tried, as options want other weights."""
    if settings.get("hands") and name in POSES:
        return "PCK is of bodies, and hands are drawn in the colours of their joints: leave out hands"
    try:
        detect(name, picture.convert("RGB"), **settings)
    except (FileNotFoundError, ImportError) as error:
        return missing(name, settings.get("model")) or " ".join(str(error).split())
    return None


def fitted(condition: Condition, size: tuple[int, int], name: str, settings: Mapping[str, Any]) -> Condition:
    """The condition with its pictures at `size` (width, height), and its control image made if it has none.

    Raises:
        ValueError: it has no picture at all.
    """
    photo = None if condition.photo is None else fit_image(load_image(condition.photo), *size)
    if condition.image is None and photo is None:
        raise ValueError(f"condition {condition.name} has neither a control image nor a photo")
    if condition.image is None:
        return replace(condition, image=detect(name, photo, **settings), photo=photo)
    image = load_image(condition.image)
    resample = getattr(detector(name), "RESAMPLE", None)  # colours must not mix, limbs must not ring
    image = fit_image(image, *size) if resample is None else ImageOps.fit(image, size, resample)
    return replace(condition, image=image, photo=photo)


def measurable(quality: Sequence[Measure], conditions: Sequence[Condition]) -> list[Measure]:
    """The measures, with the reason why one cannot be measured on these conditions."""
    photos = all(condition.photo for condition in conditions)

    def reason(measure: Measure) -> str | None:
        if measure.needs_photo and not photos:
            return "it compares with photos, which the conditions have not"
        return "it takes two conditions or more" if measure.of_sets and len(conditions) < 2 else None

    return [replace(measure, reason=measure.reason or reason(measure)) for measure in quality]


def check(plan: Plan) -> None:
    """
    Raises:
        ValueError: a condition that a measure cannot use.
    """
    for condition in plan.conditions:
        for measure in plan.fidelity:
            try:
                plan.compare(measure, condition.image, condition.image)
            except ValueError as error:
                raise ValueError(f"condition {condition.name}: {error}") from None


def attempt(plan: Plan, arm: Arm) -> None:
    """One step, so that a control that does not fit is refused before all pictures without it are made.

    Raises:
        ValueError: it does not fit, or has a guidance that cannot act.
    """
    make(replace(plan, call={**plan.call, "num_inference_steps": 1}), arm, [(0, 0)])
    if arm.guidance is not None and not plan.pipe.do_classifier_free_guidance:
        raise ValueError(
            f"a control's guidance acts in guided steps, and there are none: guidance is {plan.call['guidance_scale']:g}"
        )


def run(plan: Plan, arm: Arm, advance: Callable[[int], Any]) -> Found:
    """Makes an arm's pictures, batch by batch, and compares them."""
    found = Found()
    wanted = [(k, s) for k in range(len(plan.conditions)) for s in range(plan.seeds)]
    for start in range(0, len(wanted), plan.batch):
        batch = wanted[start : start + plan.batch]
        for (k, s), picture in zip(batch, make(plan, arm, batch), strict=True):
            extracted = observe(plan, found, k, picture)
            if s == 0 and k < GALLERY:
                found.pictures.append((picture, extracted))
        advance(len(batch))
    return found


def make(plan: Plan, arm: Arm, batch: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Pictures of pairs of a condition's and a seed's number, in one call."""
    conditions = [plan.conditions[k] for k, _ in batch]
    images = [condition.image for condition in conditions]
    if arm.neutral:
        ground = "white" if plan.settings.get("invert") else "black"
        images = [Image.new("RGB", image.size, ground) for image in images]
    noise = [noise_of(plan.seed, k, s) for k, s in batch]
    prompts = [condition.prompt for condition in conditions]
    controls = plan.make_controls(images, arm.scale)
    if arm.guidance is not None:
        background = 1.0 if plan.settings.get("invert") else 0.0
        controls = [replace(control, guidance=arm.guidance, background=background) for control in controls]
    made = plan.pipe(prompts, controls=controls, generator=noise, **plan.call)
    return list(made.images)


def noise_of(seed: int, condition: int, number: int) -> torch.Generator:
    """Of a condition's picture of that number: no other seed, condition or number has the same."""
    (own,) = np.random.SeedSequence((seed, condition, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(own))


def observe(plan: Plan, found: Found, k: int, picture: Image.Image) -> Image.Image | None:
    """Compares a picture with condition k and with another, by every measure that there is. The other is half of them away:
    neighbours in a folder are often alike.

    Returns:
        What was extracted from it.
    """
    several = len(plan.conditions)
    condition, other = plan.conditions[k], plan.conditions[(k + max(1, several // 2)) % several]
    fidelity = [measure for measure in plan.fidelity if measure.reason is None]
    extracted: Any = detect(plan.detector, picture, **plan.settings) if fidelity else None
    for measure in fidelity:
        found.own[measure.name].append(plan.compare(measure, extracted, condition.image))
        if other is not condition:
            found.shuffled[measure.name].append(plan.compare(measure, extracted, other.image))
    for measure in plan.quality:
        if measure.reason is None:
            found.own[measure.name].append(measure.compare(picture, condition))
    return extracted


def figures(plan: Plan, arm: Arm, found: Found) -> list[Line]:
    """A line for each measure."""

    def figure(measure: Measure, comparisons: list[Any]) -> Figure:
        rows = np.array(comparisons).reshape(len(plan.conditions), plan.seeds, *np.shape(comparisons[0]))
        several = len(rows) > 1 and not measure.of_sets
        return Figure(measure.figure(rows), *(bootstrap(rows, measure.figure) if several else ()))

    lines = []
    for measure in (*plan.fidelity, *plan.quality):
        if measure.reason is None:
            own, versus = figure(measure, found.own[measure.name]), found.shuffled.get(measure.name)
            shuffled = figure(measure, versus) if versus else None
            lines.append(Line(measure.name, measure.larger_is_better, arm.name, arm.scale, own, shuffled, arm.guidance))
    return lines


def about(plan: Plan) -> dict[str, Any]:
    """What the figures depend on."""
    said = {"detector": plan.detector, "settings": dict(plan.settings), "conditions": len(plan.conditions)}
    said |= {"seeds": plan.seeds, "seed": plan.seed, "steps": plan.call["num_inference_steps"]}
    return said | {"guidance": plan.call["guidance_scale"], "width": plan.call["width"], "height": plan.call["height"]}
