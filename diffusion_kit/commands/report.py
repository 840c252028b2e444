"""What a bug report needs to know of a machine, as Markdown: nothing of its user, no place and no name of a host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = (
    "diffusion_kit torch torchvision diffusers transformers accelerate peft safetensors numpy pillow pydantic scikit-image "
    "opencv-python-headless torchmetrics datasets webdataset deepspeed ray openvino torchao xformers bitsandbytes "
    "schedulefree oneccl_bind_pt intel-extension-for-pytorch triton ninja mpi4py apex controlnet_aux"
).split()
VARIABLES = (  # of which the value is a number or a word; of others only that they are set
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES "
    "CUDA_DEVICE_ORDER NCCL_DEBUG NCCL_P2P_DISABLE NCCL_IB_DISABLE TORCH_DISTRIBUTED_DEBUG TORCH_CUDA_ARCH_LIST "
    "PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF TORCH_NCCL_BLOCKING_WAIT DS_ACCELERATOR DS_BUILD_OPS MAX_JOBS CXX "
    "CCL_WORKER_COUNT KMP_AFFINITY KMP_BLOCKTIME ACCELERATE_USE_CPU ACCELERATE_MIXED_PRECISION HF_HUB_OFFLINE "
    "TOKENIZERS_PARALLELISM DIFFUSION_KIT_PROCESSES LOGLEVEL SLURM_NNODES SLURM_NTASKS"
).split()
PLACES = (
    "HF_HOME DIFFUSION_KIT_CACHE TORCH_EXTENSIONS_DIR TORCH_HOME CUDA_HOME LD_PRELOAD LD_LIBRARY_PATH MASTER_ADDR "
    "PYTHONPATH GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME SLURM_JOB_ID"
).split()
PROGRAMS = "torchrun deepspeed mpirun sbatch srun kubectl ray nvcc c++ ninja docker".split()
CGROUP = Path("/sys/fs/cgroup")


def report() -> str:
    parts = {
        "System": system(),
        "Packages": packages(),
        "Devices": devices(),
        "Environment": environment(),
        "Programs": ((name, "here" if shutil.which(name) else "not here") for name in PROGRAMS),
        "DeepSpeed's operators": operators(),
    }
    texts = [f"## {title}\n\n{table(rows)}" for title, rows in parts.items()]
    return "\n\n".join(["# diffusion-kit doctor --report", *texts, f"## torch's build\n\n```\n{build()}\n```"]) + "\n"


def table(rows: Iterator[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def system() -> Iterator[tuple[str, Any]]:
    from diffusion_kit.commands.doctor import memory

    yield "Python", platform.python_version()
    yield (
        "system",
        f"{platform.system()} {platform.release()}, {platform.machine()}, {platform.libc_ver()[1] or 'no'} libc",
    )
    yield "cores", f"{os.cpu_count()}, of which this process may use {len(os.sched_getaffinity(0))}"
    yield "memory", memory()
    yield "limit of the control group", limit()
    yield "/dev/shm", size("/dev/shm")


def limit(root: Path = CGROUP) -> str:
    """Of memory, under either version of control groups."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = root / name
        if file.is_file() and (text := file.read_text().strip()).isdecimal() and int(text) < 2**60:
            return f"{int(text) / 2**30:.1f} GiB"
    return "none"


def size(folder: str) -> str:
    return f"{shutil.disk_usage(folder).total / 2**30:.1f} GiB" if Path(folder).is_dir() else "not here"


def packages() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def devices() -> Iterator[tuple[str, Any]]:
    import torch
    import torch.distributed as dist

    from diffusion_kit.commands.doctor import devices

    yield from ((label, text) for label, text, _ in devices())
    backends = [name for name in ("gloo", "nccl", "mpi", "ucc", "xccl") if dist.is_backend_available(name)]
    yield "backends", ", ".join(backends)
    yield "CUDA of torch, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"


def environment() -> Iterator[tuple[str, str]]:
    """Values from a fixed list; of those that may name a place or a host only that there is one."""
    yield from ((name, f"`{os.environ[name]}`") for name in VARIABLES if name in os.environ)
    yield from ((name, "set") for name in PLACES if name in os.environ)


def operators() -> Iterator[tuple[str, str]]:
    try:
        from diffusion_kit.training.parallel.operators import known

        yield from known()
    except ImportError as error:
        yield "none", str(error)


def build() -> str:
    import torch

    return private(f"{torch.__config__.show()}\n{torch.__config__.parallel_info()}".strip())


def private(text: str) -> str:
    """Without the user's home, wherever a library names it."""
    return re.sub(rf"(?<![\w./-]){re.escape(str(Path.home()))}(?=/|\s|$)", "~", text)
