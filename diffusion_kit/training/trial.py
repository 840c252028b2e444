"""`train --check`: what the network sees, whether it learns, and what a run will take; nothing of the run is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .config import Config
from .data.samples import Batch
from .loop import Trainer
from .memory import first_batch, peak
from .validation import picture

STEPS = 30  # in which one batch is learned by heart
RATES = 1e-3, 1e-4  # of a network that is new, and of one that has learned already
FALL = 0.98  # of the loss at least
SIDE, LINE, COLUMNS = 160, 28, 4  # pixels of the sheet's pictures and captions; pictures in a row


def check(trainer: Trainer, sheet: Path, say: Callable[[str], None]) -> bool:
    """Whether one batch could be learned; says what was found and draws the sheet."""
    batch = first_batch(trainer, trainer.part.micro)
    bad = [sample.problem for sample in batch.samples if sample.problem]
    for problem in bad:
        say(f"left out: {problem}")
    if len(bad) == len(batch):
        raise ValueError("no picture of the first batch could be used: see the lines above")
    draw(batch).save(sheet)
    say(f"what the network sees is in {sheet}")
    losses, seconds = learn(trainer, batch)
    first, last = losses[0], sum(losses[-3:]) / 3
    learned = last < FALL * first
    verdict = "learned" if learned else "NOT learned: is everything frozen, or the picture blank?"
    say(f"one batch, {STEPS} steps: loss {first:.4f} -> {last:.4f}: {verdict}")
    share = trainer.order.batch / (len(batch) * trainer.part.processes)  # micro-batches a step
    whole = trainer.config.steps * share * seconds
    say(
        f"memory {peak(trainer.accelerator.device) / 1e9:.2f} GB, {share * seconds:.2f} s a step, {_hours(whole)} in all"
    )
    return learned


def learn(trainer: Trainer, batch: Batch) -> tuple[list[float], float]:
    """Losses of steps on the same batch with the same draws, and the median of their seconds."""
    optimizer = torch.optim.AdamW(
        [p for p in trainer.target.parameters() if p.requires_grad], RATES[has_learned(trainer.config)]
    )
    losses, times = [], []
    for _ in range(STEPS):
        start = time.monotonic()
        with torch.enable_grad(), trainer.executing():
            values, _ = trainer.parallel.module(batch.to(trainer.accelerator.device))
            loss = (values * batch.weight.to(values)).sum() / max(1.0, float(batch.weight.sum()))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        times.append(time.monotonic() - start)
    return losses, sorted(times)[len(times) // 2]


def has_learned(config: Config) -> bool:
    return bool(config.init_from) or config.target in ("unet", "prior", "hint_decoder")


def draw(batch: Batch) -> Image.Image:
    """Pictures and their conditions side by side, captions below, after crops and dropout."""
    samples = batch.samples[:32]
    wide = 2 if batch.condition is not None else 1
    rows = -(-len(samples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * wide * SIDE, rows * (SIDE + LINE)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, sample in enumerate(samples):
        left, top = k % COLUMNS * wide * SIDE, k // COLUMNS * (SIDE + LINE)
        shown = [] if sample.pixels is None else [sample.pixels / 2 + 0.5]
        shown += [sample.condition] if sample.condition is not None else []
        for n, values in enumerate(shown):
            own = picture(values[:3]).convert("RGB")
            own.thumbnail((SIDE, SIDE)) if max(own.size) > SIDE else None
            sheet.paste(own, (left + n * SIDE, top))
        pen.text((left + 2, top + SIDE + 2), (sample.caption or "(no caption)")[: 26 * wide], "black")
    return sheet


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
