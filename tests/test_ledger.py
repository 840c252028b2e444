"""The ledger: written twice is written once; nothing is lost, and nobody is stopped by it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from PIL import Image
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from diffusion_kit.cli import main
from diffusion_kit.ledger import Ledger, Recorder, database, evaluations, pictures, recorder, runs
from diffusion_kit.ledger.folders import new_run
from diffusion_kit.ledger.place import home, places
from diffusion_kit.ledger.rebuild import rebuild
from diffusion_kit.ledger.tables import Metric, Picture, Run, Table
from diffusion_kit.recipes import ControlRecipe, FileRef, Recipe, save

LINES = FileRef("lines.png", "0" * 64)
RECIPE = Recipe(
    prompt="a red fox",
    negative_prompt=None,
    seed=2**63 - 1,
    steps=3,
    guidance_scale=2.0,
    width=8,
    height=8,
    model="default",
    model_hash=None,
    scheduler="EulerDiscreteScheduler",
    scheduler_config={},
    controls=(ControlRecipe("canny", LINES, scale=(0.5, 1.0)), ControlRecipe("palette", LINES, scale=0.3)),
)


def row(folder: Path, step: int = 0) -> dict[str, Any]:
    about = {"id": "run1", "command": "train", "started": datetime.now(UTC)}
    return about | {"folder": str(folder), "target": "controlnet", "step": step, "steps": 10, "config": {"a": 1}}


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    opened = Ledger()
    yield opened
    opened.close()


def test_tables_are_as_the_migrations_make_them(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_a_migration_from_the_schema_before_keeps_rows(tmp_path: Path) -> None:
    """Written with the columns of that schema, in plain SQL; what is new has its default."""
    from alembic import command

    url = f"sqlite:///{tmp_path / 'old.db'}"
    engine = database.connect(database.parsed(url))
    config = database.alembic_config()
    with engine.execution_options(writes=True).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        values = {"now": "2026-01-02 03:04:05.000000", "config": '{"steps": 5}'}
        connection.execute(
            text(
                "INSERT INTO runs (id, folder, target, state, step, steps, config, command, host, process, started, "
                "updated) VALUES ('r', '/runs/r', 'unet', 'ended', 5, 5, :config, 'c', 'h', 1, :now, :now)"
            ),
            values,
        )
        connection.execute(text("INSERT INTO metrics (run_id, name, step, value) VALUES ('r', 'loss', 5, 0.25)"))
        connection.execute(
            text(
                "INSERT INTO pictures (id, host, file, made, source, task, prompt, model, width, height, digest) "
                "VALUES ('p', 'h', '/p.png', :now, 'generate', 'text-to-image', 'a fox', 'default', 8, 8, 'd')"
            ),
            values,
        )
    engine.dispose()
    ledger = Ledger(url)
    with ledger.reading() as session:
        run, picture = session.get_one(Run, "r"), session.get_one(Picture, "p")
        assert (run.config, run.notes, run.started) == ({"steps": 5}, "", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
        assert (picture.prompt, picture.rating, picture.favourite, picture.tags) == ("a fox", 0, False, "")
        assert runs.last(session, "r") == {"loss": 0.25}
    ledger.close()


def test_a_ledger_of_a_newer_kit_is_left_alone(ledger: Ledger) -> None:
    with ledger.engine.execution_options(writes=True).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ValueError, match="9999, which a newer diffusion-kit made"):
        Ledger()


def test_figures_are_kept_once_and_those_after_a_resume_are_dropped(ledger: Ledger, tmp_path: Path) -> None:
    with ledger.writing() as session:
        runs.begin(session, row(tmp_path))
        for step in (1, 2, 2, 3):
            own = {
                "loss": step / 4,
                "loss_by_noise": [1.0, None],
                "validation": {"fidelity": 0.5, "lost": float("nan")},
            }
            runs.log(session, row(tmp_path, step), own)
        assert runs.curve(session, "run1", "loss") == [(1, 0.25), (2, 0.5), (3, 0.75)]
        assert runs.names(session, ["run1"]) == ["loss", "validation/fidelity"]
        runs.note(session, "run1", "promising")
        runs.begin(session, row(tmp_path, 2))
        assert runs.curve(session, "run1", "loss") == [(1, 0.25), (2, 0.5)]
        session.expire_all()
        assert session.get_one(Run, "run1").notes == "promising"


def test_a_run_whose_process_is_gone_is_lost(ledger: Ledger, tmp_path: Path) -> None:
    with ledger.writing() as session:
        runs.begin(session, row(tmp_path))
        run = session.get_one(Run, "run1")
        assert runs.state_of(run) == runs.RUNNING
        run.process = 2**22 - 1  # above every number that Linux gives here
        assert runs.state_of(run) == runs.LOST
        run.host = "elsewhere"
        assert runs.state_of(run) == runs.RUNNING


def test_pictures_are_found_by_words_control_model_and_marks(ledger: Ledger, tmp_path: Path) -> None:
    others = replace(RECIPE, prompt="100% a blue HOUSE_2", model="/models/other", controls=())
    with ledger.writing() as session:
        pictures.add(session, tmp_path / "a.png", RECIPE, pictures.STUDIO)
        pictures.add(session, tmp_path / "b.png", others, pictures.GENERATE)
        pictures.mark(session, [pictures.id_of(tmp_path / "b.png")], rating=4, favourite=True, tags="  old  town ")

        def found(**query: Any) -> list[str]:
            return [Path(own.file).stem for own in pictures.search(session, pictures.Query(**query), limit=9)]

        assert found() == ["b", "a"]
        assert found(words="fox RED") == found(control="palett") == found(source="studio") == ["a"]
        assert found(words="0%") == found(words="house_2 town") == found(model="other") == found(rating=4) == ["b"]
        assert found(words="a_red") == found(words="fox house") == found(rating=5) == []
        assert found(favourite=True) == ["b"]
        assert found(since=datetime.now(UTC)) == []


def test_marks_stay_with_a_picture_and_not_with_its_name(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "a.png"

    def rating() -> int:
        session.expire_all()
        return session.get_one(Picture, pictures.id_of(file)).rating

    with ledger.writing() as session:
        pictures.add(session, file, RECIPE, pictures.GENERATE)
        pictures.mark(session, [pictures.id_of(file)], rating=5)
        pictures.add(session, file, RECIPE, pictures.GENERATE)
        assert rating() == 5
        assert [own.scale for own in session.get_one(Picture, pictures.id_of(file)).controls] == ["0.5:1.0", "0.3"]
        pictures.add(session, file, replace(RECIPE, seed=1, controls=()), pictures.GENERATE)
        assert rating() == 0
        assert session.get_one(Picture, pictures.id_of(file)).controls == []


def test_texts_that_a_database_cannot_hold_are_put_right(ledger: Ledger, tmp_path: Path) -> None:
    with ledger.writing() as session:
        pictures.add(session, tmp_path / "a.png", replace(RECIPE, prompt="fox\0 \ud800!"), pictures.GENERATE)
        assert pictures.search(session, pictures.Query(), limit=1)[0].prompt == "fox ?!"


def write_rows(url: str, number: int, rows: int) -> None:
    ledger = Ledger(url)
    with ledger.writing() as session:
        runs.begin(session, row(Path(f"/runs/{number}")) | {"id": f"run{number}"})
    for step in range(1, rows + 1):
        with ledger.writing() as session:
            runs.log(session, row(Path(f"/runs/{number}"), step) | {"id": f"run{number}"}, {"loss": 1 / step})


def test_several_processes_write_while_one_reads(tmp_path: Path) -> None:
    """All open a ledger that is not there yet; nothing is lost and nobody is refused (more in scripts/verify ledger)."""
    url, context = f"sqlite:///{tmp_path / 'l.db'}", multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_rows, args=(url, k, 50)) for k in range(3)]
    for writer in writers:
        writer.start()
    ledger, seen = Ledger(url), [0]
    while any(writer.is_alive() for writer in writers):
        with ledger.reading() as session:
            seen.append(session.scalar(select(func.count()).select_from(Metric)) or 0)
        time.sleep(0.01)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    with ledger.reading() as session:
        assert session.scalar(select(func.count()).select_from(Metric)) == 150
    assert seen == sorted(seen)


def test_a_killed_writer_leaves_it_readable(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'l.db'}"
    writer = multiprocessing.get_context("spawn").Process(target=write_rows, args=(url, 0, 10**6))
    writer.start()
    ledger, count = Ledger(url), 0
    while count < 20:
        time.sleep(0.02)
        with ledger.reading() as session:
            count = session.scalar(select(func.count()).select_from(Metric)) or 0
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    with ledger.writing() as session:
        curve = runs.curve(session, "run0", "loss")
        assert len(curve) >= count
        assert [step for step, _ in curve] == list(range(1, len(curve) + 1))
        runs.note(session, "run0", "still written to")


def test_a_ledger_that_fails_stops_nobody_and_gets_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    keep = Recorder(told.append)
    keep.picture(tmp_path / "a.png", RECIPE)
    assert told == []
    with sqlite3.connect(home() / "ledger.db") as other:  # another program holds the lock
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(database, "BUSY", 0.01)
        keep.ledger = None
        keep.picture(tmp_path / "b.png", RECIPE)
        keep.picture(tmp_path / "c.png", RECIPE)
        assert len(told) == 1
        assert "cannot be written (database is locked)" in told[0]
        other.rollback()
    monkeypatch.setattr(recorder, "PAUSE", 0.0)
    keep.next = 0.0
    keep.picture(tmp_path / "d.png", RECIPE)
    assert told[1:] == ["the history is written to again, with what it missed"]
    with Ledger().reading() as session:
        assert pictures.count(session, pictures.Query()) == 4


def test_what_can_never_be_written_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    told: list[str] = []
    keep = Recorder(told.append)

    def wrong(session: Session) -> None:
        raise ValueError("no row")

    keep(wrong)
    keep.next = 0.0
    keep.picture(tmp_path / "a.png", RECIPE)
    assert "no row" in told[0]
    assert not keep.waiting
    with Ledger().reading() as session:
        assert pictures.count(session, pictures.Query()) == 1


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "no url", "sqlite:////no/such/place\0/l.db"])
def test_a_url_that_is_none_stops_nobody_and_shows_no_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    Recorder(told.append, url).picture(tmp_path / "a.png", RECIPE)
    assert len(told) == 1
    assert "secret" not in told[0]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run's folder, a report and two pictures, as the kit leaves them."""
    folder, sheet = tmp_path / "runs" / "first", Image.new("RGB", (8, 8))
    (folder / "validation" / "step-00000002" / "unseen").mkdir(parents=True)
    config = {"target": "controlnet", "steps": 4, "base": {"model": "default"}, "validation": {"prompts": ["a fox"]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    new_run(folder, "diffusion-kit train c.yaml")
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 2, "validation": {"fidelity": 0.7}}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 3, "lo')
    sheet.save(folder / "validation" / "step-00000002" / "unseen.png")
    figure = {"value": 0.7, "low": None, "high": None}
    report = {"about": {"detector": "canny"}, "lines": [{"measure": "F1", "arm": "scale 1", "own": figure}]}
    (folder / "validation" / "step-00000002" / "unseen" / "report.json").write_text(json.dumps(report))
    for name in ("a.png", "b.webp"):
        save(sheet, tmp_path / name, RECIPE)
    sheet.save(tmp_path / "other.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_the_ledger_is_made_again_from_files(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", "--rebuild", str(made)]) == 0
    assert capsys.readouterr().out == "1 runs, 3 pictures, 1 reports\n"
    with Ledger().reading() as session:
        (run,) = runs.found(session)
        assert (run.state, run.step, run.command) == (runs.STOPPED, 2, "diffusion-kit train c.yaml")
        assert runs.last(session, run.id) == {"loss": 0.25, "validation/fidelity": 0.7}
        (evaluation,) = evaluations.found(session, run.id)
        assert (evaluation.step, evaluation.measure, evaluation.value) == (2, "F1", 0.7)
        sheet = pictures.search(session, pictures.Query(run=run.id), limit=2)
        assert [(own.prompt, own.step, own.recipe) for own in sheet] == [("a fox", 2, None)]


