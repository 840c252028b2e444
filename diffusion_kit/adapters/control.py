"""`Control`: a value that says what conditions a run, with what strength, when and where.

A kind of control is one module of this package with two names: `MODELS`, the classes of networks it is for, and
`encode(control, site)`, which does once all that can be done once and returns an `EncodedControl`. It is found by the
class of the control's model, or by `NAME`, where the network is the base's own; nothing else has to know of it.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_kit.models.formats import describe, identify
from diffusion_kit.models.sources import component_class, load_component, locate
from diffusion_kit.models.unet import Net, layout
from diffusion_kit.sampling.doors import Answer, Conditioning, Injection, Tree, in_every, inside
from diffusion_kit.sampling.engines import Engine, eager

from .maps import warn_of_polarity
from .pictures import Pictures, mask_tensor

OF_FOLDER = re.compile(
    r"diffusion_pytorch_model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.safetensors"
)  # as diffusers names it
Mode = Literal["balanced", "prompt", "control"]
Scale = float | Sequence[float] | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Control:
    """A condition on a run, beside any other, in any task.

    Attributes:
        model: a T2IAdapter, MultiAdapter, ControlNetModel, ControlNetUnionModel, ControlLoRA, IPAdapter or the UNet of a
            Kandinsky 2.2 decoder that takes a hint; a folder, file or hub id of one; or the name of a control that comes
            with the base, among them "hint" and "instruct" for bases whose own UNet takes a picture.
        image: the control image, or one for each prompt; for a MultiAdapter a list, one for each of its nets; for a
            ControlNet-Union a mapping from types to images; for an IPAdapter see there.
        scale: strength; a number, or one for each level: down levels from shallow to deep, then the middle. For a
            MultiAdapter a list has one for each net, and a number s means s / n for each of the n. For an IPAdapter also
            a mapping from beginnings of layers' names ("up_blocks.0.attentions.1"); layers not named have 0.
        start, end: fractions of the sampling steps between which the control acts. Step i of n is inside when
            start <= i / n and (i + 1) / n <= end; so `end=f` beside `start=f` leaves one step to neither, unless f n is
            whole.
        mask: greyscale picture in output space; the control acts where it is white.
        guidance: scale of a guidance of the control's own, beside that of the prompt (Brooks et al. 2023, arXiv 2211.09800,
            eq. 3): in guided steps away from what a control image without content would give, which controls that were
            trained with dropped conditions know. For T2I-Adapters and ControlNets in mode "balanced".
        background: grey value in [0, 1] of that image, as in the training; 0 for white lines on black.
        mode: "balanced" acts on both halves of the guidance batch; "prompt" on the conditional half, fading from 1 at
            the middle to 0.1 at the shallowest residual (guess mode); "control" on the conditional half, not fading.

    Raises:
        ValueError: a value out of its range.
    """

    model: Any
    image: Any
    _: KW_ONLY
    scale: Scale = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Pictures | None = None
    mode: Mode = "balanced"
    guidance: float | None = None
    background: float = 0.0

    def __post_init__(self) -> None:
        if not self.scales or not all(map(is_number, self.scales)):
            raise ValueError(f"Control scale is {self.scale!r}; it must be a finite number, or a list of them")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"Control window is {self.start} to {self.end}; it must be 0 <= start <= end <= 1")
        if self.mode not in ("balanced", "prompt", "control"):
            raise ValueError(f"Control mode is {self.mode!r}; it must be 'balanced', 'prompt' or 'control'")
        if self.guidance is not None and not is_number(self.guidance):
            raise ValueError(f"Control guidance is {self.guidance!r}; it must be a finite number, or None")
        if not is_number(self.background) or not 0 <= self.background <= 1:
            raise ValueError(f"Control background is {self.background!r}; it must be between 0 and 1")
        if self.guidance is not None and self.mode != "balanced":
            raise ValueError(f"Control mode is {self.mode!r}; with a guidance of its own it must be 'balanced'")

    @property
    def scales(self) -> tuple[float, ...]:
        if isinstance(self.scale, Mapping):
            return tuple(self.scale.values())
        return tuple(self.scale) if isinstance(self.scale, (list, tuple)) else (self.scale,)  # type: ignore[return-value]

    def level_scales(self, levels: int) -> tuple[float, ...]:
        """One scale for each level.

        Raises:
            ValueError: a list of another length, or a mapping.
        """
        if isinstance(self.scale, Mapping):
            raise ValueError("Control scale is given by layers, which only an IP-Adapter takes")
        if len(self.scales) == 1:
            return self.scales * levels
        if len(self.scales) != levels:
            raise ValueError(f"Control scale lists {len(self.scales)} levels; the base has {levels}")
        return self.scales

    @property
    def neutral(self) -> Control:
        """The same with a control image without content."""
        empty = torch.full((1, 1, 1, 1), self.background)
        several = isinstance(self.image, (list, tuple))
        return replace(self, image=[empty] * len(self.image) if several else empty, guidance=None)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Site:
    """What a control needs to know of the run that it enters.

    Attributes:
        unet: the base's UNet.
        height, width: of the output, in pixels.
        latent_size: of the latents.
        prompts, per_prompt: pictures of the run, image k and prompt k together.
        timesteps: (n,) of the schedule.
        guided: whether there may be guidance, so that tokens are needed for an unconditional half.
        own_control: name of the control that the UNet itself takes, see `models.denoiser.own_control`.
        encode_picture: pixels (N, 3, height, width) in [-1, 1] to the mode of their latents, not scaled.
        engine: of networks that run once.
    """

    unet: Net
    height: int
    width: int
    latent_size: tuple[int, int]
    prompts: int
    per_prompt: int
    timesteps: Tensor
    device: torch.device
    guided: bool = True
    own_control: str | None = None
    encode_picture: Callable[[Tensor], Tensor] | None = None
    engine: Engine = eager

    @property
    def rows(self) -> int:
        return self.prompts * self.per_prompt

    @property
    def levels(self) -> int:
        return len(layout(self.unet, self.latent_size)[1])

    def mask(self, control: Control) -> Tensor | None:
        """(rows or 1, 1, height, width) in [0, 1] where it was given, or None."""
        if control.mask is None:
            return None
        return mask_tensor(control.mask, self.height, self.width, self.prompts, self.per_prompt, "a control's mask")

    def weights(
        self, control: Control, fades: Sequence[float], positions: Sequence[int], scales: Sequence[float]
    ) -> list[Tensor]:
        """scale x mask x fade of the residuals at `positions` of the UNet's layout: (rows or 1, 1, h or 1, w or 1)."""
        places, _ = layout(self.unet, self.latent_size)
        given = self.mask(control)
        mask = None if given is None else given.to(self.device)
        weights = []
        for fade, position in zip(fades, positions, strict=True):
            level, _, size = places[position]
            area = (
                torch.ones(1, 1, 1, 1, device=self.device) if mask is None else F.interpolate(mask, size, mode="area")
            )
            weights.append(scales[level] * fade * area)
        return weights


