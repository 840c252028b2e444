"""Instruct-pix2pix (Brooks et al. 2023, arXiv 2211.09800): the picture that an instruction changes is seen by a base whose
own UNet takes its latents as extra input channels. `Control("instruct", photo, scale=1.5)`, where the scale is the image
guidance s_I of eq. 3."""

from __future__ import annotations

from diffusion_kit.sampling.doors import spread

from .control import Control, EncodedControl, Site
from .hint import AddChannels, EncodedChannels
from .pictures import picture_tensor

MODELS = ()
NAME = "instruct"


def encode(control: Control, site: Site) -> EncodedControl:
    """Encodes the picture once: mask x the mode of its latents, (rows, C, h, w). A scale of 1 needs no third branch.

    Raises:
        ValueError: a base that takes no picture; a mode or a list of scales, which the channels do not have.
    """
    if site.own_control != NAME or site.encode_picture is None:
        raise ValueError(
            f"this base takes no {NAME!r} control: its UNet has {site.unet.config.in_channels} input channels, none of "
            "them for a picture, as those of instruct-pix2pix have"
        )
    if control.mode != "balanced":
        raise ValueError(f"Control mode is {control.mode!r}; {NAME!r} has no residuals: it must be 'balanced'")
    (scale,) = control.level_scales(1)
    pixels = 2 * picture_tensor(control.image, site.height, site.width) - 1
    latents = spread(site.encode_picture(pixels.to(site.device)), site.prompts, site.per_prompt, "a control's image")
    (area,) = site.weights(control, [1.0], [0], [1.0] * site.levels)
    return EncodedChannels(
        AddChannels(),
        (control.start, control.end),
        guidance=None if scale == 1 else scale,
        channels=(area * latents).to(site.unet.dtype),
    )
