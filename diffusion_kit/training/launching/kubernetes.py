"""Manifests of a training on Kubernetes, and the kubectl commands around them.

TrainJob and TrainingRuntime are Kubeflow Trainer's (trainer.kubeflow.org/v1alpha1), PyTorchJob the training operator's
(kubeflow.org/v1); a Job is Kubernetes' own, with a number for each pod (Indexed) and a service by which they find one
another.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from .config import LONGEST, KubernetesConfig
from .job import Job
from .local import PATIENCE, SIGNALS
from .process import Process

Manifest = dict[str, Any]
TRIES = 6


def build(job: Job) -> Process:
    """kubectl, which is given the manifests.

    Raises:
        ValueError: what they need is missing, or does not belong to their kind, in one line.
    """
    file = manifest_file(job)
    return Process(("kubectl", "apply", "-f", str(file)), files={file: text(job)})


def manifest_file(job: Job) -> Path:
    output = Path(job.config.output)
    return output.with_name(f"{output.name}.k8s.yaml")


def text(job: Job) -> str:
    return yaml.safe_dump_all(manifests(job), sort_keys=False)


def manifests(job: Job) -> list[Manifest]:
    make: dict[str, Callable[[Job], list[Manifest]]] = {
        "TrainJob": train_job,
        "PyTorchJob": pytorch_job,
        "Job": plain_job,
    }
    check(job)
    return make[job.launch.kubernetes.kind](job)


def check(job: Job) -> None:
    """
    Raises:
        ValueError: no claim, or what another kind of job takes, in one line.
    """
    own, machines = job.launch.kubernetes, job.launch.machines
    if own.claim is None:
        raise ValueError(
            "launch.kubernetes.claim is missing: name the PersistentVolumeClaim that has configuration and data"
        )
    if own.kind != "PyTorchJob" and own.elastic is not None:
        raise ValueError(f"launch.kubernetes.elastic is of a PyTorchJob, and kind is {own.kind}: leave one of them out")
    if own.kind != "PyTorchJob" and own.restart not in ("OnFailure", "Never"):
        raise ValueError(f"launch.kubernetes.restart is {own.restart!r}, and a {own.kind} restarts OnFailure, or Never")
    if own.elastic is not None and not own.elastic.min <= machines <= own.elastic.max:
        told = f"launch.machines is {machines}, and launch.kubernetes.elastic allows"
        raise ValueError(f"{told} {own.elastic.min} to {own.elastic.max}")


def name_of(job: Job) -> str:
    """As Kubernetes takes names: lower-case letters, digits and dashes, with a letter first."""
    found = re.sub(r"[^a-z0-9]+", "-", Path(job.config.output).name.lower()).strip("-")
    found = found if found[:1].isalpha() else f"run-{found}".strip("-")
    return job.launch.kubernetes.name or found[:LONGEST].strip("-")


def metadata(job: Job) -> Manifest:
    return {"name": name_of(job), "namespace": job.launch.kubernetes.namespace}


# Parts


def container(job: Job, name: str, command: list[str]) -> Manifest:
    own = job.launch.kubernetes
    return {
        "name": name,
        "image": own.image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": own.mount,
        "command": command,
        "env": [{"name": key, "value": value} for key, value in environment(job).items()],
        "resources": both(own),
        "volumeMounts": [{"name": "work", "mountPath": own.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }


def resources(own: KubernetesConfig) -> Manifest:
    found: Manifest = {"cpu": str(own.cpu), "memory": own.memory}
    return found | ({"nvidia.com/gpu": str(own.gpus)} if own.gpus else {})


def both(own: KubernetesConfig) -> Manifest:
    """The same requests and limits: a guaranteed pod."""
    return {"requests": resources(own), "limits": resources(own)}


def environment(job: Job) -> dict[str, str]:
    own, count = job.launch.kubernetes, processes(job)
    found = {
        "OMP_NUM_THREADS": str(job.config.threads or max(1, own.cpu // count)),
        "DIFFUSION_KIT_PROCESSES": str(count * job.launch.machines),
        "HF_HOME": f"{own.mount}/cache/huggingface",  # on the claim, so that a new pod need not fetch it again
        "DIFFUSION_KIT_CACHE": f"{own.mount}/cache/diffusion_kit",
        "LOGLEVEL": "INFO",
    }
    if own.elastic is not None:
        del found["DIFFUSION_KIT_PROCESSES"]  # as many as there are at the time
    if job.launch.backend == "ccl":
        found["CCL_WORKER_COUNT"] = "1"
    if own.preload:
        found["LD_PRELOAD"] = ":".join(own.preload)
    return found | dict(job.launch.environment)


def processes(job: Job) -> int:
    return job.launch.processes or job.launch.kubernetes.gpus or 1


def volumes(own: KubernetesConfig) -> list[Manifest]:
    return [
        {"name": "work", "persistentVolumeClaim": {"claimName": own.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},  # through which the loader's workers send pictures
    ]


def pod(job: Job, name: str, command: list[str]) -> Manifest:
    own = job.launch.kubernetes
    found: Manifest = {
        "restartPolicy": own.restart,
        "terminationGracePeriodSeconds": PATIENCE,  # in which a run that is told to end saves
        "containers": [container(job, name, command)],
        "volumes": volumes(own),
    }
    if own.group is not None:
        found["securityContext"] = {"fsGroup": own.group}
    return found | ({"nodeSelector": dict(own.node_selector)} if own.node_selector else {})


def torchrun(job: Job, *places: str) -> list[str]:
    """The container's command: a training that goes on, as a pod may be another's successor."""
    again = [] if job.resume else ["--resume"]
    patient = ["--signals-to-handle", SIGNALS, "--shutdown-timeout", str(PATIENCE)]
    return ["torchrun", *places, *patient, *job.module(), *again]


def restarts(job: Job) -> tuple[str, str]:
    return "--max-restarts", str(job.launch.restarts)


def meeting(job: Job, rank: str, address: str, port: str) -> list[str]:
    """How a fixed number of machines find one another; what is in $() Kubernetes reads from the container's environment."""
    place = ["--nnodes", str(job.launch.machines), "--nproc_per_node", str(processes(job)), "--node_rank", f"$({rank})"]
    return [*place, "--master_addr", address, "--master_port", port, *restarts(job)]


