"""What the page does behind its buttons; scripts/verify studio presses them in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the studio is an extra; scripts/verify studio runs all of it")

from diffusion_kit.recipes import FileRef  # noqa: E402
from diffusion_kit.studio.config import StudioConfig  # noqa: E402
from diffusion_kit.studio.core import Core  # noqa: E402
from diffusion_kit.studio.library import Library  # noqa: E402
from diffusion_kit.studio.page import actions, examples  # noqa: E402

NEAR = 2.0  # of 255: other processors round in another way


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    own = Core(StudioConfig(output=tmp_path / "studio", history=False), print)
    yield own
    own.close()


def test_a_recipe_of_anybody_names_no_file_and_no_weights(core: Core, tmp_path: Path) -> None:
    """It may lie in a picture that somebody uploads."""
    recipe = actions.shown_recipe(str(examples.FILES[1]))
    (control,) = recipe.controls
    file = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(file)
    for other in (replace(control, image=FileRef.of(file)), replace(control, detect="depth:/etc")):
        with pytest.raises(ValueError, match="no picture of this studio|takes a detector's name alone"):
            actions.asked_of(core, replace(recipe, controls=(other,)))
    assert actions.asked_of(core, recipe).job.controls[0].image.path.startswith(str(core.config.inputs))


def test_folders_of_models_begin_a_studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is the first that is found, by a relative path too; two of the same name are both there."""
    monkeypatch.chdir(tmp_path)
    for folder in ("one/sdxl", "two/sdxl"):
        Path(folder).mkdir(parents=True)
        Path(folder, "model_index.json").write_text("{}")
    library = Library(("one", "two"), ())
    assert library.first == "sdxl"
    assert list(library.find_models()) == ["sdxl", "two/sdxl", "default", "default-kandinsky"]
    assert library.model(library.first) == str(tmp_path / "one/sdxl")
    assert Library(("./one/sdxl",), ()).first == "sdxl"


def test_every_example_makes_its_picture(core: Core) -> None:
    """With the pictures that lie in its recipe, which are files afterwards that a command can name."""
    for file in examples.FILES:
        job = core.submit(actions.asked_of(core, actions.shown_recipe(str(file))), "me")
        assert job.wait(60)
        assert job.error is None
        made, given = (np.asarray(Image.open(own)).astype(float) for own in (job.result.file, file))
        assert np.abs(made - given).mean() < NEAR
        assert all(Path(own.image.path).is_file() for own in job.result.recipe.controls)
    assert len(examples.FILES) >= 4
