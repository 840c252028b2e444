"""A DeepSpeed configuration beside the kit's own: one value for what both say, "auto" filled, what has no effect told.

What the kit's configuration says and DeepSpeed's leaves out, or calls "auto", is the kit's. What DeepSpeed's says and the
kit's file does not is DeepSpeed's, which so may be the master of both. What both say must be the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_kit.training.config import Config, parse
from diffusion_kit.training.tree import leaves

from . import keys

AUTO = "auto"
Tree = dict[str, Any]
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
ADAM = ("lr", "betas", "eps", "weight_decay")
ADAMS = ("adam", "adamw", "lamb", "onebitadam", "zerooneadam", "onebitlamb")  # which take these
COMMUNICATION = ("fp16", "bfp16", "bf16", "fp32")


@dataclass(frozen=True)
class Shared:
    """A value that both configurations say.

    Attributes:
        theirs, own: dotted names.
        to_own, to_theirs: of a value.
    """

    theirs: str
    own: str
    to_own: Callable[[Any], Any] = lambda value: value
    to_theirs: Callable[[Any], Any] = lambda value: value


SHARED = (
    Shared("train_batch_size", "batch", int),
    Shared("train_micro_batch_size_per_gpu", "micro_batch", int),
    Shared("gradient_clipping", "optimizer.clip", lambda value: float(value) or None, lambda clip: clip or 0.0),
    Shared("optimizer.params.lr", "optimizer.learning_rate", float),
    Shared("optimizer.params.betas", "optimizer.betas", lambda pair: tuple(map(float, pair)), list),
    Shared("optimizer.params.eps", "optimizer.epsilon", float),
    Shared("optimizer.params.weight_decay", "optimizer.weight_decay", float),
    Shared("scheduler.params.warmup_max_lr", "optimizer.learning_rate", float),
    Shared("scheduler.params.warmup_num_steps", "optimizer.warmup_steps", int, lambda steps: max(1, steps)),
    Shared("scheduler.params.total_num_steps", "steps", int),
)


def read(source: str | Mapping[str, Any]) -> Tree:
    """A DeepSpeed configuration, of a file or as it is.

    Raises:
        FileNotFoundError, ValueError: no such file, no JSON, an unknown key, in one line.
    """
    tree = deepcopy(dict(source)) if isinstance(source, Mapping) else _read_file(Path(source))
    keys.check(tree)
    for section in ("optimizer", "scheduler"):
        if section in tree and not isinstance((tree[section] or {}).get("type"), str):
            raise ValueError(f"deepspeed: {section}.type is missing: it says which one")
    if (own := tree.get("scheduler")) is not None:
        if own["type"] not in keys.SCHEDULERS:
            raise ValueError(f"deepspeed: scheduler.type is {own['type']!r}; there are {', '.join(keys.SCHEDULERS)}")
        keys.check(own.get("params", {}), keys.SCHEDULERS[own["type"]], "scheduler.params.")
    if (kind := tree.get("communication_data_type")) not in (None, *COMMUNICATION):
        raise ValueError(f"deepspeed: communication_data_type is {kind!r}; there are {', '.join(COMMUNICATION)}")
    if "thread_count" in tree.get("aio", {}):  # as it was named before
        tree["aio"]["intra_op_parallelism"] = tree["aio"].pop("thread_count")
    return tree


def _read_file(path: Path) -> Tree:
    if not path.is_file():
        raise FileNotFoundError(f"deepspeed: no configuration {path.absolute()}")
    try:
        tree = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"deepspeed: {path} is no JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"deepspeed: {path} holds no keys: a configuration is a tree")
    return tree


def get(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else getattr(tree, key, None)
    return tree


def put(tree: Tree, name: str, value: Any) -> None:
    *nodes, leaf = name.split(".")
    for node in nodes:
        tree = tree.setdefault(node, {})
    tree[leaf] = value


def said(config: Config, name: str) -> bool:
    """Whether a configuration's file gives a value, and not the default."""
    node: Any = config
    for key in name.split("."):
        if key not in node.model_fields_set:
            return False
        node = getattr(node, key)
    return True


