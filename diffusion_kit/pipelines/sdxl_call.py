"""The arguments of SDXL's one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .call import TextCall

Size = tuple[int, int]


@dataclass
class SDXLCall(TextCall):
    __doc__ = f"""{TextCall.__doc__}
    SDXL's own attributes:
        prompt_2, negative_prompt_2: for the second encoder; by default the first's. No negative prompt is the zero
            embedding of SDXL's base.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: belong to `prompt_embeds` and `negative_prompt_embeds`.
        original_size, crops_coords_top_left, target_size, aesthetic_score: SDXL's micro-conditioning.
    """

    strengths: ClassVar[tuple[float, float]] = (0.3, 0.9999)

    guidance_scale: float = 5.0
    prompt_2: Any = None
    negative_prompt_2: Any = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size = (0, 0)
    negative_target_size: Size | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    def rules(self, tensors: Sequence[str]) -> list[tuple[bool, str]]:
        return [
            *super().rules(tensors),
            (
                self.prompt_embeds is not None and self.pooled_prompt_embeds is None,
                "prompt_embeds need pooled_prompt_embeds from the same text encoder",
            ),
            (
                self.negative_prompt_embeds is not None and self.negative_pooled_prompt_embeds is None,
                "negative_prompt_embeds need negative_pooled_prompt_embeds from the same text encoder",
            ),
        ]
