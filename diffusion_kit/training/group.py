"""The group of processes that a training runs in: joined, and checked to be the one that was asked for.

Launchers may start another number of processes than they were told, and run them without a word: then every figure of the
training is another. So a training compares what it is with what it should be before its first step.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration, gather_object
from torch.nn.parallel import DistributedDataParallel

from diffusion_kit.models.onednn import has_bfloat16

from .bases import DTYPES
from .config import Config
from .launching import machine
from .parallel.parallel import Parallel
from .parallel.zero import Zero
from .precision import set_tf32

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # processes may wait long for one another: for a share of a cache, or a validation
MPI = {  # what launchers of MPI say, under torch's names; Open MPI, Intel MPI and others of MPICH's kin
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
}


def join(config: Config) -> Accelerator:
    """The accelerator of this process, in its group.

    Raises:
        ValueError, ImportError: a precision or a backend that is not to be had here, in one line.
    """
    cpu = not torch.cuda.is_available()
    if cpu and config.precision == "fp16":
        raise ValueError("precision=fp16 needs a GPU: on a CPU take bf16, or no")
    set_tf32(config.tf32)
    from_mpi()
    if config.deepspeed is not None:
        alone(cpu)
    if config.launch.bind:
        bind(config)
    backend = config.launch.backend
    if backend is not None and "RANK" in os.environ and not dist.is_initialized():
        load(backend)
        dist.init_process_group(backend, timeout=PATIENCE)
    AcceleratorState._reset_state()  # of an earlier training in this process, which may have had another precision
    # Gradients lie in what is sent, without a second copy; buffers, which no network here changes, are not sent.
    lean = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    kwargs = [InitProcessGroupKwargs(timeout=PATIENCE), lean]
    places = ProjectConfiguration(config.output, logging_dir=f"{config.output}/tensorboard")
    told: dict[str, Any] = {"log_with": list(config.trackers) or None, "project_config": places}
    accelerator = Accelerator(mixed_precision=config.precision, cpu=cpu, kwargs_handlers=kwargs, **told)
    if cpu and config.precision == "bf16" and not has_bfloat16():
        accelerator.print("precision=bf16: this CPU has no arithmetic in bfloat16; precision=no is faster by far")
    check_size(config, accelerator)
    return accelerator


def from_mpi() -> None:
    """Says to torch what MPI says."""
    if "RANK" in os.environ:
        return
    for name, theirs in MPI.items():
        value = next((os.environ[own] for own in theirs if own in os.environ), None)
        if value is not None:
            os.environ[name] = value
    if "RANK" in os.environ:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")


def alone(cpu: bool) -> None:
    """One process that nobody launched, as in a notebook, is made a group of its own: DeepSpeed wants one."""
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()})


def free_port() -> str:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return str(own.getsockname()[1])


def bind(config: Config) -> None:
    """Keeps this process, and its threads, on its share of the cores."""
    count = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")
    )  # as torch, or DeepSpeed, says it
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    cores = machine.share(rank, count)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(config.threads or len(cores))


def load(backend: str) -> None:
    """
    Raises:
        ImportError: Intel's backend, which torch does not bring, is not installed.
    """
    if backend != "ccl":
        return
    names = ("oneccl_bindings_for_pytorch", "torch_ccl")
    found = next((name for name in names if importlib.util.find_spec(name) is not None), None)
    if found is None:
        raise ImportError("launch.backend=ccl needs oneccl_bind_pt, of torch's own version: install it, or take gloo")
    importlib.import_module(found)


def check_size(config: Config, accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: another number of processes than was asked for.
    """
    launch, is_ = config.launch, accelerator.num_processes
    asked = os.environ.get("DIFFUSION_KIT_PROCESSES")
    elastic = launch.on == "kubernetes" and launch.kubernetes.elastic is not None  # as many as there are at the time
    if asked is None and launch.processes is not None and launch.include is None and not elastic:
        asked = str(launch.processes * launch.machines)
    if asked and int(asked) != is_:
        told = f"{asked} processes were asked for, and this training runs in {is_}"
        raise ValueError(f"{told}: start it with diffusion-kit launch, or set launch.processes")


def first(accelerator: Accelerator, does: Callable[[], T], chosen: bool | None = None) -> T | None:
    """What the first process does, or those that are chosen, while the others wait. Where it fails they end without a word:
    it says why.

    Raises:
        SystemExit: in the others.
    """
    found, error = None, None
    if accelerator.is_main_process if chosen is None else chosen:
        try:
            found = does()
        except Exception as own:
            error = own
    failed = any(gather_object([error is not None]))
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return found


def check(config: Config, accelerator: Accelerator, parallel: Parallel) -> None:
    """That processes are joined in the way, and in the precision, that were asked for.

    Raises:
        RuntimeError: they are not.
    """
    count, module = accelerator.num_processes, parallel.module
    if count > 1 and not (dist.is_initialized() and dist.get_world_size() == count):
        raise RuntimeError(f"{count} processes were started and are not joined: every one would train alone")
    if config.deepspeed is None:
        if count > 1 and not isinstance(module, DistributedDataParallel):
            raise RuntimeError(f"{count} processes were started, and gradients are not averaged among them")
        with accelerator.autocast():
            kind = accelerator.device.type
            on = torch.is_autocast_enabled(kind)
            runs = torch.get_autocast_dtype(kind) if on else torch.float32
    else:
        runs = check_engine(parallel, count)
    if runs != DTYPES[config.precision]:
        raise RuntimeError(f"precision={config.precision} was asked for, and networks run in {runs}")


def check_engine(parallel: Any, count: int) -> torch.dtype:
    """The precision of DeepSpeed's engine.

    Raises:
        RuntimeError: it shares the work in another way.
    """
    if not isinstance(parallel, Zero) or parallel.engine.zero_optimization_stage() != parallel.stage:
        raise RuntimeError("DeepSpeed was asked for, and does not run as it was asked")
    if parallel.engine.dp_world_size != count:
        raise RuntimeError(
            f"{count} processes were started, and DeepSpeed averages over {parallel.engine.dp_world_size}"
        )
    if parallel.engine.fp16_enabled():
        return torch.float16
    return torch.bfloat16 if parallel.engine.bfloat16_enabled() else torch.float32