# Kinds


def train_job(job: Job) -> list[Manifest]:
    """The runtime says how a machine is set up, the job how many; the operator tells torchrun both (PET_NNODES, ...)."""
    own, launch = job.launch.kubernetes, job.launch
    node = pod(job, "node", torchrun(job, *restarts(job)))
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {**metadata(job), "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": launch.machines, "torch": {}},
            "template": {"spec": {"replicatedJobs": [replicated(node)]}},
        },
    }
    run = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(job),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name_of(job)},
            "trainer": {
                "image": own.image,
                "numNodes": launch.machines,
                "numProcPerNode": processes(job),
                "resourcesPerNode": both(own),
            },
        },
    }
    return [runtime, run]


def replicated(node: Manifest) -> Manifest:
    step = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    return {"name": "node", "template": {"metadata": step, "spec": {"template": {"spec": node}}}}


def pytorch_job(job: Job) -> list[Manifest]:
    """Elastic: workers that find one another as the operator tells torchrun (PET_RDZV_ENDPOINT, ...). Fixed in number:
    only where one of them is called the master does the operator name it, and number them (MASTER_ADDR, RANK)."""
    own, count = job.launch.kubernetes, job.launch.machines
    if own.elastic is not None:
        command = torchrun(job, "--nproc_per_node", str(processes(job)))
        shares = {"Worker": count}
    else:
        command = torchrun(job, *meeting(job, "RANK", "$(MASTER_ADDR)", "$(MASTER_PORT)"))
        shares = {"Master": 1, "Worker": count - 1}
    spec: Manifest = {
        "nprocPerNode": str(processes(job)),
        "runPolicy": {"cleanPodPolicy": "None"},  # pods that have ended stay, with what they printed
        "pytorchReplicaSpecs": {kind: replicas(job, n, command) for kind, n in shares.items() if n},
    }
    if own.elastic is not None:
        elastic = own.elastic
        limits = {"minReplicas": elastic.min, "maxReplicas": elastic.max, "maxRestarts": elastic.restarts}
        spec["elasticPolicy"] = {"rdzvBackend": "c10d", **limits}
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata(job), "spec": spec}]


