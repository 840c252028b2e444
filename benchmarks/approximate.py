"""What the approximations change that are not the step cache's: weights of 8 bits, and guidance in a part of the run.

python benchmarks/approximate.py

The embedded model under its controls, beside the exact run, as benchmarks/step_cache.py measures it.
"""

from __future__ import annotations

import json

import torch
from step_cache import CONTROLS, Arm, measure, table

if __name__ == "__main__":
    torch.set_num_threads(1)
    arms = [
        Arm("exact", half=False),
        *(Arm(f"weights {scheme}", half=False, quantised=scheme) for scheme in ("int8", "int8_dynamic")),
        Arm("guidance in the first half", half=False, interval=(0.0, 0.5)),
        Arm("guidance in the middle half", half=False, interval=(0.25, 0.75)),
    ]
    measured = [row for name in CONTROLS for row in measure(name, arms)]
    print(table(measured))
    print(json.dumps({"rows": measured}))
