"""Levels and engines beside diffusers on a CUDA card, at SDXL's own width and 1024 x 1024 pixels: docs/benchmarks-cuda.md.

python benchmarks/on_cuda.py

Goes on where it was stopped: results are kept in outputs/cuda.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusion_kit.benchmark.cases import Case
from diffusion_kit.benchmark.contenders import SLOW, names_on
from diffusion_kit.benchmark.report import machine, measured, page

ROOT = Path(__file__).parents[1]
ROUNDS = 7
T2I, NET = "t2i_adapter", "controlnet"


def case(*controls: str, dtype: str = "bfloat16") -> Case:
    return Case("large", controls, dtype, steps=30, side=128, device="cuda")


def main() -> None:
    out = ROOT / "outputs" / "cuda.json"
    out.parent.mkdir(exist_ok=True)
    names = [name for name in names_on("cuda") if not name.endswith("aoti")]
    quick = [name for name in names if not name.endswith(SLOW)]
    results = measured([case()], names, out, ROUNDS)
    results += measured([case(T2I), case(NET), case(T2I, NET), case(dtype="float16")], quick, out, ROUNDS)
    (ROOT / "docs/benchmarks-cuda.md").write_text(page(results, "scripts/verify cuda"))
    ratios = [{name: own.get("ratio") for name, own in result["contenders"].items()} for result in results]
    print(json.dumps({"machine": machine(), "cases": [r["case"] for r in results], "times diffusers": ratios}))


if __name__ == "__main__":
    main()
