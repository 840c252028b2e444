#!/usr/bin/env python3
"""A plan beside runs: peak memory of processes, and bytes that they send in a step; prints JSON.

scripts/verify_plan.py             all cases that can run here (ZeRO needs `deepspeed`), some minutes
scripts/verify_plan.py CASE...     some of them

Each run is a training of a base of random weights, large enough that interpreter and libraries are the smaller part. Memory
is the largest resident set of a process in its third to fifth step, as the kernel counts it. Bytes are counted in a hook of
DDP, and in ZeRO by wrapping the collectives of torch.distributed, each at what a ring sends for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FIRST, LAST = 2, 5  # steps that are watched: in the first ones buckets and caches are made
SIDE = 256  # pixels
WIDTHS = (128, 256, 512)  # of the base's UNet

# Configurations, and in how many processes each is run.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "cache": ({"batch": 1}, 1),  # fills the cache of the others, and is not compared
    "adapter-one": ({"micro_batch": 2, "batch": 2}, 1),
    "adapter-ddp": ({"micro_batch": 1, "batch": 2}, 2),
    "adapter-ddp-checkpointing": ({"micro_batch": 2, "batch": 4, "gradient_checkpointing": True}, 2),
    "unet-one": ({"target": "unet", "batch": 1}, 1),
    "unet-ddp": ({"target": "unet", "batch": 2}, 2),
    "unet-ddp-accumulation-ema": ({"target": "unet", "batch": 4, "micro_batch": 1, "ema": 0.9}, 2),
    "unet-zero1": ({"target": "unet", "batch": 2, "deepspeed": {"zero_optimization": {"stage": 1}}}, 2),
    "unet-zero2": ({"target": "unet", "batch": 2, "deepspeed": {"zero_optimization": {"stage": 2}}}, 2),
    "unet-zero3": ({"target": "unet", "batch": 2, "deepspeed": {"zero_optimization": {"stage": 3}}}, 2),
    "adapter-zero3": ({"batch": 2, "deepspeed": {"zero_optimization": {"stage": 3}}}, 2),
}


# In a process of a run


def forget_peak() -> None:
    """The largest resident set so far becomes that of now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most, RssFile of it in pages of files, which the kernel may take back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(own for own in lines if own.startswith(name)).split()[1])


def ring(name: str, tensors: list[Any], size: int) -> float:
    """Bytes that a process sends in a ring of `size` for a collective of `tensors`, the whole of what is moved."""
    whole = sum(own.numel() * own.element_size() for own in tensors)
    return (2 if name == "all_reduce" else 1) * (size - 1) / size * whole


def counted(sent: Counter[str]) -> None:
    """Wraps torch.distributed's collectives, before anything takes them."""
    import torch.distributed as dist

    # name: place of the tensor, or list of tensors, that is whole
    whole = {"all_reduce": 0, "all_gather": 0, "all_gather_into_tensor": 0, "broadcast": 0, "reduce": 0}
    whole |= {"reduce_scatter": 1, "reduce_scatter_tensor": 1}
    for name, place in whole.items():
        own: Callable[..., Any] = getattr(dist, name)

        def wrapped(*args: Any, own: Any = own, name: str = name, place: int = place, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()][place]
            tensors = list(given) if isinstance(given, (list, tuple)) else [given]
            sent[name] += ring(name, tensors, dist.get_world_size())  # type: ignore[assignment]
            return own(*args, **kwargs)

        setattr(dist, name, wrapped)


