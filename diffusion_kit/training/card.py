"""The model card beside a result: what it was made of, with what settings, and how faithfully it is followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from diffusion_kit import __version__

from .config import Config
from .data.cache import fingerprint
from .loop import Trainer

LIBRARY = "diffusers"


def write(trainer: Trainer, folder: Path, figures: dict[str, float] | None, pictures: Path | None) -> None:
    """README.md, `training.yaml` (the whole configuration) and the last validation's pictures into a result's folder."""
    config = trainer.config
    (folder / "training.yaml").write_text(config.dump())
    samples = sorted(pictures.glob("*.png")) if pictures is not None and pictures.is_dir() else []
    for file in samples:
        (folder / f"validation-{file.name}").write_bytes(file.read_bytes())
    head = yaml.safe_dump(_head(config), sort_keys=False)
    parts = [f"---\n{head}---", f"# {config.target.replace('_', ' ')} for {config.base.model}", _use(config)]
    parts += ["## What it was made of", _table(facts(trainer))]
    if figures:
        parts += ["## Last validation", _table({name: f"{value:.4g}" for name, value in figures.items()})]
        parts += [f"![{file.stem}](validation-{file.name})" for file in samples]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def _head(config: Config) -> dict[str, Any]:
    return {
        "license": config.license or "unknown",
        "base_model": config.base.model,
        "library_name": LIBRARY,
        "tags": ["diffusion_kit", config.target],
        "num_inference_steps": config.validation.steps,
        "guidance_scale": config.validation.guidance,
    }


def facts(trainer: Trainer) -> dict[str, str]:
    """What a reader asks first; all settings are in `training.yaml`."""
    config, base = trainer.config, trainer.target.base
    sources = ", ".join(source.path for source in config.data.sources)
    count = len(trainer.pictures) - config.data.holdout
    condition = config.data.condition
    seen = trainer.step * trainer.order.batch
    return {
        "base": config.base.model + (f", UNet {base.before or fingerprint(base.unet)}" if base is not None else ""),
        "data": f"{count} pictures of {sources}, {config.data.holdout} held out",
        "condition": "none" if not trainer.target.conditioned else condition.detector or "with the data",
        "steps": f"{trainer.step} of {trainer.order.batch} pictures, {seen:,} in all",
        "left out": f"{len(trainer.figures.bad)} pictures that could not be used",
        "optimizer": f"{config.optimizer.name}, {config.optimizer.learning_rate:g}, {config.optimizer.schedule}",
        "dropout": f"caption {config.dropout.caption:g}, condition {config.dropout.condition:g}",
        "weights": "averaged" if config.ema else "of the last step",
        "trainer": f"diffusion_kit {__version__}",
    }


def _use(config: Config) -> str:
    if config.target not in ("t2i_adapter", "controlnet", "control_lora"):
        return f"Load it with diffusers, or with diffusion_kit as `{config.target}`'s folder."
    detector = config.data.condition.detector
    condition = 'load_image("condition.png")' if detector is None else f'detect("{detector}", "photo.png")'
    source = "this-folder/control_lora.safetensors" if config.target == "control_lora" else "this-folder"
    return (
        "```python\nfrom diffusion_kit import AutoPipelineForText2Image, Control, detect, load_image\n\n"
        f'pipe = AutoPipelineForText2Image.from_pretrained("{config.base.model}")\n'
        f"condition = {condition}\n"
        f'pipe("a caption", controls=[Control("{source}", condition)]).images[0].save("out.png")\n```'
    )


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| what | |", "| --- | --- |", *lines])
