"""What a model's card recommends for its pictures."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import metadata_load
from yaml import YAMLError

Numbers = tuple[int | None, float | None]  # steps and guidance


def settled(folder: str | Path, given: Numbers, otherwise: tuple[int, float]) -> tuple[int, float]:
    """Steps and guidance: as given, else as the card in a model's folder says, else as is usual.

    Raises:
        ValueError: what stands in the card is no number.
    """
    (steps, guidance), own = given, recommended(folder)
    return (
        next(value for value in (steps, own[0], otherwise[0]) if value is not None),
        next(value for value in (guidance, own[1], otherwise[1]) if value is not None),
    )


def recommended(folder: str | Path) -> Numbers:
    """`num_inference_steps` and `guidance_scale` in the head of README.md, None for what it does not say; a hub id or a
    single file, which are no absolute path of a folder, say nothing."""
    file = Path(folder) / "README.md"
    if not (file.is_absolute() and file.is_file()):
        return None, None
    try:
        says = metadata_load(file) or {}
        steps = int(says["num_inference_steps"]) if "num_inference_steps" in says else None
        return steps, float(says["guidance_scale"]) if "guidance_scale" in says else None
    except (AttributeError, TypeError, ValueError, YAMLError) as error:
        raise ValueError(f"the head of {file} says no steps and guidance: {' '.join(str(error).split())}") from None
