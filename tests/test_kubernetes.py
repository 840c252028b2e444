"""Manifests as the clusters' own schemas take them, the command in their containers, and kubectl around them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import training_models
import yaml
from conftest import light, needs

from diffusion_kit.cli import main
from diffusion_kit.training import group
from diffusion_kit.training.config import parse
from diffusion_kit.training.launching import kubernetes
from diffusion_kit.training.launching.job import Job
from diffusion_kit.training.launching.kubernetes import Manifest

ROOT = Path(__file__).parents[1]
KINDS = ("TrainJob", "PyTorchJob", "Job")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpu": {"gpus": 8},
    "node_selector": {"node_selector": {"node-type": "spr", "zone": "1"}},
    "preload": {"preload": ["/usr/lib/libtcmalloc.so.4"]},
    "restart": {"restart": "Never"},
    "no_group": {"group": None},
}
CASES = [(kind, name, own) for kind in KINDS for name, own in VARIANTS.items()]
CASES += [("PyTorchJob", "elastic", {"elastic": {"min": 1, "max": 5, "restarts": 7}})]


def job(kind: str, machines: int = 2, more: dict[str, Any] | None = None, **own: Any) -> Job:
    launch = {"on": "kubernetes", "machines": machines, "kubernetes": {"claim": "disk", **own, "kind": kind}}
    tree = {"target": "t2i_adapter", "output": "runs/edges", "steps": 9}
    return Job(parse({**tree, "launch": {**launch, **(more or {})}}, "test"), Path("edges.yaml"), ("batch=8",))


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a manifest."""
    if isinstance(tree, dict):
        yield tree
    for one in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(one)


def pods(made: list[Manifest]) -> list[dict[str, Any]]:
    return [node for node in nodes(made) if "containers" in node]


# Schemas


def core(manifest: Manifest) -> None:
    validate = needs("kubernetes_validate")
    validate.validate(manifest, "1.34", strict=True)


def trainer(manifest: Manifest) -> None:
    """Its models drop what they do not know without a word: what comes back must be what went in."""
    models = needs("kubeflow_trainer_api.models")
    assert getattr(models, f"TrainerV1alpha1{manifest['kind']}").from_dict(manifest).to_dict() == manifest


def operator(manifest: Manifest) -> None:
    training = needs("kubeflow.training")
    api, answer = training.ApiClient(), SimpleNamespace(data=json.dumps(manifest))
    assert api.sanitize_for_serialization(api.deserialize(answer, "KubeflowOrgV1PyTorchJob")) == manifest


SCHEMAS: dict[str, Callable[[Manifest], None]] = {
    "trainer.kubeflow.org/v1alpha1": trainer,
    "kubeflow.org/v1": operator,
    "batch/v1": core,
    "v1": core,
}


def taken(made: list[Manifest]) -> bool:
    try:
        for manifest in made:
            SCHEMAS[manifest["apiVersion"]](manifest)
    except Exception:
        return False
    return True