def worker(file: str) -> None:
    """A run: writes its figures beside the case."""
    case = json.loads(Path(file).read_text())
    sent: Counter[str] = Counter()
    if case["config"].get("deepspeed"):
        counted(sent)
        import deepspeed  # noqa: F401
    import torch.distributed as dist

    from diffusion_kit.training import group, train
    from diffusion_kit.training.config import parse
    from diffusion_kit.training.loop import Trainer
    from diffusion_kit.training.parallel.settings import derived

    config = parse(case["config"], "case")
    accelerator = group.join(config)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    trainer = train.make_trainer(derived(config, accelerator.num_processes), accelerator, lambda line: None)
    if accelerator.num_processes > 1 and config.deepspeed is None:
        hook(trainer.parallel.module, sent)

    def after(own: Trainer) -> bool:
        if own.step == FIRST:
            sent.clear()
            forget_peak()
        return own.step == LAST

    trainer.run(after)
    peak = resident("VmHWM")
    each = {name: value / (LAST - FIRST) for name, value in sent.items()}
    found = {"peak": peak, "files": resident("RssFile"), "bytes": sum(each.values()), "collectives": each}
    Path(f"{file}.{accelerator.process_index}").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def hook(module: Any, sent: Counter[str]) -> None:
    """Counts what DDP sends of gradients."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, and not with strings
        sent["all_reduce"] += ring("all_reduce", [bucket.buffer()], dist.get_world_size())  # type: ignore[assignment]
        return allreduce_hook(state, bucket)

    module.register_comm_hook(None, counting)


# Around the runs


def make_base(folder: Path) -> None:
    """A pipeline of SDXL's kind of random weights."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from diffusion_kit.models.sources import embedded

    torch.manual_seed(0)
    own = embedded() / "tokenizer"
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(own)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    text |= {"projection_dim": 64, "vocab_size": len(tokenizer)}
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=WIDTHS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 3),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 64,
    )
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=[32, 32, 64, 64], latent_channels=4, norm_num_groups=8, **kinds)
    pipe = StableDiffusionXLPipeline(
        vae,
        CLIPTextModel(CLIPTextConfig(**text)),
        CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer,
        tokenizer,
        unet,
        EulerDiscreteScheduler(),
    )
    pipe.save_pretrained(folder, safe_serialization=True)


def make_pictures(folder: Path, count: int = 8) -> None:
    from PIL import Image

    folder.mkdir()
    rows = []
    for k in range(count):
        for name in (f"{k}.png", f"condition-{k}.png"):
            Image.effect_noise((SIDE, SIDE), 90).convert("RGB").save(folder / name)
        rows.append({"image": f"{k}.png", "conditioning_image": f"condition-{k}.png", "text": f"a {k}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def tree_of(name: str, root: Path) -> dict[str, Any]:
    own, _ = CASES[name]
    return {
        "target": "t2i_adapter",
        "output": str(root / name),
        "base": {"model": str(root / "base")},
        "data": {"sources": [{"path": str(root / "pictures")}], "resolution": SIDE, "workers": 0},
        "cache": {"folder": str(root / "cache")},
        "steps": LAST,
        "threads": 1,
        **own,
    }


def measure(name: str, root: Path) -> list[dict[str, Any]]:
    """What the processes of a run found."""
    processes = CASES[name][1]
    file = root / f"{name}.json"
    file.write_text(json.dumps({"config": tree_of(name, root)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = command if processes > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if "deepspeed" in CASES[name][0]:
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run([*command, __file__, "worker", str(file)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stdout + done.stderr)[-3000:]}")
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(processes)]


def planned(name: str, root: Path, known: dict[Any, Any]) -> dict[str, float]:
    """What the plan says of it; networks are measured once."""
    from diffusion_kit.training.config import parse
    from diffusion_kit.training.parallel.settings import derived
    from diffusion_kit.training.planning.footprint import footprint
    from diffusion_kit.training.planning.ladder import way_of
    from diffusion_kit.training.planning.plan import Networks
    from diffusion_kit.training.planning.traffic import traffic

    processes = CASES[name][1]
    config = derived(parse(tree_of(name, root), "case"), processes)
    networks = known.setdefault((config.target, bool(config.ema)), Networks(config, cpu=True))
    way = way_of(config, {}, processes, cpu=True)
    own = networks.measured(way.checkpointing)[0]
    need = footprint(own, way, networks.trace(way.checkpointing, way.micro))
    return {"numbers": own.trained + own.spread, "peak": sum(need.sums[:2]), "bytes": traffic(own, way).bytes}


def compared(name: str, root: Path, known: dict[Any, Any]) -> dict[str, Any]:
    """Both, and the plan's errors against the fullest process."""
    found, plan = measure(name, root), planned(name, root, known)
    errors = {}
    for key in ("peak", "bytes"):
        most = max(own[key] for own in found)
        errors[key] = round(plan[key] / most - 1, 4) if most else 0.0
    return {"processes": len(found), "plan": plan, "measured": found, "error": errors}


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="plan") as name:
        root = Path(name)
        make_base(root / "base")
        make_pictures(root / "pictures")
        measure("cache", root)
        yield root


def main(names: list[str]) -> None:
    known: dict[Any, Any] = {}
    can = importlib.util.find_spec("deepspeed") is not None
    with folder() as root:
        wanted = names or [name for name, (own, _) in CASES.items() if can or "deepspeed" not in own]
        print(json.dumps({name: compared(name, root, known) for name in wanted if name != "cache"}, indent=2))


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1:2] == ["worker"] else main(sys.argv[1:])
