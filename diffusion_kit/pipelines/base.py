"""What every family's pipeline has: loading that refuses what is unsafe, saving that the peer reads, controls by name, one
call from arguments to pictures."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_xformers_available
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import get_device
from torch import Tensor, nn

from diffusion_kit.adapters.control import (
    Control,
    EncodedControl,
    Site,
    encode_control,
    load_control_model,
    named_kinds,
)
from diffusion_kit.models.attention import installed, locked
from diffusion_kit.models.denoiser import make_denoiser, with_kept_features
from diffusion_kit.models.packed import Packing, unpack_all
from diffusion_kit.models.sources import check_folder, locate, one_line
from diffusion_kit.models.unet import obstacle
from diffusion_kit.sampling.cache import StepCache
from diffusion_kit.sampling.engines import Answers, Engine, Remembered, eager
from diffusion_kit.sampling.loop import Run, sample

from .arguments import bind, signature_of
from .optimize import Level, explain, optimize

KEPT = object()  # in place of a number type: leave networks as they are


class ControlledPipeline(DiffusionPipeline):
    """A base family. Its subclass gives `Call`, the dataclass of its arguments, and `generate`.

    A peer-named subclass gives `arguments` (names in the peer's order), `defaults` and `translate`, which turns the peer's
    arguments into the family's.
    """

    Call: ClassVar[type]
    arguments: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {}
    peer_name: ClassVar[str] = ""
    engine: Engine = eager
    notes: Sequence[str] = ()  # of what `optimize` could not do
    step_cache: StepCache | None = None
    low_memory: bool = False
    answers: Answers | None = None  # of encoders, while calls share them
    done: Mapping[str, int] | None = None  # in the last call: see `sampling.loop.Run`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "Call"):
            return
        names = cls.arguments.split() or [field.name for field in dataclasses.fields(cls.Call)]
        signature = signature_of(cls.Call, names, cls.defaults)

        @torch.no_grad()
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.accept(args, kwargs)
            values = bind(signature, type(self).__name__, args, kwargs)
            self.engine.renew()
            try:
                return self.generate(self.Call(**self.translate(values)))
            finally:  # after an error, too, networks that are offloaded leave the device
                self.maybe_free_model_hooks()

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__name__, call.__qualname__ = "__call__", f"{cls.__name__}.__call__"
        call.__doc__ = cls.Call.__doc__
        cls.__call__ = call

    def accept(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments without those that this class takes and does not read."""
        return args, kwargs

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        """From this class's call arguments to the family's."""
        return values

    def generate(self, call: Any) -> Any:
        raise TypeError(f"{type(self).__name__} is no family: it has no generate")

    # Loading and saving

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> Any:
        """Loads from "default" (the embedded model), a folder, a .safetensors file or a hub id.

        Keyword arguments are those of diffusers' `from_pretrained`. Only safetensors are read, no remote code is run.

        Raises:
            FileNotFoundError: nothing there; says what was looked for and where.
            ValueError: a pickle, or a folder that leads outside itself.
        """
        if kwargs.pop("trust_remote_code", False):
            raise ValueError("trust_remote_code is refused: a model is weights and configuration, never code")
        place = locate(source)
        if isinstance(place, Path) and place.is_file():
            with one_line(source, "model configuration for the file"):
                return cls.from_single_file(str(place), **kwargs)
        if isinstance(place, Path):
            place = place.absolute()
            check_folder(place, passed=set(kwargs))
        kwargs.setdefault("use_safetensors", True)
        with one_line(source, "model"):
            return super().from_pretrained(str(place), **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """A pipeline over the same components, with the same settings. Networks keep their number type unless `dtype` is
        given; diffusers' own makes all of them float32, in the other pipeline too."""
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = KEPT
        return super().from_pipe(pipeline, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """diffusers' own."""
        return self if kwargs.get("dtype") is KEPT else super().to(*args, **kwargs)

    def to_json_string(self) -> str:
        """model_index.json with the peer's class name, so that the peer reads our folders."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = self.peer_name or type(self).__name__
        config.pop("_name_or_path", None)  # a path of this machine
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """diffusers' folder, and the controls that come with the base."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for name, folder in self._control_folders().items():
            place = Path(save_directory, "controls", name)
            net: Any = self.load_control(name)
            if hasattr(net, "save_pretrained"):
                net.save_pretrained(place)
            elif folder.resolve() != place.resolve():
                shutil.copytree(folder, place, dirs_exist_ok=True)

    # Controls

    def resolve_control(self, control: Control) -> Control:
        """Replaces the name of a control that comes with the base, or the path of one, by its network, loaded once."""
        if not isinstance(control, Control) or not isinstance(control.model, (str, Path)):
            return control
        return dataclasses.replace(control, model=self.load_control(str(control.model)))

    @property
    def control_names(self) -> list[str]:
        """Names of the controls that come with the base."""
        return sorted(self._control_folders())

    def _control_folders(self) -> dict[str, Path]:
        """Folders of the base's controls; a hub id or a single file, which are no absolute path, have none."""
        folder = Path(str(self.config.get("_name_or_path", "")))
        found = folder.glob("controls/*/*.safetensors") if folder.is_absolute() else ()
        return {path.parent.name: path.parent for path in found}

    def control_source(self, name: str) -> Path | str:
        """Where the control of that name is: in the base's model folder, or its own UNet; else the name is a path or a hub
        id itself.

        Raises:
            ValueError: the base has none of that name; names those it has.
        """
        own = self._control_folders()
        if name in named_kinds():
            return str(self.config.get("_name_or_path", ""))
        if name not in own and not re.search(r"[/\\.]", name):
            has = f"it has {', '.join(sorted(own))}" if own else "it has none"
            raise ValueError(f"no control {name!r} comes with the base ({has}); give a network or a path to one")
        return own.get(name, name)

    def load_control(self, name: str) -> nn.Module | str:
        """The control of that name of the base's model folder, or of a folder, .safetensors file or hub id. The name itself
        where the network is the base's own UNet ("hint", "instruct").

        Raises:
            ValueError: the base has none of that name; names those it has. FileNotFoundError: no such folder or file.
        """
        if name in named_kinds():
            return name
        loaded: dict[str, nn.Module] = self.__dict__.setdefault("_base_controls", {})
        if name not in loaded:
            loaded[name] = load_control_model(self.control_source(name), torch_dtype=self.unet.dtype)
        return loaded[name]

    def encode_controls(self, controls: Sequence[Control], site: Site) -> list[EncodedControl]:
        """Every control that can act in this run, encoded once.

        Raises:
            ValueError: the base's UNet takes a picture of its own, and there is not one control with it.
        """
        own, names = site.own_control, [control.model for control in controls if isinstance(control, Control)]
        if own is not None and sum(name == own for name in names) != 1:
            raise ValueError(f"this base's UNet takes a picture itself: give one Control({own!r}, picture) in controls")
        encoded = [encode_control(self.resolve_control(control), site) for control in controls]
        found = [control for control in encoded if control is not None]
        if sum(control.guidance is not None for control in found) > 1:
            raise ValueError("more than one control has a guidance of its own: give it to one")
        return found

    # Memory

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """diffusers' own; where xformers or CUDA is missing, a warning, and attention stays torch's."""
        needs = {"the package xformers": is_xformers_available(), "a CUDA device": torch.cuda.is_available()}
        missing = " and ".join(what for what, there in needs.items() if not there)
        if missing:
            warnings.warn(f"xformers' attention needs {missing}: torch's own attention is used", stacklevel=2)
        else:
            super().enable_xformers_memory_efficient_attention(attention_op)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """diffusers' own; where there is no accelerator to load onto, a warning, and the models stay on the CPU."""
        if device is None and get_device() == "cpu":
            warnings.warn("there is no accelerator: nothing is offloaded, the models run on the CPU", stacklevel=2)
        else:
            super().enable_model_cpu_offload(gpu_id, device)

    # Running

    def optimize(
        self,
        level: Level = "exact",
        *,
        engine: str | Engine | None = None,
        low_memory: bool = False,
        quantised: str | None = None,
    ) -> str:
        """From now on the pipeline runs as fast as the level allows (`pipelines.optimize`); gives what `explain` says, but
        for the memory that is expected beside weights.

        Args:
            level: "exact", the same picture; "half", with weights of half precision; "fast", half, with a step cache.
            engine: what executes the networks, by name ("eager", "packed", "openvino", "aoti", "inductor", "cudagraph") or
                itself. None is the one that a short measurement finds fastest, which also takes the place of one that is
                not here.
            low_memory: encoders are in memory while they run only (on an accelerator every network is), and pictures
                larger than the autoencoder was made for are decoded in tiles.
            quantised: "int8" (weights of linear layers in 8 bits) or "int8_dynamic" (what they are given, too), by torchao;
                it stays until the pipeline is loaded again.

        Raises:
            ValueError: no such level, way to quantise or engine.
        """
        optimize(self, level, engine, low_memory, quantised)
        return explain(self, expected=False)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Calls inside encode a prompt, a start or a control picture that they share once; other weights are seen."""
        before, self.answers = self.answers, self.answers or Answers()
        try:
            yield
        finally:
            self.answers = before

    def encoding(self, engine: Engine) -> Engine:
        """The engine for encoders: one that remembers while calls share what is encoded, none that has copies where there
        is to be little memory."""
        engine = eager if self.low_memory else engine
        return engine if self.answers is None else Remembered(self.answers, engine)

    def cache_steps(
        self,
        every: int | None = 3,
        *,
        depth: int = 1,
        controls: Literal["reuse", "recompute"] = "reuse",
        guidance: Literal["reuse", "recompute"] = "recompute",
    ) -> StepCache | None:
        """From now on one step in `every` runs the whole UNet, the others only its `depth` shallowest levels over what the
        full steps kept (see `sampling.cache`); None turns that off. ControlNets run in full steps only ("reuse"), or in
        all; so does guidance, without which the other steps run one branch.

        Raises:
            ValueError: a value out of its range, or a UNet that does not run block by block.
        """
        cache = None if every is None else StepCache(every, depth, controls, guidance)
        if cache is not None:
            plain = hasattr(self.unet, "mid_block")
            with_kept_features(make_denoiser(self.unet, self.unet.config.in_channels) if plain else None, depth)
        self.step_cache = cache
        return cache

    def explain(self) -> str:
        """What runs where, in a few lines, and the memory that one picture of the model's own size is expected to take
        beside the weights."""
        return explain(self, expected=True)

    @property
    def obstacle(self) -> str | None:
        """Why the network that is denoised with runs through its own forward; None if the executor runs it."""
        return obstacle(self.unet)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 and self.unet.config.get("time_cond_proj_dim") is None

    @property
    def guidance_weight(self) -> float:
        """w of u + w (c - u)."""
        return self._guidance_scale if self.do_classifier_free_guidance else 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs

    def denoise(self, run: Run, latents: Tensor, on_call: Callable[..., Tensor]) -> Tensor:
        """The loop, with the executor's attention installed, LoRA scaled, and offloading told that the UNet is needed."""
        if self.step_cache is not None:
            run.cache = dataclasses.replace(self.step_cache)
            run.denoiser = with_kept_features(run.denoiser, run.cache.depth)
        nets = [net for control in run.controls for net in control.injection.executed]
        nets += run.denoiser.executed
        unique = list({id(net): net for net in nets}.values())
        self.done = run.done
        scale = (self._cross_attention_kwargs or {}).get("scale")
        bar = self.progress_bar(total=run.schedule.steps)

        def counted(k: int, before: Tensor, prediction: Tensor, after: Tensor) -> Tensor:
            result = on_call(k, before, prediction, after)
            bar.update(run.schedule.ends_step(k))
            return result

        attention = installed(*unique, product=run.engine.attention)
        with bar, locked(self.unet, *unique), attention, loras_scaled(scale, self.unet):
            if not isinstance(run.engine, Packing):
                unpack_all([*unique, *(part for part in self.components.values() if isinstance(part, nn.Module))])
            run.engine.begin(unique)
            try:
                for net in unique:
                    if getattr(net, "_hf_hook", None) is not None:
                        net._hf_hook.pre_forward(net)
                return sample(run, latents, counted)
            finally:
                run.engine.end()


@contextmanager
def loras_scaled(scale: float | None, *models: Any) -> Iterator[None]:
    """LoRA layers of the models at `scale` inside the block; None leaves them alone."""
    with ExitStack() as stack:
        for model in models if scale is not None else ():
            scale_lora_layers(model, weight=scale)
            stack.callback(unscale_lora_layers, model, weight=scale)
        yield
