"""From a record to what the network sees: decoding, crop, flip, condition, caption, and what is left out this time."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_kit.adapters.detectors import detect
from diffusion_kit.adapters.pictures import eight_bit, load_image, picture_tensor, resize
from diffusion_kit.training.config import CaptionConfig, Config
from diffusion_kit.training.keyed import Place, draws

from .cache import Cache, caption_key, digest, picture_of, view_key
from .crops import Crop, bucket_sizes, make_crop, nearest_bucket
from .order import Slot
from .sources import Content, Record, Source, is_folder, open_source

ASPECT = 0.01  # share by which the aspect ratio of a condition may differ from its picture's
UNTURNABLE = {"openpose", "pose", "normal"}  # a mirrored picture has another condition than the mirrored one


@dataclass(frozen=True)
class View:
    """What of a picture is looked at: the part that is kept, and whether it is mirrored."""

    crop: Crop
    flip: bool


@dataclass(frozen=True)
class Sample:
    """One place of a step.

    Attributes:
        weight: how much it counts, at most 1; 0 where the picture could not be used: then `problem` says why, and the
            tensors are blank.
        pixels: (3, H, W) in [-1, 1]; or None where there are `moments`.
        moments: (2 C, h, w) mean and deviation of the latents, from the cache; `embed` (D,) the picture's embedding.
        condition: (C, H, W) in [0, 1], the neutral image where it was dropped; None where the target sees none.
        caption: "" where it was `dropped`; `zeros` if its embedding is zeros; `text` its embeddings, from the cache.
        time_ids: (6,) original size, crop, target size, each (height, width) or (top, left): SDXL's micro-conditioning.
    """

    place: Place
    name: str
    weight: float
    pixels: Tensor | None
    condition: Tensor | None
    caption: str
    dropped: bool
    zeros: bool
    time_ids: Tensor
    moments: Tensor | None = None
    embed: Tensor | None = None
    text: Mapping[str, Tensor] | None = None
    problem: str | None = None


@dataclass
class Pictures:
    """Every record of a configuration's sources, and how each becomes a sample.

    Attributes:
        records: source, and number in it, of each.
        sizes: (width, height) of the buckets; `shapes` the bucket of each record.
        conditioned: whether the target sees condition images.
    """

    config: Config
    sources: list[Source]
    records: list[tuple[int, int]]
    sizes: list[tuple[int, int]]
    shapes: tuple[int, ...]
    conditioned: bool
    cache: Cache = field(default_factory=Cache)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(self.config.data.sources[source].weight for source, _ in self.records)

    @cached_property
    def digest(self) -> dict[str, Any]:
        """Changes with the pictures that there are: their number, and their names where those are at hand."""
        names = [[record.name for record in own] if isinstance(own, list) else len(own) for own in self.sources]
        return {"pictures": len(self), "names": digest(names)}

    def record(self, index: int) -> Record:
        """Its name tells the source too, where there are several."""
        source, number = self.records[index]
        found = self.sources[source][number]
        several = len(self.sources) > 1
        return replace(found, name=f"{self.config.data.sources[source].path}: {found.name}") if several else found

    def __getitem__(self, slot: Slot | tuple[Place, int]) -> Sample:
        """The sample that a place makes of a picture. Whatever is wrong with the picture, the step goes on."""
        place, index, weight = Slot(*slot)
        name = f"picture {index}"
        try:
            record = self.record(index)
            name = record.name
            return replace(self._sample(record, index, place), weight=weight)
        except Exception as error:  # a reader of a damaged file may raise anything
            why = str(error) if isinstance(error, ValueError) else f"{name}: {type(error).__name__}: {error}"
            return self._blank(place, name, self.sizes[self.shapes[index]], why)

    def _sample(self, record: Record, index: int, place: Place) -> Sample:
        view = self.view(index, record, place)
        kept = self.kept(record, view)
        condition = self.condition(record, view) if self.conditioned else None
        if condition is not None and draws(place, "drop_condition").random() < self.config.dropout.condition:
            condition = torch.full_like(condition, self.config.data.condition.background)
        caption, dropped, zeros = self.caption(record, place)
        crop, (width, height) = view.crop, record_size(record)
        left = crop.scaled[0] - crop.size[0] - crop.left if view.flip else crop.left
        return Sample(
            place,
            record.name,
            weight=1.0,
            pixels=None if kept else self.pixels(record, view),
            condition=condition,
            caption=caption,
            dropped=dropped,
            zeros=zeros,
            time_ids=torch.tensor([height, width, crop.top, left, *crop.size[::-1]], dtype=torch.float32),
            moments=kept.get("moments"),
            embed=kept.get("embed"),
            text=self.cache.text.get(caption_key(caption, zeros)) if self.cache.text is not None else None,
        )

    # What a picture looks like

    def view(self, index: int, record: Record, place: Place) -> View:
        data, size = self.config.data, self.sizes[self.shapes[index]]
        variant = int(draws(place, "crop").integers(data.crops)) if data.crop == "random" else None
        return View(
            make_crop(record_size(record), size, variant, (self.config.seed, index)),
            draws(place, "flip").random() < data.flip,
        )

    def views(self, index: int) -> list[View]:
        """Every view that there may be of a picture."""
        data, record = self.config.data, self.record(index)
        size, key = self.sizes[self.shapes[index]], (self.config.seed, index)
        variants = range(data.crops) if data.crop == "random" else [None]
        crops = [make_crop(record_size(record), size, variant, key) for variant in variants]
        flips = [flip for flip, share in ((False, 1 - data.flip), (True, data.flip)) if share > 0]
        return [View(crop, flip) for crop in crops for flip in flips]

    def key(self, record: Record, view: View) -> str:
        """By which the cache knows a view."""
        return view_key(self.cache.keys.of(record), view.crop, view.flip)

    def kept(self, record: Record, view: View) -> dict[str, Tensor]:
        """What the cache has in place of a view's pixels."""
        store = self.cache.latents
        found = store.get(self.key(record, view)) if store is not None else None
        return {name: value.float() for name, value in (found or {}).items()}

    def pixels(self, record: Record, view: View) -> Tensor:
        picture = seen(eight_bit(opened(record.image, record.name)), view)
        return picture_tensor(picture, picture.height, picture.width)[0] * 2 - 1

    def condition(self, record: Record, view: View) -> Tensor:
        """(C, H, W) in [0, 1]: the one that came with the picture, or what the detector makes of the part that is kept.

        Raises:
            ValueError: it is missing, or of another shape than its picture.
        """
        own = self.config.data.condition
        if own.detector is None:
            found = seen(self._given_condition(record), view)
        else:
            found = self.detected(record, replace(view, flip=False))
            found = found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else found
        return picture_tensor(found, found.height, found.width, channels=own.channels)[0]

    def detected(self, record: Record, view: View) -> Image.Image:
        own, store = self.config.data.condition, self.cache.conditions
        if store is not None and (kept := store.get(self.key(record, view))) is not None:
            return picture_of(kept["picture"])
        return detect(str(own.detector), seen(eight_bit(opened(record.image, record.name)), view), **own.options)

    def _given_condition(self, record: Record) -> Image.Image:
        if record.condition is None:
            raise ValueError(f"{record.name} has no condition image: set data.condition.detector, or add one")
        given = opened(record.condition, f"the condition of {record.name}")
        width, height = record_size(record)
        if abs(np.log(given.width / given.height * height / width)) > ASPECT:
            raise ValueError(
                f"the condition of {record.name} is {given.width} x {given.height}, the picture {width} x {height}: "
                "they must have the same shape"
            )
        return given

    # What is said of it

    def caption(self, record: Record, place: Place) -> tuple[str, bool, bool]:
        """The caption at a place, whether it was dropped, and whether its embedding is zeros."""
        rng = draws(place, "drop_caption")
        dropped, zeros = rng.random() < self.config.dropout.caption, rng.random() < self.config.dropout.zeros
        if dropped:
            return "", True, zeros
        rng = draws(place, "caption")
        text = record.captions[int(rng.integers(len(record.captions)))]
        own = self.config.data.caption
        return (shuffled(text, own, rng) if own.shuffle_tags else text), False, False

    def _blank(self, place: Place, name: str, size: tuple[int, int], problem: str) -> Sample:
        width, height = size
        return Sample(
            place,
            name,
            weight=0.0,
            pixels=torch.zeros(3, height, width),
            condition=torch.zeros(self.config.data.condition.channels, height, width) if self.conditioned else None,
            caption="",
            dropped=True,
            zeros=False,
            time_ids=torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32),
            problem=problem,
        )


