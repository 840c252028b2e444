"""Image helpers of diffusers under their own names, beside the kit's safe `load_image` and `fit_image`."""

from diffusers.utils import make_image_grid

from diffusion_kit.adapters.pictures import fit_image, load_image

__all__ = ["fit_image", "load_image", "make_image_grid"]
