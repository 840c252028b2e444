"""Two processes with half of the batch each beside one with the whole, over 50 steps, in every way of sharing; each
comparison is made again with three faults put in on purpose, which it has to find; runs go on bit for bit, and checkpoints
between one process and two.

python scripts/verify_parallel.py [WAY ...]       needs deepspeed, and libaio for NVMe
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
from safetensors.torch import load_file  # noqa: E402
from test_parallel import apart, case, gradient, kept, losses, moved, run  # noqa: E402

from diffusion_kit.training.consolidate import consolidate  # noqa: E402

STEPS, FEW = 50, 6
GRADIENT, LOSS, MOVED = 1e-5, 1e-5, 1e-3  # bounds: relative, and of the weights against how far they moved


def sharing(folder: Path) -> dict[str, dict[str, Any]]:
    """What is put over the configuration, by the name of the way."""
    offload = {"offload_optimizer": {"device": "cpu"}}
    nvme = {"device": "nvme", "nvme_path": str(folder / "nvme"), "buffer_count": 6}
    small = {**nvme, "buffer_size": 10_000_000}  # by default 10^8 numbers, locked, six times in each of the four runs

    def zero(stage: int, **more: Any) -> dict[str, Any]:
        return {"deepspeed": {"zero_optimization": {"stage": stage, **more}}}

    return {
        "DDP": {},
        **{f"ZeRO {stage}": zero(stage) for stage in range(4)},
        "ZeRO 3, base whole": {**zero(3), "base": {"spread": False}},
        "ZeRO 2, optimizer on the CPU": zero(2, **offload),
        "ZeRO 3, all on the CPU": zero(3, **offload, offload_param={"device": "cpu"}),
        "ZeRO 3, all on NVMe": zero(3, offload_optimizer=nvme, offload_param=small),
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


def main(only: list[str]) -> None:
    start = time.monotonic()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = {way: more for way, more in sharing(folder).items() if way in only or not only}
        long = {"steps": STEPS, "checkpoints": {"every": 1, "keep": 99}, "validation": {"every": 0}}
        short = {**long, "steps": FEW}

        def made(output: str, way: str, own: dict[str, Any], **more: Any) -> dict[str, Any]:
            return {**case(folder / output, None, **{**own, **ways.get(way, {})}), **more}

        run([made("one", "", long), made("few", "", short)], 1, folder)
        for way in ways:
            run(
                [made(way, way, long), *(made(f"{way} {fault}", way, short, fault=fault) for fault in FAULTS)],
                2,
                folder,
            )
            own = compared(folder / "one", folder / way, STEPS)
            found = {fault: compared(folder / "few", folder / f"{way} {fault}", FEW) for fault in FAULTS}
            faults = {fault: {**values, "found": not same(values)} for fault, values in found.items()}
            figures[way] = {**own, "passed": same(own), "faults": faults}
            if way in ("DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3"):
                figures[way] |= going_on(folder, way, made, short)
            if way == "ZeRO 3":
                figures[way]["consolidated"] = consolidated(folder / way, folder / "consolidated")
            print(way, json.dumps(figures[way]), file=sys.stderr, flush=True)
    print(json.dumps({"ways": figures, "seconds": round(time.monotonic() - start)}))


ENDS = ("stopped and gone on", "2 to 1", "1 to 2")


def consolidated(run: Path, out: Path) -> dict[str, Any]:
    """The last checkpoint, made a result by one process, beside the result that the run's processes wrote together."""
    consolidate(run, out)
    name = "diffusion_pytorch_model.safetensors"
    live, offline = load_file(run / "result" / name), load_file(out / name)
    return {"tensors": len(live), "passed": all(bool((live[key] == offline[key]).all()) for key in live)}


def going_on(folder: Path, way: str, made: Any, short: dict[str, Any]) -> dict[str, Any]:
    """A run of two that stops after half of its steps and goes on with two, with one, and one that goes on with two."""
    half = {**short, "steps": FEW // 2}
    names = [f"{way} {end}" for end in ENDS]
    whole = folder / f"{way} undisturbed"
    run([made(whole.name, way, short), *(made(name, way, half) for name in names[:2])], 2, folder)
    run([made(names[2], "", half)], 1, folder)
    run([made(names[0], way, short, resume=True), made(names[2], way, short, resume=True)], 2, folder)
    run([made(names[1], "", short, resume=True)], 1, folder)
    weights, other = kept(whole, FEW, "weights"), kept(folder / names[0], FEW, "weights")
    bits = all(bool((weights[key] == other[key]).all()) for key in weights)
    gaps = {end: moved(folder / "few", folder / name, FEW) for end, name in zip(ENDS[1:], names[1:], strict=True)}
    return {ENDS[0]: {"bit for bit": bits, "passed": bits}} | {
        end: {"weights": gap, "passed": gap < MOVED} for end, gap in gaps.items()
    }


if __name__ == "__main__":
    main(sys.argv[1:])
