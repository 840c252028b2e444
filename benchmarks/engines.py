"""Levels and engines beside diffusers and other runtimes: the cases of docs/benchmarks.md, and their bounds.

python benchmarks/engines.py

Goes on where it was stopped: results are kept, by machine, in docs/results/engines.json. On two cores of a slow processor
it takes about four hours, on an otherwise idle machine; the bounds' own cases come first, and what was measured on older
sources is measured again when there is a result of every case. The page has what is measured so far, on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from diffusion_kit.benchmark.cases import Case
from diffusion_kit.benchmark.contenders import SLOW, absent, names_on
from diffusion_kit.benchmark.report import code, compared, kept, machine, measured, page

ROOT = Path(__file__).parents[1]
ROUNDS = 7
T2I, NET = "t2i_adapter", "controlnet"
MIXTURES: list[tuple[str, ...]] = [(), (T2I,), (NET,), (T2I, NET)]
DTYPES = ("float32", "bfloat16")

PLAIN = [Case("medium", (), dtype, threads, steps=3) for dtype in DTYPES for threads in (1, 2)]
WHOLE = Case("small", steps=30, side=32, threads=2)
NETS = [replace(WHOLE, controls=(NET,)), replace(WHOLE, controls=(NET,), end=0.5)]
COUNTED = [WHOLE, replace(WHOLE, controls=(T2I,)), *NETS]  # whose operations have bounds
LONG = [*COUNTED, replace(WHOLE, threads=1), replace(WHOLE, dtype="bfloat16")]
CONTROLLED = [Case("medium", own, dtype, threads=2, steps=3) for dtype in DTYPES for own in MIXTURES[1:]]
COMPILED = [Case("medium", (), dtype, threads=2, steps=4) for dtype in DTYPES]  # other cases than the plain
SMALL = [Case("small", own) for own in MIXTURES]
GROWTH = [Case("small", side=side, threads=2) for side in (32, 96)]
GROWTH += [Case("small", side=32, batch=batch, threads=2) for batch in (2, 4)]
LARGE = [Case("large", dtype="bfloat16", threads=2, steps=3)]
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
MEMORY = {"eager": 1.02, "packed": 1.1, "openvino": 1.1, "aoti": 1.1}  # times diffusers'

Results = dict[Case, dict[str, Any]]
Bound = dict[str, Any]


def bound(what: str, value: float, least: float | None = None, most: float | None = None) -> Bound:
    passed = (least is None or value >= least) and (most is None or value <= most)
    return {"what": what, "value": round(value, 3), "least": least, "most": most, "passed": passed}


def bounds(results: Results) -> list[Bound]:
    """Of the cases that there are so far."""
    found = [own for case in PLAIN if case in results for own in speeds(case, results[case])]
    if all(case in results for case in COUNTED):
        found += operations(results)
    for case, result in results.items():
        found += memory(case, result["contenders"])
        found += [
            {"what": f"{name}, {case.name}", "passed": False, "why": row["absent"]}
            for name, row in result["contenders"].items()
            if row["absent"] and absent(name, case) is None and not row["absent"].startswith("Absent: ")
        ]
    return found


def speeds(case: Case, result: dict[str, Any]) -> list[Bound]:
    """A miss says what there would be if every operation ran at the machine's peak."""
    rows, found = result["contenders"], []
    for name, other, least in SPEEDS[case.dtype]:
        if any(rows[key]["absent"] for key in (name, other)):
            continue
        own = bound(
            f"{name} beside {other}, {case.name}", compared(rows[name]["steps"], rows[other]["steps"])[0], least
        )
        if work := rows[f"{name.split()[0]} eager"]["flops"]:
            most = rows[other]["step"] * result["peak"] / (work / case.steps)
            own["why"] = f"missed; at the peak measured it would be {most:.2f}"
        found.append(own)
    return found


