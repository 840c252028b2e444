"""What each launcher is given: the same list is printed by a dry run and started by a real one."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_kit.cli import main
from diffusion_kit.training import group, loader, run
from diffusion_kit.training.config import parse
from diffusion_kit.training.launching import launch, machine, mpi, slurm
from diffusion_kit.training.launching.job import Job
from diffusion_kit.training.launching.process import Process
from diffusion_kit.training.parallel.zero import Zero

TWO = {"processes": 2, "machines": 2, "address": "node0", "hosts": ["node0", "node1"]}


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "PYTHONPATH",
        "LD_PRELOAD",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "RANK",
        "WORLD_SIZE",
        "DIFFUSION_KIT_PROCESSES",
    ):
        monkeypatch.delenv(name, raising=False)


def job(on: str = "local", resume: bool = False, **own: Any) -> Job:
    tree = {"target": "t2i_adapter", "output": "runs/edges", "steps": 9, "threads": 3}
    config = parse({**tree, "launch": {"on": on, **own}}, "test")
    return Job(config, Path("edges.yaml"), ("batch=8",), resume)


def after(process: Process, name: str) -> str:
    return process.argv[process.argv.index(name) + 1]


def test_one_machine() -> None:
    made = launch.build(job(processes=2, restarts=3, resume=True))
    assert made.argv[:3] == (sys.executable, "-m", "diffusion_kit.training.launching.elastic")
    assert after(made, "--nproc_per_node") == "2"
    assert after(made, "--max-restarts") == "3"
    assert "--standalone" in made.argv
    assert made.argv[-6:] == ("-m", "diffusion_kit.cli", "train", "edges.yaml", "batch=8", "--resume")
    assert made.environment == {"DIFFUSION_KIT_PROCESSES": "2", "OMP_NUM_THREADS": "3"}


def test_the_same_command_on_every_machine() -> None:
    made = launch.build(job(**TWO, rank=1, port=29777))
    assert after(made, "--nnodes") == "2"
    assert after(made, "--node_rank") == "1"
    assert after(made, "--master_addr") == "node0"
    assert after(made, "--master_port") == "29777"
    assert made.environment["DIFFUSION_KIT_PROCESSES"] == "4"
    with pytest.raises(ValueError, match=r"^launch.address is missing[^\n]*$"):
        launch.build(job(machines=2))


def test_deepspeeds_launcher(tmp_path: Path) -> None:
    made = launch.build(job("deepspeed", **TWO))
    assert Path(made.argv[0]).name == "deepspeed"
    assert after(made, "--num_nodes") == "2"
    assert after(made, "--module") == "diffusion_kit.cli"
    hosts, environment = made.files
    assert made.files[hosts] == "node0 slots=2\nnode1 slots=2\n"
    assert after(made, "--hostfile") == str(hosts)
    assert made.environment["DS_ENV_FILE"] == str(environment), "other machines are given nothing else"
    assert "DIFFUSION_KIT_PROCESSES=4\n" in made.files[environment]
    chosen = launch.build(job("deepspeed", include="node0:1"))
    assert after(chosen, "--include") == "node0:1"
    assert chosen.environment["DIFFUSION_KIT_PROCESSES"] == "", "as many as it names"
    both = launch.build(job("deepspeed", **TWO, include="node0:1"))
    assert "--hostfile" in both.argv
    assert "--num_nodes" not in both.argv, "DeepSpeed takes only one of them"
    (tmp_path / "hosts").write_text("a slots=1\n")
    given = launch.build(job("deepspeed", hosts=str(tmp_path / "hosts")))
    assert after(given, "--hostfile") == str(tmp_path / "hosts")
    assert [file.name for file in given.files] == ["edges.env"]
    with pytest.raises(FileNotFoundError, match="no host file"):
        launch.build(job("deepspeed", hosts=str(tmp_path / "none")))


def test_open_mpi_and_intel_mpi_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    own = job("mpi", **TWO, environment={"CCL_WORKER_COUNT": "2"})
    opened, intel = mpi.build(own, "open"), mpi.build(own, "intel")
    for made in (opened, intel):
        assert after(made, "-n") == "4"
        assert made.environment["MASTER_ADDR"] == "node0"
        assert made.environment["CCL_WORKER_COUNT"] == "2"
        assert made.argv[-4:] == ("diffusion_kit.cli", "train", "edges.yaml", "batch=8")
    assert after(opened, "--map-by") == "ppr:2:node"
    assert after(intel, "-ppn") == "2"
    assert list(intel.files.values()) == ["node0\nnode1\n"]
    forwarded = {opened.argv[k + 1] for k, part in enumerate(opened.argv) if part == "-x"}
    assert forwarded == set(opened.environment)
    told = {intel.argv[k + 1]: intel.argv[k + 2] for k, part in enumerate(intel.argv) if part == "-genv"}
    assert told == dict(intel.environment)
    for text, kind in {"mpirun (Open MPI) 4.1.4": "open", "Intel(R) MPI Library for Linux": "intel"}.items():
        monkeypatch.setattr(mpi.shutil, "which", lambda name: name)
        done = subprocess.CompletedProcess([], 0, text, "")
        monkeypatch.setattr(mpi.subprocess, "run", lambda *args, done=done, **more: done)
        assert mpi.flavour() == kind


def test_a_batch_script(tmp_path: Path) -> None:
    own = {"time": "1:00:00", "partition": "gpu", "account": "us", "cpus": 8, "gpus": 2, "options": ["--mem=0"]}
    text = slurm.script(job("slurm", machines=2, slurm=own | {"setup": ["module load x"]}))
    lines = text.splitlines()
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:2", "--time=1:00:00", "--requeue", "--mem=0"):
        assert f"#SBATCH {line}" in lines
    assert "module load x" in lines
    assert "export DIFFUSION_KIT_PROCESSES=4" in lines
    step = next(line for line in lines if line.startswith("srun"))
    assert "--cpus-per-task=8" in step, "else the processes of a machine share one core"
    given = shlex.split(step)
    started = shlex.split(given[given.index("-c") + 1])
    assert started[0] == "exec", "signals are for torch's launcher: a shell would die of them"
    assert started[started.index("--node_rank") + 1] == "$SLURM_NODEID"
    assert started[started.index("--master_addr") + 1] == "$MASTER_ADDR"
    assert started[-1] == "$RESUME"
    file = tmp_path / "script"
    file.write_text(text)
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    made = launch.build(job("slurm"))
    assert made.argv == ("sbatch", "runs/edges.sbatch")


def test_a_dry_run_prints_what_a_run_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "edges.yaml"
    file.write_text(f"target: t2i_adapter\nsteps: 1\noutput: {tmp_path}/run\n")
    for on in ("local", "deepspeed", "mpi", "slurm", "kubernetes"):
        started: list[Any] = []
        arguments = ["launch", "--on", on, str(file), "launch.processes=2", "launch.kubernetes.claim=disk"]
        assert main([*arguments, "--dry-run"]) == 0
        printed = capsys.readouterr().out

        def become(program: str, argv: Any, environment: Any, started: list[Any] = started) -> None:
            assert program == argv[0]
            started.append((list(argv), environment))

        with monkeypatch.context() as patch:
            # Of that module alone: who looks for mpirun would run it.
            patch.setattr("diffusion_kit.training.launching.process.shutil", SimpleNamespace(which=lambda name: name))
            patch.setattr("diffusion_kit.training.launching.process.os.execvpe", become)
            assert main(arguments) == 0
        words = shlex.split(printed.splitlines()[-1])
        argv, environment = started[0]
        assert words[-len(argv) :] == argv
        given = dict(word.split("=", 1) for word in words[: -len(argv)])
        assert {name: environment[name] for name in given} == given


def test_what_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "edges.yaml"
    file.write_text(f"target: t2i_adapter\nsteps: 1\noutput: {tmp_path}/run\n")
    with pytest.raises(FileNotFoundError, match="not-here is not here"):
        Process(("not-here",)).run()
    assert main(["launch", str(file), "--status"]) == 2
    assert "add --on kubernetes" in capsys.readouterr().err


def test_what_a_launcher_cannot_do() -> None:
    for on in ("deepspeed", "mpi"):
        with pytest.raises(ValueError, match=r"^launch.restarts is torch's launcher's[^\n]*$"):
            launch.build(job(on, restarts=2))
        with pytest.raises(ValueError, match=r"^launch.hosts names 2 machines, and launch.machines is 1$"):
            launch.build(job(on, hosts=["node0", "node1"]))


def test_mpi_is_told_the_first_machine(tmp_path: Path) -> None:
    """Else every machine would wait for itself."""
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    assert mpi.build(job("mpi")).environment["MASTER_ADDR"] == "127.0.0.1"
    assert mpi.build(job("mpi", machines=2, hosts=["b", "c"])).environment["MASTER_ADDR"] == "b"
    with pytest.raises(ValueError, match=r"^launch.address is missing[^\n]*$"):
        mpi.build(job("mpi", machines=2, hosts=str(tmp_path / "hosts")))


# Ends


def elastic(tmp_path: Path, program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a program."""
    file = tmp_path / "program.py"
    file.write_text(f"import os, signal, sys\nrank = os.environ['RANK']\n{program}\n")
    command = [
        sys.executable,
        "-m",
        "diffusion_kit.training.launching.elastic",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *flags, str(file)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def test_a_launcher_says_nothing_behind_a_process_that_failed(tmp_path: Path) -> None:
    done = elastic(tmp_path, "rank == '1' and sys.exit(2)\nsignal.pause()")
    assert (done.returncode, done.stdout + done.stderr) == (2, "")


def test_a_launcher_says_what_was_killed_and_by_what(tmp_path: Path) -> None:
    done = elastic(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else signal.pause()")
    line = "diffusion-kit: process 1 was killed by SIGKILL; --resume goes on from the last checkpoint\n"
    assert (done.returncode, done.stdout + done.stderr) == (1, line)


@pytest.mark.heavy
def test_what_the_first_process_refuses_is_said_once(tmp_path: Path) -> None:
    """The others have no error of their own, such as that the first is gone."""
    program = """
from accelerate import Accelerator
from diffusion_kit.training import group
def refused():
    raise ValueError("refused")
try:
    group.first(Accelerator(cpu=True), refused)
except ValueError as error:
    print(error, flush=True)
    sys.exit(2)
"""
    done = elastic(tmp_path, program)
    assert (done.returncode, done.stdout) == (2, "refused\n")
    assert "Error" not in done.stderr


def test_a_process_started_again_goes_on_only_in_a_run_that_it_was_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another that was refused, because the folder holds a run, would else go on with that run at its second try."""
    (tmp_path / "run").mkdir()
    config = parse({"target": "unet", "output": str(tmp_path / "run"), "steps": 1}, "test")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    run.begin(config, False, ())
    assert not run.restarted(tmp_path / "run"), "it is the first of its place"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run.restarted(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    assert not run.restarted(tmp_path / "run")


def test_what_a_cluster_sends_to_all_processes_leaves_the_loaders_alone() -> None:
    """SLURM ends every process, and torch's launcher sends it again: pictures are still wanted until the step is made."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=lambda: (loader.quiet_worker(0), ready.set(), time.sleep(60)), daemon=True)
    worker.start()
    assert ready.wait(60)
    for _ in range(3):
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        worker.join(0.2)
        assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


# The group of processes


def test_mpis_names_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    group.from_mpi()
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_another_number_of_processes_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate launch --cpu --num_processes 2 starts one process, and says nothing."""
    config = parse({"target": "unet", "output": "x", "steps": 1, "launch": {"processes": 2}}, "test")
    with pytest.raises(ValueError, match=r"^2 processes were asked for, and this training runs in 1: [^\n]+$"):
        group.join(config)
    monkeypatch.setenv("DIFFUSION_KIT_PROCESSES", "1")
    group.join(config)


def beside(count: int, autocast: Any = nullcontext) -> Any:
    """An accelerator of one process among several."""
    return SimpleNamespace(num_processes=count, device=torch.device("cpu"), autocast=autocast)


def test_processes_that_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse({"target": "unet", "output": "x", "steps": 1}, "test")
    plain: Any = SimpleNamespace(module=torch.nn.Linear(1, 1))
    group.check(config, beside(1), plain)
    with pytest.raises(RuntimeError, match="2 processes were started and are not joined"):
        group.check(config, beside(2), plain)
    monkeypatch.setattr(group.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(group.dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="gradients are not averaged"):
        group.check(config, beside(2), plain)


def test_another_precision_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate takes fp16 on a CPU and trains in float32."""
    plain: Any = SimpleNamespace(module=torch.nn.Linear(1, 1))
    tree = {"target": "unet", "output": "x", "steps": 1}
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    group.check(parse({**tree, "precision": "bf16"}, "test"), beside(1, half), plain)
    for precision, autocast, runs in (("bf16", nullcontext, "float32"), ("no", half, "bfloat16")):
        with pytest.raises(
            RuntimeError, match=f"precision={precision} was asked for, and networks run in torch.{runs}"
        ):
            group.check(parse({**tree, "precision": precision}, "test"), beside(1, autocast), plain)
    monkeypatch.setattr(group.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^precision=fp16 needs a GPU[^\n]*$"):
        group.join(parse({**tree, "precision": "fp16"}, "test"))


def engine(stage: int, count: int, half: bool = False) -> Any:
    """DeepSpeed's, of another stage, number of processes or precision than was asked for."""
    own = Zero.__new__(Zero)
    own.stage = 2
    own.module = own.engine = SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        dp_world_size=count,
        fp16_enabled=lambda: False,
        bfloat16_enabled=lambda: half,
    )
    return own


def test_deepspeed_runs_as_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse({"target": "unet", "output": "x", "steps": 1, "deepspeed": {}}, "test")
    monkeypatch.setattr(group.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(group.dist, "get_world_size", lambda: 2)
    group.check(config, beside(2), engine(2, 2))
    for wrong, told in (
        (engine(0, 2), "does not run as it was asked"),
        (engine(2, 1), "DeepSpeed averages over 1"),
        (engine(2, 2, half=True), "networks run in torch.bfloat16"),
        (SimpleNamespace(module=None), "does not run as it was asked"),
    ):
        with pytest.raises(RuntimeError, match=told):
            group.check(config, beside(2), wrong)


def test_processes_of_deepspeeds_launcher_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how many there are under a name of its own."""
    monkeypatch.setattr(machine, "sockets", lambda: [[0, 1, 2, 3]])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    given: list[Any] = []
    monkeypatch.setattr(group.os, "sched_setaffinity", lambda process, cores: given.append(cores))
    monkeypatch.setattr(group.torch, "set_num_threads", lambda count: None)
    group.bind(job("deepspeed", bind=True).config)
    assert given == [[2, 3]]


def test_intels_backend_is_missing() -> None:
    with pytest.raises(ImportError, match=r"^launch.backend=ccl needs oneccl_bind_pt[^\n]*$"):
        group.load("ccl")


@pytest.mark.parametrize(("processors", "count"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2)])
def test_cores_are_shared_without_overlap(monkeypatch: pytest.MonkeyPatch, processors: int, count: int) -> None:
    cores = [[8 * k + n for n in range(8)] for k in range(processors)]
    monkeypatch.setattr(machine, "sockets", lambda: cores)
    shares = [machine.share(rank, count) for rank in range(count)]
    assert sorted(core for own in shares for core in own) == sorted(core for own in cores for core in own)
