"""What a configuration says of where a training runs; none of it changes what is learned."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from diffusion_kit.training.tree import Tree

LONGEST = 50  # characters of a job's name: those of its pods are longer, and have at most 63
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
SENSIBLE = 2**28, 2**45  # bytes of a machine's memory


def _name(text: str) -> str:
    """Of a job, and of its service (RFC 1035)."""
    if len(text) > LONGEST or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text):
        raise ValueError(f"a name has at most {LONGEST} lower-case letters, digits and dashes, and a letter first")
    return text


def _label(text: str) -> str:
    """Of a namespace (RFC 1123)."""
    if "." in text:
        raise ValueError("it has no dots")
    return _labels(text)


def _labels(text: str) -> str:
    """Of a claim: labels with dots between them (RFC 1123)."""
    if not all(len(part) <= 63 and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", part) for part in text.split(".")):
        raise ValueError("it has at most 63 lower-case letters, digits and dashes, and no dash at an end")
    return text


def _memory(text: str) -> str:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", text)
    if found is None or (found[2] and found[2] not in UNITS):
        near = f"{found[1]}{found[2][0].upper()}i" if found and found[2] else "16Gi"
        raise ValueError(f"Kubernetes counts memory in Ki, Mi, Gi, Ti, or k, M, G, T; such as {near}")
    size = float(found[1]) * UNITS.get(found[2], 1)
    if not SENSIBLE[0] <= size <= SENSIBLE[1]:
        raise ValueError(f"that is {size:.3g} bytes for a machine; such as 16Gi would be right")
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/") or text.strip("/") == "":
        raise ValueError("it must be a whole path in the container, such as /workspace")
    return text


Absolute = Annotated[str, AfterValidator(_absolute)]


class SlurmConfig(Tree):
    """
    Attributes:
        job: its name; None: the run's folder.
        time: limit, as "1-00:00:00".
        partition, account: of the cluster.
        cpus: cores a machine; None: as many as the cluster gives.
        gpus: a machine.
        warning: seconds before the end of the time at which the run is told, saves, and is queued again.
        options: further #SBATCH lines, as "--mem=0".
        setup: lines of shell before the run, such as an environment that is activated.
    """

    job: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    cpus: int | None = Field(None, ge=1)
    gpus: int = Field(0, ge=0)
    warning: int = Field(120, ge=0)
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


class ElasticConfig(Tree):
    """How many machines a PyTorchJob may have, and how often it starts workers again."""

    min: int = Field(1, ge=1)
    max: int = Field(4, ge=1)
    restarts: int = Field(10, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> ElasticConfig:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, and max {self.max}, which is less")
        return self


class KubernetesConfig(Tree):
    """
    Attributes:
        kind: what runs the job: Kubeflow's TrainJob, its older PyTorchJob, or a plain Job.
        name: of the job; None: the run's folder.
        image: with the kit in it; `Dockerfile` makes one.
        claim: the PersistentVolumeClaim that holds configuration, data, caches and the run.
        mount: where it is in the container; relative paths of the configuration begin there.
        group: number of the group that may write the claim, the one of the image's user; None: as the cluster says.
        cpu, memory, gpus: of each machine; requests and limits are the same.
        node_selector: labels of the machines that are to be used.
        elastic: of a PyTorchJob.
        restart: policy of a worker; "Always" and "ExitCode" are a PyTorchJob's.
        preload: libraries of the image that are loaded first, such as tcmalloc's.
    """

    kind: Literal["TrainJob", "PyTorchJob", "Job"] = "TrainJob"
    name: Annotated[str, AfterValidator(_name)] | None = None
    namespace: Annotated[str, AfterValidator(_label)] = "default"
    image: str = Field("diffusion-kit:latest", min_length=1)
    claim: Annotated[str, AfterValidator(_labels)] | None = None
    mount: Absolute = "/workspace"
    group: int | None = Field(1000, ge=0)
    cpu: int = Field(4, ge=1, le=1024)
    memory: Annotated[str, AfterValidator(_memory)] = "16Gi"
    gpus: int = Field(0, ge=0, le=64)
    node_selector: dict[str, str] = {}
    elastic: ElasticConfig | None = None
    restart: Literal["OnFailure", "Never", "Always", "ExitCode"] = "OnFailure"
    preload: tuple[Absolute, ...] = ()


class LaunchConfig(Tree):
    """
    Attributes:
        on: what starts the processes.
        processes: on each machine; None: one a GPU, or one a processor socket.
        machines: how many.
        rank: of this machine, where the launcher runs on each of them.
        address, port: of the first machine.
        hosts: a host file, or names of machines.
        include: which devices of which machines, as DeepSpeed's launcher takes it: "host:0,1".
        backend: of torch.distributed; None: nccl on GPUs, gloo on CPUs; "ccl" needs Intel's bindings.
        bind: each process stays on the cores of its socket.
        restarts: how often the workers are started again when one dies; the run goes on from its last checkpoint.
        environment: what every process is given.
        ipex: Intel's extension was asked for, which is no longer maintained; nothing needs it.
    """

    on: Literal["local", "deepspeed", "mpi", "slurm", "kubernetes"] = "local"
    processes: int | None = Field(None, ge=1)
    machines: int = Field(1, ge=1)
    rank: int = Field(0, ge=0)
    address: str | None = None
    port: int = Field(29500, ge=1, le=65535)
    hosts: str | tuple[str, ...] | None = None
    include: str | None = None
    backend: Literal["gloo", "nccl", "ccl", "mpi"] | None = None
    bind: bool = False
    restarts: int = Field(0, ge=0)
    environment: dict[str, str] = {}
    ipex: bool = False
    slurm: SlurmConfig = SlurmConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()