def operations(results: Results) -> list[Bound]:
    flops = [results[case]["contenders"]["exact eager"]["flops"] or 0 for case in COUNTED]
    if not all(flops):
        return []
    # What a ControlNet makes of its picture and of the text, once, is 8 % of 15 of its steps here: 15 of 30 give .515.
    half = (flops[3] - flops[0]) / (flops[2] - flops[0])
    return [
        bound("FLOPs of 30 steps with a T2I-Adapter beside those without", flops[1] / flops[0], most=1.01),
        bound("FLOPs that a ControlNet adds in half of the steps beside those in all", half, 0.50, 0.53),
    ]


def memory(case: Case, rows: dict[str, Any]) -> list[Bound]:
    theirs = rows["diffusers"]
    if theirs["absent"]:
        return []
    own = {name: row for name, row in rows.items() if name.endswith(tuple(MEMORY)) and not row["absent"]}
    return [
        bound(
            f"peak memory of {name} beside diffusers, {case.name}",
            row["peak"] / theirs["peak"],
            most=MEMORY[name.split()[-1]],
        )
        for name, row in own.items()
    ]


def own_levels(result: dict[str, Any]) -> dict[str, Any]:
    """A result without the levels that are of another precision."""
    other = f" is not of {result['case']['dtype']}"
    rows = {name: row for name, row in result["contenders"].items() if not (row["absent"] or "").endswith(other)}
    return {**result, "contenders": rows}


def told(results: Sequence[dict[str, Any]], left: Sequence[Case]) -> list[str]:
    """What there was to be shown, for the page, machine by machine; and cases that this one cannot run."""
    machines: dict[str, Results] = {}
    for own in results:
        case = Case(**{**own["case"], "controls": tuple(own["case"]["controls"])})
        machines.setdefault(json.dumps(own["about"]["machine"]), {})[case] = own
    lines = ["## Bounds", ""]
    for own in machines.values():
        lines += [*told_of_one(own), ""]
    return [*lines, *(f"- not measured here: {case.name} ({absent('diffusers', case)})" for case in left), ""]


def told_of_one(results: Results) -> list[str]:
    """A machine's, misses first."""
    now, about = code(), next(iter(results.values()))["about"]["machine"]
    older = sum(result["about"]["code"] != now for result in results.values())
    said = f"{len(results)} cases" + (f", of which {older} were measured on older sources than {now}" if older else "")
    lines = [f"On {about['processor']}, {about['instructions']}: {said}.", ""]
    lines += ["| | found | bound | |", "| --- | --- | --- | --- |"]
    for own in sorted(bounds(results), key=lambda own: own["passed"]):
        limits = [f"{word} {own[key]}" for word, key in (("at least", "least"), ("at most", "most")) if own.get(key)]
        why = "" if own["passed"] else own.get("why", "missed")
        lines.append(f"| {own['what']} | {own.get('value', '')} | {', '.join(limits)} | {why.replace('|', '/')} |")
    return lines


def main() -> None:
    out = ROOT / "docs" / "results" / "engines.json"
    quick = [name for name in names_on("cpu") if not name.endswith(SLOW)]
    kit = [name for name in quick if not name.endswith("alone")]
    groups = [
        (PLAIN, quick),
        (LONG, kit),
        (CONTROLLED, kit),
        (COMPILED, ["diffusers", "exact eager", *(name for name in names_on("cpu") if name.endswith(SLOW))]),
        (SMALL, kit),
        (GROWTH, ["diffusers", "exact eager", "exact packed", "exact openvino"]),
        (LARGE, ["diffusers", "half eager", "half packed", "half openvino"]),
    ]
    left = [case for cases, _ in groups for case in cases if absent("diffusers", case) is not None]
    results: Results = {}
    for older, (cases, names) in product((True, False), groups):
        possible = [case for case in cases if case not in left]
        results |= dict(zip(possible, measured(possible, names, out, ROUNDS, older=older), strict=True))
        found = [own_levels(own) for own in kept(out)]
        text = page(found, "scripts/verify bench", told(found, left))
        (ROOT / "docs/benchmarks.md").write_text(text)
    print(json.dumps({"machine": machine(), "bounds": bounds(results), "not measured": [case.name for case in left]}))


if __name__ == "__main__":
    main()
