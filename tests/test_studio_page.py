"""What the page does behind its buttons; scripts/verify studio presses them in a browser."""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import needs
from PIL import Image
from sqlalchemy import update

gr = needs("gradio")

from diffusion_kit.ledger import pictures as ledger_pictures  # noqa: E402
from diffusion_kit.ledger import runs as ledger_runs  # noqa: E402
from diffusion_kit.ledger.tables import Picture  # noqa: E402
from diffusion_kit.recipes import FileRef  # noqa: E402
from diffusion_kit.studio.config import StudioConfig  # noqa: E402
from diffusion_kit.studio.core import Core  # noqa: E402
from diffusion_kit.studio.library import Library  # noqa: E402
from diffusion_kit.studio.page import actions, compare, create, doodle, examples, history, pictures, runs  # noqa: E402
from diffusion_kit.studio.queue import CANCELLED, Job  # noqa: E402

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


def test_a_picture_that_was_repainted_fills_the_form_too(core: Core, tmp_path: Path) -> None:
    """What is painted on the picture to start from is made anew; a slot that is not on the page is not asked for."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    with gr.Blocks():
        creating = create.tab(core, gr.State(None), gr.State(None))
    recipe = actions.shown_recipe(str(examples.FILES[3]))
    start = core.inputs.add_picture(Image.new("RGB", (64, 64), "red"), "picture")
    own = replace(recipe, image=start, mask=core.inputs.add_picture(mask, "mask"), strength=0.9, controls=())
    filled = creating.filled(own)
    assert filled[creating.slots[1].image] == pictures.NOTHING, "not what the browser had there"
    values = {part: part.value for part in creating.inputs} | filled
    values[creating.slots[3].image] = pictures.painted(examples.FILES[0].read_bytes())
    asked = creating.asked({part: values[part] for part in creating.inputs})
    assert (asked.job.image, asked.settings.strength, asked.job.controls) == (start, 0.9, ())
    assert asked.job.mask is not None
    np.testing.assert_array_equal(np.asarray(Image.open(asked.job.mask.path)), np.asarray(mask))


def test_what_of_a_recipe_is_not_here_is_told(core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot whose control or picture is missing stays empty; that the picture is then made without it is said."""
    warned = list[str]()
    monkeypatch.setattr(gr, "Warning", warned.append)
    with gr.Blocks():
        creating = create.tab(core, gr.State(None), gr.State(None))
    recipe = actions.shown_recipe(str(examples.FILES[3]))
    first, second = recipe.controls
    Image.new("RGB", (8, 8)).save(tmp_path / "gone.png")
    gone = FileRef.of(tmp_path / "gone.png")
    (tmp_path / "gone.png").unlink()
    changed = replace(
        recipe,
        model="/models/other",
        steps=400,
        scheduler="TCDScheduler",
        image=gone,
        strength=0.0,
        controls=(replace(first, kind="/nets/other"), replace(second, image=gone, detect="depth:/weights")),
    )
    filled = creating.filled(changed)
    for told in (
        "the model /models/other", "400 steps", "TCDScheduler", "the picture to start from", "the control /nets/other",
        f"the picture of the control {second.kind}", "the detector depth:/weights",
    ):  # fmt: skip
        assert told in warned[0]
    assert filled[creating.strength] == 0.0
    assert filled[creating.slots[0].image] == pictures.NOTHING
    assert filled[creating.slots[1].image] == pictures.NOTHING
    assert filled[creating.slots[1].detect] == "depth"
    warned.clear()
    creating.filled(recipe)
    assert not warned


