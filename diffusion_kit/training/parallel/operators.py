"""DeepSpeed's operators: parts in C++ that it compiles when a run first needs them, or here before a run."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffusion_kit.training.config import Config

from .settings import fill_optimizer, get, read
from .zero import require

BUILDERS = {  # an optimizer's, without offload and with it
    "adam": ("FusedAdamBuilder", "CPUAdamBuilder"),
    "adamw": ("FusedAdamBuilder", "CPUAdamBuilder"),
    "lamb": ("FusedLambBuilder", "FusedLambBuilder"),
    "lion": ("FusedLionBuilder", "CPULionBuilder"),
    "adagrad": (None, "CPUAdagradBuilder"),
}
QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")


def needed(config: Config, cpu: bool) -> list[str]:
    """Builders of the operators that a training's first step would compile.

    Raises:
        ValueError, FileNotFoundError: DeepSpeed's configuration cannot be used, in one line.
    """
    tree = read(config.deepspeed or {})
    fill_optimizer(tree, config)
    zero = tree.get("zero_optimization", {})
    devices = [get(zero, f"{name}.device") for name in ("offload_optimizer", "offload_param")]
    found: list[str | None] = ["ShareMemCommBuilder"] if cpu else []  # gradients between processes of a machine
    if "optimizer" in tree and not get(tree, "optimizer.params.torch_adam"):
        pair = BUILDERS.get(tree["optimizer"]["type"].lower(), (None, None))
        found.append(pair[devices[0] in ("cpu", "nvme")])
    if "nvme" in devices:
        found += ["PinMemoryBuilder", "AsyncIOBuilder"]
    if any(zero.get(name) for name in QUANTIZED):
        found.append("QuantizerBuilder")
    return [name for name in found if name is not None]


def build(config: Config, say: Callable[[str], None]) -> None:
    """Compiles what a training will need and is not there yet.

    Raises:
        ValueError: DeepSpeed's configuration cannot be used. RuntimeError: a part of the system is missing, or the
            compiler failed; in one line.
        ImportError: DeepSpeed is not installed.
    """
    names = needed(config, not torch.cuda.is_available())
    for k, name in enumerate(names, 1):
        start = time.monotonic()
        own = builder(name)
        say(f"deepspeed: {k} of {len(names)}: {own.name}, which may take minutes")
        load(own)
        say(f"deepspeed: {own.name} is there after {time.monotonic() - start:.0f} s")
    say(f"deepspeed: all {len(names)} operators that this training needs are there")


def builder(name: str) -> Any:
    """
    Raises:
        ImportError: DeepSpeed is not installed. RuntimeError: it has no such operator for this machine's device.
    """
    require()
    at_cpu()
    from deepspeed.accelerator import get_accelerator

    made = get_accelerator().create_op_builder(name)
    if made is None or type(made).__name__ == "NotImplementedBuilder":
        raise RuntimeError(f"deepspeed has no {name.removesuffix('Builder')} for this device: take another optimizer")
    return made


def load(own: Any) -> Any:
    """An operator's module, compiled if it is not there.

    Raises:
        RuntimeError: what is missing, or the compiler's error, in one line.
    """
    if lack := missing(own):
        raise RuntimeError(f"deepspeed's {own.name} cannot be compiled: {lack}")
    try:
        return own.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        lines = [line for line in str(error).splitlines() if " error: " in line] or [str(error)]
        raise RuntimeError(f"deepspeed's {own.name} could not be compiled: {' '.join(lines[0].split())}") from None


def missing(own: Any) -> str | None:
    """The part of the system that an operator needs and that is not here, with how to get it."""
    from torch.utils.cpp_extension import CUDA_HOME, is_ninja_available

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no compiler {compiler}: apt install g++"
    if not is_ninja_available():
        return "there is no ninja: pip install ninja"
    if torch.cuda.is_available() and CUDA_HOME is None:
        return "there is no nvcc: install CUDA's toolkit of torch's version, or set CUDA_HOME"
    if own.name == "async_io" and not own.is_compatible():
        return "there is no libaio: apt install libaio-dev"
    if not own.is_compatible():
        return f"this machine is not one that it is made for{f' ({own.error_log})' if own.error_log else ''}"
    return None


def known() -> Iterator[tuple[str, str]]:
    """Every operator that DeepSpeed has for this device, and whether it is compiled, or can be.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    require()
    at_cpu()
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    made = {name: own for name, own in ALL_OPS.items() if type(own).__name__ != "NotImplementedBuilder"}
    for name, own in made.items():
        fit = own.is_compatible(verbose=False)
        yield name, "installed" if installed_ops.get(name) else "can be compiled" if fit else "not for this machine"


def at_cpu() -> None:
    """DeepSpeed asks an environment variable, not torch, where there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