@dataclass
class EncodedControl:
    """A control after its one encoding: see `sampling.doors.Encoded`.

    Attributes:
        guidance: scale of a guidance of its own, or None.
        name: of the control's network, or its class.
    """

    injection: Injection
    window: tuple[float, float]
    guidance: float | None = None
    name: str = field(default="", init=False)

    def active(self, step: int, steps: int) -> bool:
        return inside(step, steps, self.window)

    def tensors(self, conditioning: Conditioning, branches: int) -> Tree:
        raise TypeError(f"{type(self).__name__} answers nothing")

    def silence(self, branches: int) -> Answer:
        return Answer()


def fading(n: int, mode: Mode) -> list[float]:
    """Weights of n residuals from the shallowest to the deepest: all 1, or from 0.1 to 1 in prompt mode."""
    return torch.logspace(-1, 0, n).tolist() if mode == "prompt" else [1.0] * n


def in_branches(values: Tensor, mode: Mode, branches: int) -> Tensor:
    """Rows (B, ...) for the batch of the step: in every branch, or zero in all but the conditional one."""
    if mode == "balanced":
        return in_every(values, branches)
    return torch.cat([torch.zeros_like(values)] * (branches - 1) + [values])


def encode_control(control: Control, site: Site) -> EncodedControl | None:
    """Encodes a control once for a run; None if it could do nothing (scale 0, an all-black mask, an empty window).

    Raises:
        TypeError: no kind of control is known for the model.
        ValueError: the control does not fit the base.
    """
    if not isinstance(control, Control):
        raise TypeError(f"controls holds a {type(control).__name__}; it must hold Control values")
    kind = kind_of(control.model)
    mask = site.mask(control)
    if not any(control.scales) or control.start == control.end or (mask is not None and not mask.any()):
        return None
    warn_of_polarity(control.model, control.image)
    encoded = kind.encode(control, site)
    encoded.name = control.model if isinstance(control.model, str) else type(control.model).__name__
    if control.guidance is not None and encoded.guidance != control.guidance:
        what = repr(control.model) if isinstance(control.model, str) else f"this {type(control.model).__name__}"
        raise ValueError(f"{what} takes no Control(guidance=...): leave it out")
    return encoded