def test_rebuilding_keeps_what_the_user_said_and_a_broken_file(made: Path) -> None:
    keep, told = Recorder(print), list[str]()
    whole = replace(RECIPE, guidance_scale=5)  # as a job file says it
    save(Image.new("RGB", (8, 8)), made / "a.png", whole)
    keep.picture(made / "a.png", whole, pictures.STUDIO)
    keep.close()
    ledger, own = Ledger(), pictures.id_of(made / "a.png")
    with ledger.writing() as session:
        pictures.mark(session, [own], rating=3)
    ledger.close()
    assert rebuild([], told.append)["pictures"] == 2  # by the place that was noted
    with Ledger().reading() as session:
        picture = session.get_one(Picture, own)
        assert (picture.rating, picture.source) == (3, pictures.STUDIO)
    file = home() / "ledger.db"
    for end in ("", "-wal", "-shm"):
        Path(f"{file}{end}").unlink(missing_ok=True)
    file.write_bytes(b"this is no database, whatever its name says" * 99)
    assert rebuild([], told.append)["pictures"] == 2
    assert "is broken; it is now" in told[-1]
    assert [path.read_bytes()[:4] for path in home().glob("ledger.db.broken-*")] == [b"this"]
    assert places() == [str(made)]


def test_a_ledger_that_is_damaged_behind_its_header_is_put_aside(made: Path) -> None:
    rebuild([made], print)
    file, told = home() / "ledger.db", list[str]()
    with sqlite3.connect(file) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'pictures'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = file.read_bytes()
    file.write_bytes(content[: (page - 1) * size] + b"\xff" * size + content[page * size :])
    assert rebuild([made], told.append)["pictures"] == 3
    assert "is broken; it is now" in told[0]
    with Ledger().reading() as session:
        assert len(pictures.search(session, pictures.Query(), limit=9)) == 3