def precise(config: Config) -> Config:
    """The kit's configuration with DeepSpeed's precision, where it says none: processes are joined in it, before the rest
    can be derived."""
    tree = read(config.deepspeed) if config.deepspeed is not None and not said(config, "precision") else {}
    found = {name: value for name, value, _ in _precision(tree)}
    return config.model_copy(update=found) if found else config


def derived(config: Config, processes: int) -> Config:
    """The kit's configuration with what DeepSpeed's says and it does not.

    Raises:
        ValueError: both say something, and not the same.
    """
    if config.deepspeed is None:
        return config
    tree = read(config.deepspeed)
    given: Tree = {}
    for name, value, theirs in [*_shared(tree), *_precision(tree), *_accumulated(tree, config, processes)]:
        now = given.get(name) or (get(config, name) if said(config, name) else None)
        if now is not None and now != value:
            raise ValueError(
                f"deepspeed: {theirs} makes {name} {_shown(value)}, but it is {_shown(now)}: leave one of them out"
            )
        given[name] = value
    whole = config.model_dump(mode="json")
    for name, value in given.items():
        put(whole, name, list(value) if isinstance(value, tuple) else value)
    return parse(whole, "deepspeed")


def _shown(value: Any) -> str:
    return json.dumps(value)


def _shared(tree: Tree) -> Iterator[tuple[str, Any, str]]:
    for pair in SHARED:
        value = get(tree, pair.theirs)
        if value not in (None, AUTO):
            yield pair.own, pair.to_own(value), pair.theirs
    if get(tree, "checkpoint.use_node_local_storage"):
        yield "checkpoints.each_machine", True, "checkpoint.use_node_local_storage"
    kind = get(tree, "scheduler.type")
    if kind in SCHEDULES:
        yield "optimizer.schedule", SCHEDULES[kind], "scheduler.type"


def _precision(tree: Tree) -> Iterator[tuple[str, Any, str]]:
    for kind in ("fp16", "bf16"):
        if get(tree, f"{kind}.enabled") is True:
            yield "precision", kind, f"{kind}.enabled"


