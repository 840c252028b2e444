"""Where models come from: the embedded one, folders, single files and hub ids; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEFAULT = "default"
EMBEDDED = {DEFAULT: "default", "default-kandinsky": "default_kandinsky"}  # name: folder here, of what comes along
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
LIBRARIES = {"diffusers", "transformers"}


def embedded(name: str = DEFAULT) -> Path:
    """Folder of a model that comes with the package."""
    return Path(__file__).parent / EMBEDDED[name]


def locate(source: str | Path) -> Path | str:
    """The folder or safetensors file of a model, or a hub id as it is.

    Raises:
        ValueError: a pickle, a folder that is no model or leads outside itself.
        FileNotFoundError: no such folder or file.
    """
    if str(source) in EMBEDDED:
        return embedded(str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run any code when opened; convert it once: "
            f"diffusion-kit models --convert {path}"
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no model: a model is a folder, a .safetensors file or a hub id")
        return path
    text = str(source)
    if path.is_absolute() or text.startswith(".") or text.endswith(".safetensors") or text.count("/") != 1:
        raise FileNotFoundError(
            f"no model {text!r}: no folder or file {path.absolute()}, and it is no hub id (owner/name)"
        )
    return text


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Of a network, with shards: "model.safetensors", "model.fp16-00001-of-00002.safetensors"."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if file.name.split(".")[1].partition("-")[0] == (variant or "safetensors")]


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; the weights are not read.

    Raises:
        ValueError: it is cut short, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is cut short, or no safetensors file ({error})") from None


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The file that says what a folder is.

    Raises:
        FileNotFoundError: it is missing. ValueError: it is not JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is no {what}: it has no {file.name}")
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None


def check_folder(folder: Path, passed: set[str]) -> None:
    """Refuses a model folder that names foreign code, leads outside itself, or lacks a component nobody passed."""
    index_file, root = folder / "model_index.json", folder.resolve()
    for name, entry in read_json(index_file, "model folder").items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None or name in passed:
            continue
        library = str(entry[0]).split(".")[0]
        if library not in LIBRARIES and not hasattr(_peer_pipelines(), library):
            raise ValueError(
                f"{index_file} takes {name!r} from the module {entry[0]!r}; only {sorted(LIBRARIES)} are loaded"
            )
        component = folder / name
        if not component.is_dir() or not any(component.iterdir()):
            raise FileNotFoundError(
                f"{folder} has no {name!r}: its model_index.json names it, the folder {component} is missing"
            )
        _check_links(component, root)
        for file in component.glob("*.safetensors"):
            tensor_shapes(file)
    if (folder / "controls").exists():
        _check_links(folder / "controls", root)


def _check_links(component: Path, root: Path) -> None:
    for file in (component, *component.rglob("*")):
        if _leads_outside(file, root):
            raise ValueError(f"{file} leads outside the model folder {root}")


def _leads_outside(file: Path, root: Path) -> bool:
    """Links out of the folder; a hub cache's own links (snapshots to blobs of the same repository) are not foreign."""
    if not file.is_symlink():
        return not file.resolve().is_relative_to(root)
    target = file.resolve()
    repository = root.parents[1] if root.parent.name == "snapshots" else root
    return not target.is_relative_to(repository)


def _peer_pipelines() -> Any:
    from diffusers import pipelines

    return pipelines


@contextmanager
def one_line(source: str | Path, what: str) -> Iterator[None]:
    """Turns the many lines in which a missing hub, repository or file is told into one."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and "\n" not in str(error) and len(str(error)) < 300:
            raise
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"no {what} {str(source)!r}: no such folder, and the hub did not give it ({reason})"
        ) from None


def component_class(source: str | Path) -> str:
    """Name of a network's class in the config.json of its folder or hub id."""
    place = locate(source)
    if isinstance(place, Path):
        return str(read_json(place / "config.json", "network").get("_class_name"))
    from diffusers import ModelMixin

    with one_line(source, "network"):
        return str(ModelMixin.load_config(place).get("_class_name"))


def load_component(cls: Any, source: str | Path, **kwargs: Any) -> Any:
    """A network (T2IAdapter, ControlNetModel, ...) from a folder or a hub id; safetensors only."""
    place = locate(source)
    with one_line(source, cls.__name__):
        if isinstance(place, Path):
            for file in place.glob("*.safetensors"):
                tensor_shapes(file)
        return cls.from_pretrained(str(place), use_safetensors=True, **kwargs)


def find_weights(source: str | Path, subfolder: str, name: str | None, hub: Mapping[str, Any]) -> tuple[Path, str, str]:
    """A safetensors file: `source` itself, or `name` in the subfolder of a folder or hub id, of a folder also its only one;
    and the root and the folder in it where it lies.

    Raises:
        FileNotFoundError: it is not there. ValueError: not said which, or no safetensors file.
    """
    place = locate(source)
    if isinstance(place, Path) and place.is_file():
        return place, str(place.parent.parent), place.parent.name
    if isinstance(place, Path) and name is None:
        files = sorted(file.name for file in (place / subfolder).glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"{place / subfolder} has {', '.join(files) or 'no .safetensors file'}: say weight_name=")
        name = files[0]
    if not name or not name.endswith(".safetensors"):
        raise ValueError(f"weight_name is {name!r}; it must name a .safetensors file of {place}")
    if isinstance(place, Path):
        return Path(locate((place / subfolder / name).absolute())), str(place), subfolder
    from huggingface_hub import hf_hub_download

    with one_line(place, name):
        return Path(hf_hub_download(place, name, subfolder=subfolder or None, **hub)), place, subfolder
