"""`diffusion-kit doctor`: what is here, what would be used, what is missing and how to get it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

OPTIONAL = {  # module: what it is for, and how to get it
    "controlnet_aux": (
        "detectors with networks for lines, poses and normals",
        "pip install 'diffusion_kit[detectors]'",
    ),
    "ai_edge_litert": ("the detector pose", "pip install 'diffusion_kit[detectors]'"),
    "datasets": ("training data in tables", "pip install 'diffusion_kit[data]'"),
    "webdataset": ("training data in tars", "pip install 'diffusion_kit[data]'"),
    "openvino": ("the engine openvino", "pip install 'diffusion_kit[openvino]'"),
    "torchao": ("weights of 8 bits", "pip install 'diffusion_kit[quantised]'"),
    "deepspeed": ("trainings that are spread over processes", "pip install 'diffusion_kit[deepspeed]'"),
    "ray": ("caches and job files shared among workers", "pip install 'diffusion_kit[ray]'"),
    "xformers": ("memory-efficient attention on CUDA", "pip install 'diffusion_kit[xformers]'"),
    "imwatermark": ("SDXL's invisible watermark", "pip install invisible-watermark"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report", metavar="FILE", nargs="?", const="-", help="what a bug report needs, as Markdown; - prints it"
    )


def run(options: argparse.Namespace) -> None:
    """Prints; fails where a package that the kit needs is missing or of a version it does not work with."""
    if options.report is not None:
        write(options.report)
        return
    wrong = []
    for label, value, bad in report():
        print(f"{label:24}{value}")
        wrong += [f"{label} {value}"] if bad else []
    if wrong:
        raise ValueError(f"not as needed: {'; '.join(wrong)}")


def write(file: str) -> None:
    """A bug report's part of this machine, to a file or "-" for the output."""
    from diffusion_kit.commands.report import report

    text = report()
    if file == "-":
        print(text, end="")
        return
    beside = Path(f"{file}.part")
    beside.write_text(text)
    beside.replace(file)
    print(f"{file}: add the command, its configuration and what it printed")


def report() -> Iterator[tuple[str, str, bool]]:
    """Label, text, and whether it is wrong."""
    yield "python", f"{platform.python_version()} at {sys.executable}", sys.version_info < (3, 11)
    yield "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory()}", False
    yield from _packages()
    yield from devices()
    yield from _optional()
    yield from _models()


def _packages() -> Iterator[tuple[str, str, bool]]:
    """Every package that the kit requires, beside the versions with which it works."""
    from packaging.requirements import Requirement

    try:
        yield "diffusion_kit", importlib.metadata.version("diffusion_kit"), False
    except importlib.metadata.PackageNotFoundError:
        yield "diffusion_kit", "not installed, run from its source: pip install -e . in it", True
        return
    for text in importlib.metadata.requires("diffusion_kit") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield needed.name, f"missing: pip install '{needed}'", True
            continue
        fits = needed.specifier.contains(found, prereleases=True)
        yield needed.name, found if fits else f"{found}, but {needed} is needed: pip install '{needed}'", not fits


def devices() -> Iterator[tuple[str, str, bool]]:
    import torch

    yield "device cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", False
    for k in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(k)
        yield f"device cuda:{k}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", False
    if torch.backends.mps.is_available():
        yield "device mps", "Apple GPU", False
    used = "cuda, float32 unless --dtype float16" if torch.cuda.is_available() else "cpu, float32"
    yield "would be used", used, False


def _optional() -> Iterator[tuple[str, str, bool]]:
    from diffusion_kit.adapters.detectors import detectors, missing

    for module, (purpose, how) in OPTIONAL.items():
        here = importlib.util.find_spec(module) is not None
        yield module, f"here, for {purpose}" if here else f"not installed, for {purpose}: {how}", False
    lacks = {name: missing(name) for name in detectors()}
    yield "detectors", ", ".join(name for name, lack in lacks.items() if lack is None), False
    for name, lack in lacks.items():
        if lack is not None:
            yield f"  {name}", lack, False


def _models() -> Iterator[tuple[str, str, bool]]:
    from diffusion_kit.making.fingerprint import fingerprint
    from diffusion_kit.models.sources import EMBEDDED, check_folder, embedded

    for name in EMBEDDED:
        try:
            check_folder(embedded(name), passed=set())
            yield f"model {name}", f"{embedded(name)}, {fingerprint(name)[:19]}", False
        except (OSError, ValueError) as error:
            yield f"model {name}", f"damaged: {error}; install diffusion_kit again", True
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    yield "hub", f"cache {HF_HUB_CACHE}{', offline' if HF_HUB_OFFLINE else ''}", False


def memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):  # not on Windows
        return "memory unknown"
