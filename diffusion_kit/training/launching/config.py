"""What a configuration says of where a training runs; none of it changes what is learned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffusion_kit.training.tree import Tree


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


class KubernetesConfig(Tree):
    """
    Attributes:
        kind: what runs the job: Kubeflow's TrainJob, its older PyTorchJob, or a plain Job.
        name: of the job; None: the run's folder.
        image: with the kit in it; `Dockerfile` makes one.
        runtime: of a TrainJob.
        claim: the PersistentVolumeClaim that holds configuration, data, caches and the run.
        mount: where it is in the container.
        cpu, memory, gpus: of each machine; requests and limits are the same.
        node_selector: labels of the machines that are to be used.
        elastic: of a PyTorchJob.
        restart: policy of a worker.
        preload: libraries of the image that are loaded first, such as tcmalloc's.
    """

    kind: Literal["TrainJob", "PyTorchJob", "Job"] = "TrainJob"
    name: str | None = None
    namespace: str = "default"
    image: str = "diffusion-kit:latest"
    runtime: str = "torch-distributed"
    claim: str = "diffusion-kit"
    mount: str = "/workspace"
    cpu: int = Field(4, ge=1)
    memory: str = "16Gi"
    gpus: int = Field(0, ge=0)
    node_selector: dict[str, str] = {}
    elastic: ElasticConfig | None = None
    restart: Literal["OnFailure", "Never", "Always", "ExitCode"] = "OnFailure"
    preload: tuple[str, ...] = ()


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