def test_one_bad_file_does_not_end_a_rebuild(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of it is written: no run that would be taken for one that is alive."""
    run = made / "bad"
    shutil.copytree(next(file.parent for file in made.rglob("run.json")), run)
    (run / "run.json").write_text((run / "run.json").read_text().replace('"id": "', '"id": "x'))
    (run / "metrics.jsonl").write_text('{"step": null, "loss": 1.0}\n')
    assert main(["history", "--rebuild", str(made)]) == 0
    assert "is left out" in capsys.readouterr().err
    own = Ledger()
    with own.reading() as session:
        assert not any(found.id.startswith("x") for found in runs.found(session))
        assert list(runs.found(session))
    own.close()


def test_what_a_studio_keeps_beside_its_pictures_is_none_of_them(made: Path) -> None:
    own = made / "studio"
    for name in ("pictures/2026-11-30", "inputs", "shown", "cache/ab"):
        (own / name).mkdir(parents=True)
        save(Image.new("RGB", (8, 8)), own / name / "1.png", RECIPE)
    (own / ".browser").write_text("secret")
    assert rebuild([own], print)["pictures"] == 1


def test_a_folder_whose_name_is_no_text_stops_no_picture(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    Recorder(print).place(place)
    assert str(place) in places()


def test_history_is_searched_on_the_terminal(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["history", "--rebuild", str(made)])
    capsys.readouterr()
    assert main(["history", "fox", "--control", "canny", "--limit", "1"]) == 0
    printed = capsys.readouterr()
    assert "canny 0.5:1.0, palette 0.3" in printed.out
    assert "1 of 2 pictures" in printed.err
    assert main(["history", "--json", "--source", "run"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "a fox"
    assert main(["history", "--since", "yesterday"]) == 2
    assert "--since is 'yesterday'" in capsys.readouterr().err


def test_runs_are_listed_and_compared_on_the_terminal(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["history", "--rebuild", str(made)])
    with Ledger().writing() as session:
        second = row(made / "second", 1) | {"config": {"target": "controlnet", "steps": 9}, "steps": 9}
        runs.begin(session, second)
        runs.log(session, second, {"loss": 0.125})
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["state", "running", "stopped"]
    assert main(["runs", "compare", "first", "second"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert ["steps", "4", "9"] in rows
    assert ["loss", "0.25", "0.125"] in rows
    assert "target" not in {name for name, *_ in rows}
    assert main(["runs", "third"]) == 2
    assert "no run third" in capsys.readouterr().err
