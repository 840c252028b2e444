"""diffusers' attention processors under their own names."""

from diffusers.models.attention_processor import *  # noqa: F403