@pytest.mark.parametrize(("kind", "name", "own"), CASES)
def test_manifests_are_what_the_schemas_take(kind: str, name: str, own: dict[str, Any]) -> None:
    for manifest in kubernetes.manifests(job(kind, **own)):
        SCHEMAS[manifest["apiVersion"]](manifest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_misspelt_field_is_found(kind: str) -> None:
    """Wherever it is: each mapping of each manifest is given one, but for those whose keys are free."""
    count = len([*nodes(kubernetes.manifests(job(kind, node_selector={"a": "b"})))])
    free = ("labels", "nodeSelector", "selector", "requests", "limits", "pytorchReplicaSpecs")
    found = 0
    for k in range(count):
        made = kubernetes.manifests(job(kind, node_selector={"a": "b"}))
        place = [*nodes(made)][k]
        if any(place is node.get(name) for node in nodes(made) for name in free):
            continue
        place["mispelt"] = "x"
        assert not taken(made), place
        found += 1
    assert found > 10


def test_the_fetching_pod_is_one() -> None:
    core(yaml.safe_load(next(iter(kubernetes.fetch(job("Job")).files.values()))))


# What the documents ask for


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_hold_what_was_asked_for(kind: str) -> None:
    own = {
        "name": "edges-2",
        "image": "registry/kit:1",
        "namespace": "art",
        "claim": "team.disk",
        "mount": "/data",
        "cpu": 12,
        "memory": "32Gi",
        "gpus": 2,
        "node_selector": {"node-type": "spr"},
        "preload": ["/usr/lib/libtcmalloc.so.4", "/usr/lib/libiomp5.so"],
    }
    launch = {"processes": 3, "backend": "ccl", "environment": {"CCL_WORKER_COUNT": "2"}}
    made = kubernetes.manifests(job(kind, 2, launch, **own))
    assert made[-1]["kind"] == kind
    assert [one["metadata"]["name"] for one in made] == ["edges-2"] * len(made)
    assert {one["metadata"]["namespace"] for one in made} == {"art"}
    assert len(pods(made)) == (2 if kind == "PyTorchJob" else 1)
    for spec in pods(made):
        container = spec["containers"][0]
        assert container["image"] == "registry/kit:1"
        same = {"cpu": "12", "memory": "32Gi", "nvidia.com/gpu": "2"}
        assert container["resources"] == {"requests": same, "limits": same}
        values = {one["name"]: one.get("value") for one in container["env"]}
        assert values["LD_PRELOAD"] == "/usr/lib/libtcmalloc.so.4:/usr/lib/libiomp5.so"
        assert values["HF_HOME"].startswith("/data/")
        assert values["DIFFUSION_KIT_CACHE"].startswith("/data/")
        assert values["CCL_WORKER_COUNT"] == "2"
        assert values["OMP_NUM_THREADS"] == "4", "12 cores, 3 processes"
        assert values["DIFFUSION_KIT_PROCESSES"] == "6"
        assert spec["nodeSelector"] == {"node-type": "spr"}
        assert spec["volumes"][0]["persistentVolumeClaim"] == {"claimName": "team.disk"}
        assert spec["volumes"][1]["emptyDir"] == {"medium": "Memory"}
        places = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        assert places == {"work": "/data", spec["volumes"][1]["name"]: "/dev/shm"}
        assert container["command"][-1] == "--resume", "a pod may be another's successor"
    assert "LD_PRELOAD" not in str(kubernetes.manifests(job(kind))), "only where the image has it"


def test_an_elastic_job() -> None:
    own = {"elastic": {"min": 2, "max": 5, "restarts": 7}, "restart": "ExitCode"}
    spec = kubernetes.manifests(job("PyTorchJob", 4, {"processes": 2}, **own))[0]["spec"]
    assert spec["elasticPolicy"] == {"rdzvBackend": "c10d", "minReplicas": 2, "maxReplicas": 5, "maxRestarts": 7}
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert (worker["replicas"], worker["restartPolicy"]) == (4, "ExitCode")
    assert "DIFFUSION_KIT_PROCESSES" not in str(spec), "as many as there are at the time"


def test_a_job_of_a_fixed_number_has_a_master() -> None:
    """Without one the operator tells nobody where the others are."""
    specs = kubernetes.manifests(job("PyTorchJob", 3))[0]["spec"]["pytorchReplicaSpecs"]
    assert {kind: one["replicas"] for kind, one in specs.items()} == {"Master": 1, "Worker": 2}
    alone = kubernetes.manifests(job("PyTorchJob", 1))[0]["spec"]["pytorchReplicaSpecs"]
    assert list(alone) == ["Master"]


def test_an_elastic_run_may_have_fewer_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFUSION_KIT_PROCESSES", raising=False)
    one = SimpleNamespace(num_processes=1)
    group.check_size(job("PyTorchJob", 4, {"processes": 1}, elastic={}).config, one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 processes were asked for"):
        group.check_size(job("PyTorchJob", 4, {"processes": 1}).config, one)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "name"),
    [("runs/My_Edges.2", "my-edges-2"), ("2026-run", "run-2026-run"), ("runs/" + "a" * 80, "a" * 50)],
)
def test_names_that_kubernetes_takes(output: str, name: str) -> None:
    config = parse({"target": "unet", "output": output, "steps": 1}, "test")
    assert kubernetes.name_of(Job(config, Path("x"))) == name


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"claim": None}, "launch.kubernetes.claim is missing: name the PersistentVolumeClaim"),
        ({"claim": "My Disk"}, "launch.kubernetes.claim is 'My Disk': it has at most 63 lower-case"),
        ({"name": "My_Edges"}, "launch.kubernetes.name is 'My_Edges': a name has at most 50 lower-case"),
        ({"name": "2edges"}, "launch.kubernetes.name is '2edges': .* a letter first"),
        ({"name": "a" * 51}, "launch.kubernetes.name is 'a+': a name has at most 50"),
        ({"namespace": "a.b"}, "launch.kubernetes.namespace is 'a.b': it has no dots"),
        ({"memory": "16GB"}, "launch.kubernetes.memory is '16GB': .*; such as 16Gi$"),
        ({"memory": "16"}, "launch.kubernetes.memory is '16': that is 16 bytes for a machine; such as 16Gi"),
        ({"memory": "9000Ti"}, "launch.kubernetes.memory is '9000Ti': that is 9.9e.15 bytes"),
        ({"cpu": 5000}, "launch.kubernetes.cpu is 5000: .*1024"),
        ({"gpus": 1000}, "launch.kubernetes.gpus is 1000: .*64"),
        ({"mount": "work"}, "launch.kubernetes.mount is 'work': it must be a whole path"),
        ({"preload": ["libtcmalloc.so"]}, "launch.kubernetes.preload.0 is 'libtcmalloc.so': it must be a whole path"),
        ({"elastic": {"min": 3, "max": 2}}, "launch.kubernetes.elastic: min is 3, and max 2"),
        ({"elastic": {"min": 3, "max": 4}}, "launch.machines is 2, and launch.kubernetes.elastic allows 3 to 4"),
        ({"kind": "Job", "elastic": {}}, "launch.kubernetes.elastic is of a PyTorchJob, and kind is Job"),
        ({"kind": "TrainJob", "restart": "Always"}, "launch.kubernetes.restart is 'Always', and a TrainJob restarts"),
    ],
)
def test_what_a_user_can_get_wrong(own: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        kubernetes.manifests(job(**{"kind": "PyTorchJob", **own}))
    assert "\n" not in str(error.value)


# The command in the container


def operators_environment(kind: str, rank: int, port: int) -> dict[str, str]:
    """What two machines are told by Kubeflow's Trainer, its training operator (1.9), and Kubernetes' Job."""
    pet = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(rank)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if kind == "TrainJob":
        return pet | {f"PET_{name}": value for name, value in place.items()}
    if kind == "PyTorchJob":
        return pet | place | {"WORLD_SIZE": "2", "RANK": str(rank)}
    if kind == "elastic":
        told = {"PET_RDZV_ENDPOINT": f"127.0.0.1:{port}", "PET_RDZV_BACKEND": "c10d", "PET_NNODES": "1:2"}
        return told | {"PET_MAX_RESTARTS": "1", "PET_NPROC_PER_NODE": "1"}
    return {"JOB_COMPLETION_INDEX": str(rank)}


def started(kind: str, own: Job, rank: int, port: int, folder: Path, script: Path | None = None) -> Any:
    """A container's process as Kubernetes starts it, here; `script` in place of the training."""
    container = pods(kubernetes.manifests(own))[0]["containers"][0]
    told = {one["name"]: one["value"] for one in container["env"] if "value" in one and one["name"] != "HF_HOME"}
    told |= operators_environment(kind, rank, port)
    argv = [re.sub(r"\$\((\w+)\)", lambda found: told[found[1]], part) for part in container["command"]]
    argv = ["127.0.0.1" if part == "edges-0.edges" else str(port) if part == "29500" else part for part in argv]
    assert argv[0] == "torchrun"
    if script is not None:
        argv = [*argv[: argv.index("-m")], str(script)]
    near = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DIFFUSION_KIT_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *argv[1:]],
        cwd=folder,
        env={**os.environ, **told, **near},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def ended(processes: list[Any]) -> list[str]:
    try:
        texts = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(texts)
    return texts


