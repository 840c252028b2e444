"""Manifests of a training on Kubernetes, and the kubectl commands around them.

TrainJob and TrainingRuntime are Kubeflow Trainer's (trainer.kubeflow.org/v1alpha1), PyTorchJob the training operator's
(kubeflow.org/v1); a Job is Kubernetes' own, with a number for each pod (Indexed) and a service by which they find one
another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .config import KubernetesConfig
from .job import Job
from .process import Process

Manifest = dict[str, Any]
PORT = 29500


def build(job: Job) -> Process:
    """kubectl, which is given the manifests."""
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
    return make[job.launch.kubernetes.kind](job)


def name_of(job: Job) -> str:
    """As Kubernetes takes names: lower-case letters, digits and dashes."""
    own = job.launch.kubernetes.name or Path(job.config.output).name
    return re.sub(r"[^a-z0-9]+", "-", own.lower()).strip("-")[:50] or "training"


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
    found: Manifest = {"cpu": own.cpu, "memory": own.memory}
    return found | ({"nvidia.com/gpu": own.gpus} if own.gpus else {})


def both(own: KubernetesConfig) -> Manifest:
    """The same requests and limits: a guaranteed pod."""
    return {"requests": resources(own), "limits": resources(own)}


def environment(job: Job) -> dict[str, str]:
    own, count = job.launch.kubernetes, processes(job)
    found = {
        "OMP_NUM_THREADS": str(job.config.threads or max(1, own.cpu // count)),
        "DIFFUSION_KIT_PROCESSES": str(count * job.launch.machines),
        "HF_HOME": f"{own.mount}/cache/huggingface",  # on the claim, so that a new pod need not fetch it again
        "LOGLEVEL": "INFO",
    }
    if job.launch.kubernetes.elastic is not None:
        found["DIFFUSION_KIT_PROCESSES"] = ""  # as many as there are at the time
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


def pod(job: Job, command: list[str], restart: str, name: str = "pytorch") -> Manifest:
    own = job.launch.kubernetes
    found: Manifest = {"restartPolicy": restart, "containers": [container(job, name, command)], "volumes": volumes(own)}
    return found | ({"nodeSelector": dict(own.node_selector)} if own.node_selector else {})


def train(job: Job) -> list[str]:
    """The training; always one that goes on, as a pod may be another's successor."""
    again = [] if job.resume else ["--resume"]
    return ["-m", "diffusion_kit.cli", *job.train(), *again]


# Kinds


def train_job(job: Job) -> list[Manifest]:
    """The runtime says how a machine is set up, the job how many and what runs."""
    own, launch = job.launch.kubernetes, job.launch
    command = ["torchrun", "--max-restarts", str(launch.restarts), *train(job)]
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {**metadata(job), "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": launch.machines, "torch": {}},
            "template": {"spec": {"replicatedJobs": [replicated(job, command)]}},
        },
    }
    count = {"numNodes": launch.machines, "numProcPerNode": processes(job)}
    run = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(job),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name_of(job)},
            "trainer": {
                **count,
                "image": own.image,
                "resourcesPerNode": both(own),
            },
        },
    }
    return [runtime, run]


def replicated(job: Job, command: list[str]) -> Manifest:
    step = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    template = {"metadata": step, "spec": {"template": {"spec": pod(job, command, "Never", "node")}}}
    return {"name": "node", "template": template}


def pytorch_job(job: Job) -> list[Manifest]:
    own, launch = job.launch.kubernetes, job.launch
    inner = pod(job, ["torchrun", *train(job)], "Never")
    del inner["restartPolicy"]  # the operator's
    replicas = {"replicas": launch.machines, "restartPolicy": own.restart, "template": {"spec": inner}}
    spec: Manifest = {"nprocPerNode": str(processes(job)), "pytorchReplicaSpecs": {"Worker": replicas}}
    if own.elastic is not None:
        elastic = own.elastic
        limits = {"minReplicas": elastic.min, "maxReplicas": elastic.max, "maxRestarts": elastic.restarts}
        spec["elasticPolicy"] = {"rdzvBackend": "c10d", **limits}
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata(job), "spec": spec}]


def plain_job(job: Job) -> list[Manifest]:
    """A pod a machine, each with its number, and a service without an address of its own, so that pods have names."""
    name, launch = name_of(job), job.launch
    count = str(processes(job))
    first = f"{name}-0.{name}"
    start = [
        "torchrun",
        "--nproc_per_node",
        count,
        "--nnodes",
        str(launch.machines),
        "--node_rank",
        "$(JOB_COMPLETION_INDEX)",
    ]
    start += ["--master_addr", first, "--master_port", str(PORT), "--max-restarts", str(launch.restarts)]
    spec = pod(job, [*start, *train(job)], "Never") | {"subdomain": name}
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
            "completions": launch.machines,
            "parallelism": launch.machines,
            "completionMode": "Indexed",
            "backoffLimit": 6,
            "template": {"spec": spec},
        },
    }
    return [service, run]


# Commands around them


def command(job: Job, what: str, to: str | None = None) -> Process:
    """What kubectl is asked for: "submit", "status", "logs", "fetch" or "delete"."""
    own, name = job.launch.kubernetes, name_of(job)
    label = f"jobset.sigs.k8s.io/jobset-name={name}" if own.kind == "TrainJob" else None
    label = label or (f"training.kubeflow.org/job-name={name}" if own.kind == "PyTorchJob" else f"job-name={name}")
    space = ("--namespace", own.namespace)
    if what == "submit":
        return build(job)
    if what == "status":
        return Process(("kubectl", "get", "pods", "-l", label, *space))
    if what == "logs":
        return Process(("kubectl", "logs", "-f", "-l", label, "--prefix", "--max-log-requests", "64", *space))
    if what == "delete":
        return Process(("kubectl", "delete", "-f", str(manifest_file(job))), files={manifest_file(job): text(job)})
    return fetch(job, to or ".")


def fetch(job: Job, to: str) -> Process:
    """Copies a run from the claim, through a pod that holds it and is removed afterwards."""
    own = job.launch.kubernetes
    name, folder = f"{name_of(job)}-fetch", f"{own.mount}/{job.config.output}"
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
                    "volumeMounts": [{"name": "work", "mountPath": own.mount}],
                }
            ],
            "volumes": volumes(own)[:1],
        },
    }
    file = manifest_file(job).with_suffix(".fetch.yaml")
    space = f"--namespace {own.namespace}"
    script = (
        f"kubectl apply -f {file} && kubectl wait --for=condition=Ready pod/{name} {space} --timeout=300s && "
        f"kubectl cp {own.namespace}/{name}:{folder} {to}; code=$?; kubectl delete pod {name} {space}; exit $code"
    )
    return Process(("bash", "-c", script), files={file: yaml.safe_dump(helper, sort_keys=False)})
