"""*Runs*: trainings as they are, with their curves and pictures; notes on them; and what they can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from diffusion_kit.ledger import runs
from diffusion_kit.ledger.folders import about
from diffusion_kit.ledger.tables import Run
from diffusion_kit.studio.core import FORESEEN, Core, explain

from .events import QUIET, telling, told
from .output import PLAIN

NAME = "runs"
EVERY = 3.0  # seconds, while a run is live
RARELY = 15  # of them while no run is live
COLUMNS = ["run", "state", "target", "step", "of", "loss", "fidelity", "started", "id", "notes"]
NOTES = COLUMNS.index("notes")
LOSS, FIDELITY = "loss", "validation/fidelity"
MOST = 8  # runs whose curves are drawn


@dataclass
class Runs:
    core: Core
    table: Any
    chosen: Any
    loss: Any
    fidelity: Any
    bars: Any
    sheets: Any
    words: Any
    sent: Any  # notes as this page was told them
    timer: Any

    @property
    def parts(self) -> list[Any]:
        return [self.table, self.loss, self.fidelity, self.bars, self.sheets, self.words, self.sent, self.timer]

    def looked(self, chosen: list[str]) -> dict[Any, Any]:
        """Updates that show what is there now; where the ledger is not reached, the page keeps what it has and says so."""
        try:
            return self.found(chosen)
        except FORESEEN as error:
            return {self.words: f"**{explain(error)}**"}

    def found(self, chosen: list[str]) -> dict[Any, Any]:
        with self.core.ledger.reading() as session:
            rows = runs.found(session)
            last = {run.id: runs.last(session, run.id) for run in rows}
            drawn = [run for run in rows if run.id in chosen] or list(rows[:1])
            curves = {name: curve(session, drawn[:MOST], name) for name in (LOSS, FIDELITY)}
        states = {run.id: runs.state_of(run) for run in rows}
        return {
            self.table: pd.DataFrame([listed(run, states[run.id], last[run.id]) for run in rows], columns=COLUMNS),
            self.loss: curves[LOSS],
            self.fidelity: curves[FIDELITY],
            self.bars: pd.DataFrame([(label(run), last[run.id].get(LOSS)) for run in rows], columns=["run", LOSS]),
            self.sheets: sheets(self.core, drawn[0]) if drawn else [],
            self.words: said(drawn[0], states[drawn[0].id])
            if drawn
            else "no runs yet: `diffusion-kit train` makes them",
            self.sent: {run.id: run.notes for run in rows},
            self.timer: gr.Timer(EVERY if runs.RUNNING in states.values() else RARELY),
        }


def listed(run: Run, state: str, last: dict[str, float]) -> tuple[Any, ...]:
    started = f"{run.started.astimezone():%Y-%m-%d %H:%M}"
    figures = (None if last.get(name) is None else float(f"{last[name]:.4g}") for name in (LOSS, FIDELITY))
    return (label(run), state, run.target, run.step, run.steps, *figures, started, run.id, run.notes)


def label(run: Run) -> str:
    return f"{Path(run.folder).name} {run.id[:4]}"


def curve(session: Any, drawn: list[Run], name: str) -> pd.DataFrame:
    rows = [(step, value, label(run)) for run in drawn for step, value in runs.curve(session, run.id, name)]
    return pd.DataFrame(rows, columns=["step", name.rpartition("/")[2], "run"])


def sheets(core: Core, run: Run) -> list[tuple[str, str]]:
    """Of the last validation that is there; of a run that lies on this machine, or a disk that it sees."""
    if not is_here(run):
        return []
    folders = sorted(Path(run.folder).glob("validation/step-*"), reverse=True)
    files = next((found for folder in folders if (found := sorted(folder.glob("*.png")))), [])
    return [(core.shown(file), f"{file.stem}, step {int(file.parent.name.partition('-')[2])}") for file in files]


def is_here(run: Run) -> bool:
    """Whether its folder is seen from here: one of the same name may be another's."""
    try:
        return bool(about(Path(run.folder))["id"] == run.id)
    except (OSError, ValueError, KeyError):
        return False


