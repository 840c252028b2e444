"""`diffusion-kit models`: what is embedded, what a folder or file is, and pickles made into safetensors."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

Rows = Iterator[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="[inspect] MODEL",
        nargs="*",
        help="a folder, a file or a hub id; without, what is embedded; `inspect FILE`: what a file is, in a line",
    )
    parser.add_argument("--convert", metavar="FILE", help="write a pickle's tensors beside it, as .safetensors")


def run(options: argparse.Namespace) -> None:
    if options.convert:
        print(convert(Path(options.convert)))
        return
    from diffusion_kit.models.sources import EMBEDDED

    inspects, names = options.model[:1] == ["inspect"], options.model
    if inspects:
        names = names[1:]
    if len(names) > 1 or (inspects and not names):
        raise ValueError(f"models {' '.join(options.model)}: give one model, or inspect and one .safetensors file")
    if inspects:
        print(inspect(names[0]))
        return
    for k, name in enumerate(names or EMBEDDED):
        if k:
            print()
        for label, text in describe(name):
            print(f"{label:28}{text}")


def inspect(source: str) -> str:
    """What a single file is, in a line.

    Raises:
        FileNotFoundError: nothing there. ValueError: no safetensors file, or damaged.
    """
    from diffusion_kit.models.formats import describe as describe_file
    from diffusion_kit.models.sources import locate

    place = locate(source)
    if not isinstance(place, Path) or not place.is_file():
        raise ValueError(f"{source} is no file: `diffusion-kit models {source}` says what a folder or a hub id is")
    return describe_file(place)


def describe(source: str) -> Rows:
    """What a model is, in labelled lines.

    Raises:
        FileNotFoundError: nothing there. ValueError: no model, a pickle, or damaged.
    """
    from diffusion_kit.making.fingerprint import fingerprint
    from diffusion_kit.models.sources import locate

    place = locate(source)
    if isinstance(place, str):
        place = _in_cache(place)
    yield "model", str(place)
    if place.is_file():
        yield from _file(place)
    elif (place / "model_index.json").is_file():
        yield from _pipeline(place)
    else:
        yield from _network(place)
    yield "hash", fingerprint(source)


def _in_cache(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{name} is no folder or file here, and not in the hub's cache: `hf download {name}` fetches it"
        ) from None


def _pipeline(folder: Path) -> Rows:
    from diffusion_kit.models.sources import check_folder, read_json
    from diffusion_kit.pipelines.auto import FAMILIES

    index = read_json(folder / "model_index.json", "model folder")
    name = str(index.get("_class_name"))
    family = FAMILIES[name].__name__ if name in FAMILIES else "of no family that this version has"
    yield "pipeline", f"{name} ({family})"
    check_folder(folder, passed=set())
    for part, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None:
            yield f"  {part}", f"{entry[1]}{_weights_in(folder / part)}"
    for control in sorted(folder.glob("controls/*/")):
        yield f"  control {control.name}", f"{_control_in(control)}{_weights_in(control)}{_expects(control.name)}"


def _control_in(folder: Path) -> str:
    from diffusion_kit.models.formats import LABELS, identify
    from diffusion_kit.models.sources import read_json

    files = sorted(folder.glob("*.safetensors"))
    if files and not (folder / "config.json").is_file():
        return LABELS[identify(files[0]).kind].removeprefix("a ")
    return str(read_json(folder / "config.json", "control").get("_class_name"))


def _network(folder: Path) -> Rows:
    from diffusion_kit.models.sources import read_json

    config = read_json(folder / "config.json", "model, nor one with a model_index.json")
    architectures = config.get("architectures") or ["a network"]
    yield "network", f"{config.get('_class_name') or architectures[0]}{_weights_in(folder)}{_expects(folder.name)}"
    for key in ("in_channels", "sample_size", "cross_attention_dim", "block_out_channels", "channels", "adapter_type"):
        if key in config:
            yield f"  {key}", str(config[key])


def _file(file: Path) -> Rows:
    from diffusion_kit.models.formats import describe as describe_file

    yield "file", f"{describe_file(file)}{_expects(file.stem)}"


def _weights_in(folder: Path) -> str:
    """Parameters and size of a component's weights; of several variants, the first."""
    from diffusion_kit.models.sources import PICKLES, tensor_shapes

    files = sorted(folder.glob("*.safetensors"))
    shards = [file for file in files if "-of-" in file.name] or files[:1]
    if not shards:
        pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        return f", only as a pickle ({pickles[0]}), which is refused" if pickles else ""
    shapes = {name: shape for file in shards for name, shape in tensor_shapes(file).items()}
    return f", {_count(shapes, sum(file.stat().st_size for file in shards))}"


def _count(shapes: Mapping[str, tuple[int, ...]], size: int) -> str:
    return f"{sum(math.prod(shape) for shape in shapes.values()) / 1e6:.1f} M parameters, {size / 1e6:.1f} MB"


def _expects(name: str) -> str:
    from diffusion_kit.adapters.maps import expected_map

    known = expected_map(name)
    if known is None:
        return ""
    polarity = f", {known.polarity}" if known.polarity else ""
    return f"; expects {known.shows}{polarity}" + (f" (detect {known.detector})" if known.detector != "none" else "")


def convert(file: Path) -> Path:
    """Writes the tensors of a pickle as safetensors beside it; only tensors and plain containers are unpickled.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds something else than tensors, or the result is there already.
    """
    import pickle

    import torch
    from safetensors.torch import save_file

    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    out = file.with_suffix(".safetensors")
    if out.exists():
        raise ValueError(f"{out} is there already")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise ValueError(f"{file} holds more than tensors, which is refused, or is no pickle at all") from None
    for inner in ("state_dict", "model"):
        content = content.get(inner, content) if isinstance(content, dict) else content
    named = content.items() if isinstance(content, dict) else ()
    tensors = {k: v.clone().contiguous() for k, v in named if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no tensors by name")
    beside = out.with_name(f".{out.name}.part")
    try:
        save_file(tensors, beside)
        beside.rename(out)
    finally:
        beside.unlink(missing_ok=True)
    return out
