"""What is run: SDXL's architecture at three widths, with and without controls."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

WIDTHS = {"small": 64, "medium": 128, "large": 320}  # channels at the UNet's first level; large is SDXL itself
CONTROLS = ("t2i_adapter", "controlnet")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """A run that every contender makes.

    Attributes:
        width: of `WIDTHS`. controls: of `CONTROLS`.
        dtype: of the weights; threads: of torch and of other runtimes; device: of the networks.
        steps: of one run, Euler's, with guidance. batch: pictures in it. side: of the latents.
        end: where in the run the controls' window ends.
    """

    width: str = "small"
    controls: tuple[str, ...] = ()
    dtype: str = "float32"
    threads: int = 1
    steps: int = 4
    batch: int = 1
    side: int = 64
    end: float = 1.0
    device: str = "cpu"

    @property
    def inputs(self) -> str:
        """Which networks run, and the shapes of what they are given."""
        parts = [self.width, *(self.controls or ("plain",)), self.dtype]
        return " ".join(parts + [f"batch-{self.batch}"] * (self.batch > 1) + [f"side-{self.side}"] * (self.side != 64))

    @property
    def name(self) -> str:
        where = f"{self.threads}-threads" if self.device == "cpu" else self.device
        return " ".join([self.inputs, where, f"{self.steps}-steps", *([f"end-{self.end}"] * (self.end < 1))])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "controls": list(self.controls)}