def bring(net: Any, device: torch.device) -> None:
    """A network to where a control is encoded: by its hook, where it is offloaded."""
    if (hook := getattr(net, "_hf_hook", None)) is not None:
        hook.pre_forward(net)
    elif net.device.type != "meta" and net.device != device:  # layers that are offloaded one by one have hooks
        net.to(device)


def kind_of(model: Any) -> ModuleType:
    if isinstance(model, str) and model in named_kinds():
        return named_kinds()[model]
    for kind in kinds():
        if isinstance(model, kind.MODELS):
            return kind
    known = ", ".join(cls.__name__ for kind in kinds() for cls in kind.MODELS)
    raise TypeError(f"a {type(model).__name__} is no control: known are {known}, and names of controls of the base")


def shown_as(model: Any, kind: str | None, image: Any) -> Any:
    """The control image as a `Control` of the network takes it: of a network for several types, by its type."""
    return {kind: image} if getattr(kind_of(model), "BY_TYPE", False) else image


def load_control_model(source: str | Path, **kwargs: Any) -> Any:
    """The network of a control from a folder, a .safetensors file or a hub id: its class by its config, or by the file's
    header and the loaders that kinds have as `FILES`.

    Raises:
        FileNotFoundError: no such folder, file or repository. ValueError: something else than a control.
    """
    place = locate(source)
    if (
        isinstance(place, Path)
        and (named := OF_FOLDER.fullmatch(place.name))
        and place.with_name("config.json").is_file()
    ):
        source = place = place.parent  # what its shapes do not tell stands beside it
        kwargs |= {"variant": named["variant"]} if named["variant"] else {}
    if isinstance(place, Path) and place.is_dir() and not (place / "config.json").is_file():
        files = list(place.glob("*.safetensors"))
        place = files[0] if len(files) == 1 else place  # as a Control-LoRA is
    if isinstance(place, Path) and place.is_file():
        loaders = {name: loader for kind in kinds() for name, loader in getattr(kind, "FILES", {}).items()}
        found = identify(place)
        if found.kind not in loaders or (found.kind, found.layout) == ("ip_adapter", "FaceID"):
            raise ValueError(f"{source} is no control of this version: it is {describe(place)}")
        return loaders[found.kind](place, **kwargs)
    name = component_class(source)
    classes = {cls.__name__: cls for kind in kinds() for cls in kind.MODELS}
    if name not in classes:
        raise ValueError(f"{source} is a {name}, which is no control; known are {', '.join(classes)}")
    return load_component(classes[name], source, **kwargs)


def granularity(factor: int, nets: Sequence[Any]) -> int:
    """What the output's sides must be multiples of: for an autoencoder that scales down by `factor`, and controls' nets."""
    return math.lcm(factor, *(kind.multiple(net) for net in nets if hasattr(kind := kind_of(net), "multiple")))


@cache
def named_kinds() -> dict[str, ModuleType]:
    """The kinds whose network is the base's own."""
    return {kind.NAME: kind for kind in kinds() if hasattr(kind, "NAME")}


@cache
def kinds() -> tuple[ModuleType, ...]:
    """The modules of this package that define a kind of control."""
    package = importlib.import_module(__package__)
    names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    return tuple(module for module in modules if hasattr(module, "MODELS"))
