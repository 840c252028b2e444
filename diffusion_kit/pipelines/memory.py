"""Less memory for a little time."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffusion_kit.sampling.engines.pages import page_out
from diffusion_kit.sampling.engines.weights import park

from .engines import cache_folder

# How the names of networks begin that are done before the first step.
RESTING = ("text_encoder", "image_encoder", "prior_")


def set_low_memory(pipe: Any, low: bool) -> None:
    """On a CPU encoders lie in a file and leave memory after they ran; elsewhere every network of the pipeline is on the
    device while it runs only. Large pictures go through the autoencoder in tiles, several pictures one by one."""
    device, before = pipe._execution_device, pipe.low_memory
    pipe.low_memory = low
    if low or before:  # else they are as the user has set them
        set_pieces(pipe, low)
    if device.type != "cpu":
        if low:
            pipe.enable_model_cpu_offload(device=device)
        elif before:
            pipe.remove_all_hooks()
            pipe.to(device)
    elif low:
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            park(resting(pipe), folder)
        except OSError as error:
            pipe.notes.append(f"encoders stay in memory: {folder} takes no file ({error.strerror or error})")
        rest(pipe)


def set_pieces(pipe: Any, low: bool) -> None:
    """Whether the autoencoder works in pieces."""
    vae = getattr(pipe, "vae", None)
    for name in () if vae is None else ("tiling", "slicing"):
        if hasattr(vae, f"use_{name}"):  # the methods are there without it, too, and raise
            getattr(vae, f"{'enable' if low else 'disable'}_{name}")()
        elif low:
            pipe.notes.append(f"{type(vae).__name__} has no {name}")


def rest(pipe: Any) -> None:
    """Encoders leave memory, where there is to be little of it."""
    if pipe.low_memory and pipe._execution_device.type == "cpu":
        page_out(resting(pipe))


def resting(pipe: Any) -> list[nn.Module]:
    return [net for name, net in pipe.components.items() if name.startswith(RESTING) and isinstance(net, nn.Module)]
