"""Files of a network that is loaded in parts; the loading itself is tested where several processes are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_kit.models.sources import weight_files
from diffusion_kit.models.spread import gathered, is_spread


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        (None, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("fp16", ["model.fp16.safetensors"]),
        ("bf16", []),
    ],
)
def test_files_of_a_variant(tmp_path: Path, variant: str | None, names: list[str]) -> None:
    for name in (
        "model-00002-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        "model.bin",
    ):
        (tmp_path / name).touch()
    assert [file.name for file in weight_files(tmp_path, variant)] == names


def test_whole_weights_need_no_gathering() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    assert not is_spread(weight)
    with gathered([weight], changed=True):
        weight.data.mul_(2)
    assert weight.tolist() == [2, 2]
