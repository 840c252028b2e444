"""Every way of running in several processes, really run on this machine.

python scripts/verify_scale.py [--only PART]... [--json]

What a part found is kept in outputs/scale.json with the commit, and the part is not run again unless `--only` names it: a
verification that was stopped goes on where it was. A promise that does not hold ends it with a line and the log's end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from scale import clusters, local, notebook, runs, scripts, slurm  # noqa: E402

KEPT = ROOT / "outputs" / "scale.json"
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "local": local.local,
    "restart": local.restart,
    "resume": local.resume,
    "worlds": local.worlds,
    "folder": local.folder,
    "accelerate_trap": local.accelerate_trap,
    "notebook": notebook.notebook,
    "mpi": clusters.mpi,
    "deepspeed_launcher": clusters.deepspeed_launcher,
    "slurm": slurm.slurm,
    "slurm_told": slurm.slurm_told,
    "slurm_requeue": slurm.slurm_requeue,
    **scripts.PARTS,
}


def kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text()) if KEPT.is_file() else {}


def keep(name: str, result: dict[str, Any]) -> None:
    beside = KEPT.with_suffix(".part")
    beside.write_text(json.dumps({**kept(), name: result}, indent=1) + "\n")
    os.replace(beside, KEPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="PART", action="append", choices=list(PARTS), help="run this part, again too")
    parser.add_argument("--json", action="store_true", help="all that is kept in one line at the end")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as behind a shell's "&": a part sends it
    runs.WORK.mkdir(parents=True, exist_ok=True)
    for name in options.only or [name for name in PARTS if name not in kept()]:
        began, commit = time.monotonic(), runs.commit()
        figures = PARTS[name]()
        keep(name, {"commit": commit, "seconds": round(time.monotonic() - began), "figures": figures})
        print(f"{name}: {json.dumps(figures)}", file=sys.stderr, flush=True)
    found = {name: result for name, result in kept().items() if name in PARTS}
    print(json.dumps(found, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
