"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): cross-attention sees the tokens of a reference picture beside the text's,
each attended by itself and added (eq. 5). Keys and values of the picture are made once for a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.attention_processor import Attention
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusion_kit.models.attention import Tokens, attention_layers, joint, split_heads
from diffusion_kit.models.sources import find_weights, one_line, tensor_shapes
from diffusion_kit.models.unet import Net, layout, obstacle
from diffusion_kit.sampling.doors import Answer, Conditioning, Tree, branched, in_every, spread
from diffusion_kit.sampling.engines import Engine, eager

from .control import Control, EncodedControl, Scale, Site
from .pictures import as_list, eight_bit

# First matrix of the projection in the plain, full-face and plus kinds, and how an encoder's configuration calls the
# width of what it reads: one embedding of the picture, or one of each patch.
READS = {
    "image_proj.proj.weight": "projection_dim",
    "image_proj.proj.0.weight": "hidden_size",
    "image_proj.proj_in.weight": "hidden_size",
}


class IPAdapter(nn.Module):
    """The projection of a picture's embeddings to tokens, and their keys and values for every cross-attention layer of a
    UNet, in the order of its modules; with the encoder of the picture.

    `Control(ip_adapter, image)` takes a picture (PIL); a list, one for each prompt; or a list of lists, where the pictures
    of a prompt, or of all, act together. Embeddings in place of pictures are a tensor (N, pictures, D), or (N, pictures,
    patches, D) of plus and full-face adapters; with guidance (2 N, ...), the unconditional half first.

    Args:
        weights: tensors of a plain, plus or full-face checkpoint.
        image_encoder: may be shared by several adapters; without one only embeddings are taken.
        feature_extractor: by default one for the encoder's size.

    Raises:
        ValueError: weights of another kind, or an image encoder that does not fit.
    """

    is_reference: ClassVar[bool] = True  # its picture is not in output space

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
    ):
        super().__init__()
        self.reads, self.width = _reads(
            {name: tuple(weight.shape) for name, weight in weights.items()}, "this checkpoint"
        )
        parts = {name.removeprefix("image_proj."): w for name, w in weights.items() if name.startswith("image_proj.")}
        convert = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers
        self.image_proj = convert(parts, low_cpu_mem_usage=False)
        numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("ip_adapter.")})
        self.to_k_ip, self.to_v_ip = (
            nn.ModuleList(_linear(weights[f"ip_adapter.{n}.{name}.weight"]) for n in numbers)
            for name in ("to_k_ip", "to_v_ip")
        )
        found = self.width if image_encoder is None else getattr(image_encoder.config, self.reads)
        if found != self.width:
            raise ValueError(
                f"this image encoder does not fit the IP-Adapter: its {self.reads} is {found}, the adapter takes "
                f"{self.width}"
            )
        if image_encoder is not None and feature_extractor is None:
            size = image_encoder.config.image_size
            feature_extractor = CLIPImageProcessor(size=size, crop_size=size)
        self.image_encoder, self.feature_extractor = image_encoder, feature_extractor

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str = "",
        weight_name: str | None = None,
        image_encoder: CLIPVisionModelWithProjection | str | None = "image_encoder",
        feature_extractor: CLIPImageProcessor | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **hub: Any,
    ) -> IPAdapter:
        """Loads a .safetensors file, or `weight_name` in `subfolder` of a folder or hub id.

        Args:
            image_encoder: a model, or the folder in which one that fits is looked for: beside the file and in "models";
                with a slash, from the source's root. With None, or if there is none, only embeddings are taken.
            hub: revision, cache_dir, token and the like.

        Raises:
            FileNotFoundError: no such file. ValueError: a pickle, no IP-Adapter, one for FaceID, or an encoder that does
                not fit.
        """
        file, root, subfolder = find_weights(source, subfolder, weight_name, hub)
        reads = _reads(tensor_shapes(file), str(file))
        if isinstance(image_encoder, str):
            near = [str(PurePosixPath(folder, image_encoder)) for folder in (subfolder, "models")]
            folders = [image_encoder] if "/" in image_encoder else near
            image_encoder = _find_encoder(root, folders, reads, dtype=torch_dtype, **hub)
        adapter = cls(load_file(file), image_encoder, feature_extractor)
        for part in (adapter.image_proj, adapter.to_k_ip, adapter.to_v_ip):
            part.to(torch_dtype)  # the encoder may be another's too
        return adapter.eval()

    @torch.no_grad()
    def embed(self, pictures: Sequence[Any], engine: Engine = eager) -> tuple[Tensor, Tensor]:
        """(unconditional, conditional) embeddings of N pictures, each (N, D), of plus and full-face (N, patches, D).

        Args:
            pictures: PIL, or tensors (3, h, w) that are already what the encoder takes.

        Raises:
            ValueError: there is no image encoder, or not a picture.
        """
        if self.image_encoder is None:
            raise ValueError(
                f"this IP-Adapter has no image encoder: give image_encoder=, of {self.reads} {self.width}, or keep it in "
                "the folder image_encoder beside the file"
            )
        pixels = torch.stack([self._pixels(picture) for picture in pictures])
        pixels = pixels.to(get_module_execution_device(self.image_encoder), self.image_encoder.dtype)
        see = engine.network(See(self.image_encoder, patches=self.reads != "projection_dim"))
        if self.reads == "projection_dim":
            embeds = see(pixels)
            return torch.zeros_like(embeds), embeds
        states = see(torch.cat([torch.zeros_like(pixels[:1]), pixels]))
        return states[:1].expand(len(pixels), -1, -1), states[1:]

    def _pixels(self, picture: Any) -> Tensor:
        if isinstance(picture, Tensor):
            return picture
        if not isinstance(picture, Image.Image):
            raise ValueError(f"an IP-Adapter's picture is a PIL image, not {type(picture).__name__}")
        return self.feature_extractor(eight_bit(picture), return_tensors="pt").pixel_values[0]

    @torch.no_grad()
    def project(self, embeds: Tensor) -> Tensor:
        """Embeddings (N, pictures, ...) as tokens (N, pictures x tokens, width of the text)."""
        tokens = self.image_proj(embeds.flatten(0, 1).to(next(self.image_proj.parameters())))
        return tokens.unflatten(0, embeds.shape[:2]).flatten(1, 2)


