"""Training a T2I-Adapter beside the operations of diffusers' train_t2i_adapter_sdxl.py: losses, time, memory, FLOPs.

python benchmarks/training_speed.py [--json]      (a few minutes; for figures that count, on an otherwise idle machine)

The reference leaves the base's weights differentiable, so that the backward pass makes their gradients and keeps them; it
encodes each picture in each step. Text embeddings are made beforehand in both; settings, float32 and draws are the same.

The base is an SDXL with random weights, a quarter of all widths and a quarter of the positions, latents of 64 x 64: so
attention, convolutions, linear layers and the autoencoder have the shares of FLOPs that they have in SDXL at 1024 pixels,
whose step is counted without being run. (Narrower ones spend their time on other things.) Steps alternate in one process on
one thread. Seconds are medians: of processor time, which is what counts, and of elapsed time. Peak memory is that of three
steps in a process of their own.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_kit.models.attention import installed
from diffusion_kit.training.bases import Base, posterior
from diffusion_kit.training.config import Config, ObjectiveConfig, parse
from diffusion_kit.training.data.samples import Batch, Sample, collate
from diffusion_kit.training.group import join
from diffusion_kit.training.keyed import Place
from diffusion_kit.training.loader import MicroBatches, batches
from diffusion_kit.training.loop import Trainer
from diffusion_kit.training.objective import make_objective, normal
from diffusion_kit.training.targets.t2i_adapter import T2IAdapterTarget
from diffusion_kit.training.targets.target import Target
from diffusion_kit.training.train import make_trainer

ROOT = Path(__file__).resolve().parents[1]
SHARE, SIDE, BATCH = 4, 512, 1  # widths are so many times smaller than SDXL's; pixels; pictures a step
STEPS, WARM = 10, 2  # whose losses are compared; of which the first are not timed
TOLERANCE = 1e-5  # of losses, relative
WANTED = {"kit": 1.25, "cached": 1.6}  # times the steps a second, at least
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SETTINGS: dict[str, Any] = {
    "target": "t2i_adapter",
    "steps": STEPS,
    "threads": 1,
    "objective": {"timesteps": "cubic"},
    "dropout": {"caption": 0.0, "condition": 0.0},
}
RATE, CLIP = 1e-4, 1.0


# The reference


@dataclass(frozen=True)
class Inputs:
    """What the reference is given in a step: B pictures (B, 3, H, W) in [-1, 1], and what the kit drew for them."""

    pixels: Tensor
    condition: Tensor
    prompt_embeds: Tensor
    text_embeds: Tensor
    time_ids: Tensor
    posterior: Tensor
    noise: Tensor
    timesteps: Tensor


class Reference:
    """The networks and the optimizer as the script leaves them: autoencoder frozen, UNet not."""

    def __init__(self, unet: Any, vae: Any, adapter: Any) -> None:
        self.unet, self.vae, self.adapter = (
            unet.train().requires_grad_(True),
            vae.requires_grad_(False),
            adapter.train(),
        )
        self.optimizer = torch.optim.AdamW(adapter.parameters(), RATE, weight_decay=1e-2)
        alphas = EulerDiscreteScheduler(**SCHEDULE).alphas_cumprod
        self.sigmas = ((1 - alphas) / alphas).sqrt()

    def loss(self, own: Inputs) -> Tensor:
        """Weighted error of the denoised latents: x + sigma e is denoised, of weight 1 / sigma^2."""
        latent = self.vae.encode(own.pixels).latent_dist
        x = (latent.mean + latent.std * own.posterior) * self.vae.config.scaling_factor
        sigma = self.sigmas.to(x)[own.timesteps].view(-1, 1, 1, 1)
        noisy = x + sigma * own.noise
        prediction = self.unet(
            noisy / (sigma**2 + 1).sqrt(),
            own.timesteps,
            encoder_hidden_states=own.prompt_embeds,
            added_cond_kwargs={"text_embeds": own.text_embeds, "time_ids": own.time_ids},
            down_intrablock_additional_residuals=list(self.adapter(own.condition)),
        ).sample
        return (sigma**-2 * (noisy - sigma * prediction - x) ** 2).mean()

    @torch.enable_grad()
    def step(self, own: Inputs) -> float:
        loss = self.loss(own)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def load_reference(base: str, adapter: Any) -> Reference:
    unet, vae = (
        cls.from_pretrained(base, subfolder=name)
        for cls, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    return Reference(unet, vae, adapter)


# The kit


def config(folder: Path, base: str, data: str, *, cached: bool, **more: Any) -> Config:
    """Text embeddings from a cache; with `cached` latents too."""
    cache = {"folder": str(folder / f"cache-{cached}"), "latents": cached}
    own = {"sources": [{"path": data}], "resolution": SIDE, "workers": 0}
    optimizer = {"learning_rate": RATE, "clip": CLIP}
    tree = {"output": str(folder), "base": {"model": base}, "data": own, "cache": cache, "optimizer": optimizer}
    return parse({**SETTINGS, "batch": BATCH, **tree, **more}, "benchmark")


def load_kit(own: Config) -> tuple[Trainer, list[list[Batch]]]:
    """A trainer, and the micro-batches of each of its steps."""
    trainer = make_trainer(own, join(own), lambda line: None)
    plan = MicroBatches(trainer.order, trainer.part, 0, own.steps)
    return trainer, list(batches(trainer.pictures, plan, 0))


def learn(trainer: Trainer, step: list[Batch]) -> float:
    """A step as the trainer's run makes it; the loss."""
    with torch.enable_grad(), trainer.executing():
        trainer.learn(step)
    return trainer.figures.losses[-1]


