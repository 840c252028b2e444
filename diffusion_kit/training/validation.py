"""What was learned so far: the same pictures, prompts and seeds each time, some that are trained on and some held out.

Every validation writes a folder `validation/step-00001000` and gives figures for the log: a loss without any chance in it,
and, where there is a control, its fidelity as `diffusion_kit.evaluation` measures it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion_kit.adapters.control import Control
from diffusion_kit.evaluation import Condition, Report, evaluate
from diffusion_kit.evaluation.measures import MEASURES
from diffusion_kit.utils import make_image_grid

from .data.samples import Batch, Pictures, Sample, collate
from .keyed import Place
from .loop import Trainer
from .memory import is_short

FAR = 2**40  # an epoch that no training reaches: validation's draws are none of its own


@dataclass(frozen=True)
class Group:
    """Pictures that are validated together, "seen" or "unseen"."""

    name: str
    indices: tuple[int, ...]


def groups(trainer: Trainer) -> list[Group]:
    """Pictures spread evenly over those that are trained on, and over those held out."""
    count = len(trainer.pictures)
    trained = count - trainer.config.data.holdout
    found = {"seen": range(trained), "unseen": range(trained, count)}
    return [Group(name, spread(trainer, own)) for name, own in found.items() if own]


def spread(trainer: Trainer, indices: range) -> tuple[int, ...]:
    """Pictures of the commonest shape, as they are shown side by side; some several times where there are more prompts."""
    own, shapes = trainer.config.validation, trainer.pictures.shapes
    common = Counter(shapes[k] for k in indices).most_common(1)[0][0]
    there = [k for k in indices if shapes[k] == common]
    places = np.linspace(0, len(there) - 1, min(max(own.pictures, len(own.prompts)), len(there))).astype(int)
    chosen = [there[k] for k in places]
    return tuple(np.resize(chosen, max(len(chosen), len(own.prompts))).tolist())


@torch.no_grad()
def validate(trainer: Trainer, folder: Path) -> dict[str, float]:
    """Figures by name; `fidelity`, if it could be measured, is what the best checkpoint is chosen by: more is better."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    lost = set()
    base = trainer.target.base
    with base.at_hand() if base is not None else nullcontext():
        for group in groups(trainer):
            samples = usable(trainer, group)
            figures[f"loss_{group.name}"] = loss(trainer, samples)
            try:
                found = show(trainer, group, collate(samples), folder)
            except Exception as error:  # a pose without a person, latents that overflow: no reason to end a training
                if is_short(error):
                    raise
                trainer.say(f"validation of {group.name} pictures: {error}")
                found = {}
                lost.add(group.name)
            figures |= {f"{name}_{group.name}": value for name, value in found.items()}
    last = "unseen" if trainer.config.data.holdout else "seen"
    if last not in lost:  # a loss beside fidelities would be taken for the best of them
        figures["fidelity"] = figures.get(f"fidelity_{last}", -figures[f"loss_{last}"])
    return figures


def loss(trainer: Trainer, samples: Sequence[Sample]) -> float:
    """The mean, as many at once as in a step."""
    size, losses = trainer.part.micro, []
    for start in range(0, len(samples), size):
        batch = collate(samples[start : start + size]).to(trainer.accelerator.device)
        with trainer.executing(), trainer.accelerator.autocast():
            losses.append(trainer.target(batch).loss.double().cpu())
    return float(torch.cat(losses).mean())


def usable(trainer: Trainer, group: Group) -> list[Sample]:
    """The group's samples that can be read; all, which are blank, where none can."""
    samples = quiet_samples(trainer.pictures, group.indices)
    for sample in samples:
        if sample.problem:
            trainer.say(f"validation of {group.name} pictures, left out: {sample.problem}")
    return [sample for sample in samples if sample.weight] or samples


def quiet_samples(pictures: Pictures, indices: Sequence[int]) -> list[Sample]:
    """The pictures whole: in the middle, not mirrored, nothing dropped."""
    config = pictures.config
    data = config.data.model_copy(update={"crop": "center", "flip": 0.0})
    dropout = config.dropout.model_copy(update={"caption": 0.0, "condition": 0.0})
    quiet = replace(pictures, config=config.model_copy(update={"data": data, "dropout": dropout}))
    return [quiet[Place(config.validation.seed, FAR, k), index] for k, index in enumerate(indices)]


