"""Scripts that verify on their own, as parts: their JSON, in which nothing may have failed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from . import clusters, runs
from .runs import need

WAYS = (
    "DDP",
    "ZeRO 0",
    "ZeRO 1",
    "ZeRO 2",
    "ZeRO 3",
    "ZeRO 3, base whole",
    "ZeRO 2, optimizer on the CPU",
    "ZeRO 3, all on the CPU",
    "ZeRO 3, all on NVMe",
)


def script(name: str, *arguments: str, deepspeed: bool = True, python: str | None = None) -> dict[str, Any]:
    """Figures of a script; a `passed` or `found` that is false in them ends this one."""
    python = python or (clusters.with_deepspeed() if deepspeed else sys.executable)
    runs.installed("/usr/include/libaio.h", "libaio-dev")
    command = [python, str(runs.ROOT / "scripts" / name), *arguments]
    own = runs.environment({"DS_ACCELERATOR": "cpu"})
    done = subprocess.run(command, cwd=runs.WORK, env=own, capture_output=True, text=True, check=False)
    need(done.returncode == 0, f"{name} {' '.join(arguments)}\n{done.stderr[-3000:]}")
    text = f"\n{done.stdout}"
    figures = json.loads(text[text.rindex("\n{") :])  # behind what libraries print
    bad = [".".join(path) for path in failures(figures)]
    need(not bad, f"{name} {' '.join(arguments)}: {', '.join(bad)}\n{json.dumps(figures, indent=1)}")
    return figures


def failures(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where it says that something did not pass, or was not found."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if key in ("passed", "found") and value is False:
            yield path
        elif key == "passed" and isinstance(value, dict):
            yield from ((*path, name) for name, well in value.items() if not well)
        else:
            yield from failures(value, (*path, key))


def with_ray() -> str:
    return runs.python_with("ray", "ray[data]>=2.40,<2.64")


PARTS = {
    **{f"beside one process: {way}": partial(script, "verify_parallel.py", way) for way in WAYS},
    "rows of DeepSpeed's guide": partial(script, "verify_deepspeed.py"),
    "plan": partial(script, "verify_plan.py"),
    "shares of processes": partial(script, "verify_shares.py", "processes", deepspeed=False),
    "ZeRO inference": partial(script, "verify_shares.py", "zero"),
    "Ray": lambda: script("verify_shares.py", "ray", python=with_ray()),
}
