"""From rows to ratios with their spread, as JSON and as a page."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from diffusion_kit.recipes.whole import write_whole

from .cases import Case
from .interleaved import DIED, REFERENCE, Row, compare, machine_peak
from .models import model_folder

LEGEND = """\
Every contender runs in a process of its own, in turn with the others; "times diffusers" is the median, with quartiles, of
the ratios of the rounds. A run is a pipeline's call without decoding, on random weights of SDXL's architecture, with
guidance; a step is one of those after the first, which prepares much that a long run needs once (on a card, a run's
seconds, and those of a step cache, are shared out to its steps). GFLOP and operations are those that torch dispatches in a
run, shared out to its steps; the share is that of a whole run, of the fastest product of large matrices (2048 x 2048 on a
CPU) before and after the case. Peak memory is of the whole process from its beginning to the end of a first run,
"anonymous" what is no page of a file; "converting" is the peak of another process in which networks were converted
that later lay on disk; "card" is the most that torch held of a card's memory. The error is the relative difference of the
latents from diffusers' in the 2-norm. Other runtimes have the UNet alone, with diffusers' scheduler in a plain loop."""
RUNTIMES = ("openvino", "onnxruntime")
PACKAGE = Path(__file__).parents[1]
ROOMS = ("adapters", "benchmark", "models", "pipelines", "sampling")
PACKAGES = ("diffusion_kit", "torch", "diffusers", "transformers", "openvino", "onnxruntime")


def compared(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast as the other, by both's seconds: median, and the quartiles, of the ratios of each round."""
    ratios = np.array(other) / np.array(own)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(middle), float(low), float(high)


def summary(case: Case, rows: Sequence[Row], peak: float) -> dict[str, Any]:
    """What is kept of a case; times are seconds of a step, `share` is of the machine's peak."""
    by_name = {row.name: row for row in rows if row.absent is None}
    reference = by_name.get(REFERENCE)
    contenders = {}
    for row in rows:
        own = asdict(row)
        if row.name in by_name:
            own["step"] = float(np.median(row.steps))
            level = row.name.split()[0]
            same = (
                reference if level in (REFERENCE, *RUNTIMES) else by_name.get(f"{level} eager")
            )  # who does the same work
            work = row.flops or (same.flops if same else None)
            own["share"] = work / float(np.median(row.seconds)) / peak if work else None
        if row.name in by_name and reference is not None:
            own["ratio"] = compared(row.steps, reference.steps)
            own["ratio of runs"] = compared(row.seconds, reference.seconds)
        contenders[row.name] = own
    return {"case": case.to_json(), "peak": peak, "contenders": contenders}


def machine() -> dict[str, str]:
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        **({"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def code() -> str:
    """A hash of the sources that are measured."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for file in sorted((PACKAGE / room).glob("**/*.py")):
            digest.update(f"{file.relative_to(PACKAGE)}".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def lines_of(result: dict[str, Any]) -> list[str]:
    """A case's table in Markdown."""
    case = Case(**{**result["case"], "controls": tuple(result["case"]["controls"])})
    sources = result.get("about", {}).get("code", "not noted")
    lines = [
        f"**{case.name}** (peak measured {result['peak'] / 1e9:.0f} GFLOP/s, sources {sources})",
        "",
        f"| | times {REFERENCE}, a step | a run | ms a step, quartiles | GFLOP | operations | share of peak "
        "| peak MB | anonymous MB | converting MB | card MB | error |",
        "| --- " * 12 + "|",
    ]
    for name, own in result["contenders"].items():
        if own.get("absent"):
            lines.append(f"| {name} | {own['absent'].replace('|', '/')} |" + " |" * 10)
            continue
        step, run = (spread(own.get(kind)) for kind in ("ratio", "ratio of runs"))
        places = ",.0f" if own["step"] > 0.1 else ",.1f"
        low, middle, high = (f"{1e3 * part:{places}}" for part in np.percentile(own["steps"], [25, 50, 75]))
        flops = "" if own["flops"] is None else f"{own['flops'] / case.steps / 1e9:,.0f}"
        operations = "" if own["operations"] is None else f"{own['operations'] / case.steps:,.0f}"
        share = "" if own.get("share") is None else f"{100 * own['share']:.0f} %"
        converting = "" if own["converting"] is None else f"{own['converting'] / 1e6:,.0f}"
        card = "" if own["card"] is None else f"{own['card'] / 1e6:,.0f}"
        error = "" if own["error"] is None else f"{own['error']:.0e}"
        lines.append(
            f"| {name} | {step} | {run} | {middle} [{low}, {high}] | {flops} | {operations} "
            f"| {share} | {own['peak'] / 1e6:,.0f} | {own['anonymous'] / 1e6:,.0f} | {converting} | {card} | {error} |"
        )
    return lines


def spread(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def measured(
    cases: Sequence[Case], names: Sequence[str], out: Path, rounds: int, *, older: bool = False
) -> list[dict[str, Any]]:
    """Results of the cases, printed and kept in `out` after each; one that is there, of the same contenders, rounds,
    machine and sources, is not run again.

    Args:
        older: nor is one of other sources.

    Raises:
        ValueError: `out` is there and holds something else.
    """
    results, found = kept(out), []
    about = {"names": list(names), "rounds": rounds, "machine": machine(), "code": code()}
    asked = {key: value for key, value in about.items() if not (older and key == "code")}
    with tempfile.TemporaryDirectory() as root:
        for case in cases:
            fits = (own for own in results if own["case"] == case.to_json() and asked.items() <= own["about"].items())
            known = next(filter(whole, fits), None)
            if known is None:
                # Nobody wants random networks to stay.
                os.environ["DIFFUSION_KIT_CACHE"] = str(Path(root) / "converted" / case.inputs.replace(" ", "-"))
                before = machine_peak(case)
                rows = compare(case, names, model_folder(case, Path(root)), rounds)
                known = summary(case, rows, max(before, machine_peak(case))) | {"about": about}
                results = [own for own in results if not same(own, known)] + [known]
                write_whole(out, (json.dumps(results, indent=1) + "\n").encode())
            found.append(known)
            print("\n".join([*lines_of(known), ""]), flush=True)
    return found


def whole(own: dict[str, Any]) -> bool:
    """Whether no contender died of what may not be there another time."""
    return not any((row["absent"] or "").startswith(DIED) for row in own["contenders"].values())


def same(own: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results are of one case and one machine."""
    return bool(own["case"] == other["case"] and own["about"]["machine"] == other["about"]["machine"])


def kept(out: Path) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: the file is there and holds something else.
    """
    if not out.is_file():
        return []
    try:
        results = json.loads(out.read_text())
        if all({"case", "about", "peak", "contenders"} <= own.keys() for own in results):
            return list(results)
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"{out} holds no results of `diffusion-kit bench`: give another name")


def page(results: Sequence[dict[str, Any]], command: str, more: Sequence[str] = ()) -> str:
    """All tables in Markdown, by machine; `more` lines come before them."""
    parts = ["# Benchmarks", "", f"Made by `{command}`.", "", LEGEND, "", *more]
    machines: list[dict[str, str]] = []
    for result in results:
        if (own := result["about"]["machine"]) not in machines:
            machines.append(own)
    for own in machines:
        parts += [f"## {own['processor']}, {own['instructions']}, {own['cores']} cores", ""]
        parts += [*(f"- {label}: {text}" for label, text in own.items()), ""]
        for result in results:
            parts += [*lines_of(result), ""] * (result["about"]["machine"] == own)
    return "\n".join(parts)
