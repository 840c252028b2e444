"""The road of docs/training.md, from photos to a picture: its commands as they stand there, in an empty folder.

python scripts/verify_road.py

Prints JSON: wall and CPU seconds of each command, the edge F1 of the held-out photos, and which bounds hold. Writes
docs/pictures/photo-edges.png, and what the commands print to outputs/road.txt, of which the page shows parts.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE, LOG = ROOT / "docs/training.md", ROOT / "docs/pictures/photo-edges.png", ROOT / "outputs/road.txt"
GAIN, MINUTES = 0.1, 20  # of edge F1 by the control, at least; of two idle cores, at most
SHOWN = "00", "01", "03", "05"  # of a condition: itself, without the control, with it, with guidance over it
COLUMNS, ZOOM, GAP = 2, 2, 4  # conditions a row; enlargement; pixels between


def commands(page: str) -> list[str]:
    """What is to be typed in the section "The road"."""
    section = page.split("\n## The road\n")[1].split("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S)


def run(command: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Seconds and output of a command; an error ends the script with the output's end."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
    )
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout[-1000:]}{done.stderr[-3000:]}\nexit code {done.returncode}")
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{wall:6.1f} s  {command.strip()}", file=sys.stderr)
    return {"command": command.strip(), "wall": round(wall, 1), "cpu": round(cpu, 1)}, done.stdout


def sheet(evaluation: Path) -> Image.Image:
    """Of each second held-out photo: its edges, the picture without the control, the picture with it."""
    numbers = sorted({file.name[:3] for file in evaluation.glob("*.png")})[::2]
    cells = [Image.open(evaluation / f"{number}-{which}.png") for number in numbers for which in SHOWN]
    side, wide = ZOOM * cells[0].width, len(SHOWN)
    block = wide * side + 4 * GAP  # a condition's pictures, and what stands between it and the next
    whole = Image.new("RGB", (COLUMNS * block, -(-len(numbers) // COLUMNS) * (side + GAP)), "white")
    for k, cell in enumerate(cells):
        row, column = divmod(k // wide, COLUMNS)
        place = (column * block + k % wide * side, row * (side + GAP))
        whole.paste(cell.convert("RGB").resize((side, side), Image.Resampling.NEAREST), place)
    return whole


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "examples", folder / "examples")
        done = [run(command, folder) for command in commands(PAGE.read_text())]
        sheet(folder / "evaluation").save(PICTURE)
        lines = json.loads((folder / "evaluation/report.json").read_text())["lines"]
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("\n".join(f"$ {figures['command']}\n{output}" for figures, output in done))
    f1 = {line["arm"]: line["own"] for line in lines}
    others = {line["arm"]: line["shuffled"]["value"] for line in lines}
    gain = f1["scale 1"]["value"] - f1["without"]["value"]
    minutes = sum(figures["wall"] for figures, _ in done) / 60
    result = {
        "commands": [figures for figures, _ in done],
        "minutes": round(minutes, 1),
        "cpu_minutes": round(sum(figures["cpu"] for figures, _ in done) / 60, 1),
        "cores": os.cpu_count(),
        "edge_f1": f1,
        "gain": round(gain, 3),
        "above another's edges": round(f1["scale 1"]["value"] - others["scale 1"], 3),
        "passed": {f"gain of {GAIN}": gain >= GAIN, f"{MINUTES} minutes on two idle cores": minutes <= MINUTES},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
