"""`diffusion-kit data`: training data looked through before a training, and moved between folders and tars."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .console import note

if TYPE_CHECKING:
    from diffusion_kit.training.config import Config
    from diffusion_kit.training.data.check import Findings

SHOWN = 20  # findings of a kind that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, (_, line) in ACTIONS.items():
        action = actions.add_parser(name, help=line, description=line, allow_abbrev=False)
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if name == "import":
            action.add_argument("tars", metavar="TAR", nargs="+", help="tars of webdataset; braces name several")
        else:
            action.add_argument("config", metavar="CONFIG", help="YAML of a training; its part `data` is used")
            action.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="put over it: data.resolution=512")
        if name == "check":
            action.add_argument("--sheet", metavar="FILE", help="write a contact sheet, PNG")
            action.add_argument("--json", action="store_true", help="print everything that was found as JSON")
        else:
            action.add_argument("--out", metavar="FOLDER", required=True, help="a new folder")
        if name == "export":
            action.add_argument("--per-shard", type=int, default=1000, metavar="N", help="pictures in a tar; 1000")


def run(options: argparse.Namespace) -> None:
    ACTIONS[options.action][0](options)


def check(options: argparse.Namespace) -> None:
    """Prints what is wrong; exit code 1 if anything is.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such configuration or source, or a place that cannot be written.
    """
    from diffusion_kit.recipes import save
    from diffusion_kit.training.data import check as checks

    config = _config(options)
    sheet = Path(options.sheet) if options.sheet else None
    if sheet is not None and (sheet.suffix != ".png" or not sheet.parent.is_dir()):
        raise ValueError(f"--sheet {sheet} must be a .png file in a folder that is there")
    findings = checks.check(
        config.data,
        conditions=config.target not in ("unet", "autoencoder", "prior"),
        captions=config.target not in ("autoencoder", "hint_decoder"),
    )
    print(_as_json(findings) if options.json else _as_text(findings))
    if sheet is not None:
        save(checks.contact_sheet(findings, config.data), sheet)
    if findings.problems:
        raise SystemExit(1)


def export(options: argparse.Namespace) -> None:
    from diffusion_kit.training.data.sources import open_source
    from diffusion_kit.training.data.webdataset import write_tars

    if options.per_shard < 1:
        raise ValueError(f"--per-shard {options.per_shard} must be 1 or more")
    sources = [open_source(source) for source in _config(options).data.sources]
    records = (source[number] for source in sources for number in range(len(source)))
    _tell(write_tars(records, Path(options.out), options.per_shard), options.out)


def import_(options: argparse.Namespace) -> None:
    from diffusion_kit.training.data.webdataset import import_tars

    _tell(import_tars(options.tars, Path(options.out)), options.out)


def _config(options: argparse.Namespace) -> Config:
    from diffusion_kit.training.config import read

    return read(options.config, options.overrides)


def _tell(left_out: list[str], out: str) -> None:
    for line in left_out[:SHOWN]:
        note(f"left out: {line}")
    print(f"{out}" + (f"; {len(left_out)} pictures are left out" if left_out else ""))


def _as_json(findings: Findings) -> str:
    found = [
        {"kind": one.kind, "problem": one.problem, "picture": one.picture, "text": one.text} for one in findings.found
    ]
    return json.dumps({"pictures": findings.pictures, "problems": findings.problems, "found": found}, indent=2)


def _as_text(findings: Findings) -> str:
    from diffusion_kit.recipes.recipe import printable

    kinds = Counter(finding.kind for finding in findings.found)
    lines = []
    for kind, count in kinds.items():
        own = [finding for finding in findings.found if finding.kind == kind]
        lines += [
            f"{kind:14}{printable(f'{one.picture}: {one.text}' if one.picture else one.text)}" for one in own[:SHOWN]
        ]
        lines += [f"{kind:14}and {count - SHOWN} more: --json lists them all"] if count > SHOWN else []
    notes = len(findings.found) - findings.problems
    return "\n".join([*lines, f"{findings.pictures} pictures: {findings.problems} problems, {notes} notes"])


ACTIONS = {
    "check": (check, "look for what is wrong with the data of a training"),
    "export": (export, "write the data of a training as tars of webdataset"),
    "import": (import_, "write tars of webdataset as a folder with metadata.jsonl"),
}