MODELS = (IPAdapter,)
FILES = {"ip_adapter": IPAdapter.from_pretrained}


@dataclass(frozen=True)
class See:
    """What an image encoder makes of pictures: an embedding (N, D) of each, or its patches (N, patches, D) before the last
    layer."""

    net: CLIPVisionModelWithProjection
    patches: bool

    @property
    def executed(self) -> tuple[nn.Module, ...]:
        return (self.net,)

    def __call__(self, pixels: Tensor) -> Tensor:
        seen = self.net(pixels, output_hidden_states=self.patches)
        return seen.hidden_states[-2] if self.patches else seen.image_embeds


@dataclass(frozen=True)
class AddTokens:
    """The same tokens in every step."""

    executed = ()

    def __call__(self, tensors: Tree, x: Tensor, branches: int) -> Answer:
        return Answer(tokens=tensors)


@dataclass(frozen=True, eq=False)
class ImagePrompt(Control):
    """One of the pictures of a call that a pipeline's own adapters are shown; `number` tells it from the others."""

    number: int = 0


Seeing = Mapping[str, tuple[Attention, nn.Linear, nn.Linear, Tensor]]


@dataclass(kw_only=True)
class EncodedTokens(EncodedControl):
    """`states` are tokens (rows or 2 rows, tokens, width); `layers` has by name each layer that sees them, its projections
    to keys and values, and scale x mask (rows or 1, 1, queries or 1, 1); `at` gives these at another scale. `number` is an
    `ImagePrompt`'s."""

    states: Tensor
    rows: int
    layers: Seeing
    at: Callable[[Scale], Seeing]
    number: int | None = None

    def tensors(self, conditioning: Conditioning, branches: int) -> Tree:
        states = branched({"states": self.states}, self.rows, branches)["states"]
        result = {}
        for name, (layer, to_k, to_v, weight) in self.layers.items():
            key, value = (split_heads(layer, project(states)).to(weight) for project in (to_k, to_v))
            result[name] = (Tokens(key, value, in_every(weight, branches) if len(weight) > 1 else weight),)
        return result


def encode(control: Control, site: Site) -> EncodedControl:
    """Encodes and projects the pictures; keys and values follow when the run has its branches."""
    adapter = control.model
    if control.mode != "balanced":
        raise ValueError(f"an IP-Adapter acts on both halves: its mode is 'balanced', not {control.mode!r}")
    why = obstacle(site.unet)
    if why is not None:
        raise ValueError(f"an IP-Adapter needs a UNet that does not run its own forward; this one does: {why}")
    layers = _fitting(adapter, site.unet)
    for part in adapter.children():
        if not hasattr(part, "_hf_hook"):  # of an encoder that is offloaded
            part.to(site.device)
    halves = [adapter.project(half) for half in _embeddings(adapter, control.image, site)]
    states = [spread(half, site.prompts, site.per_prompt, "an IP-Adapter's image") for half in halves]

    def at(scale: Scale) -> Seeing:
        weights = _weights(replace(control, scale=scale), site, list(layers))
        parts = zip(layers.items(), adapter.to_k_ip, adapter.to_v_ip, strict=True)
        return {name: (layer, k, v, weights[name]) for (name, layer), k, v in parts if name in weights}

    return EncodedTokens(
        AddTokens(),
        (control.start, control.end),
        states=torch.cat(states),
        rows=site.rows,
        layers=at(control.scale),
        at=at,
        number=control.number if isinstance(control, ImagePrompt) else None,
    )


