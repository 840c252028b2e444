"""What the families over a UNet and an autoencoder share: one call from arguments to pictures, whatever the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import AsymmetricAutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor

from diffusion_kit.adapters.control import Control, Site, granularity
from diffusion_kit.models.denoiser import control_channels, make_denoiser, own_control
from diffusion_kit.models.vae import decode_latents, encode_mode, encode_picture, preview, preview_matrix, scale_factor
from diffusion_kit.sampling.engines import eager
from diffusion_kit.sampling.guidance import guidance_embedding
from diffusion_kit.sampling.loop import Run
from diffusion_kit.sampling.schedule import Schedule, make_schedule

from .base import ControlledPipeline
from .call import LateControls, LatentCall
from .callbacks import Callbacks
from .canvas import Canvas, make_canvas
from .memory import rest
from .starts import Batch, Encoder, Start, from_masked_picture, from_noise, from_picture


class LatentPipeline(ControlledPipeline):
    """A family whose components hold a `vae`, a `unet` and a `scheduler`.

    A family gives `conditioning`, the tensors that the UNet sees beside the latents, and `output`, the value that a call
    returns; it may change `finish`, which is given the decoded pixels.
    """

    def _set_up(self) -> None:
        """To be called when the components are registered."""
        self.vae_scale_factor = scale_factor(self.vae) if self.vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale, self._guidance_rescale = self.Call.guidance_scale, 0.0  # type: ignore[attr-defined]
        self._clip_skip: int | None = None
        self._interrupt, self._num_timesteps = False, 0
        self._cross_attention_kwargs: dict[str, Any] | None = None
        self._denoising_start: float | None = None
        self._denoising_end: float | None = None

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels for which the model was made."""
        size = self.unet.config.sample_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def own_control(self) -> str | None:
        """Name of the control that the UNet itself takes."""
        return None if None in (self.unet, self.vae) else own_control(self.unet, self.vae.config.latent_channels)

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def denoising_end(self) -> float | None:
        return self._denoising_end

    @property
    def denoising_start(self) -> float | None:
        return self._denoising_start

    # What a family, or a class with an adapter, gives

    upcasts: ClassVar[bool] = True  # a float16 autoencoder whose configuration says force_upcast runs in float32

    rounding: ClassVar[str] = "nearest"  # of a size that was asked for

    @property
    def size_multiple(self) -> int:
        """What the sides of a result are multiples of."""
        return self.vae_scale_factor

    def own_adapters(self) -> Sequence[Any]:
        """Networks of controls that are components of the pipeline."""
        return ()

    def start_level(self, call: Any, schedule: Schedule) -> tuple[float, float] | None:
        """a and b of a image + b noise at which image-to-image starts, where they are not the schedule's."""
        return None

    def conditioning(self, call: Any, canvas: Canvas, device: torch.device) -> dict[str, Tensor]:
        """(unconditional, conditional) embeddings along the batch, or the conditional ones without guidance."""
        raise TypeError(f"{type(self).__name__} has no conditioning")

    def finish(self, pixels: Tensor) -> Tensor:
        """The decoded pixels (B, 3, H, W) in [-1, 1], checked or marked."""
        return pixels

    def output(self, images: Any, return_dict: bool) -> Any:
        raise TypeError(f"{type(self).__name__} has no output")

    def decode(self, latents: Tensor, output_type: str, **beside: Tensor) -> Any:
        """Pictures of the latents as "pil", "np" or "pt"; "latent" gives the latents."""
        if output_type == "latent":
            return latents
        device = get_module_execution_device(self.vae)
        pixels = decode_latents(self.vae, latents.to(device), upcast=self.upcasts, engine=self.engine, **beside)
        return self.image_processor.postprocess(self.finish(pixels), output_type=output_type)

    def preview(self, latents: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1]: a picture of latents for the price of a matrix product."""
        return preview(preview_matrix(self.vae), latents)

    # The call

    def generate(self, call: LatentCall) -> Any:
        call.check(self._callback_tensor_inputs)
        late = call.controls if isinstance(call.controls, LateControls) else LateControls(lambda _: (), call.controls)
        late = replace(late, more=[self.resolve_control(own) for own in late.more])
        canvas = self._canvas(call, late.more)
        self._remember(call)
        device = self._execution_device
        conditioning = self.conditioning(call, canvas, device)
        rest(self)
        if "preview" in call.callback_on_step_end_tensor_inputs:
            preview_matrix(self.vae)  # now: in the loop, offloading would take the UNet away for it
        schedule = self._schedule(call, device)
        batch = Batch(
            call.prompts,
            call.num_images_per_prompt,
            (self.vae.config.latent_channels, *canvas.latent_size(self.vae_scale_factor)),
            call.generator,
            device,
            self.unet.dtype,
        )
        start = self._start(call, batch, schedule, canvas)
        site = Site(
            self.unet,
            canvas.height,
            canvas.width,
            batch.shape[1:],
            batch.prompts,
            batch.per_prompt,
            schedule.timesteps,
            device,
            guided=self.do_classifier_free_guidance,
            own_control=self.own_control,
            encode_picture=partial(encode_mode, self.vae, upcast=self.upcasts, engine=self.encoding(self.engine)),
            engine=self.encoding(eager),
        )
        controls = [canvas.place(control, call.image) for control in late(schedule)]
        run = Run(
            schedule=schedule,
            denoiser=make_denoiser(self.unet, batch.shape[0], call.cross_attention_kwargs),
            conditioning=conditioning,
            controls=self.encode_controls(controls, site),
            channels=start.channels,
            rule=start.rule,
            guidance_scale=self.guidance_weight,
            guidance_rescale=call.guidance_rescale,
            guidance_interval=call.guidance_interval,
            generator=call.generator,
            engine=self.engine,
            dtype=self.unet.dtype,
        )
        rest(self)  # of those that controls have used
        latents = self.denoise(run, start.latents, Callbacks(self, call, run)).to(self.unet.dtype)
        images = self.decode(latents, call.output_type, **self._beside(canvas, batch))
        if canvas.crop is not None:
            overlay = self.image_processor.apply_overlay
            mask = call.mask_image.resize(call.image.size, Image.Resampling.NEAREST)
            images = [overlay(mask, call.image, image, canvas.crop) for image in images]
        return self.output(images, call.return_dict)

    def _remember(self, call: LatentCall) -> None:
        """What callbacks read and write on the pipeline."""
        self._guidance_scale, self._guidance_rescale = call.guidance_scale, call.guidance_rescale
        self._clip_skip, self._cross_attention_kwargs = getattr(call, "clip_skip", None), call.cross_attention_kwargs
        self._denoising_start, self._denoising_end = call.denoising_start, call.denoising_end
        self._interrupt = False

    def _schedule(self, call: LatentCall, device: torch.device) -> Schedule:
        schedule = make_schedule(
            self.scheduler,
            call.num_inference_steps,
            timesteps=call.timesteps,
            sigmas=call.sigmas,
            strength=None if call.image is None else call.share,
            denoising_start=call.denoising_start,
            denoising_end=call.denoising_end,
            eta=call.eta,
            device=device,
        )
        self._num_timesteps = schedule.calls
        return schedule

    def _canvas(self, call: LatentCall, controls: Sequence[Control]) -> Canvas:
        nets = [control.model for control in controls if isinstance(control, Control)]
        return make_canvas(
            self.image_processor,
            call.image,
            call.mask_image,
            call.height,
            call.width,
            call.padding_mask_crop,
            native=self.native_size,
            latent_channels=self.vae.config.latent_channels,
            multiple=granularity(self.size_multiple, [*self.own_adapters(), *nets]),
            fit=call.fit,
            rounding=self.rounding,
        )

    def encoder(self, batch: Batch) -> Encoder:
        """Pixels and a generator to latents."""

        options: dict[str, Any] = {"upcast": self.upcasts, "engine": self.encoding(self.engine)}

        def encode(pixels: Tensor, generator: Any) -> Tensor:
            return encode_picture(self.vae, pixels.to(batch.device), generator, batch.dtype, **options)

        return encode

    def _start(self, call: LatentCall, batch: Batch, schedule: Schedule, canvas: Canvas) -> Start:
        encoder, add_noise = self.encoder(batch), call.denoising_start is None
        takes = self.unet.config.in_channels - control_channels(self.unet, batch.shape[0])
        if canvas.mask is None and takes != batch.shape[0]:
            raise ValueError(
                f"this UNet takes {takes} input channels, as those made for inpainting do: give image= and mask_image="
            )
        if canvas.picture is None:
            return from_noise(batch, schedule, call.latents)
        if canvas.mask is None:
            level = self.start_level(call, schedule)
            options: dict[str, Any] = {"add_noise": add_noise, "latents": call.latents, "level": level}
            return from_picture(batch, schedule, canvas.picture, encoder, **options)
        return from_masked_picture(call, batch, schedule, canvas, encoder, takes)

    def _beside(self, canvas: Canvas, batch: Batch) -> dict[str, Tensor]:
        """What an autoencoder made for inpainting sees beside the latents: picture and mask, a row for each result."""
        if canvas.picture is None or canvas.mask is None or not isinstance(self.vae, AsymmetricAutoencoderKL):
            return {}
        return {"image": batch.spread(canvas.picture, "image"), "mask": batch.spread(canvas.mask, "mask_image")}

    def guidance_condition(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """{"timestep_cond": (rows, E)} for UNets that are told the guidance scale; else nothing."""
        width = self.unet.config.get("time_cond_proj_dim")
        if width is None:
            return {}
        return {"timestep_cond": guidance_embedding(self._guidance_scale, width, rows, device, self.unet.dtype)}


def texts(prompt: Any, rows: int | None = None, what: str = "negative prompts") -> list[str]:
    """A list of texts; a single one stands for every row."""
    own = [prompt] * (rows or 1) if isinstance(prompt, str) else list(prompt)
    if rows is not None and len(own) != rows:
        raise ValueError(f"{len(own)} {what} for {rows} prompts: give one, or one for each")
    return own