def open_pictures(config: Config, conditioned: bool) -> Pictures:
    """
    Raises:
        FileNotFoundError, ValueError: no data, or settings that do not go together; in one line.
    """
    data = config.data
    if not data.sources:
        raise ValueError("data.sources is empty: name at least one, such as data.sources=[{path: pictures}]")
    if data.flip and conditioned and data.condition.detector in UNTURNABLE:
        raise ValueError(
            f"data.flip must be 0 for {data.condition.detector}: a mirrored picture has other left and right sides"
        )
    for source in data.sources:
        folder = Path(source.path).expanduser()
        if is_folder(folder) and Path(config.output).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"output {config.output} lies inside data.sources {folder}: its pictures would be taken for data"
            )
    sources = [open_source(source) for source in data.sources]
    count = sum(map(len, sources))
    if data.holdout >= count:
        raise ValueError(f"data.holdout is {data.holdout}, and there are {count} pictures: leave some to train on")
    records = [(k, number) for k, source in enumerate(sources) for number in range(len(source))]
    sizes = bucket_sizes(data.resolution, data.buckets, data.bucket_step)
    shapes = tuple(_shape(sources[k], number, sizes) if len(sizes) > 1 else 0 for k, number in records)
    return Pictures(config, sources, records, sizes, shapes, conditioned)