def show(trainer: Trainer, group: Group, batch: Batch, folder: Path) -> dict[str, float]:
    """Writes pictures of a group; what was measured of them."""
    target = trainer.target
    if hasattr(target, "reconstruct"):
        return reconstructions(target, batch, folder / f"{group.name}.png")
    pipe = target.pipeline()
    if pipe is None:
        return {}
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts_of(trainer, batch)
    if target.conditioned and measured_by(trainer) is not None:
        report = fidelity(trainer, pipe, batch, prompts)
        page = folder / group.name
        page.mkdir(exist_ok=True)
        report.page(page)
        (page / "report.json").write_text(report.to_json(), encoding="utf-8")
        grid(report).save(folder / f"{group.name}.png")
        line = next((line for line in report.lines if line.arm != "without"), None)
        if line is None:  # the detector lacks its weights
            return {}
        return {"fidelity": line.own.value if line.larger_is_better else -line.own.value}
    pictures = plain(trainer, pipe, batch, prompts)
    make_image_grid(pictures, 1, len(pictures)).save(folder / f"{group.name}.png")
    return {}


def prompts_of(trainer: Trainer, batch: Batch) -> list[str]:
    given = trainer.config.validation.prompts
    return [given[k % len(given)] if given else sample.caption for k, sample in enumerate(batch.samples)]


def measured_by(trainer: Trainer) -> str | None:
    """The detector by which fidelity is measured: the one said, or the one that makes the conditions."""
    name = trainer.config.validation.measure or trainer.config.data.condition.detector
    return name if name in MEASURES else None


def fidelity(trainer: Trainer, pipe: Any, batch: Batch, prompts: list[str]) -> Report:
    own, control = trainer.config.validation, trainer.target.control
    options = trainer.config.data.condition.options if own.measure is None else {}
    images = [picture(sample.condition) for sample in batch.samples]
    conditions = [Condition(f"{k}", prompts[k], image) for k, image in enumerate(images)]
    return evaluate(
        pipe,
        lambda pictures, scale: [Control(control, pictures, scale=scale)],
        conditions,
        detector=str(measured_by(trainer)),
        settings=options,
        seeds=1,
        seed=own.seed,
        steps=own.steps,
        guidance=own.guidance,
        size=images[0].size,
        batch=trainer.part.micro,
    )


def plain(trainer: Trainer, pipe: Any, batch: Batch, prompts: list[str]) -> list[Image.Image]:
    """A picture of each prompt, under its condition where the target has one."""
    own = trainer.config.validation
    height, width = batch.time_ids[0, 4:].int().tolist()
    made = []
    for k, prompt in enumerate(prompts):
        condition = batch.samples[k].condition
        controls = [] if condition is None else [Control(trainer.target.control, picture(condition))]
        noise = torch.Generator().manual_seed(own.seed + k)
        call = {"num_inference_steps": own.steps, "guidance_scale": own.guidance, "generator": noise}
        call |= {"width": width, "height": height}
        made.append(pipe(prompt, controls=controls, **call).images[0])
    return made


def reconstructions(target: Any, batch: Batch, file: Path) -> dict[str, float]:
    """Pictures above what the autoencoder makes of them, and the mean PSNR in decibels."""
    pixels = torch.stack([sample.pixels for sample in batch.samples])
    made = target.reconstruct(pixels).float().cpu().clamp(-1, 1)
    pairs = [picture(row / 2 + 0.5) for row in (*pixels, *made)]
    make_image_grid(pairs, 2, len(pixels)).save(file)
    error = ((made - pixels) / 2).square().mean((1, 2, 3)).clamp(min=1e-10)
    return {"fidelity": float((-10 * error.log10()).mean())}


def picture(values: Any) -> Image.Image:
    """(C, H, W) in [0, 1] as a picture."""
    array = (values.permute(1, 2, 0) * 255).round().byte().numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[..., 0])


def grid(report: Report) -> Image.Image:
    """A row for each condition: what was asked for, and each arm's picture."""
    rows = [[shown.condition, *(made for _, made, _ in shown.made)] for shown in report.gallery]
    size = rows[0][1].size
    pictures = [own.convert("RGB").resize(size) for row in rows for own in row]
    return make_image_grid(pictures, len(rows), len(rows[0]))