MEET = """
import os, torch.distributed as dist
dist.init_process_group("gloo")
names = [None] * dist.get_world_size()
dist.all_gather_object(names, os.environ["GROUP_RANK"])
print("met", names, os.environ.get("DIFFUSION_KIT_PROCESSES"), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", light(["TrainJob", "Job", "elastic"]))
def test_machines_find_one_another(kind: str, tmp_path: Path) -> None:
    own = job("PyTorchJob" if kind == "elastic" else kind, **({"elastic": {"max": 2}} if kind == "elastic" else {}))
    script, port = tmp_path / "meet.py", free_port()
    script.write_text(MEET)
    texts = ended([started(kind, own, rank, port, tmp_path, script) for rank in range(2)])
    count = None if kind == "elastic" else "2"
    assert all(f"met ['0', '1'] {count}" in text for text in texts), texts


@pytest.mark.heavy
def test_a_training_in_two_containers(tmp_path: Path) -> None:
    """The whole command, as the operator starts it: configuration, data and run where the claim would be."""
    file = tmp_path / "edges.yaml"
    launch = job("PyTorchJob", more={"processes": 1}).launch.model_dump(mode="json")
    config = training_models.config("t2i_adapter", "edges", launch=launch)
    file.write_text(config.dump())
    own, port = Job(config, Path("edges.yaml")), free_port()
    texts = ended([started("PyTorchJob", own, rank, port, tmp_path) for rank in range(2)])
    assert "begins at the first step" in texts[0]
    assert (tmp_path / "edges/result/config.json").is_file(), texts
    assert json.loads((tmp_path / "edges/metrics.jsonl").read_text().splitlines()[-1])["step"] == config.steps


# kubectl

KUBECTL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$RECORD"
if [ "$1" = cp ]; then mkdir -p "$3/result"; echo weights > "$3/result/weights"; fi
if [ "$1" = "$FAILS" ]; then exit 3; fi
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """Runs `diffusion-kit launch` with a kubectl that notes what it is asked for: exit code, and the notes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").write_text(KUBECTL)
    (tmp_path / "bin/kubectl").chmod(0o755)
    (tmp_path / "edges.yaml").write_text("target: t2i_adapter\nsteps: 1\noutput: runs/my edges\n")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("FAILS", "nothing")

    def become(file: str, argv: list[str], environment: dict[str, str]) -> NoReturn:
        """In place of a process that becomes another."""
        raise SystemExit(subprocess.run(argv, env=environment).returncode)

    monkeypatch.setattr(os, "execvpe", become)

    def run(kind: str, *more: str) -> tuple[int, list[str]]:
        (tmp_path / "record").write_text("")
        own = ["launch.kubernetes.claim=disk", f"launch.kubernetes.kind={kind}", "launch.kubernetes.namespace=art"]
        with pytest.raises(SystemExit) as end:
            main(["launch", "--on", "kubernetes", "edges.yaml", *own, *more])
        return int(end.value.code or 0), (tmp_path / "record").read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("TrainJob", "jobset.sigs.k8s.io/jobset-name"),
        ("PyTorchJob", "training.kubeflow.org/job-name"),
        ("Job", "job-name"),
    ],
)
def test_kubectl_is_asked(kind: str, label: str, kubectl: Callable[..., tuple[int, list[str]]]) -> None:
    pods = f"-l {label}=my-edges --namespace art"
    for more in ((), ("--submit",)):
        assert kubectl(kind, *more) == (0, ["apply -f runs/my edges.k8s.yaml"])
    assert list(yaml.safe_load_all(Path("runs/my edges.k8s.yaml").read_text()))[-1]["kind"] == kind
    assert kubectl(kind, "--status") == (0, [f"get pods {pods}"])
    assert kubectl(kind, "--logs") == (0, [f"logs -f {pods} --prefix --max-log-requests 64"])
    Path("runs/my edges.k8s.yaml").unlink()
    assert kubectl(kind, "--delete") == (0, ["delete -f runs/my edges.k8s.yaml"])
    assert Path("runs/my edges.k8s.yaml").is_file(), "it is made again where it was lost"


