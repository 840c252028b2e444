"""Every row of DeepSpeed's guide that a CPU can run, run: a training of a few steps in two processes, whose losses are
finite and whose weights move; those that need a GPU are named with why.

python scripts/verify_deepspeed.py [ROW ...]       needs deepspeed, and libaio for NVMe
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_parallel import case, kept, losses, run  # noqa: E402

AUTO = "auto"
ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), AUTO)}
WARMUP = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), AUTO)
SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR": WARMUP,
    "WarmupDecayLR": {**WARMUP, "total_num_steps": AUTO},
    "WarmupCosineLR": {"total_num_steps": AUTO, "warmup_num_steps": AUTO},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 1, "lr_range_test_step_rate": 1.0},
    "OneCycle": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3, "cycle_first_step_size": 2},
}
ZERO2 = {"stage": 2}
NEEDS = {  # what cannot run here: its configuration is checked and filled in tests
    "fp16": "a GPU",
    "TF32": "a GPU",
    "apex": "a GPU, and apex",
    "NCCL": "GPUs",
    "Lamb": "a GPU, on which alone DeepSpeed has it",
    "OneBitAdam": "NCCL or MPI, in which alone DeepSpeed sends compressed moments",
}
STEPS = 4


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def rows(nvme: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, DeepSpeed's configuration, what is put over the kit's."""
    for file in sorted((ROOT / "configs/deepspeed").glob("*.json")):
        text = file.read_text().replace("/local_nvme", str(nvme))
        tree = json.loads(text.replace('"buffer_size": 100000000', '"buffer_size": 1000000'))  # networks are small
        yield f"configs/deepspeed/{file.name}", tree, {}
    yield "bf16", {**zero(2), "bf16": {"enabled": True}}, {}
    yield (
        "bf16, gradients added in float32",
        {**zero(1), "data_types": {"grad_accum_dtype": "fp32"}},
        {"precision": "bf16"},
    )
    yield "communication_data_type", {**zero(2), "communication_data_type": "fp32"}, {"precision": "bf16"}
    for name, params in SCHEDULERS.items():
        yield f"{name}, the kit's optimizer", {**zero(2), "scheduler": {"type": name, "params": params}}, {}
    both = {"optimizer": ADAMW, "scheduler": {"type": "WarmupLR", "params": WARMUP}}
    yield "DeepSpeed's optimizer and scheduler", {**zero(2), **both}, {}
    yield (
        "AdamW of DeepSpeed, the kit's schedule",
        {**zero(2), "optimizer": ADAMW},
        {"optimizer": {"schedule": "cosine"}},
    )
    adam = {"type": "Adam", "params": {**ADAMW["params"], "torch_adam": True}}
    yield "Adam, torch's", {**zero(1), "optimizer": adam}, {}
    radam = {"type": "RAdam", "params": {"lr": AUTO}}
    yield "an untested optimizer", {**zero(2), "zero_allow_untested_optimizer": True, "optimizer": radam}, {}
    free = {**zero(2, offload_optimizer={"device": "cpu"}), "zero_force_ds_cpu_optimizer": False}
    yield "offload, another optimizer than DeepSpeed's", free, {}
    yield (
        "gradient accumulation and clipping",
        {**zero(2), "gradient_accumulation_steps": 2, "gradient_clipping": 0.5},
        {"micro_batch": None},
    )
    yield "buckets", zero(2, overlap_comm=True, reduce_bucket_size=10000, allgather_bucket_size=10000), {}
    small = {f"stage3_{name}": 10000 for name in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")}
    small["stage3_param_persistence_threshold"] = 0
    yield "every stage3 value, sub_group_size", zero(3, sub_group_size=10000, **small), {}
    yield "wall_clock_breakdown, steps_per_print", {**zero(2), "wall_clock_breakdown": True, "steps_per_print": 1}, {}
    yield "activation_checkpointing", {**zero(2), "activation_checkpointing": {"profile": False}}, {}
    yield "use_node_local_storage", {**zero(2), "checkpoint": {"use_node_local_storage": True}}, {}
    yield "one process", zero(2), {"processes": 1}


def tried(folder: Path, number: int, tree: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    own = {"steps": STEPS, "checkpoints": {"every": 1, "keep": 9}, "validation": {"every": 0}, **more}
    processes = own.pop("processes", 2)
    output = folder / str(number)
    made = case(output, None, deepspeed=tree, **{key: value for key, value in own.items() if value is not None})
    if own.get("micro_batch", 1) is None:
        del made["config"]["micro_batch"]
    try:
        run([made], processes, folder)
    except AssertionError as error:
        return {"passed": False, "error": str(error)[-1500:]}
    first, last = kept(output, 1, "weights"), kept(output, STEPS, "weights")
    moved = sum(float((last[name] - first[name]).square().sum()) for name in last) ** 0.5
    rates = [json.loads(line)["learning_rate"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = losses(output)
    passed = len(found) == STEPS and all(map(math.isfinite, found)) and moved > 0
    return {"passed": passed, "losses": found, "moved": moved, "learning_rates": rates}


def main(only: list[str]) -> None:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (row, tree, more) in enumerate(rows(folder / "nvme")):
            if only and not any(word in row for word in only):
                continue
            figures[row] = tried(folder, number, tree, more)
            print(row, json.dumps(figures[row]), file=sys.stderr, flush=True)
    print(json.dumps({"rows": figures, "only by dry run": NEEDS}))


if __name__ == "__main__":
    main(sys.argv[1:])