def test_a_comparison_goes_on_without_its_page_and_is_stopped(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def work(job: Job) -> str:
        assert go.wait(20)
        return "made"

    monkeypatch.setattr(core, "submit", lambda asked, owner, measured: core.queue.submit(owner, work))
    made = compare.Comparison("ann", [compare.Cell(f"{k}", None) for k in range(core.queue.size)], 2)  # type: ignore[arg-type]
    made.ask(core)
    assert len(made.jobs) == core.queue.size // 2, "others find room"
    assert not made.is_over
    made.stop(core)
    go.set()
    assert made.is_over
    assert all(job.wait(20) for job in made.jobs)
    assert all(job.state == CANCELLED for job in made.jobs[1:])


def test_a_deleted_picture_leaves_nothing(core: Core, tmp_path: Path) -> None:
    with gr.Blocks():
        past = history.tab(core)
    file = core.config.pictures / "2026-11-30" / "00001-7.png"
    beside = file.parent / "controls" / "00001-7-1.png"
    for own in (file, beside):
        own.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(own)
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(other)
    recipe = actions.shown_recipe(str(examples.FILES[0]))
    with core.ledger.writing() as session:
        for own in (file, other):
            ledger_pictures.add(session, own, recipe, ledger_pictures.STUDIO)
    ids = [ledger_pictures.id_of(own) for own in (file, other)]
    small = [past.thumbs.one(past.row(id)) for id in ids]
    copy = Path(core.shown(other))
    assert copy.is_file()
    past.deleted(ids[0])
    assert not any(own is not None and own.exists() for own in (file, beside, small[0]))
    assert other.is_file()
    past.deleted(ids[1])
    assert not any(own is not None and own.exists() for own in (other, copy, small[1]))
    with core.ledger.reading() as session:
        assert ledger_pictures.count(session, ledger_pictures.Query()) == 0


def test_behind_a_proxy_only_what_the_studio_made_is_shown_and_deleted(tmp_path: Path) -> None:
    core = Core(StudioConfig(output=tmp_path / "studio", hosts=("studio.lan",)), print)
    with gr.Blocks():
        past = history.tab(core)
    other, made = tmp_path / "other.png", core.config.pictures / "made.png"
    made.parent.mkdir(parents=True)
    for file in (other, made):
        Image.new("RGB", (8, 8)).save(file)
        with core.ledger.writing() as session:
            ledger_pictures.add(session, file, actions.shown_recipe(str(examples.FILES[0])), ledger_pictures.GENERATE)
    id = ledger_pictures.id_of(other)
    for use in (past.deleted, past.shown, past.file, lambda id: past.mark(id, rating=5)):
        with pytest.raises(gr.Error, match="not made by the studio"):
            use(id)
    assert other.is_file()
    values = dict.fromkeys(past.filters) | {
        past.source: history.ANY,
        past.days: "any time",
        past.rating: 0,
        past.page: 1,
    }
    found = past.found(values)
    assert found[past.ids] == [ledger_pictures.id_of(made)]
    assert found[past.count].startswith("1 pictures")
    with zipfile.ZipFile(past.zipped(values)) as archive:
        assert archive.namelist() == ["0001-made.png"]
    core.close()


def test_a_picture_of_another_machine_is_not_the_file_of_its_name_here(core: Core, tmp_path: Path) -> None:
    with gr.Blocks():
        past = history.tab(core)
    file = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(file)
    with core.ledger.writing() as session:
        ledger_pictures.add(session, file, actions.shown_recipe(str(examples.FILES[0])), ledger_pictures.GENERATE)
        session.execute(update(Picture).values(host="elsewhere"))
    shown = past.shown(ledger_pictures.id_of(file))
    assert shown[past.picture] is None
    assert "it lies on elsewhere" in shown[past.about]
    with pytest.raises(gr.Error, match="lies on elsewhere"):
        past.deleted(ledger_pictures.id_of(file))
    assert file.is_file()


def test_a_wiped_doodle_is_no_error_and_all_else_is() -> None:
    for nothing in (None, Image.new("L", (8, 8), "white")):
        with pytest.raises(doodle.NothingDrawn):
            doodle.lines(nothing)


@pytest.mark.parametrize(("form", "told"), [("TIFF", "is not a PNG, JPEG or WEBP"), ("PNG", "at most 64 megapixels")])
def test_what_is_painted_on_is_a_picture_that_the_kit_opens(core: Core, form: str, told: str) -> None:
    data = io.BytesIO()
    Image.new("1", (8, 8) if form == "TIFF" else (9000, 8000)).save(data, form)
    with pytest.raises(ValueError, match=told):
        pictures.drawn(core, pictures.painted(data.getvalue()), "the picture")


@pytest.mark.parametrize(
    "value", ["no JSON", "[]", "{}", '{"picture": "/etc/passwd"}', '{"picture": "http://a/b.png"}']
)
def test_an_easel_takes_pictures_alone(core: Core, value: str) -> None:
    with pytest.raises(ValueError, match="is no picture|must be a picture in base64|not a PNG"):
        pictures.drawn(core, value, "the picture")
    for empty in (None, "", pictures.NOTHING):
        assert pictures.drawn(core, empty, "the picture") == (None, None)


def test_a_drawing_is_a_picture_that_is_kept_nowhere(core: Core, tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "white").save(tmp_path / "drawing.png")
    found = pictures.drawing(core, pictures.painted((tmp_path / "drawing.png").read_bytes()), "the drawing")
    assert found is not None
    assert found.size == (8, 4)
    assert not core.config.inputs.is_dir()
    assert pictures.drawing(core, "", "the drawing") is None
    with pytest.raises(ValueError, match="the drawing is not a PNG, JPEG or WEBP"):
        pictures.drawing(core, pictures.painted(b"no picture"), "the drawing")


def test_a_run_that_is_over_is_asked_for_nothing(core: Core, tmp_path: Path) -> None:
    own = {"target": "t2i_adapter", "step": 1, "steps": 2, "config": {}, "command": "", "started": datetime.now(UTC)}
    (tmp_path / "config.yaml").write_text("target: t2i_adapter")
    with core.ledger.writing() as session:
        ledger_runs.begin(session, own | {"id": "a", "folder": str(tmp_path)})
        ledger_runs.end(session, "a", ledger_runs.STOPPED)
    with pytest.raises(gr.Error, match="is stopped: nothing can be asked of it"):
        runs.asking(core, "stop")(["a"])
    assert not (tmp_path / ".asked").exists()


def test_painted_pictures_come_back_as_they_went(core: Core) -> None:
    """The picture with its own bytes, what is painted as a mask of black and white."""
    rng, data = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(data, "JPEG")
    mask = Image.fromarray((rng.random((40, 60)) > 0.5).astype(np.uint8) * 255)
    image, painted = pictures.drawn(core, pictures.painted(data.getvalue(), mask), "the picture")
    assert image is not None
    assert painted is not None
    assert image.open() == data.getvalue()
    np.testing.assert_array_equal(np.asarray(Image.open(painted.path)), np.asarray(mask))
    assert pictures.drawn(core, pictures.painted(data.getvalue()), "the picture")[1] is None


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
