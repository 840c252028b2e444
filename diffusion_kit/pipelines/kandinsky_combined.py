"""Kandinsky 2.x from prompt to picture in one call: a decoder with its prior."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from diffusion_kit.models.sources import locate, read_json
from diffusion_kit.sampling.engines import eager

from .call import LatentCall
from .kandinsky import Kandinsky2Call, Kandinsky2Pipeline, Kandinsky21Pipeline, Kandinsky22Pipeline
from .kandinsky_prior import KandinskyPriorPipeline, KandinskyV22PriorPipeline, PriorCall
from .optimize import Level

PRIOR = "prior_"  # before the names of the prior's components


@dataclass
class CombinedCall(Kandinsky2Call):
    __doc__ = f"""{Kandinsky2Call.__doc__}
    Of the prior:
        prior_guidance_scale, prior_num_inference_steps: of its own denoising.
        prior_callback_on_step_end, prior_callback_on_step_end_tensor_inputs: called after each of its steps.
        latents: (N, D) is its noise, (B, 4, h, w) the decoder's.
        height, width: by default what the model was made for, whatever a picture has; 512 in the published ones.
    """

    prior_guidance_scale: float = 4.0
    prior_num_inference_steps: int = 25
    prior_callback_on_step_end: Any = None
    prior_callback_on_step_end_tensor_inputs: Sequence[str] = field(default_factory=lambda: ["latents"])

    def rules(self, tensors: Sequence[str]) -> list[tuple[bool, str]]:
        prompt = (self.prompt is None, "give a prompt; a decoder alone makes pictures of image_embeds")
        return [*LatentCall.rules(self, tensors), prompt]


class WithPrior(Kandinsky2Pipeline):
    """A decoder that has the components of its prior, under names that begin with "prior_"."""

    prior_class: ClassVar[type]
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["prior_prior"]

    @property
    def prior_pipe(self) -> Any:
        """The prior over this pipeline's components."""
        if "_prior_pipe" not in self.__dict__:
            parts = {name: part for name, part in self.components.items() if name.startswith(PRIOR)}
            self._prior_pipe = self.prior_class(**{name.removeprefix(PRIOR): part for name, part in parts.items()})
        return self._prior_pipe

    @property
    def decoder_pipe(self) -> Any:
        """The decoder over this pipeline's components."""
        family = next(cls for cls in type(self).__mro__ if cls in (Kandinsky21Pipeline, Kandinsky22Pipeline))
        return family.from_pipe(self)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        super().set_progress_bar_config(**kwargs)
        self.prior_pipe.set_progress_bar_config(**kwargs)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        with super().sharing():
            before, self.prior_pipe.answers = self.prior_pipe.answers, self.answers
            try:
                yield
            finally:
                self.prior_pipe.answers = before

    def optimize(self, level: Level = "exact", **options: Any) -> str:
        told = super().optimize(level, **options)
        self.prior_pipe.low_memory = self.low_memory
        # Guidance and steps of the prior stay whole: they cost next to nothing. Copies of its weights would not rest.
        self.prior_pipe.engine = eager if self.low_memory else self.engine
        return told

    def generate(self, call: Any) -> Any:
        call.check(self._callback_tensor_inputs)
        height, width = self.native_size
        call = dataclasses.replace(call, height=call.height or height, width=call.width or width)
        return super().generate(call if call.image_embeds is not None else self._with_embeds(call))

    def _with_embeds(self, call: CombinedCall) -> CombinedCall:
        """The call with the prior's embeddings in it."""
        of_prior = call.latents is not None and call.latents.ndim == 2
        prior = PriorCall(
            prompt=call.prompt,
            negative_prompt=call.negative_prompt,
            num_images_per_prompt=call.num_images_per_prompt,
            num_inference_steps=call.prior_num_inference_steps,
            generator=call.generator,
            latents=call.latents if of_prior else None,
            guidance_scale=call.prior_guidance_scale,
            callback_on_step_end=call.prior_callback_on_step_end,
            callback_on_step_end_tensor_inputs=call.prior_callback_on_step_end_tensor_inputs,
            return_dict=False,
        )
        embeds, negative_embeds = self.prior_pipe.generate(prior)
        return dataclasses.replace(
            call,
            image_embeds=embeds,
            negative_image_embeds=negative_embeds,
            negative_prompt=None,  # it is in the embeddings; the peer gives it to no decoder
            latents=None if of_prior else call.latents,
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, prior: Any = None, **kwargs: Any) -> Any:
        """A folder or hub id of a combined pipeline; or of a decoder, whose prior is `prior` (a pipeline, a folder or an
        id), or what the decoder's model_index.json or model card names.

        Raises:
            ValueError: no prior is named. FileNotFoundError: nothing there.
        """
        place = locate(source)
        index = read_json(place / "model_index.json", "model folder") if isinstance(place, Path) else {}
        if f"{PRIOR}prior" in index or f"{PRIOR}prior" in kwargs:
            return super().from_pretrained(source, **kwargs)
        prior = prior or connected_prior(source)
        if prior is None:
            raise ValueError(f"{source} is a decoder and names no prior: give prior=, a folder or hub id of its prior")
        if isinstance(prior, (str, Path)):
            own = {
                name: value for name, value in kwargs.items() if name in ("torch_dtype", "variant", "use_safetensors")
            }
            prior = cls.prior_class.from_pretrained(prior, **own)  # type: ignore[attr-defined]
        return super().from_pretrained(source, **kwargs, **prior_parts(prior))


