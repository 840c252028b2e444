"""What the page does behind its buttons; scripts/verify studio presses them in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the studio is an extra; scripts/verify studio runs all of it")

from diffusion_kit.ledger import runs as ledger_runs  # noqa: E402
from diffusion_kit.recipes import FileRef  # noqa: E402
from diffusion_kit.studio.config import StudioConfig  # noqa: E402
from diffusion_kit.studio.core import Core  # noqa: E402
from diffusion_kit.studio.library import Library  # noqa: E402
from diffusion_kit.studio.page import actions, create, examples, pictures, runs  # noqa: E402

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


def test_a_recipe_fills_the_form_and_the_form_asks_for_it(core: Core, tmp_path: Path) -> None:
    """With a region that was painted, and as many controls."""
    mask = Image.new("L", (400, 400))
    mask.paste(255, (0, 0, 200, 400))
    with gr.Blocks():
        creating = create.tab(core, gr.State(None), gr.State(None))
    recipe = actions.shown_recipe(str(examples.FILES[3]))
    kept = tuple(
        replace(
            own, image=core.inputs.add(own.image.data or b"", "picture"), mask=core.inputs.add_picture(mask, "mask")
        )
        for own in recipe.controls
    )
    filled = creating.filled(replace(recipe, controls=kept))
    assert filled[creating.slots[0].shown] == len(kept) == 2
    values = {part: part.value for part in creating.inputs} | filled
    asked = creating.asked({part: values[part] for part in creating.inputs})
    assert (asked.seed, asked.job.prompt, asked.settings.steps) == (recipe.seed, recipe.prompt, recipe.steps)
    for own, other in zip(asked.job.controls, kept, strict=True):
        assert (own.kind, own.scale, own.detect) == (other.kind, other.scale, other.detect)
        assert own.mask is not None
        shown = np.asarray(Image.open(own.mask.path).convert("L")) > 127
        assert abs(shown.mean() - 0.5) < 0.02
        assert shown[:, 0].all()


@pytest.mark.parametrize(("suffix", "told"), [("tif", "is not a PNG, JPEG or WEBP"), ("png", "at most 64 megapixels")])
def test_what_is_painted_on_is_a_picture_that_the_kit_opens(suffix: str, told: str, tmp_path: Path) -> None:
    """Gradio alone opens any file that PIL knows, of any size."""
    file = tmp_path / f"given.{suffix}"
    Image.new("1", (8, 8) if suffix == "tif" else (9000, 8000)).save(file)
    with gr.Blocks():
        part = pictures.easel("A picture", 100, "easel")
    value = {"background": file, "layers": [], "composite": None}
    payload = part.data_model(**{**value, "background": gr.FileData(path=str(file), orig_name=file.name)})
    with pytest.raises(gr.Error, match=told):
        part.preprocess(payload)


def test_painted_pictures_come_back_as_they_went(core: Core) -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    mask = Image.fromarray((rng.random((40, 60)) > 0.5).astype(np.uint8) * 255)
    with gr.Blocks():
        part = pictures.easel("A picture", 100, "easel")
    sent = part.postprocess(pictures.painted(photo, mask))
    back, painted = pictures.drawn(part.preprocess(part.data_model(**sent.model_dump())))
    np.testing.assert_array_equal(np.asarray(painted), np.asarray(mask))
    np.testing.assert_array_equal(np.asarray(back), np.asarray(photo))


def test_notes_of_others_stay(core: Core) -> None:
    """A page writes what was changed on it, however old its table is."""
    own = {"target": "t2i_adapter", "step": 1, "steps": 2, "config": {}, "command": "", "started": datetime.now(UTC)}
    with core.ledger.writing() as session:
        for id in "ab":
            ledger_runs.begin(session, own | {"id": id, "folder": f"/runs/{id}"})
            ledger_runs.note(session, id, "from elsewhere")
    table = pd.DataFrame({"id": ["a", "b"], "notes": ["", "mine"]})
    assert runs.write_notes(core, table, {"a": "", "b": ""}) == {"a": "", "b": "mine"}
    with core.ledger.reading() as session:
        assert {run.id: run.notes for run in ledger_runs.found(session)} == {"a": "from elsewhere", "b": "mine"}


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
