"""Filling the cache: every view of every picture, every caption, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .bases import Base, embed
from .config import DTYPES_OF, Config
from .data.cache import Cache, caption_key, picture_bytes
from .data.keys import Known
from .data.samples import Pictures, View
from .loader import quiet_worker

TOGETHER = (8 * 1024**2, 64)  # pixels, and pictures, at most, that go through the autoencoder at once
EVERY = 60.0  # seconds, where no bar shows how far it is
CAPTIONS = 64  # captions that go through the encoders at once
BLOCK = 32  # pictures that one share has together: who makes a block, makes it in the same groups, and so the same bits


@dataclass(frozen=True)
class Job:
    """A view of a picture that is not whole in the cache, decoded; `problem` where that failed.

    Attributes:
        key: of its latents; `plain` of its condition, which is kept as it is unmirrored.
        read: files whose content was read for that.
    """

    key: str
    plain: str
    name: str
    pixels: Tensor | None
    condition: Tensor | None
    problem: str | None = None
    read: Sequence[tuple[Known, str]] = ()


@dataclass
class Missing:
    """Views that the cache lacks, as a dataset: `jobs` are (picture, view)."""

    pictures: Pictures
    cache: Cache
    jobs: list[tuple[int, View]]

    @property
    def unflipped(self) -> bool:
        """Whether every view is there unmirrored too, whose condition is the same."""
        return self.pictures.config.data.flip < 1

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> Job | None:
        index, view = self.jobs[number]
        record = self.pictures.record(index)
        try:
            key, plain = (self.pictures.key(record, replace(view, flip=flip)) for flip in (view.flip, False))
            latents, conditions = self.cache.latents, self.cache.conditions
            pixels = self.pictures.pixels(record, view) if latents is not None and key not in latents else None
            condition = None
            if conditions is not None and plain not in conditions and not (view.flip and self.unflipped):
                condition = picture_bytes(self.pictures.detected(record, replace(view, flip=False)))
            return Job(key, plain, record.name, pixels, condition, read=self.cache.keys.taken())
        except Exception as error:  # a reader of a damaged file may raise anything
            return Job("", "", record.name, None, None, f"{type(error).__name__}: {error}")


def fill(
    config: Config,
    base: Base | None,
    pictures: Pictures,
    cache: Cache,
    say: Callable[[str], None],
    part: tuple[int, int],
) -> int:
    """Puts what is missing into the cache; how many views were made.

    Args:
        part: (k, n): the k-th of n shares of the pictures, for several processes. What they make together, broken off and
            begun again or not, is what one makes alone, bit for bit; but where a picture or a caption occurs more than
            once, last digits may differ, with the others that go through the network at once.
    """
    dtype, blocks = DTYPES_OF[config.cache.dtype], blocks_of(len(pictures), part)
    if cache.text is not None and base is not None:
        with flushed(cache):
            fill_text(base, pictures, cache, dtype, blocks)
    if cache.latents is None and cache.conditions is None:
        return 0
    jobs = [(k, view) for block in blocks for k in block for view in tried(pictures.views, k)]
    made, seen, told = 0, 0, time.monotonic()
    with tqdm(total=len(jobs), desc="cache", unit="view", disable=None) as bar, flushed(cache):
        for group in grouped(Missing(pictures, cache, jobs), config.data.workers):
            bar.update(len(group))
            seen += len(group)
            if bar.disable and time.monotonic() - told > EVERY:
                say(f"cache: {seen} of {len(jobs)} views")
                told = time.monotonic()
            for job in group:
                cache.keys.note(job.read)
                if job.problem is not None:
                    say(f"left out: {job.problem}")
            keep(base, cache, group, dtype)
            made += sum(job.pixels is not None or job.condition is not None for job in group)
    return made


def blocks_of(count: int, part: tuple[int, int]) -> list[range]:
    """A share of so many pictures: every n-th block of them."""
    starts = range(part[0] * BLOCK, count, part[1] * BLOCK)
    return [range(start, min(start + BLOCK, count)) for start in starts]


@contextmanager
def flushed(cache: Cache) -> Iterator[None]:
    """What was made is kept, however the block ends."""
    try:
        yield
    finally:
        cache.flush()


def keep(base: Base | None, cache: Cache, group: list[Job], dtype: torch.dtype) -> None:
    """Puts conditions, and what the base makes of the pixels, into the cache: of a group all or nothing."""
    if cache.conditions is not None:
        cache.conditions.put({job.plain: {"picture": job.condition} for job in group if job.condition is not None})
    new = [(job, job.pixels) for job in group if job.pixels is not None]
    if not new or base is None or cache.latents is None:
        return
    pixels = torch.stack([own for _, own in new])
    moments = base.encode(pixels, [job.name for job, _ in new]).to(dtype)
    embeds = embed(base.prior, pixels.to(base.device)).to(dtype) if base.prior is not None else None
    made = {"moments": moments} if embeds is None else {"moments": moments, "embed": embeds}
    cache.latents.put({job.key: {name: value[k] for name, value in made.items()} for k, (job, _) in enumerate(new)})


def tried(read: Callable[[int], Sequence[Any]], index: int) -> Sequence[Any]:
    """What is read of a picture; nothing of one that cannot be read, which training names."""
    try:
        return read(index)
    except Exception:
        return ()


def grouped(missing: Missing, workers: int) -> Iterator[list[Job]]:
    """Jobs of one block whose pixels have one shape, a few at a time; those without pixels by themselves. A group ends
    where block or shape change, whatever is missing there: the rest of a block, after some of its groups, falls into the
    groups that were left."""
    loader: DataLoader[Any] = DataLoader(
        missing,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )
    group: list[Job] = []
    alike = None
    for (index, view), job in zip(missing.jobs, loader, strict=True):
        own, (width, height) = (index // BLOCK, view.crop.size), view.crop.size
        full = len(group) == TOGETHER[1] or (len(group) + 1) * width * height > TOGETHER[0]
        if group and (own != alike or (full and job.pixels is not None)):
            yield group
            group = []
        alike = own
        if job.pixels is None:
            yield [job]
        else:
            group.append(job)
    if group:
        yield group


def fill_text(base: Base, pictures: Pictures, cache: Cache, dtype: torch.dtype, blocks: Sequence[range]) -> None:
    """The captions of every block, and what is shared by all: the empty one and, with the first block, zeros."""
    store, done = cache.text, {("", False), ("", True)}
    assert store is not None

    def captions_of(index: int) -> Sequence[str]:
        return pictures.record(index).captions

    def keep_all(captions: Sequence[tuple[str, bool]]) -> None:
        new = [own for own in captions if caption_key(*own) not in store]
        for start in range(0, len(new), CAPTIONS):
            some = new[start : start + CAPTIONS]
            with torch.no_grad():
                found = base.text([caption for caption, _ in some], [zeros for _, zeros in some])
            kept = {name: value.to(dtype) for name, value in found.items()}
            store.put(
                {caption_key(*own): {name: value[k] for name, value in kept.items()} for k, own in enumerate(some)}
            )

    for block in blocks:
        if block.start == 0:  # what all shares need is made by one
            keep_all(sorted(done))
        captions = {(caption, False) for k in block for caption in tried(captions_of, k)} - done
        keep_all(sorted(captions))
        done |= captions