def inputs(trainer: Trainer, batch: Batch) -> Inputs:
    """What the kit sees and draws, for the reference."""
    base, places = trainer.target.base, batch.places
    assert base is not None
    pixels = torch.stack([sample.pixels for sample in batch.samples if sample.pixels is not None])
    shape = base.moments(batch.samples).chunk(2, 1)[0].shape[1:]
    found = base.conditioning(batch)
    return Inputs(
        pixels,
        batch.condition,  # type: ignore[arg-type]
        found["prompt_embeds"],
        found["add_text_embeds"],
        found["add_time_ids"],
        normal(places, "posterior", shape),
        base.objective.noise(places, shape),
        base.objective.timesteps(places),
    )


# The three that are compared


@dataclass
class Arms:
    """A step of each of "reference", "kit" and "cached", by its number; the loss."""

    steps: dict[str, Callable[[int], float]]
    given: list[Inputs]


def arms(folder: Path, base: str, data: str, **more: Any) -> Arms:
    kit, plain = load_kit(config(folder, base, data, cached=False, **more))
    cached, kept = load_kit(config(folder, base, data, cached=True, **more))
    with torch.no_grad():
        given = [inputs(kit, step[0]) for step in plain]
    adapter = T2IAdapter(**kit.target.control.config)
    adapter.load_state_dict(kit.target.control.state_dict())
    reference = load_reference(base, adapter)
    return Arms(
        {
            "reference": lambda k: reference.step(given[k]),
            "kit": lambda k: learn(kit, plain[k]),
            "cached": lambda k: learn(cached, kept[k]),
        },
        given,
    )


