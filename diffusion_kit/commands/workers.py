"""Tasks that many workers share, by Ray Data.

Every worker is a process that makes ready once (loads a model) and then does one task after another. Where one dies, the
task that it had begun is done again by the process that takes its place; the others go on.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Task = Callable[[Any], Any]
RETRIES = 3  # of one task whose worker dies, which it may be the cause of
BLOCKS = 4096  # into which the tasks are cut: what a worker does between two reports
STORE = 200 * 2**20  # bytes of Ray's memory for objects: tasks and answers are small
QUIET = {  # what Ray says goes to its own logs
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # on the death of a worker
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
BAD = (ValueError, TypeError, FileNotFoundError, PermissionError)  # what a user can put right


@dataclass(frozen=True)
class Failed:
    """Why a task has no answer; `bad`: by what it was given."""

    problem: str
    bad: bool

    @classmethod
    def by(cls, error: Exception) -> Failed:
        bad = isinstance(error, BAD)
        return cls(str(error) if bad or isinstance(error, ImportError) else f"{type(error).__name__}: {error}", bad)

    def error(self) -> Exception:
        return ValueError(self.problem) if self.bad else RuntimeError(self.problem)


def code_of(failures: Sequence[Failed]) -> int:
    """Of the command's exit: 2 for bad input, 1 for another failure, 0 for none."""
    return 2 if any(failed.bad for failed in failures) else int(bool(failures))


def add_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--on", choices=("ray",), help=f"share {what} among workers of Ray, here or on its cluster")
    parser.add_argument("--workers", type=int, metavar="N", help="of Ray; by default one a GPU, or one a processor")


def check(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: options that do not fit each other. ImportError: Ray is not installed; says how to get it.
    """
    if options.workers is not None and (options.on is None or options.workers < 1):
        raise ValueError(f"--workers is {options.workers}: it must be 1 or more, and goes with --on ray")
    if options.on == "ray" and importlib.util.find_spec("ray") is None:
        raise ImportError('ray is not installed: pip install "diffusion_kit[ray]"')


class Worker:
    """Runs in a process of its own.

    Args:
        ready: gives what does a task; called once, before the first.
        folder: where the command runs, from which its paths are.
    """

    def __init__(self, ready: Callable[[], Task], folder: str, threads: int) -> None:
        self.ready, self.folder, self.threads = ready, folder, threads
        self.task: Task | None = None

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Answers, under the numbers of their tasks."""
        answers = [pickle.dumps(self.answer(pickle.loads(task))) for task in rows["task"]]
        return {"number": list(rows["number"]), "answer": answers}

    def answer(self, task: Any) -> tuple[bool, Any]:
        """Whether the worker was ready, and the answer or `Failed`."""
        try:
            self.task = self.task or self.begin()
        except Exception as error:
            return False, Failed.by(error)
        try:
            return True, self.task(task)
        except Exception as error:
            return True, Failed.by(error)

    def begin(self) -> Task:
        import torch

        os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        return self.ready()


def shared(tasks: Sequence[Any], ready: Callable[[], Task], workers: int | None, *, gpu: bool) -> Iterator[Any]:
    """The answers in the order of the tasks, or `Failed` in the place of one.

    Args:
        ready: makes a worker ready, and gives what does a task; it and the tasks go to other processes.
        gpu: whether a worker takes a GPU, or its part of one, where there are any.

    Raises:
        ValueError, RuntimeError: no worker could make itself ready; why, in one line.
    """
    with muted(), connected(workers) as (count, cpus):
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars, context.print_on_execution_start = False, False
        context.max_errored_blocks = -1  # a task that kills its workers does not stop the others
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        said = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(said) if said.isdigit() else cpus
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / count) if gpu else 0
        rows = [{"number": k, "task": pickle.dumps(task)} for k, task in enumerate(tasks)]
        answers = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map_batches(
            Worker,
            fn_constructor_args=(ready, os.getcwd(), threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus or None,
            max_task_retries=RETRIES,
        )
        yield from in_order(answers.iter_rows(), len(tasks))


def in_order(rows: Iterable[Mapping[str, Any]], count: int) -> Iterator[Any]:
    """Answers as soon as those before them are there; one that never comes is a worker's death, again and again."""
    waiting: dict[int, Any] = {}
    following = 0
    for row in rows:
        was_ready, answer = pickle.loads(row["answer"])
        if not was_ready:
            raise answer.error()
        waiting[int(row["number"])] = answer
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    dead = Failed(f"its worker died {RETRIES + 1} times, perhaps for want of memory", False)
    yield from (waiting.get(number, dead) for number in range(following, count))


@contextmanager
def connected(workers: int | None) -> Iterator[tuple[int, int]]:
    """Joins the cluster that RAY_ADDRESS names, or starts Ray here; how many workers, and cores of each.

    Raises:
        ValueError: no such cluster.
    """
    from diffusion_kit.training.launching import machine

    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet)
        except ConnectionError:
            token = "; where it asks for a token, set RAY_AUTH_MODE=token"
            raise ValueError(f"no cluster of Ray lets this command in at {address} (RAY_ADDRESS){token}") from None
        count = workers or int(ray.cluster_resources().get("GPU", 0)) or len(ray.nodes())
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // count)
    else:
        count = machine.processes(workers)
        cpus = machine.threads(count)
        ray.init("local", num_cpus=count * cpus + 1, include_dashboard=False, object_store_memory=STORE, **quiet)
    try:
        yield count, cpus
    finally:
        ray.shutdown()


@contextmanager
def muted() -> Iterator[None]:
    """What native code writes to the error stream goes nowhere; what Python writes goes on."""
    told, kept, nowhere = sys.stderr, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    with open(kept, "w", buffering=1) as real:
        if told is sys.__stderr__:
            sys.stderr = real
        try:
            yield
        finally:
            sys.stderr = told
            os.dup2(kept, 2)
            os.close(nowhere)
