"""In which precision networks run and their matrices are multiplied, and what helps where its range is too small."""

from __future__ import annotations

import torch

from .config import Config
from .parallel.settings import get, read

AMPERE = (8, 0)  # the first GPUs that have TF32
NAMES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def set_tf32(wanted: bool | None) -> None:
    """Whether GPUs may round factors of float32 to 10 bits of mantissa (TF32) in matrix products and convolutions.

    Args:
        wanted: None leaves it as torch has it, which is convolutions only.
    """
    if wanted is not None:
        torch.backends.cuda.matmul.allow_tf32 = wanted  # under these names: the compiler reads no others
        torch.backends.cudnn.allow_tf32 = wanted


def told(config: Config, device: torch.device) -> str:
    """A line of a training's start."""
    line = f"precision: networks run in {NAMES[config.precision]}"
    if config.precision != "no":
        line += ", sums in float32"
    if device.type == "cpu":
        return line + ("; tf32 has no effect on a CPU" if config.tf32 else "")
    if torch.cuda.get_device_capability(device) < AMPERE:
        return line + ("; tf32 has no effect on this GPU, which is older than Ampere" if config.tf32 else "")
    own, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return f"{line}; products of float32 matrices in {_named(own)}, convolutions in {_named(cudnn)}"


def _named(tf32: bool) -> str:
    return "TF32" if tf32 else "float32"


def cure(config: Config, what: str) -> str:
    """What helps where the loss, or the gradient, was not finite in several steps, in one line."""
    if config.precision == "fp16" and what == "gradient":
        own = read(config.deepspeed or {})
        if get(own, "fp16.loss_scale"):
            return "the loss scale is fixed: set fp16.loss_scale to 0, or take precision=bf16 or no"
        power = "" if config.deepspeed is None else "raise fp16.initial_scale_power to 32, or "
        return f"the loss scale cannot become smaller: {power}take precision=bf16 or no"
    others = {"no": "", "bf16": ", or take precision=no", "fp16": ", or take precision=bf16 or no"}
    return f"lower optimizer.learning_rate, look at the pictures that are named{others[config.precision]}"
