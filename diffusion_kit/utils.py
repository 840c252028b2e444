"""Image helpers of diffusers under their own names, beside the kit's safe `load_image`."""

from diffusers.utils import make_image_grid

from diffusion_kit.adapters.pictures import load_image

__all__ = ["load_image", "make_image_grid"]
