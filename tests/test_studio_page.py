"""What the page does behind its buttons; scripts/verify studio presses them in a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the studio is an extra; scripts/verify studio runs all of it")

from diffusion_kit.studio.config import StudioConfig  # noqa: E402
from diffusion_kit.studio.core import Core  # noqa: E402
from diffusion_kit.studio.page import actions, examples  # noqa: E402

NEAR = 2.0  # of 255: other processors round in another way


def test_every_example_makes_its_picture(tmp_path: Path) -> None:
    """With the pictures that lie in its recipe, which are files afterwards that a command can name."""
    core = Core(StudioConfig(output=tmp_path, history=False), print)
    try:
        for file in examples.FILES:
            job = core.submit(actions.asked_of(core, actions.shown_recipe(str(file))), "me")
            assert job.wait(60)
            assert job.error is None
            made, given = (np.asarray(Image.open(own)).astype(float) for own in (job.result.file, file))
            assert np.abs(made - given).mean() < NEAR
            assert all(Path(own.image.path).is_file() for own in job.result.recipe.controls)
    finally:
        core.close()
    assert len(examples.FILES) >= 4