def _accumulated(tree: Tree, config: Config, processes: int) -> Iterator[tuple[str, Any, str]]:
    """Batch and micro-batch belong together by the number of micro-batches."""
    count = tree.get("gradient_accumulation_steps")
    if count in (None, AUTO):
        return
    name, micro, batch = (
        "gradient_accumulation_steps",
        tree.get("train_micro_batch_size_per_gpu"),
        tree.get("train_batch_size"),
    )
    micro = config.micro_batch if micro in (None, AUTO) else micro
    batch = config.batch if batch in (None, AUTO) else batch
    if micro is not None:
        yield "batch", int(micro) * int(count) * processes, name
    else:
        yield "micro_batch", max(1, int(batch) // (int(count) * processes)), name


# What the engine is given


def settings(config: Config, processes: int, width: int | None, say: Callable[[str], None]) -> Tree:
    """DeepSpeed's configuration for a training: every value there, none "auto".

    Args:
        width: largest width of the networks in the engine, in place of a transformer's hidden size.
    """
    tree = read(config.deepspeed or {})
    batch, share = int(config.batch), int(config.batch) // processes
    micro = config.micro_batch or share
    if share % micro:
        raise ValueError(f"micro_batch is {micro}, the share of a process {share}: DeepSpeed wants equal micro-batches")
    tree |= {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
    }
    tree.setdefault("steps_per_print", 2000)
    fill_optimizer(tree, config)
    for pair in SHARED[2:]:
        node = get(tree, pair.theirs.rpartition(".")[0]) if "." in pair.theirs else tree
        leaf = pair.theirs.rpartition(".")[2]
        if node is not None and (pair.theirs == "gradient_clipping" or node.get(leaf) == AUTO):
            node[leaf] = pair.to_theirs(get(config, pair.own))
    if get(tree, "scheduler.params.warmup_min_lr") == AUTO:
        put(tree, "scheduler.params.warmup_min_lr", 0.0)
    for kind in ("fp16", "bf16"):
        if kind in tree or config.precision == kind:
            put(tree, f"{kind}.enabled", config.precision == kind)
    if "amp" in tree:
        _fill_apex(tree["amp"])
    fill_zero(tree.get("zero_optimization", {}), width, say)
    _warn(tree, say)
    check_filled(tree)
    return tree


def check_filled(tree: Tree) -> None:
    """
    Raises:
        ValueError: a value is "auto" still.
    """
    if left := next((name for name, value in leaves(tree) if value == AUTO), None):
        raise ValueError(f'deepspeed: {left} is "auto", which nothing in the kit\'s configuration says: give a value')


def fill_optimizer(tree: Tree, config: Config) -> None:
    """The kit's own optimizer, unless another is named; offloaded, DeepSpeed's for the CPU, which is made for that."""
    offload = get(tree, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
    own = config.optimizer.name
    if "optimizer" in tree:
        if own != "adamw":
            told = f"deepspeed: optimizer.type is {tree['optimizer']['type']}, optimizer.name is {own}"
            raise ValueError(f"{told}: leave one of them out")
        params = tree["optimizer"].setdefault("params", {})
        for name in ADAM if tree["optimizer"]["type"].lower() in ADAMS else ADAM[:1]:
            params.setdefault(name, AUTO)
    elif offload and own == "adamw" and tree.get("zero_force_ds_cpu_optimizer", True):
        tree["optimizer"] = {"type": "AdamW", "params": dict.fromkeys(ADAM, AUTO)}
    elif own == "schedule_free":
        raise ValueError(
            "optimizer.name=schedule_free keeps an average that DeepSpeed's engine does not know: take adamw"
        )
    elif own != "adamw" and not tree.get("zero_allow_untested_optimizer") and "zero_optimization" in tree:
        raise ValueError(f'deepspeed: {own} was not tested with ZeRO: add "zero_allow_untested_optimizer": true')


def _fill_apex(node: Tree) -> None:
    """Apex's mixed precision, which is only used where it is asked for by name."""
    node["enabled"] = node.get("enabled") is True
    if node.get("opt_level") == AUTO:
        node["opt_level"] = "O1"


def fill_zero(zero: Tree, width: int | None, say: Callable[[str], None]) -> None:
    """What belongs to a model's width, as the document says: h^2, 0.9 h^2, 10 h."""
    if AUTO not in zero.values():
        return
    if width is None:
        raise ValueError('deepspeed: "auto" in zero_optimization needs a network whose width is known: give values')
    made = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    found = {name: value for name, value in made.items() if zero.get(name) == AUTO}
    zero |= found
    say(f"deepspeed: of width {width}: " + ", ".join(f"{name} {value}" for name, value in found.items()))


def _warn(tree: Tree, say: Callable[[str], None]) -> None:
    if "activation_checkpointing" in tree:
        say("deepspeed: activation_checkpointing has no effect on these networks: set gradient_checkpointing=true")
    zero = tree.get("zero_optimization", {})
    if gathers := [name for name in zero if name.endswith("weights_on_model_save")]:
        say(f"deepspeed: {gathers[0]} is not needed: results are whole; weights consolidate --dtype bf16 makes 16 bits")
    idle = [name for name in ("allgather_partitions", "allgather_bucket_size", "reduce_scatter") if name in zero]
    if zero.get("stage") == 3 and idle:
        say(f"deepspeed: stage 3 does not use {', '.join(idle)}")


def width_of(nets: list[Any]) -> int | None:
    """The largest width that a network's configuration says."""
    found: list[int] = []
    for net in nets:
        own = getattr(net, "config", {})
        for name in ("hidden_size", "hidden_sizes", "block_out_channels", "channels"):
            value = own.get(name) if hasattr(own, "get") else getattr(own, name, None)
            found += [value] if isinstance(value, int) else list(value or ())
    return max(found, default=None)
