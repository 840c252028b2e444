"""Two processes with half of the batch each beside one with the whole, over 50 steps, in every way of sharing; each
comparison is made again with three faults put in on purpose, which it has to find; runs go on bit for bit, and checkpoints
between one process and two.

python scripts/verify_parallel.py       needs deepspeed, and libaio for NVMe
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from parallel_worker import FAULTS  # noqa: E402
from test_parallel import apart, case, gradient, kept, losses, moved, run  # noqa: E402

STEPS, FEW = 50, 6
GRADIENT, LOSS, MOVED = 1e-5, 1e-5, 1e-3  # bounds: relative, and of the weights against how far they moved


def sharing(folder: Path) -> dict[str, dict[str, Any]]:
    """What is put over the configuration, by the name of the way."""
    offload = {"offload_optimizer": {"device": "cpu"}}
    nvme = {"device": "nvme", "nvme_path": str(folder / "nvme"), "buffer_count": 6}

    def zero(stage: int, **more: Any) -> dict[str, Any]:
        return {"deepspeed": {"zero_optimization": {"stage": stage, **more}}}

    return {
        "DDP": {},
        **{f"ZeRO {stage}": zero(stage) for stage in range(4)},
        "ZeRO 3, base whole": {**zero(3), "base": {"spread": False}},
        "ZeRO 2, optimizer on the CPU": zero(2, **offload),
        "ZeRO 3, all on the CPU": zero(3, **offload, offload_param={"device": "cpu"}),
        "ZeRO 3, all on NVMe": zero(3, offload_optimizer=nvme, offload_param=nvme),
    }


def compared(one: Path, two: Path, step: int) -> dict[str, float]:
    first, second = losses(one), losses(two)
    return {
        "gradient": apart(gradient(one), gradient(two)),
        "loss": max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True)),
        "first loss": abs(first[0] - second[0]) / abs(first[0]),
        "weights": moved(one, two, step),
    }


def same(found: dict[str, float]) -> bool:
    return found["gradient"] < GRADIENT and found["first loss"] < LOSS and found["weights"] < MOVED


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = sharing(folder)
        long = {"steps": STEPS, "checkpoints": {"every": 1, "keep": 99}, "validation": {"every": 0}}
        short = {**long, "steps": FEW}

        def made(output: str, way: str, own: dict[str, Any], **more: Any) -> dict[str, Any]:
            return {**case(folder / output, None, **{**own, **ways[way]}), **more}

        run([made("one", "DDP", long)], 1, folder)
        figures: dict[str, Any] = {}
        for way in ways:
            run([made(way, way, long)], 2, folder)
            figures[way] = compared(folder / "one", folder / way, STEPS)
            figures[way]["passed"] = same(figures[way])
            print(way, json.dumps(figures[way]), file=sys.stderr, flush=True)
        run([made("few", "DDP", short)], 1, folder)
        for way in ways:
            run([made(f"{way} {fault}", way, short, fault=fault) for fault in FAULTS], 2, folder)
            found = {fault: compared(folder / "few", folder / f"{way} {fault}", FEW) for fault in FAULTS}
            figures[way]["faults"] = {fault: {**own, "found": not same(own)} for fault, own in found.items()}
            print(way, json.dumps(figures[way]["faults"]), file=sys.stderr, flush=True)
        for way in ("DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3"):
            figures[way] |= going_on(folder, way, made, short)
            print(way, json.dumps({key: figures[way][key] for key in ENDS}), file=sys.stderr, flush=True)
    print(json.dumps({"ways": figures, "seconds": round(time.monotonic() - start)}))


ENDS = ("stopped and gone on", "2 to 1", "1 to 2")


def going_on(folder: Path, way: str, made: Any, short: dict[str, Any]) -> dict[str, Any]:
    """A run of two that stops after half of its steps and goes on with two, with one, and one that goes on with two."""
    half = {**short, "steps": FEW // 2}
    names = [f"{way} {end}" for end in ENDS]
    run([made(name, way, half) for name in names[:2]], 2, folder)
    run([made(names[2], "DDP", half)], 1, folder)
    run([made(names[0], way, short, resume=True), made(names[2], way, short, resume=True)], 2, folder)
    run([made(names[1], "DDP", short, resume=True)], 1, folder)
    whole = folder / way
    weights, other = kept(whole, FEW, "weights"), kept(folder / names[0], FEW, "weights")
    bits = all(bool((weights[key] == other[key]).all()) for key in weights)
    return {ENDS[0]: "bit for bit" if bits else moved(whole, folder / names[0], FEW)} | {
        end: moved(folder / "few", folder / name, FEW) for end, name in zip(ENDS[1:], names[1:], strict=True)
    }


if __name__ == "__main__":
    main()
