"""What the approximations change that are not the step cache's: weights of 8 bits, and guidance in a part of the run.

python benchmarks/approximate.py

The embedded model under its controls, beside the exact run, as benchmarks/step_cache.py measures it, but on all cores, of
which processor time is added up. Half an hour for each control on two of them; goes on where it was stopped
(outputs/approximate.json), if no source has changed.
"""

from __future__ import annotations

import json

from step_cache import CONTROLS, ROOT, Arm, measure, table

from diffusion_kit.benchmark.report import code

KEPT = ROOT / "outputs" / "approximate.json"
ARMS = [
    Arm("exact", half=False),
    *(Arm(f"weights {scheme}", half=False, quantised=scheme) for scheme in ("int8", "int8_dynamic")),
    Arm("guidance in the first half", half=False, interval=(0.0, 0.5)),
    Arm("guidance in the middle half", half=False, interval=(0.25, 0.75)),
]


def main() -> None:
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    keys = {name: f"{name}, sources {code()}" for name in CONTROLS}
    for name, key in keys.items():
        if key not in kept:
            kept[key] = measure(name, ARMS)
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept))
    measured = [row for key in keys.values() for row in kept[key]]
    print(table(measured))
    print(json.dumps({"rows": measured}))


if __name__ == "__main__":
    main()
