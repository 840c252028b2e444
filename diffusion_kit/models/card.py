"""What a model's card recommends for its pictures."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
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


def _card(folder: str | Path) -> Path | None:
    file = Path(folder) / "README.md"
    if file.is_absolute():
        return file if file.is_file() else None
    try:
        found = try_to_load_from_cache(str(folder), "README.md")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def recommended(folder: str | Path) -> Numbers:
    """`num_inference_steps` and `guidance_scale` in the head of README.md, None for what it does not say. The card of a hub
    id is read where it is in the hub's cache; a single file has none."""
    file = _card(folder)
    if file is None:
        return None, None
    try:
        says = metadata_load(file) or {}
        steps = int(says["num_inference_steps"]) if "num_inference_steps" in says else None
        return steps, float(says["guidance_scale"]) if "guidance_scale" in says else None
    except (AttributeError, TypeError, ValueError, YAMLError) as error:
        raise ValueError(f"the head of {file} says no steps and guidance: {' '.join(str(error).split())}") from None