def _embeddings(adapter: IPAdapter, image: Any, site: Site) -> Sequence[Tensor]:
    """(N, pictures, ...) of the unconditional half, with guidance, and of the conditional."""
    if isinstance(image, Tensor):
        patches = () if adapter.reads == "projection_dim" else ("patches",)
        if image.ndim != 3 + len(patches) or image.shape[-1] != adapter.width or len(image) % (1 + site.guided):
            form = ", ".join(["2 N" if site.guided else "N", "pictures", *patches, str(adapter.width)])
            raise ValueError(f"embeddings for an IP-Adapter have shape {tuple(image.shape)}; this one takes ({form})")
        return image.chunk(1 + site.guided)
    groups = [as_list(pictures) for pictures in as_list(image)]
    counts = [len(group) for group in groups]
    if len(set(counts)) != 1 or not all(counts):
        raise ValueError(f"an IP-Adapter's image lists {counts} pictures; every prompt needs as many, at least one")
    embeds = adapter.embed([picture for group in groups for picture in group], site.engine)
    return [half.unflatten(0, (len(groups), -1)) for half in (embeds if site.guided else embeds[1:])]


def _weights(control: Control, site: Site, names: list[str]) -> dict[str, Tensor]:
    """scale x mask (rows or 1, 1, queries or 1, 1) of every layer whose scale is not 0."""
    levels = [_level(name, site.levels - 1) for name in names]
    places, _ = layout(site.unet, site.latent_size)
    first = {place[0]: position for position, place in reversed(list(enumerate(places)))}
    scales, own = (1.0,) * site.levels, [1.0] * len(names)
    if isinstance(control.scale, Mapping):
        unknown = [part for part in control.scale if not any(name.startswith(part) for name in names)]
        if unknown:
            raise ValueError(f"Control scale names {unknown[0]!r}; no cross-attention layer of the UNet begins so")
        own = [next((s for part, s in control.scale.items() if name.startswith(part)), 0.0) for name in names]
    else:
        scales = control.level_scales(site.levels)
    weights = site.weights(control, own, [first[level] for level in levels], scales)
    return {
        name: weight.flatten(2).unsqueeze(-1).to(site.unet.dtype)
        for name, level, share, weight in zip(names, levels, own, weights, strict=True)
        if share * scales[level]
    }


def _level(name: str, middle: int) -> int:
    """Of the layer of that name; an up block counts to the down block of its size."""
    block, index = name.split(".")[:2]
    if block == "mid_block":
        return middle
    return int(index) if block == "down_blocks" else middle - 1 - int(index)


def _fitting(adapter: Net, unet: Net) -> dict[str, Attention]:
    """The UNet's cross-attention layers, checked against the adapter's.

    Raises:
        ValueError: they are others.
    """
    layers = {name: layer for name, layer in attention_layers(unet) if layer.is_cross_attention and not joint(layer)}
    width, base_width = adapter.to_k_ip[0].in_features, unet.config.cross_attention_dim
    if width != base_width:
        raise ValueError(
            f"this IP-Adapter does not fit the base: its tokens have width {width}, the base's text {base_width}"
        )
    has, takes = [to_k.out_features for to_k in adapter.to_k_ip], [layer.inner_kv_dim for layer in layers.values()]
    if has != takes:
        raise ValueError(
            f"this IP-Adapter does not fit the base: it is for {len(has)} layers of widths {sorted(set(has))}, "
            f"the UNet has {len(takes)} of {sorted(set(takes))}"
        )
    return layers


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def _reads(shapes: Mapping[str, tuple[int, ...]], what: str) -> tuple[str, int]:
    """What an adapter of these tensors reads (see `READS`), and its width.

    Raises:
        ValueError: no IP-Adapter, or one for the face embeddings of insightface.
    """
    projects = [name for name in READS if name in shapes]
    face = any("perceiver_resampler" in name for name in shapes) or (
        "image_proj.proj.0.weight" in shapes and "image_proj.proj.3.weight" not in shapes
    )
    if face:
        raise ValueError(f"{what} is a FaceID IP-Adapter: it reads embeddings of insightface, which is not supported")
    if not projects or not any(name.endswith("to_k_ip.weight") for name in shapes):
        raise ValueError(f"{what} is no IP-Adapter: it has no image_proj and ip_adapter tensors of a known kind")
    return READS[projects[0]], shapes[projects[0]][1]


def _find_encoder(
    root: str, folders: Sequence[str], reads: tuple[str, int], **options: Any
) -> CLIPVisionModelWithProjection | None:
    """The first image encoder in these folders that gives what the adapter reads."""
    for folder in folders:
        try:
            config = CLIPVisionConfig.from_pretrained(root, subfolder=folder, **options)
        except OSError:
            continue
        if getattr(config, reads[0]) == reads[1]:
            options |= {"subfolder": folder, "use_safetensors": True}
            with one_line(f"{root}/{folder}", "image encoder"):
                return CLIPVisionModelWithProjection.from_pretrained(root, **options)
    return None
