"""The configuration of a training: one typed tree, read from YAML, changed by `key=value`, written beside the weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from .launching.config import LaunchConfig
from .tree import Tree

Target = Literal["t2i_adapter", "controlnet", "control_lora", "unet", "autoencoder", "prior", "hint_decoder"]


DTYPES_OF = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Share = Annotated[float, Field(ge=0, lt=1)]


class BaseModelConfig(Tree):
    """The base that is controlled, or that is trained itself.

    Attributes:
        model: "default", a folder or a hub id of a pipeline.
        vae: folder or hub id of another autoencoder (one that is safe in fp16), or None for the base's own.
        prior: of Kandinsky 2.2, the folder or hub id of its prior.
        revision, variant: of a hub id.
        spread: whether its UNet is spread over the processes by ZeRO's stage 3; None: there it is.
    """

    model: str = "default"
    vae: str | None = None
    prior: str | None = None
    revision: str | None = None
    variant: str | None = None
    spread: bool | None = None


class SourceConfig(Tree):
    """Pictures and what belongs to them.

    Attributes:
        path: a folder, a .jsonl file or a folder with metadata.jsonl, a folder or file of `datasets` (.parquet, .arrow), or
            a .tar file of webdataset (braces as in "{000..009}.tar" name several).
        image, condition, caption: names of the columns, or of webdataset's extensions. A folder's pictures have captions in
            a .txt file of the same name, and their condition in the subfolder named `condition`.
        weight: how often each picture comes in an epoch; 0.5 is every second epoch on average.
    """

    path: str
    image: str = "image"
    condition: str = "conditioning_image"
    caption: str = "text"
    weight: float = Field(1.0, gt=0)


class ConditionConfig(Tree):
    """Where condition images come from, and what they are when dropped.

    Attributes:
        detector: name of a detector that makes them of the pictures; None: they come with the data.
        options: the detector's.
        background: value in [0, 1] of the neutral image, which stands for a dropped condition: black for edges and poses.
        channels: of the condition image.
    """

    detector: str | None = None
    options: dict[str, Any] = {}
    background: float = Field(0.0, ge=0, le=1)
    channels: int = Field(3, ge=1)


class CaptionConfig(Tree):
    """
    Attributes:
        shuffle_tags: captions are lists of tags, which stand in another order each time.
        separator: between tags.
        keep_tags: so many at the beginning stay where they are.
    """

    shuffle_tags: bool = False
    separator: str = Field(",", min_length=1)
    keep_tags: int = Field(0, ge=0)


class DataConfig(Tree):
    """
    Attributes:
        resolution: side in pixels of a square picture; other shapes have about as many pixels.
        buckets: number of aspect ratios beside the square, landscape and portrait together; 0: all are cropped square.
        bucket_step: what sides are multiples of, pixels.
        crop: where a picture is cut, "center" or "random".
        crops: random crops of a picture that there are; one of them is drawn each time. A cache keeps them all.
        flip: probability of a mirrored picture and condition; 0 for poses and text.
        holdout: pictures at the end of the data that are not trained on but validated.
    """

    sources: tuple[SourceConfig, ...] = ()
    resolution: int = Field(1024, ge=8)
    buckets: int = Field(0, ge=0, multiple_of=2)
    bucket_step: int = Field(64, ge=1)
    crop: Literal["center", "random"] = "center"
    crops: int = Field(1, ge=1)
    flip: float = Field(0.0, ge=0, le=1)
    holdout: int = Field(0, ge=0)
    condition: ConditionConfig = ConditionConfig()
    caption: CaptionConfig = CaptionConfig()
    workers: int = Field(2, ge=0)


class CacheConfig(Tree):
    """
    Attributes:
        folder: of the cache, or None for none.
        latents, text, conditions: what it keeps.
        dtype: of what is kept.
    """

    folder: str | None = None
    latents: bool = True
    text: bool = True
    conditions: bool = True
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class ObjectiveConfig(Tree):
    """
    Attributes:
        timesteps: "uniform"; "cubic", t = (1 - u^3) T, which prefers noisy ones; "logit_normal", which prefers the middle.
        prediction: what the network predicts; None: as the base's scheduler says.
        min_snr_gamma: of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), or None.
        zero_terminal_snr: the last timestep is pure noise (Lin et al. 2023, arXiv 2305.08891); None: as the scheduler says.
        noise_offset: standard deviation of a constant added to each channel of the noise.
    """

    timesteps: Literal["uniform", "cubic", "logit_normal"] = "uniform"
    prediction: Literal["epsilon", "v_prediction"] | None = None
    min_snr_gamma: float | None = Field(None, gt=0)
    zero_terminal_snr: bool | None = None
    noise_offset: float = Field(0.0, ge=0)


class DropoutConfig(Tree):
    """Probabilities, drawn anew each time a picture comes.

    Attributes:
        caption: the caption is empty.
        condition: the condition is the neutral image.
        zeros: share of the empty captions whose embedding is zeros, as SDXL's pipelines give without a negative prompt.
    """

    caption: float = Field(0.1, ge=0, le=1)
    condition: float = Field(0.1, ge=0, le=1)
    zeros: float = Field(0.0, ge=0, le=1)


class OptimizerConfig(Tree):
    """
    Attributes:
        name: adamw; adamw8bit (bitsandbytes); schedule_free (schedulefree), which wants the schedule "constant".
        schedule: of the learning rate after a linear warm-up.
        clip: largest norm of the gradient, or None.
    """

    name: Literal["adamw", "adamw8bit", "schedule_free"] = "adamw"
    learning_rate: float = Field(1e-5, gt=0, allow_inf_nan=False)
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(1e-2, ge=0)
    epsilon: float = Field(1e-8, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    clip: float | None = Field(1.0, gt=0)


class CheckpointConfig(Tree):
    """
    Attributes:
        every: steps between checkpoints.
        minutes: and at least so often, where the machine may go away.
        keep: the last so many are kept, and the best by fidelity.
        each_machine: every machine writes its own, where they have no folder in common.
    """

    every: int = Field(500, ge=1)
    minutes: float | None = Field(None, gt=0)
    keep: int = Field(3, ge=1)
    each_machine: bool = False


class ValidationConfig(Tree):
    """
    Attributes:
        every: steps between validations; 0 for none.
        pictures: conditions that are shown, of trained pictures and of those held out.
        prompts: used in place of the pictures' captions.
        measure: how control fidelity is measured; None: as belongs to the detector.
    """

    every: int = Field(0, ge=0)
    pictures: int = Field(4, ge=1)
    prompts: tuple[str, ...] = ()
    steps: int = Field(20, ge=1)
    guidance: float = Field(5.0, ge=0)
    seed: int = Field(0, ge=0)
    measure: str | None = None


class Config(Tree):
    """A training.

    Attributes:
        target: what is trained.
        output: folder of the run.
        network: what a network made from scratch is like; the keys are the target's.
        init_from: weights to start from: a folder or file of the kit or as published.
        steps: of the optimizer, in all.
        batch: pictures a step over all processes, or "auto".
        micro_batch: pictures that a process sends through the network at once; None: its share of the batch.
        precision: of the networks that are not trained, and of the arithmetic.
        tf32: whether GPUs multiply float32 matrices with 10 bits of mantissa; None: as torch does, in convolutions only.
        ema: decay of the average of the weights that is saved and shown, or None.
        deepspeed: DeepSpeed's configuration, a file or a tree, or None: every process holds all weights.
        launch: where it runs.
        log_every: steps between lines of the log.
        trackers: who is told of the run beside its folder and the history.
        history: whether the run is written to the ledger.
    """

    target: Target
    output: str = Field(min_length=1)
    base: BaseModelConfig = BaseModelConfig()
    network: dict[str, Any] = {}
    init_from: str | None = None
    data: DataConfig = DataConfig()
    cache: CacheConfig = CacheConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    dropout: DropoutConfig = DropoutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    steps: int = Field(ge=1)
    batch: int | Literal["auto"] = 8
    micro_batch: int | None = Field(None, ge=1)
    precision: Literal["no", "fp16", "bf16"] = "no"
    tf32: bool | None = None
    gradient_checkpointing: bool = False
    ema: float | None = Field(None, gt=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int | None = Field(None, ge=1)
    license: str | None = None
    deepspeed: str | dict[str, Any] | None = None
    launch: LaunchConfig = LaunchConfig()
    log_every: int = Field(10, ge=1)
    trackers: tuple[Literal["tensorboard", "trackio", "mlflow", "wandb"], ...] = ()
    history: bool = True

    @field_validator("batch", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and value >= 1):
            raise ValueError("it must be 1 or more, or auto")
        return value

    @field_validator("precision", mode="before")
    @classmethod
    def _bare_no(cls, value: Any) -> Any:
        """YAML takes a bare `no` for false."""
        return "no" if value is False else value

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.data.crop == "random" and self.data.crops == 1:
            raise ValueError("data.crop is random among data.crops, and these are 1: say data.crops=8, or crop=center")
        if self.objective.zero_terminal_snr and self.objective.prediction == "epsilon":
            raise ValueError("zero_terminal_snr: pure noise tells nothing of the noise; use prediction: v_prediction")
        if self.cache.folder and self.cache.text and self.data.caption.shuffle_tags:
            raise ValueError(
                "cache.text cannot keep shuffled tags: set cache.text=false or data.caption.shuffle_tags=false"
            )
        if self.optimizer.name == "schedule_free" and self.optimizer.schedule != "constant":
            raise ValueError("optimizer.schedule must be constant for schedule_free, which needs none")
        return self

    def dump(self) -> str:
        """The whole tree as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A configuration file with `dotted.key=value` put over it; values are YAML.

    Raises:
        FileNotFoundError: no such file. ValueError: no YAML, an unknown key, or a value out of range, in one line.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration {path.absolute()}")
    try:
        tree = yaml.safe_load(path.read_text("utf-8")) or {}
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no keys: a configuration is a tree of `key: value`")
    for override in overrides:
        _put(tree, override)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], where: str) -> Config:
    """
    Raises:
        ValueError: what is wrong first, in one line.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first(error)}") from None


def _put(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is no key=value, such as data.resolution=512")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{key}: {text!r} is no YAML value") from None
    *nodes, leaf = key.split(".")
    here: Any = tree
    for node in nodes:
        if isinstance(here, dict) and here.get(node) is None:  # missing, or a name with nothing behind it
            here[node] = {}
        here = here[_number(here, node, key)] if isinstance(here, list) else here[node]
        if not isinstance(here, (dict, list)):
            raise ValueError(f"{key}: {node} is a value, not a tree")
    here[_number(here, leaf, key) if isinstance(here, list) else leaf] = value


def _number(entries: list[Any], text: str, key: str) -> int:
    """Of an entry of a list."""
    if not text.isdecimal() or int(text) >= len(entries):
        raise ValueError(f"{key}: {text!r} is no entry of a list of {len(entries)}; they are counted from 0")
    return int(text)


def _first(error: ValidationError) -> str:
    """The first error of a tree in one line, unknown keys with the nearest known one."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = keys_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1, 0.5)
        return f"no key {place}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{place} is missing"
    given = "" if not place or isinstance(problem["input"], (dict, list)) else f" is {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}{given}: {message}" if place else message


def keys_at(place: Sequence[str | int]) -> list[str]:
    """The keys that a node of the tree knows."""
    node: Any = Config
    for name in place:
        if isinstance(name, int):
            continue
        node = node.model_fields[name].annotation
        inner = [own for own in get_args(node) if isinstance(own, type) and issubclass(own, Tree)]
        node = inner[0] if inner else node
    return list(node.model_fields) if isinstance(node, type) and issubclass(node, Tree) else []