def said(run: Run, state: str) -> str:
    return f"**{label(run)}** {state}, step {run.step} of {run.steps}, last heard {run.updated.astimezone():%H:%M:%S}"


def tab(core: Core) -> Runs:
    chosen = gr.State([])
    table = gr.Dataframe(
        headers=COLUMNS,
        interactive=True,
        static_columns=[k for k in range(len(COLUMNS)) if k != NOTES],
        show_search="filter",
        label="Runs: pick one or more; notes are written in place",
        elem_id=f"{NAME}-table",
        max_height=320,
        wrap=True,
    )
    with gr.Row():
        words = gr.Markdown(elem_id=f"{NAME}-words")
        buttons = [gr.Button(text, size="sm", elem_id=f"{NAME}-{what}", min_width=80) for what, text in ASKED.items()]
        several = gr.Checkbox(False, label="Curves of several", min_width=120)
    with gr.Row():
        loss = gr.LinePlot(x="step", y=LOSS, color="run", title="loss", elem_id=f"{NAME}-loss", min_width=320)
        fidelity = gr.LinePlot(
            x="step", y="fidelity", color="run", title="fidelity", elem_id=f"{NAME}-fidelity", min_width=320
        )
    with gr.Row():
        bars = gr.BarPlot(x="run", y=LOSS, title="last loss", y_lim=[0, None], elem_id=f"{NAME}-bars", min_width=320)
        sheets_part = gr.Gallery(
            label="Last validation", columns=1, object_fit="contain", elem_id=f"{NAME}-sheets", **PLAIN
        )
    timer = gr.Timer(EVERY)
    made = Runs(core, table, chosen, loss, fidelity, bars, sheets_part, words, gr.State({}), timer)
    wire(made, dict(zip(ASKED, buttons, strict=True)), several)
    return made


ASKED = {"save": "Save now", "validate": "Validate now", "stop": "Stop"}


def wire(own: Runs, buttons: dict[str, Any], several: Any) -> None:
    own.timer.tick(own.looked, own.chosen, own.parts, **QUIET)

    def pick(table: pd.DataFrame, before: list[str], many: bool, event: gr.SelectData) -> list[str]:
        id = str(event.row_value[COLUMNS.index("id")])
        return [*(own for own in before if own != id), id] if many else [id]

    own.table.select(pick, [own.table, own.chosen, several], own.chosen, **QUIET).then(
        own.looked, own.chosen, own.parts, **QUIET
    )
    own.table.input(
        telling(lambda table, sent: write_notes(own.core, table, sent)), [own.table, own.sent], own.sent, **QUIET
    )
    for what, button in buttons.items():
        button.click(asking(own.core, what), own.chosen, None, **QUIET)


def write_notes(core: Core, table: pd.DataFrame, sent: dict[str, str]) -> dict[str, str]:
    """Into the database at once: the table on the page is drawn anew in seconds. Only those that were changed on this page:
    others may have been changed elsewhere.

    Args:
        sent: notes of each run as the page was told them; they are given back with the changes.
    """
    changed = {id: str(own) for id, own in zip(table["id"], table["notes"], strict=True) if str(own) != sent.get(id)}
    with core.ledger.writing() as session:
        for id, notes in changed.items():
            runs.note(session, id, notes)
    return sent | changed


def asking(core: Core, what: str) -> Any:
    def ask(chosen: list[str]) -> None:
        from diffusion_kit.training.run import ask

        if not chosen:
            raise gr.Error("pick a run first")
        with told(), core.ledger.reading() as session:
            run = session.get_one(Run, chosen[-1])
            if (state := runs.state_of(run)) != runs.RUNNING:
                raise ValueError(f"{label(run)} is {state}: nothing can be asked of it")
            if not is_here(run):
                raise ValueError(f"{label(run)} lies on {run.host}: ask it there")
            ask(Path(run.folder), what)
        gr.Info(f"asked it to {what}: it does after the step at hand")

    return ask