def with_prior(family: type[Kandinsky2Pipeline], prior: type) -> Callable[..., None]:
    """A constructor over the components of `family` and those of `prior`, which have PRIOR before their names."""
    own = list(inspect.signature(family.__init__).parameters.values())
    its = list(inspect.signature(prior.__init__).parameters.values())[1:]
    signature = inspect.Signature([*own, *(part.replace(name=f"{PRIOR}{part.name}") for part in its)])

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        parts = dict(signature.bind(self, *args, **kwargs).arguments)
        family.__init__(**{part.name: parts.pop(part.name) for part in own})
        self.register_modules(**parts)

    init.__signature__ = signature  # type: ignore[attr-defined]
    # diffusers reads the components' types from here.
    priors = get_type_hints(prior.__init__).items()
    init.__annotations__ = {**get_type_hints(family.__init__), **{f"{PRIOR}{name}": hint for name, hint in priors}}
    return init


class Kandinsky21CombinedPipeline(WithPrior, Kandinsky21Pipeline):
    """Kandinsky 2.1 with its prior: three tasks, any controls."""

    Call: ClassVar[type] = CombinedCall
    peer_name = "KandinskyCombinedPipeline"
    prior_class = KandinskyPriorPipeline
    model_cpu_offload_seq = "prior_text_encoder->prior_image_encoder->text_encoder->unet->movq"
    __init__ = with_prior(Kandinsky21Pipeline, KandinskyPriorPipeline)


class Kandinsky22CombinedPipeline(WithPrior, Kandinsky22Pipeline):
    """Kandinsky 2.2 with its prior: three tasks, any controls, `Control("hint", depth_map)` too."""

    Call: ClassVar[type] = CombinedCall
    peer_name = "KandinskyV22CombinedPipeline"
    prior_class = KandinskyV22PriorPipeline
    model_cpu_offload_seq = "prior_text_encoder->prior_image_encoder->unet->movq"
    __init__ = with_prior(Kandinsky22Pipeline, KandinskyV22PriorPipeline)


def prior_parts(prior: Any) -> dict[str, Any]:
    """Components of a prior pipeline under the names that they have beside a decoder's."""
    return {f"{PRIOR}{name}": part for name, part in prior.components.items()}


def connected_prior(source: str | Path) -> str | None:
    """The prior that a decoder's model_index.json ("prior") or model card ("prior:" in its head) names; a path in them is
    relative to the folder. None where neither does."""
    place = locate(source)
    files = {}
    for name in ("model_index.json", "README.md"):
        try:
            file = place / name if isinstance(place, Path) else Path(hf_hub_download(place, name))
        except (EntryNotFoundError, LocalEntryNotFoundError, OSError):
            continue
        if file.is_file():
            files[name] = file
    named = read_json(files["model_index.json"], "model folder").get("prior") if "model_index.json" in files else None
    if named is None and "README.md" in files:
        named = ModelCard.load(files["README.md"], ignore_metadata_errors=True).data.get("prior")
    first = named[0] if isinstance(named, list) else named
    if first and str(first).startswith(".") and isinstance(place, Path):
        return str(place / first)
    return first or None