def _shape(source: Source, number: int, sizes: list[tuple[int, int]]) -> int:
    """The bucket of a record; that of one that cannot be read does not matter."""
    try:
        return nearest_bucket(record_size(source[number]), sizes)
    except Exception:
        return 0


def record_size(record: Record) -> tuple[int, int]:
    """(width, height) of a picture upright: as its list says, or of the file's header."""
    if record.size is not None:
        return record.size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(record.image if isinstance(record.image, Path) else io.BytesIO(record.image)) as picture:
            lying = picture.getexif().get(0x0112, 1) >= 5  # EXIF orientation
            return picture.size[::-1] if lying else picture.size


def opened(content: Content, name: str) -> Image.Image:
    return load_image(content, name=name)


def seen(picture: Image.Image, view: View) -> Image.Image:
    """The part of a picture that a view keeps."""
    crop = view.crop
    part = resize(picture, crop.size, box=crop.part_of(picture.size))  # the rest may be huge at that scale
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else part


def shuffled(text: str, config: CaptionConfig, rng: np.random.Generator) -> str:
    """The tags of a caption in another order, behind those that stay."""
    tags = [tag.strip() for tag in text.split(config.separator) if tag.strip()]
    kept, moved = tags[: config.keep_tags], tags[config.keep_tags :]
    return f"{config.separator} ".join([*kept, *(moved[k] for k in rng.permutation(len(moved)))])


@dataclass(frozen=True)
class Batch:
    """Samples of one shape; `condition` is (B, C, H, W), `weight` (B,), `time_ids` (B, 6)."""

    samples: tuple[Sample, ...]
    weight: Tensor
    condition: Tensor | None
    time_ids: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def places(self) -> list[Place]:
        return [sample.place for sample in self.samples]

    def to(self, device: torch.device) -> Batch:
        condition = None if self.condition is None else self.condition.to(device, non_blocking=True)
        return Batch(self.samples, self.weight.to(device), condition, self.time_ids.to(device))


def collate(samples: Sequence[Sample]) -> Batch:
    conditions = [sample.condition for sample in samples if sample.condition is not None]
    return Batch(
        tuple(samples),
        torch.tensor([sample.weight for sample in samples]),
        torch.stack(conditions) if conditions else None,
        torch.stack([sample.time_ids for sample in samples]),
    )
