"""Networks of the learned detectors: weights are found, read from safetensors, and kept once built.

The networks are those of controlnet_aux. Its own loaders unpickle; here its classes are filled from safetensors files,
which have the name of the published pickle but for the suffix.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_kit.adapters.pictures import resize
from diffusion_kit.models.sources import PICKLES, locate

ANNOTATORS = "lllyasviel/Annotators"  # where the pickles are published
MULTIPLE = 64  # of both sides of what controlnet_aux looks at
INSTALL = "pip install 'diffusion_kit[detectors]'"

LINEART, LINEART_COARSE, PIDINET = "sk_model.pth", "sk_model2.pth", "table5_pidinet.pth"


def learned_lineart(image: Image.Image, model: Any, coarse: bool = False) -> Image.Image:
    """White lines on black, RGB, of the picture's size, as in Chan et al. (2022, arXiv:2203.12691); `coarse` draws fewer.

    Raises:
        FileNotFoundError, ValueError: weights missing or unfit; see `find`.
    """
    return look(image, _lineart, find("lineart", LINEART_COARSE if coarse else LINEART, model))


def learned_sketch(image: Image.Image, model: Any) -> Image.Image:
    """PiDiNet's edges above one half, white on black, RGB, of the picture's size: what T2I-Adapter's sketches are.

    Raises:
        FileNotFoundError, ValueError: weights missing or unfit; see `find`.
    """
    return look(image, pidinet, find("sketch", PIDINET, model), apply_filter=True)


def find(name: str, published: str, model: Any, *, download: bool = True) -> Path:
    """The safetensors file of a detector's weights.

    Args:
        name: the detector, for the error.
        published: name of the file as it is published ("ControlNetHED.pth"); its suffix is replaced.
        model: a folder that has the file, the file itself, a hub id, or None.
        download: ask the hub; otherwise only its cache on this machine.

    Raises:
        FileNotFoundError: no such file; says which is wanted, where it was looked for and how to come by it.
        ValueError: only a pickle is there.
    """
    wanted = Path(published).with_suffix(".safetensors").name
    needs = f"detector {name} needs {wanted}"
    if model is None or str(model) == ANNOTATORS:
        raise FileNotFoundError(
            f"{needs}, which is published as a pickle only: hf download {ANNOTATORS} {published} --local-dir detectors "
            f"&& diffusion-kit models --convert detectors/{published}, then model='detectors' (--model detectors)"
        )
    place = locate(model)
    if isinstance(place, str):
        return _from_hub(needs, wanted, place, download)
    if place.is_file():
        return place
    if (place / wanted).is_file():
        return place / wanted
    for suffix in PICKLES:
        pickle = (place / wanted).with_suffix(suffix)
        if pickle.is_file():
            raise ValueError(
                f"{needs}: {pickle} is a pickle, which can run any code when opened; "
                f"diffusion-kit models --convert {pickle} converts it once"
            )
    raise FileNotFoundError(f"{needs}: {place} has none")


def _from_hub(needs: str, wanted: str, repository: str, download: bool) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not download:
        cached = try_to_load_from_cache(repository, wanted)
        if not isinstance(cached, str):
            raise FileNotFoundError(f"{needs}: it is not in the hub's cache, the first run asks {repository} for it")
        return Path(cached)
    try:
        return Path(hf_hub_download(repository, wanted))
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"{needs}: the hub did not give it from {repository} ({reason})") from None


def absence(name: str, published: str, model: Any) -> str | None:
    """Why a detector cannot run now, in one line; None where its package and its weights are here."""
    if importlib.util.find_spec("controlnet_aux") is None:
        return f"detector {name} needs the package controlnet_aux: {INSTALL}"
    try:
        find(name, published, model, download=False)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None


def annotator(package: str) -> Any:
    """A module of controlnet_aux ("hed").

    Raises:
        ImportError: it does not load here.
    """
    try:
        return importlib.import_module(f"controlnet_aux.{package}")
    except ImportError as error:
        raise ImportError(f"the package controlnet_aux does not load ({error}): {INSTALL}") from None


def fill(build: Callable[[], Any], file: Path) -> Any:
    """The network that `build` makes, ready to run, with the weights of a safetensors file.

    Raises:
        ValueError: the file is cut short, or is not of this network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = {key.removeprefix("module."): value for key, value in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error})") from None
    net = build()
    own = net.state_dict().keys()
    longer = {key.partition(".")[2]: key for key in own}  # OpenPose's files leave out the first part of a name
    try:
        net.load_state_dict({key if key in own else longer.get(key, key): value for key, value in tensors.items()})
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} does not fit {type(net).__name__}: {first} ...") from None
    return net.eval()


def look(image: Image.Image, build: Callable[..., Any], *files: Path | None, **options: Any) -> Image.Image:
    """What one of controlnet_aux's detectors makes of a picture: RGB, of the picture's size.

    Args:
        build: makes the detector from its files; called once for the same files.
        options: the detector's own.
    """
    stout = widened(image)
    width, height = (max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in stout.size)
    seen = resize(stout, (width, height))
    side = min(seen.size)  # its shorter side as it is: the detector resizes nothing
    result = _built(build, *files)(seen, detect_resolution=side, image_resolution=side, **options)
    return resize(result, image.size)


def widened(image: Image.Image) -> Image.Image:
    """The picture, stretched until it is at most eight times as long as wide: less is too narrow for some networks."""
    least = max(image.size) // 8
    width, height = (max(side, least) for side in image.size)
    return resize(image, (width, height))


@lru_cache(maxsize=4)
def _built(build: Callable[..., Any], *files: Path | None) -> Any:
    with _quiet():
        return build(*files)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the dozen warnings of controlnet_aux's imports, and what its networks print."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _lineart(file: Path) -> Any:
    aux = annotator("lineart")
    net = fill(lambda: aux.Generator(3, 1, 3), file)
    return aux.LineartDetector(net, net)


def pidinet(file: Path) -> Any:
    """controlnet_aux's detector of soft edges."""
    aux = annotator("pidi")
    return aux.PidiNetDetector(fill(aux.pidinet, file))