def test_a_run_is_fetched(
    kubectl: Callable[..., tuple[int, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "cp")
    code, asked = kubectl("TrainJob", "--fetch")
    assert code == 3, "kubectl's own"
    assert asked[-1] == "delete pod my-edges-fetch --namespace art", "the helper goes away, whatever happens"
    assert not (tmp_path / "runs/my edges").exists(), "nothing half-copied"
    monkeypatch.setenv("FAILS", "nothing")
    code, asked = kubectl("TrainJob", "--fetch")
    assert code == 0
    assert asked == [
        "apply -f runs/my edges.k8s.fetch.yaml",
        "wait --for=condition=Ready pod/my-edges-fetch --namespace art --timeout=300s",
        "cp art/my-edges-fetch:/workspace/runs/my edges runs/my edges.part",
        "delete pod my-edges-fetch --namespace art",
    ]
    assert (tmp_path / "runs/my edges/result/weights").read_text() == "weights\n"
    assert not (tmp_path / "runs/my edges.part").exists()


def test_kubectl_is_missing(
    kubectl: Callable[..., tuple[int, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    own = ["launch", "--on", "kubernetes", "edges.yaml", "launch.kubernetes.claim=disk", "--status"]
    assert main(own) == 2
    assert "kubectl is not here: install it, or look with --dry-run" in capsys.readouterr().err
    assert main([*own, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("kubectl get pods")