def replicas(job: Job, count: int, command: list[str]) -> Manifest:
    inner = pod(job, "pytorch", [*command])  # lists of their own: YAML would write the second as a reference
    del inner["restartPolicy"]  # the operator's
    return {"replicas": count, "restartPolicy": job.launch.kubernetes.restart, "template": {"spec": inner}}


def plain_job(job: Job) -> list[Manifest]:
    """A pod a machine, each with its number, and a service without an address of its own, so that pods have names."""
    name, machines = name_of(job), job.launch.machines
    command = torchrun(job, *meeting(job, "JOB_COMPLETION_INDEX", f"{name}-0.{name}", str(job.launch.port)))
    spec = pod(job, "pytorch", command) | {"subdomain": name}
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    spec["containers"][0]["env"].insert(0, {"name": "JOB_COMPLETION_INDEX", "valueFrom": index})
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(job),
        "spec": {"clusterIP": "None", "selector": {"job-name": name}, "publishNotReadyAddresses": True},
    }
    run = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(job),
        "spec": {
            "completions": machines,
            "parallelism": machines,
            "completionMode": "Indexed",
            "backoffLimit": TRIES * machines,  # where one dies, all fail and come again
            "template": {"spec": spec},
        },
    }
    return [service, run]


# Commands around them


def command(job: Job, what: str) -> Process:
    """What kubectl is asked for: "submit", "status", "logs", "fetch" or "delete"."""
    own, name = job.launch.kubernetes, name_of(job)
    labels = {
        "TrainJob": "jobset.sigs.k8s.io/jobset-name",
        "PyTorchJob": "training.kubeflow.org/job-name",
        "Job": "job-name",
    }
    pods = ("-l", f"{labels[own.kind]}={name}", "--namespace", own.namespace)
    if what == "submit":
        return build(job)
    if what == "status":
        return Process(("kubectl", "get", "pods", *pods))
    if what == "logs":
        return Process(("kubectl", "logs", "-f", *pods, "--prefix", "--max-log-requests", "64"))
    if what == "delete":
        return Process(("kubectl", "delete", "-f", str(manifest_file(job))), files={manifest_file(job): text(job)})
    return fetch(job)


def fetch(job: Job) -> Process:
    """Copies a run from the claim to where it would be if it had run here, through a pod that is removed afterwards.
    What is here already stays until all has come."""
    check(job)
    own, name, output = job.launch.kubernetes, f"{name_of(job)}-fetch", job.config.output
    helper = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": own.namespace},
        "spec": {
            "restartPolicy": "Never",
            "containers": [
                {
                    "name": "fetch",
                    "image": own.image,
                    "command": ["sleep", "3600"],
                    "volumeMounts": [{"name": "work", "mountPath": own.mount, "readOnly": True}],
                }
            ],
            "volumes": volumes(own)[:1],
        },
    }
    file = manifest_file(job).with_suffix(".fetch.yaml")
    space, beside = f"--namespace {own.namespace}", shlex.quote(f"{output}.part")
    source = shlex.quote(f"{own.namespace}/{name}:{PurePosixPath(own.mount) / output}")
    script = (
        f"kubectl apply -f {shlex.quote(str(file))} && "
        f"kubectl wait --for=condition=Ready pod/{name} {space} --timeout=300s && rm -rf {beside} && "
        f"kubectl cp {source} {beside} && mkdir -p {shlex.quote(output)} && cp -a {beside}/. {shlex.quote(output)} && "
        f"rm -r {beside}; code=$?; kubectl delete pod {name} {space}; exit $code"
    )
    return Process(("bash", "-c", script), files={file: yaml.safe_dump(helper, sort_keys=False)})
