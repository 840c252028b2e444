"""Levels and engines beside diffusers and other runtimes: the cases of docs/benchmarks.md, and their bounds.

python benchmarks/engines.py

Goes on where it was stopped: results are kept, by machine, in docs/results/engines.json. On two cores it takes about two
hours, on an otherwise idle machine; the bounds' own cases come first. The page has what is measured so far, on every
machine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_kit.benchmark.cases import Case
from diffusion_kit.benchmark.contenders import SLOW, absent, names_on
from diffusion_kit.benchmark.report import compared, kept, machine, measured, page

ROOT = Path(__file__).parents[1]
ROUNDS = 7
T2I, NET = "t2i_adapter", "controlnet"
MIXTURES: list[tuple[str, ...]] = [(), (T2I,), (NET,), (T2I, NET)]

PLAIN = [Case("medium", (), dtype, threads, steps=3) for dtype in ("float32", "bfloat16") for threads in (1, 2)]
COMPILED = [Case("medium", (), dtype, steps=4) for dtype in ("float32", "bfloat16")]  # another case than the plain
CONTROLLED = [
    Case("medium", own, dtype, threads=2, steps=3) for dtype in ("float32", "bfloat16") for own in MIXTURES[1:]
]
SMALL = [Case("small", own) for own in MIXTURES]
LARGE = [Case("large", dtype="bfloat16", threads=2, steps=3)]
GROWTH = [Case("small", side=side) for side in (32, 96)] + [Case("small", side=32, batch=batch) for batch in (2, 4)]
WHOLE = Case("small", steps=30, side=32)
NETS = [replace(WHOLE, controls=(NET,)), replace(WHOLE, controls=(NET,), end=0.5)]
LONG = [WHOLE, replace(WHOLE, controls=(T2I,)), *NETS]
SPEEDS = {
    "float32": [
        ("exact packed", "diffusers", 1.5),
        ("exact openvino", "diffusers", 1.8),
        ("exact openvino", "openvino alone", 0.97),
    ],
    "bfloat16": [
        ("half packed", "diffusers", 1.2),
        ("half openvino", "diffusers", 1.5),
        ("half openvino", "openvino alone", 0.97),
    ],
}
MEMORY = {"eager": 1.02, "packed": 1.1, "openvino": 1.1, "inductor": 1.1, "aoti": 1.1}  # times diffusers'


def ratio(results: dict[Case, dict[str, Any]], case: Case, name: str, other: str) -> float:
    """How many times as fast a contender's steps are as another's; 0 where one of them did not run."""
    own = results[case]["contenders"]
    if any(own[key]["absent"] for key in (name, other)):
        return 0.0
    return compared(own[name]["steps"], own[other]["steps"])[0]


def bounds(results: dict[Case, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []

    def bound(what: str, value: float, least: float | None = None, most: float | None = None) -> None:
        passed = (least is None or value >= least) and (most is None or value <= most)
        found.append({"what": what, "value": round(value, 3), "least": least, "most": most, "passed": passed})

    for case in PLAIN:
        if case not in results:
            found.append({"what": f"speeds of {case.name}", "passed": None, "not measured": absent("diffusers", case)})
            continue
        for name, other, least in SPEEDS[case.dtype]:
            bound(f"{name} beside {other}, {case.name}", ratio(results, case, name, other), least)
    flops = [results[case]["contenders"]["exact eager"]["flops"] for case in LONG]
    bound("FLOPs of 30 steps with a T2I-Adapter beside those without", flops[1] / flops[0], most=1.01)
    half = (flops[3] - flops[0]) / (flops[2] - flops[0])
    bound("FLOPs that a ControlNet adds in half of the steps beside those in all", half, 0.49, 0.51)
    for case, result in results.items():
        rows = result["contenders"]
        theirs = rows["diffusers"]
        for name, row in rows.items():
            if name.endswith(tuple(MEMORY)) and not row["absent"] and not theirs["absent"]:
                what = f"peak memory of {name} beside diffusers, {case.name}"
                bound(what, row["peak"] / theirs["peak"], most=MEMORY[name.split()[-1]])
    return found


def main() -> None:
    out = ROOT / "docs" / "results" / "engines.json"
    quick = [name for name in names_on("cpu") if not name.endswith(SLOW)]
    kit = [name for name in quick if not name.endswith("alone")]
    named = [
        (PLAIN, quick),
        (LONG + GROWTH, ["diffusers", "exact eager", "exact packed", "exact openvino"]),
        (CONTROLLED + SMALL, kit),
        (LARGE, ["diffusers", "half packed", "half openvino"]),
        (COMPILED, ["diffusers", *(name for name in names_on("cpu") if name.endswith(SLOW))]),
    ]
    results: dict[Case, dict[str, Any]] = {}
    for cases, names in named:
        possible = [case for case in cases if absent("diffusers", case) is None]
        results |= dict(zip(possible, measured(possible, names, out, ROUNDS), strict=True))
        (ROOT / "docs/benchmarks.md").write_text(page(kept(out), "scripts/verify bench"))
    print(json.dumps({"machine": machine(), "bounds": bounds(results)}))


if __name__ == "__main__":
    main()