def worst(losses: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative difference of the losses to the reference's."""
    reference = losses["reference"]
    return {
        name: max(abs(a - b) / b for a, b in zip(losses[name], reference, strict=True)) for name in ("kit", "cached")
    }


def timed(own: Arms) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Losses of all steps; median seconds of a step in processor time and elapsed."""
    losses: dict[str, list[float]] = {name: [] for name in own.steps}
    clocks = {"processor": time.process_time, "elapsed": time.perf_counter}
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in own.steps} for clock in clocks}
    for k in range(STEPS):
        for name, step in own.steps.items():
            start = {clock: now() for clock, now in clocks.items()}
            losses[name].append(step(k))
            for clock, now in clocks.items():
                times[clock][name].append(now() - start[clock])
    medians = {
        clock: {name: statistics.median(values[WARM:]) for name, values in each.items()}
        for clock, each in times.items()
    }
    return losses, medians


# FLOPs


def flops(run: Callable[[], Any]) -> int:
    """Of a call, with attention as plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def ratios(counts: Mapping[str, float]) -> dict[str, float]:
    return {name: counts["reference"] / counts[name] for name in ("kit", "cached")}


def sdxl_flops() -> dict[str, int]:
    """Of a step with one picture of 1024 pixels, on SDXL's shapes, without weights or numbers."""
    with torch.device("meta"):
        unet, vae = make_unet(1), make_vae(1)
        adapter = make_adapter(1)
        pixels, condition, moments = (
            torch.zeros(1, 3, 1024, 1024),
            torch.zeros(1, 3, 1024, 1024),
            torch.zeros(8, 128, 128),
        )
        text = {"prompt_embeds": torch.zeros(77, 2048), "add_text_embeds": torch.zeros(1280)}
        time_ids = torch.zeros(6)
    sample = Sample(Place(0, 0, 0), "", 1.0, None, condition[0], "", False, False, time_ids, moments=moments, text=text)
    own = parse({**SETTINGS, "output": "none"}, "benchmark")
    target = T2IAdapterTarget.__new__(T2IAdapterTarget)
    Target.__init__(target, own)
    pipe: Any = SimpleNamespace(unet=unet.requires_grad_(False), vae=vae.requires_grad_(False))
    objective = make_objective(EulerDiscreteScheduler(**SCHEDULE), ObjectiveConfig())
    target.base, target.adapter = Base(pipe, objective, [], None), adapter  # type: ignore[arg-type]

    @torch.enable_grad()
    def step() -> None:
        with installed(unet):
            target(collate([sample])).loss.sum().backward()

    cached = flops(step)
    kit = cached + flops(lambda: posterior(vae, pixels))
    latents = moments[None].chunk(2, 1)[0]
    given = Inputs(
        pixels,
        condition,
        *(value[None] for value in (*text.values(), time_ids)),
        posterior=latents,
        noise=latents,
        timesteps=torch.zeros(1, dtype=torch.long, device="meta"),
    )
    reference = Reference(unet, vae, adapter)

    @torch.enable_grad()
    def reference_step() -> None:
        reference.loss(given).backward()

    return {"reference": flops(reference_step), "kit": kit, "cached": cached}


# Memory


def peak(step: Callable[[int], float]) -> int:
    """Most bytes that the process held while it made three steps."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for k in range(3):
        step(k)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_of(name: str, folder: Path) -> int:
    """In this process; the folder holds base, data, caches and inputs."""
    base, data = str(folder / "base"), str(folder / "data")
    if name != "reference":
        trainer, steps = load_kit(config(folder, base, data, cached=name == "cached"))
        return peak(lambda k: learn(trainer, steps[k]))
    given = [Inputs(**values) for values in torch.load(folder / "inputs.pt")]
    reference = load_reference(base, make_adapter(SHARE))
    return peak(lambda k: reference.step(given[k]))


def peaks(folder: Path) -> dict[str, int]:
    found = {}
    for name in ("reference", "kit", "cached"):
        command = [sys.executable, __file__, "peak", name, str(folder)]
        found[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


# The base


def make_unet(share: int, pooled: int = 1280) -> UNet2DConditionModel:
    """SDXL's, of widths that are `share` times smaller."""
    return UNet2DConditionModel(
        block_out_channels=(320 // share, 640 // share, 1280 // share),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20) if share == 1 else (1, 2, 5),  # numbers of heads
        cross_attention_dim=2048 // share,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256 // share,
        projection_class_embeddings_input_dim=pooled + 6 * 256 // share,
        norm_num_groups=32 if share == 1 else 8,
    )


def make_vae(share: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128 // share, 256 // share, 512 // share, 512 // share),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 if share == 1 else 8,
        scaling_factor=0.13025,
    )


def make_adapter(share: int) -> T2IAdapter:
    return T2IAdapter(3, [size // share for size in (320, 640, 1280, 1280)], 2, 16, "full_adapter_xl")


def prepare(folder: Path) -> None:
    """Base and data."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest
    import training_models
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    wide = 2048 // SHARE
    pipe = StableDiffusionXLPipeline(
        vae=make_vae(SHARE),
        unet=make_unet(SHARE, pooled=32),
        text_encoder=conftest.text_encoder(CLIPTextModel, wide // 2, 5),
        text_encoder_2=conftest.text_encoder(CLIPTextModelWithProjection, wide // 2, 6),
        tokenizer=conftest.tokenizer(),
        tokenizer_2=conftest.tokenizer(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
    )
    pipe.save_pretrained(folder / "base", safe_serialization=True)
    shutil.copytree(training_models.data(8, SIDE), folder / "data")


def measure(folder: Path) -> dict[str, Any]:
    prepare(folder)
    base, data = str(folder / "base"), str(folder / "data")
    own = arms(folder, base, data)
    losses, seconds = timed(own)
    counted = {name: flops(lambda name=name: own.steps[name](0)) for name in own.steps}
    torch.save(
        [{f.name: getattr(given, f.name) for f in fields(given)} for given in own.given[:3]], folder / "inputs.pt"
    )
    memory = peaks(folder)
    weights = sum(p.numel() for p in UNet2DConditionModel.from_pretrained(base, subfolder="unet").parameters())
    return {
        "base": {"parameters": weights, "latents": SIDE // 8, "batch": BATCH, "threads": torch.get_num_threads()},
        "losses, largest relative difference": worst(losses),
        "seconds a step": seconds,
        "times the steps a second": {clock: ratios(values) for clock, values in seconds.items()},
        "FLOP ratio": ratios(counted),
        "FLOP ratio of SDXL at 1024 pixels": ratios(sdxl_flops()),
        "peak MB of steps": {name: round(value / 1e6) for name, value in memory.items()},
        "gradients of the base, MB": round(4 * weights / 1e6),
    }


def missed(found: dict[str, Any]) -> list[str]:
    """What is not as it was promised."""
    faster, memory = found["times the steps a second"]["processor"], found["peak MB of steps"]
    said = [
        f"{name}: {faster[name]:.2f} times as fast, not {least}"
        for name, least in WANTED.items()
        if faster[name] < least
    ]
    for name in WANTED:
        if (error := found["losses, largest relative difference"][name]) > TOLERANCE:
            said.append(f"{name}: losses differ by {error:.1e}")
        if (saved := memory["reference"] - memory[name]) < found["gradients of the base, MB"]:
            said.append(f"{name}: {saved} MB less memory only")
    return said


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    print(json.dumps(found, indent=None if "--json" in sys.argv else 1))
    if said := missed(found):
        sys.exit("; ".join(said))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        torch.set_num_threads(1)
        print(peak_of(sys.argv[2], Path(sys.argv[3])))
    else:
        main()
